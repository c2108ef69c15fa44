"""`ow.fine_tuning`: fine-tuning jobs. Client-side; the trainers are imported by the worker only."""

from __future__ import annotations

import logging
import os
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from pydantic import BaseModel

from openweights.client.datasets import HOLD, TOKEN_BYTES, other_purpose
from openweights.client.job_kinds import MOUNT_PURPOSE, Jobs
from openweights.client.watching.estimates import Work
from openweights.errors import ConfigError, shown
from openweights.jobs.at_hand import look_at_hand
from openweights.jobs.numbers import check_memory
from openweights.jobs.pinning import (
    adapter_base,
    awaited_job,
    check_has_weights,
    pinned_model,
    shape_to_keep,
)
from openweights.jobs.unsloth.config.demonstrations import split_right
from openweights.jobs.unsloth.config.fields import DatasetRef
from openweights.jobs.unsloth.config.first_look import FirstRows, beginning, check_files
from openweights.jobs.unsloth.config.grpo_fields import (
    FUNCTION_FIELDS,
    RewardSpec,
    own_functions,
    reward_choices,
    split_gold,
    with_files,
)
from openweights.jobs.unsloth.config.machine import training_needs
from openweights.jobs.unsloth.config.own_functions import source_problems
from openweights.jobs.unsloth.config.problems import config_notes, field_losses, rows_problem
from openweights.jobs.unsloth.config.rows import (
    check_rows,
    learned_keys,
    numbered_rows,
    overlap_note,
    run_steps,
)
from openweights.jobs.unsloth.config.vram import gpu_gb
from openweights.jobs.unsloth.grpo.trial import (
    Split,
    function_problems,
    local_function_problems,
    trial_rows,
)
from openweights.jobs.unsloth.validate import TrainingConfig, training_config
from openweights.models.checkpoint import (
    check_adapter_shape,
    check_can_go_on,
    check_is_dense,
    check_target_modules,
    linear_modules,
    may_be_same_modules,
)
from openweights.models.names import location_here, repository_id
from openweights.models.shape import check_row_length, config_here, made_for
from openweights.types import JobType

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from openweights import OpenWeights
    from openweights.client.job_options import JobOptions, takes
    from openweights.client.jobs import Job
    from openweights.needs import Need

    Callbacks = Sequence[BaseModel | Mapping[str, Any]]


logger = logging.getLogger(__name__)

# What memory depends on beside the model.
_SIZES = ("max_seq_length", "per_device_train_batch_size", "gradient_accumulation_steps")
_JOB_ID = re.compile(r"s?ftjob-[0-9a-f]{12}.*")


class FineTuning(Jobs):
    """Submits fine-tuning jobs: `ow.fine_tuning.create(model=…, training_file=…, loss="sdft", …)`.

    The fields are those of `TrainingConfig`. Local datasets are uploaded first, and the rows are
    checked against the loss before the job is submitted.
    """

    if TYPE_CHECKING:

        class _Arguments(TrainingConfig, JobOptions):
            """As given: some fields may be written more freely than they are kept."""

            learning_rate: float | str = 1e-4  # pyright: ignore[reportIncompatibleVariableOverride]
            sampling_callbacks: Callbacks | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
            mcq_callbacks: Callbacks | None = None  # pyright: ignore[reportIncompatibleVariableOverride]

        @takes(_Arguments)
        def create(self, **params: Any) -> Job: ...

    params: ClassVar[type[BaseModel]] = TrainingConfig
    job_type: ClassVar[JobType] = "fine-tuning"
    stall_timeout_s: ClassVar[float | None] = 1800.0
    id_covers_mounts: ClassVar[bool] = False

    def __init__(self, ow: OpenWeights) -> None:
        super().__init__(ow)
        # Of stored files, whose ids are made of what is in them.
        self._row_counts: dict[str, int] = {}

    @property
    def id_prefix(self) -> str:
        """What the ids of its jobs begin with."""
        return "ftjob"

    def validate(self, params: dict[str, Any]) -> TrainingConfig:
        """The parameters, checked, with local datasets uploaded and a model's folder in full.

        Raises:
            ConfigError: A line for each field that is wrong, and what would work.
            DatasetError: A local dataset has rows that cannot be used.
        """
        kind = cast("type[TrainingConfig]", type(self).params)
        if isinstance(model := params.get("model"), str):
            # What goes on from an adapter has its shape, which need not be said again.
            params = {**shape_to_keep(self.ow, model), **params}
        wrong = self._function_problems(params)
        try:
            config = self._without_job_id(training_config(params, kind))
        except ConfigError as error:
            wrong = wrong or self._trial_problems(params)
            raise ConfigError("\n".join([str(error), *wrong])) from None
        if wrong:
            raise ConfigError("\n".join(wrong))
        check_has_weights(config.model)
        model = pinned_model(self.ow, config.model, may_wait=True)
        return self._upload_local(config.model_copy(update={"model": model}))

    def needs(self, validated: BaseModel) -> Sequence[Need]:
        """What its settings take of the machine that trains."""
        return training_needs(cast("TrainingConfig", validated))

    def awaited_jobs(self, validated: BaseModel) -> Sequence[str]:
        """The job that trains the model."""
        return awaited_job(self.ow, cast("TrainingConfig", validated).model)

    def _without_job_id(self, config: TrainingConfig) -> TrainingConfig:
        """The parameters of a stored job as they were given: its default name was filled in, and a
        name is part of what a job is.
        """
        name, usual = config.finetuned_model_id, type(config).model_fields["finetuned_model_id"]
        if (found := _JOB_ID.search(name)) is None:
            return config
        filled = {
            repository_id(usual.default, model=config.model, job_id=found[0], org=org)
            for org in (self.ow.hf_org, None)
        }
        if name not in filled:
            return config
        return config.model_copy(update={"finetuned_model_id": usual.default})

    def with_job_id(self, validated: BaseModel, job_id: str) -> BaseModel:
        """`finetuned_model_id` filled in, but for {org_id} where only the worker's token tells."""
        config = cast("TrainingConfig", validated)
        name = repository_id(
            config.finetuned_model_id,
            model=config.model,
            job_id=job_id,
            org=self.ow.hf_org,
            extra=config.model_naming_extra_parameters,
        )
        return config.model_copy(update={"finetuned_model_id": name})

    def get_entrypoint(self, validated_params: BaseModel) -> str:
        return "python -m openweights.jobs.unsloth.training {job_id}"

    def check(self, validated: BaseModel) -> None:
        """See that the files are there and that the loss can use their rows.

        Raises:
            ConfigError: A file, or the job of `model`, is not in the store, a push was asked for
                without a token, the chat template has no such option, a model on this machine has
                no such module or cannot be spread, or an adapter to go on from has another shape.
            DatasetError: Rows cannot be used; names line and field.
        """
        config = cast(TrainingConfig, validated)
        if config.push_to_hub and not self.ow.settings.hf_token:
            raise ConfigError(
                "push_to_hub: True needs a Hugging Face token; set HF_TOKEN, or remove push_to_hub "
                "(the result is kept in the store in any case)"
            )
        keys: dict[str, list[int]] = {"training_file": [], "test_file": []}
        for ref in config.datasets():
            with self.open_stored(ref.name, ref.file) as content:
                name, rows = self.ow.backend.get_file(ref.file).filename, numbered_rows(content)
                if config.test_file is not None and ref.field in keys:
                    rows = learned_keys(rows, keys[ref.field])
                self._row_counts[ref.file] = check_rows(rows, config, ref, name)
        if note := overlap_note(keys["training_file"], keys["test_file"]):
            logger.warning("%s", note)
        for field, note in config_notes(config, self._steps(config)):
            logger.warning("%s: %s", field, note)
        self._check_adapter(config)
        self._check_rendering(config)
        self._check_own_rewards(config)

    def _check_own_rewards(self, config: TrainingConfig) -> None:
        """See that reward functions are in the store, want only what they are given, and give
        what they must.
        """
        own = [
            (field, choice)
            for field, spec in config.rewards.items()
            for choice in reward_choices(spec)
            if choice.is_stored
        ]
        if not own:
            return
        with self.open_stored("training_file", config.training_file) as content:
            columns = {name for _, row in numbered_rows(content) for name in row}
        with self.open_stored("training_file", config.training_file) as content:
            rows = trial_rows(numbered_rows(content), _split_of(config.loss))
        sources: list[tuple[str, str, bytes]] = []
        for field, choice in own:
            with self.open_stored(field, str(choice.file)) as content:
                sources.append((field, choice.name, content.read()))
        if wrong := function_problems(self.ow.settings, sources, columns, rows):
            raise ConfigError("\n".join(wrong))

    def work(self, validated: BaseModel) -> Work:
        """Its steps, and the tokens of each: what is read, by the size of the file, and what is
        sampled at most.
        """
        config = cast(TrainingConfig, validated)
        size = self.ow.backend.get_file(config.training_file).bytes
        row = min(
            size / self._row_counts[config.training_file] / TOKEN_BYTES, config.max_seq_length
        )
        sampled = {"sdft": config.sdft_max_new_tokens, "grpo": config.grpo_max_completion_length}
        tokens = config.step_size * (row + sampled.get(config.loss, 0))
        return Work(self._steps(config), round(tokens))

    def _steps(self, config: TrainingConfig) -> int:
        return run_steps(config, self._row_counts[config.training_file])

    def _check_adapter(self, config: TrainingConfig) -> None:
        """See that a model on this machine has what the adapter is to be put on, and takes rows of
        that length, and that the config suits the adapter that is gone on from.
        """
        shape = shape_to_keep(self.ow, config.model)
        if shape:
            check_can_go_on(is_peft=config.is_peft, engine=config.engine)
        base = adapter_base(self.ow, config.model, ask_hub=False)
        if (known := config_here(base)) is not None:
            check_row_length(known, config.max_seq_length, by_row=config.engine != "unsloth")
        if not config.is_peft:
            return
        if config.parallel == "fsdp":
            check_is_dense(base, known)
        folder = Path(location_here(base))
        modules = linear_modules(folder) if folder.is_dir() else None
        if modules is not None:
            check_target_modules(config.model, config.target_modules, modules)
        kept = shape.get("target_modules", ())
        if may_be_same_modules(config.target_modules, kept, modules):
            shape.pop("target_modules", None)
        asked = {name: getattr(config, name) for name in shape}
        check_adapter_shape(shape, asked, config.model)

    def vram_gb(self, validated: BaseModel) -> int | None:
        """What the job needs by its model's shape, loss and batches (`config/vram.py`).

        A subclass that says how much it needs, and a model of unknown size, get the kind's own.
        """
        usual = type(self).requires_vram_gb
        if usual != Jobs.requires_vram_gb:
            return usual
        config = cast(TrainingConfig, validated)
        needed = gpu_gb(config, adapter_base(self.ow, config.model, ask_hub=False))
        return check_memory(needed, {f: _size(config, f) for f in _SIZES}) or usual

    def _check_rendering(self, config: TrainingConfig) -> None:
        """See that the chat template writes what rows say, and that the limits leave something of
        them, where the tokenizer is at hand.
        """
        files: list[FirstRows] = []
        for ref in config.datasets():
            with self.open_stored(ref.name, ref.file) as content:
                files.append(beginning(ref, numbered_rows(content)))
        shape = config_here(adapter_base(self.ow, config.model, ask_hub=False))
        positions = None if shape is None else made_for(shape)
        look = partial(check_files, files=files, config=config, positions=positions)
        for warning in (
            look_at_hand(config.model, config.chat_template, config.template_options, look) or ()
        ):
            logger.warning("%s", warning)

    def _upload_local(self, config: TrainingConfig) -> TrainingConfig:
        """The config with ids of stored files in place of local ones."""
        stored = {ref: self._stored_rows(ref, config.loss) for ref in config.datasets()}
        config = config.with_files(stored)
        return config.model_copy(
            update={field: self._stored_rewards(field, s) for field, s in config.rewards.items()}
        )

    def _function_problems(self, params: Mapping[str, Any]) -> list[str]:
        """What is wrong with the files of functions that the loss is given, whatever else is: a
        line each. What a subclass mounts is there on the worker.
        """
        return [
            line
            for field, name, file in self._local_functions(params)
            for line in source_problems([(file, name)], field)
        ]

    def _trial_problems(self, params: Mapping[str, Any]) -> list[str]:
        """What a trial of these functions finds, where other parameters are wrong."""
        functions, rows = self._local_functions(params), params.get("training_file")
        split = _split_of(params.get("loss"))
        return local_function_problems(self.ow.settings, functions, rows, split)

    def _local_functions(self, params: Mapping[str, Any]) -> list[tuple[str, str, str]]:
        """Field, name and file of the functions that the loss is given from this machine."""
        mounted, loss = self.mounted_paths(), params.get("loss")
        return [
            (field, choice.name, str(choice.file))
            for field in FUNCTION_FIELDS
            if field_losses(field, "") == (loss,)
            for choice in own_functions(params.get(field))
            if str(choice.file) not in mounted
        ]

    def _stored_rows(self, ref: DatasetRef, loss: str) -> str:
        """The id of a dataset's file.

        Raises:
            ConfigError: A local file holds rows that another loss, or another field, reads.
            DatasetError: Its rows cannot be used.
        """
        if os.path.isfile(ref.file) and (held := other_purpose(ref.file, ref.purpose)):
            given = f"{shown(os.path.basename(ref.file))} holds {HOLD[held]}"
            raise ConfigError(f"{ref.name}: {rows_problem(given, held, ref, loss)}")
        return self.stored(ref.file, ref.purpose)

    def _stored_rewards(self, field: str, spec: RewardSpec) -> RewardSpec:
        """The rewards with ids of stored files in place of local ones: their text is part of what
        the job does. What a subclass mounts stays as it is.
        """
        mounted, stored = self.mounted_paths(), {}
        for choice in reward_choices(spec):
            if choice.file is not None and not choice.is_stored and choice.file not in mounted:
                path = Path(choice.file).expanduser()
                stored[choice.file] = self.ow.files.upload(path, MOUNT_PURPOSE)["id"]
        return with_files(spec, stored)


def _split_of(loss: object) -> Split:
    """How a loss that scores answers splits a row into a prompt and the right answer."""
    return split_right if loss == "sdft" else split_gold


def _size(config: TrainingConfig, field: str) -> tuple[int, int]:
    """A field's value, and its default."""
    return getattr(config, field), type(config).model_fields[field].default
