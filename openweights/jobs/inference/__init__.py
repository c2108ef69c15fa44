"""`ow.inference`: what a model answers to a file of prompts. Client-side: no torch here."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, cast

from pydantic import BaseModel

from openweights.client.datasets import TOKEN_BYTES
from openweights.client.job_kinds import Jobs
from openweights.errors import ConfigError, NotFoundError
from openweights.jobs.at_hand import look_at_hand
from openweights.jobs.inference.config import InferenceConfig
from openweights.jobs.inference.rows import check_input, fitting_prompt
from openweights.jobs.inference.vram import answering_vram_gb, tokens_at_once
from openweights.jobs.numbers import check_memory
from openweights.jobs.pinning import adapter_base, awaited_jobs, pinned_model, pinned_models
from openweights.jobs.unsloth.config.first_look import check_each, first_rows
from openweights.jobs.unsloth.config.rows import numbered_rows
from openweights.models.names import model_reference
from openweights.models.shape import config_here, made_for
from openweights.needs import GPU_EXTRA, TRAIN_EXTRA, Need
from openweights.types import JobType

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from openweights import OpenWeights
    from openweights.client.job_options import JobOptions, takes
    from openweights.client.jobs import Job

PURPOSE = "conversations"
OPENAI_KEY = "OPENAI_API_KEY"


def openai_secrets(
    ow: OpenWeights, models: Iterable[str], *, judged: bool = False
) -> tuple[str, ...]:
    """The organization's key, where a project's worker asks OpenAI.

    Args:
        judged: Whether one of its models grades answers.
    """
    asks = judged or any(model_reference(model).kind == "openai" for model in models)
    return (OPENAI_KEY,) if asks and ow.settings.is_remote else ()


def answering_needs(
    models: Iterable[str],
    engine: str,
    *,
    in_4bit: bool = False,
    judge: str | None = None,
    field: str = "model",
) -> list[Need]:
    """What answers of models take.

    Args:
        judge: The parameter that asks a model of OpenAI for grades, if one does.
        field: The parameter that names the models.
    """
    kinds = {model_reference(model).kind for model in models}
    needs: list[Need] = []
    if kinds - {"openai"}:
        needs.append(Need("", TRAIN_EXTRA, packages=("torch", "transformers", "peft")))
        if engine == "vllm":
            needs.append(Need("engine", "use 'auto'", packages=("vllm",)))
        if engine == "cuda_graph":
            needs.append(Need("engine", "use 'auto'", gpu=True))
        if in_4bit:
            needs.append(
                Need("quantization", f"remove it, or {GPU_EXTRA}", packages=("bitsandbytes",))
            )
    asks = [field] if "openai" in kinds else [judge] if judge else []
    set_it = f"export {OPENAI_KEY}=…"
    return needs + [Need(name, set_it, packages=("openai",), variable=OPENAI_KEY) for name in asks]


class Inference(Jobs):
    """Submits inference jobs: `ow.inference.create(model=…, input_file_id=…)`.

    The result is `job.outputs["file"]`: JSON lines in the order of the input, each row plus
    `completion` and `logprobs`. A job that loses its worker goes on with the rows that are missing.
    """

    if TYPE_CHECKING:

        class _Arguments(InferenceConfig, JobOptions):
            """As given: one text that ends a completion, or one more model, needs no list."""

            stop: list[str] | str = []  # pyright: ignore[reportIncompatibleVariableOverride]
            other_models: list[str] | str = []  # pyright: ignore[reportIncompatibleVariableOverride]

        @takes(_Arguments)
        def create(self, **params: Any) -> Job: ...

    params: ClassVar[type[BaseModel]] = InferenceConfig
    job_type: ClassVar[JobType] = "inference"
    id_covers_mounts: ClassVar[bool] = False

    def __init__(self, ow: OpenWeights) -> None:
        super().__init__(ow)
        self._row_counts: dict[str, int] = {}  # of files that were checked

    @property
    def id_prefix(self) -> str:
        """What the ids of its jobs begin with."""
        return "inferencejob"

    def vram_gb(self, validated: BaseModel) -> int | None:
        """By the shape of the largest model, and by how much it reads and writes."""
        config = cast("InferenceConfig", validated)
        stored = self.ow.backend.get_file(config.input_file_id)
        tokens = tokens_at_once(
            self._rows_of(config.input_file_id),
            stored.bytes / TOKEN_BYTES,
            config.max_tokens,
            config.n_completions_per_prompt,
        )
        asked = {"tokens": tokens, "engine": config.engine}
        needed = max(
            answering_vram_gb(self.ow, model, config.quantization, **asked)
            for model in config.models
        )
        n = config.n_completions_per_prompt
        sizes = {"max_tokens": (config.max_tokens, 600), "n_completions_per_prompt": (n, 1)}
        return check_memory(needed, sizes)

    def _rows_of(self, file_id: str) -> int:
        """Counted where no check has: the job may be another client's."""
        if file_id not in self._row_counts:
            with self.ow.backend.open_file(file_id) as content:
                self._row_counts[file_id] = sum(bool(line.strip()) for line in content)
        return self._row_counts[file_id]

    def needed_secrets(self, validated: BaseModel) -> Sequence[str]:
        """The organization's key, for a model of OpenAI on a project's worker."""
        return openai_secrets(self.ow, cast("InferenceConfig", validated).models)

    def needs(self, validated: BaseModel) -> Sequence[Need]:
        """What the engine takes, and OpenAI's key for a model of theirs."""
        config = cast("InferenceConfig", validated)
        in_4bit = config.quantization is not None
        return answering_needs(config.models, config.engine, in_4bit=in_4bit)

    def validate(self, params: dict[str, Any]) -> InferenceConfig:
        """The parameters, checked, with a local file uploaded and the models pinned.

        Raises:
            ConfigError: A line for each field that is wrong, and what would work.
            DatasetError: A local file has rows that cannot be used.
        """
        config = self.checked(params)
        file = self.stored_dataset("input_file_id", config.input_file_id, PURPOSE)
        first, *others = pinned_models(self.ow, config.models, "other_models")
        named = {"input_file_id": file, "model": first, "other_models": others}
        return config.model_copy(update=named)

    def checked(self, params: dict[str, Any]) -> InferenceConfig:
        """The parameters, as far as they can be checked by themselves.

        Raises:
            ConfigError: A line for each field that is wrong, and what would work.
        """
        config = cast("InferenceConfig", super().validate(params))
        if config.min_tokens > config.max_tokens:
            raise ConfigError(
                f"min_tokens: is {config.min_tokens}, more than max_tokens={config.max_tokens}; "
                "lower it"
            )
        return config

    def awaited_jobs(self, validated: BaseModel) -> Sequence[str]:
        """The fine-tuning jobs among the models that have not completed."""
        return awaited_jobs(self.ow, cast("InferenceConfig", validated).models)

    def newest(self, model: str) -> str:
        """`model`; of a job that has not completed its newest checkpoint.

        Raises:
            ConfigError: The job has saved nothing yet.
        """
        return pinned_model(self.ow, model)

    def check(self, validated: BaseModel) -> None:
        """See that the input is there, and that each row can be answered.

        Raises:
            ConfigError: The store has no such file, or the chat template no such option.
            DatasetError: A row asks for what cannot be, or the chat template does not write what it
                says; names its line.
        """
        config = cast("InferenceConfig", validated)
        file = config.input_file_id
        try:
            content = self.ow.backend.open_file(file)
        except NotFoundError:
            raise ConfigError(
                f"input_file_id: the store has no file {file}; upload it with "
                f'ow.files.upload(path, purpose="{PURPOSE}")'
            ) from None
        with content:
            count = check_input(content, self.ow.backend.get_file(file).filename)
            self._row_counts[file] = count
        with self.ow.backend.open_file(file) as content:
            rows = first_rows(numbered_rows(content))
        for model in config.models:
            shape = config_here(adapter_base(self.ow, model, ask_hub=False))
            positions = None if shape is None else made_for(shape)
            context = min(config.max_model_len, positions or config.max_model_len)
            render = partial(fitting_prompt, config=config, context=context)
            look = partial(check_each, rows=rows, render=render, name="input_file_id")
            look_at_hand(model, config.chat_template, config.template_options, look)

    def get_entrypoint(self, validated_params: BaseModel) -> str:
        """See `Jobs`."""
        return "python -m openweights.jobs.inference.run {job_id}"
