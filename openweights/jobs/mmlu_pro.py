"""`ow.mmlu_pro`: MMLU-Pro, with reasoning and examples, by subject. Client-side: no torch here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, cast

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from openweights.client.job_kinds import Jobs
from openweights.errors import ConfigError, InvalidInputError, closest, shown
from openweights.jobs.inference import answering_needs
from openweights.jobs.numbers import Count, Tokens
from openweights.jobs.pinning import awaited_job, pinned_model
from openweights.models.names import AnyModel, ChatTemplate, model_reference
from openweights.paths import relative

if TYPE_CHECKING:
    from collections.abc import Sequence

    from openweights.client.job_options import JobOptions, takes
    from openweights.client.jobs import Job
    from openweights.needs import Need

SUBJECTS = (
    *("biology", "business", "chemistry", "computer science", "economics", "engineering"),
    *("health", "history", "law", "math", "other", "philosophy", "physics", "psychology"),
)
DATASET = "TIGER-Lab/MMLU-Pro"


def _subjects(value: str) -> str:
    for name in value.split(","):
        if value != "all" and name.strip() not in SUBJECTS:
            meant = closest(name.strip(), SUBJECTS)
            remedy = f"did you mean {meant!r}?" if meant else f"name some of {', '.join(SUBJECTS)}"
            raise ValueError(f"{shown(name.strip())} is no subject; {remedy}, or 'all'")
    return value


def _inside(value: str) -> str:
    try:
        return relative(value, "the folder", "the job's folder")
    except InvalidInputError as error:
        raise ValueError(str(error)) from None


Inside = Annotated[str, AfterValidator(_inside)]


class MMLUProConfig(BaseModel):
    """Which model answers what.

    Attributes:
        model: As `InferenceConfig.model` names it.
        ntrain: Worked examples of the subject before each question, at most 5.
        selected_subjects: "all", or names with commas between them: "law,computer science".
        save_dir: Where the results are written in the job's folder; what is below `uploads` is
            delivered.
        global_record_file: A CSV file, in the job's folder, that gets a line with the accuracies.
        gpu_util: Taken for older scripts; engines take what they need.
        limit: So many questions of each subject, drawn by a seed; None for all.
        max_tokens: Answers are cut here.
        max_model_len: Prompt and answer together, in tokens, at most.
        dataset: A dataset of the hub with the columns of MMLU-Pro, or a folder with `test` and
            `validation` files of it.
        chat_template, engine: As of `InferenceConfig`.
        job_id_suffix: Ends the job's id.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    model: AnyModel
    ntrain: Annotated[int, Field(ge=0, le=5)] = 5
    selected_subjects: Annotated[str, AfterValidator(_subjects)] = "all"
    save_dir: Inside = "uploads"
    global_record_file: Inside | None = None
    gpu_util: str | float = "0.9"
    limit: Count | None = None
    max_tokens: Tokens = 2048
    max_model_len: Tokens = 8192
    dataset: str = DATASET
    chat_template: ChatTemplate = "default"
    engine: Literal["auto", "vllm", "cuda_graph", "transformers"] = "auto"
    job_id_suffix: str | None = None

    @property
    def subjects(self) -> list[str]:
        """Those that are asked about, in their order."""
        if self.selected_subjects == "all":
            return list(SUBJECTS)
        return [name.strip() for name in self.selected_subjects.split(",")]


class MMLUPro(Jobs):
    """Submits MMLU-Pro (Wang et al., 2024): `ow.mmlu_pro.create(model=…)`.

    Each subject's accuracy, and that of all, is an event of type `evaluation`, as of `ow.evaluate`;
    the same are the results.
    """

    if TYPE_CHECKING:

        class _Arguments(MMLUProConfig, JobOptions): ...

        @takes(_Arguments)
        def create(self, **params: Any) -> Job: ...

    params: ClassVar[type[BaseModel]] = MMLUProConfig
    requires_vram_gb: ClassVar[int | None] = 60
    id_covers_mounts: ClassVar[bool] = False

    @property
    def id_prefix(self) -> str:
        """What the ids of its jobs begin with."""
        return "mmlujob"

    def needs(self, validated: BaseModel) -> Sequence[Need]:
        """What the engine takes."""
        config = cast("MMLUProConfig", validated)
        return answering_needs([config.model], config.engine)

    def validate(self, params: dict[str, Any]) -> MMLUProConfig:
        """The parameters, checked, with the model pinned.

        Raises:
            ConfigError: A line for each field that is wrong, and what would work.
        """
        config = cast("MMLUProConfig", super().validate(params))
        if model_reference(config.model).kind == "openai":
            raise ConfigError(
                f"model: {config.model} is OpenAI's; ask it with ow.inspect_ai.create(model=…, "
                "eval_name='inspect_evals/mmlu_pro')"
            )
        model = pinned_model(self.ow, config.model, may_wait=True)
        return config.model_copy(update={"model": model})

    def awaited_jobs(self, validated: BaseModel) -> Sequence[str]:
        """The job that trains the model."""
        return awaited_job(self.ow, cast("MMLUProConfig", validated).model)

    def get_entrypoint(self, validated_params: BaseModel) -> str:
        """See `Jobs`."""
        return "python -m openweights.jobs.evaluate.mmlu_pro {job_id}"
