"""`ow.inspect_ai`: evaluations of the package inspect-ai, put to a served model. Client-side."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, cast

from pydantic import AfterValidator, BaseModel, ConfigDict

from openweights import images
from openweights.client.job_kinds import MOUNT_PURPOSE, Jobs
from openweights.errors import ConfigError
from openweights.jobs.inference import answering_needs, openai_secrets
from openweights.jobs.inference.vram import answering_vram_gb
from openweights.jobs.numbers import Tokens
from openweights.jobs.pinning import awaited_job, pinned_model
from openweights.jobs.unsloth.config.own_functions import check_source
from openweights.models.names import AnyModel, ChatTemplate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from openweights.client.job_options import JobOptions, takes
    from openweights.client.jobs import Job
    from openweights.needs import Need

# `inspect_evals/gpqa_diamond`, `my_tasks.py`, `my_tasks.py@my_task`, or a stored file in its place.
_EVALUATION = re.compile(
    r"(?P<file>[^@\s-][^@]*\.py|custom_job_file:file-[0-9a-f]+)(@(?P<task>\w+))?"
)
_NAME = re.compile(r"\w[\w./@-]*")


def _evaluation(value: str) -> str:
    if not _EVALUATION.fullmatch(value) and not _NAME.fullmatch(value):
        raise ValueError(
            "is no evaluation; name one such as inspect_evals/gsm8k, or a file of your own: "
            "my_tasks.py@my_task"
        )
    return value


def _options(value: str) -> str:
    try:
        shlex.split(value)
    except ValueError as error:
        raise ValueError(f"cannot be read ({error}); write it as for a shell") from None
    return value.strip()


class InspectConfig(BaseModel):
    """Which evaluation is put to which model.

    Attributes:
        model: As `InferenceConfig.model` names it.
        eval_name: Of inspect-ai (`inspect_evals/gsm8k`), or a file of tasks: `tasks.py`,
            `tasks.py@my_task`.
        options: More arguments of `inspect eval`, as for a shell: `--limit 20 --temperature 0`.
        max_model_len: Prompt and answer together, in tokens, at most.
        chat_template: A Jinja template, or "default" for the tokenizer's own.
        engine: As of `ApiConfig`.
        job_id_suffix: Ends the job's id.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    model: AnyModel
    eval_name: Annotated[str, AfterValidator(_evaluation)]
    options: Annotated[str, AfterValidator(_options)] = ""
    max_model_len: Tokens = 8192
    chat_template: ChatTemplate = "default"
    engine: Literal["auto", "vllm", "cuda_graph", "transformers"] = "auto"
    job_id_suffix: str | None = None

    @property
    def task_file(self) -> tuple[str, str | None] | None:
        """The file of tasks, and which of them; None for an evaluation that is installed."""
        found = _EVALUATION.fullmatch(self.eval_name)
        return (found["file"], found["task"]) if found else None


class InspectAI(Jobs):
    """Submits evaluations of inspect-ai: `ow.inspect_ai.create(model=…, eval_name=…)`.

    inspect-ai runs in an environment of its own on the worker, which is made once. Its scores are
    events of type `inspect`, and `job.download` delivers its log, for `inspect view`.
    """

    if TYPE_CHECKING:

        class _Arguments(InspectConfig, JobOptions): ...

        @takes(_Arguments)
        def create(self, **params: Any) -> Job: ...

    params: ClassVar[type[BaseModel]] = InspectConfig
    base_image: ClassVar[str] = images.VLLM_IMAGE
    id_covers_mounts: ClassVar[bool] = False

    @property
    def id_prefix(self) -> str:
        """What the ids of its jobs begin with."""
        return "inspectjob"

    def vram_gb(self, validated: BaseModel) -> int | None:
        """By the model's size."""
        config = cast("InspectConfig", validated)
        engine = "vllm" if config.engine == "auto" else config.engine  # as its image has it
        return answering_vram_gb(self.ow, config.model, engine=engine)

    def needed_secrets(self, validated: BaseModel) -> Sequence[str]:
        """The organization's key, for a model of OpenAI on a project's worker."""
        return openai_secrets(self.ow, [cast("InspectConfig", validated).model])

    def needs(self, validated: BaseModel) -> Sequence[Need]:
        """What the engine takes, and OpenAI's key for a model of theirs."""
        config = cast("InspectConfig", validated)
        return answering_needs([config.model], config.engine)

    def validate(self, params: dict[str, Any]) -> InspectConfig:
        """The parameters, checked, with a local file of tasks uploaded and the model pinned.

        Raises:
            ConfigError: A line for each field that is wrong, and what would work.
        """
        config = cast("InspectConfig", super().validate(params))
        changed = {"model": pinned_model(self.ow, config.model, may_wait=True)}
        if config.task_file is not None and ":" not in config.task_file[0]:
            name, task = config.task_file
            path = Path(name).expanduser()
            if task is not None:
                check_source(path, task, "eval_name")
            elif not path.is_file():
                raise ConfigError(f"eval_name: there is no file {path}; correct the path")
            stored = self.ow.files.upload(path, MOUNT_PURPOSE)["id"]
            changed["eval_name"] = stored if task is None else f"{stored}@{task}"
        return config.model_copy(update=changed)

    def awaited_jobs(self, validated: BaseModel) -> Sequence[str]:
        """The job that trains the model."""
        return awaited_job(self.ow, cast("InspectConfig", validated).model)

    def get_entrypoint(self, validated_params: BaseModel) -> str:
        """See `Jobs`."""
        return "python -m openweights.jobs.inspect_ai.run {job_id}"
