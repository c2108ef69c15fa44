"""`ow.evaluate`: models side by side on small suites of problems. Client-side: no torch here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, cast

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from openweights.arguments import as_list
from openweights.client.job_kinds import MOUNT_PURPOSE, Jobs
from openweights.client.messages import Problems
from openweights.errors import ConfigError, closest, shown, spelled
from openweights.jobs.inference import (
    PURPOSE,
    answering_needs,
    openai_secrets,
)
from openweights.jobs.inference.vram import answering_vram_gb
from openweights.jobs.numbers import Count, Rows, TemperatureOrGreedy, Tokens, TopP
from openweights.jobs.pinning import awaited_jobs, pinned_models
from openweights.jobs.unsloth.config.grpo_fields import (
    DEFAULT_JUDGE,
    GOLD_REWARDS,
    JUDGES,
    TEXT_REWARD_NAMES,
    RewardChoice,
    own_functions,
    reward_choices,
    split_gold,
    with_files,
)
from openweights.jobs.unsloth.config.own_functions import source_problems
from openweights.jobs.unsloth.config.rows import numbered_rows
from openweights.jobs.unsloth.grpo.trial import (
    function_problems,
    local_function_problems,
    trial_rows,
)
from openweights.models.names import AnyModel, ChatTemplate, TemplateOptions, bare_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from openweights.client.job_options import JobOptions, takes
    from openweights.client.jobs import Job
    from openweights.needs import Need

BENCHMARKS = ("humaneval", "gsm8k", "tool_use")
# Scores of answers to rows of one's own; the names are those of the rewards of grpo.
MEASURES = (*TEXT_REWARD_NAMES, *JUDGES)


def measure(name: str) -> RewardChoice | None:
    """What scores the answers to the rows of `prompts`; None for a benchmark.

    Raises:
        ValueError: There is nothing of that name.
    """
    if name in BENCHMARKS:
        return None
    if name in MEASURES or ":" in name:
        return reward_choices(name)[0]
    known = (*BENCHMARKS, *MEASURES)
    meant = closest(name, known)
    remedy = f"did you mean {meant!r}?" if meant else f"use {spelled(known)}"
    raise ValueError(f"{shown(name)} is no evaluation; {remedy} (or 'file.py:function')")


def _suite(names: list[str]) -> list[str]:
    for name in names:
        measure(name)
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"names {twice[0]!r} twice; give each once")
    return names


class AskedModels(BaseModel):
    """Models, and how they answer.

    Attributes:
        models: As `InferenceConfig.model` names them: repositories, adapters, folders, fine-tuning
            jobs and their checkpoints, `openai/<name>`. Differences are to the first.
        samples: Answers to each problem; its score is their mean.
        temperature: 0 takes the likeliest token.
        top_p: Of the likeliest tokens those that hold so much; 1 for all.
        max_model_len: Prompt and answer together, in tokens, at most.
        chat_template, template_options, quantization, engine: As of `InferenceConfig`.
        seed: Draws problems and answers.
        job_id_suffix: Ends the job's id.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    models: Annotated[list[AnyModel], BeforeValidator(as_list), Field(min_length=1)]
    samples: Rows = 1
    temperature: TemperatureOrGreedy = 0.0
    top_p: TopP = 1.0
    max_model_len: Tokens = 8196
    chat_template: ChatTemplate = "default"
    template_options: TemplateOptions = {}
    quantization: Literal["bitsandbytes"] | None = None
    engine: Literal["auto", "vllm", "cuda_graph", "transformers"] = "auto"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    job_id_suffix: str | None = None


class EvaluateConfig(AskedModels):
    """Which models are asked what.

    Attributes:
        suite: `humaneval`, `gsm8k` and `tool_use` have problems of their own. The others score
            answers to `prompts`: `rouge_l`, `ngram_recall`, `caps_spanish`, `llm_judge`,
            `similarity_judge`, and `file.py:function`, which is called as a reward function of
            grpo is, and returns a number from 0 to 1 for each completion.
        prompts: Rows with `messages`: a file id, or a local path. A last answer, or
            `gold_response`, is what answers are compared with.
        judge: The model of OpenAI that `llm_judge` and `similarity_judge` ask.
        limit: So many problems of each, drawn by `seed`; None for all.
        max_tokens: Answers are cut here; None for what suits each evaluation.
    """

    suite: Annotated[
        list[str], BeforeValidator(as_list), Field(min_length=1), AfterValidator(_suite)
    ]
    prompts: str | None = None
    judge: Annotated[str, AfterValidator(bare_name)] = DEFAULT_JUDGE
    limit: Count | None = None
    max_tokens: Tokens | None = None

    @property
    def measures(self) -> list[RewardChoice]:
        """Those of the suite that score answers to `prompts`."""
        return [choice for name in self.suite if (choice := measure(name)) is not None]


class Evaluate(Jobs):
    """Submits evaluations: `ow.evaluate.create(models=[base, job.id], suite=["humaneval"])`.

    Each model's score on each evaluation is an event of type `evaluation`, with its confidence
    interval and its difference to the first model; `job.download` delivers the table
    (`evaluation/scores.csv`), its figure (`evaluation/scores.png`), and all answers with their
    scores. A job that loses its worker goes on with the answers that are missing.
    """

    if TYPE_CHECKING:

        class _Arguments(EvaluateConfig, JobOptions):
            """As given: one model, or one evaluation, needs no list."""

            models: list[str] | str  # pyright: ignore[reportIncompatibleVariableOverride]
            suite: list[str] | str  # pyright: ignore[reportIncompatibleVariableOverride]

        @takes(_Arguments)
        def create(self, **params: Any) -> Job: ...

    params: ClassVar[type[BaseModel]] = EvaluateConfig
    id_covers_mounts: ClassVar[bool] = False

    @property
    def id_prefix(self) -> str:
        """What the ids of its jobs begin with."""
        return "evaljob"

    def vram_gb(self, validated: BaseModel) -> int | None:
        """By the size of the largest model."""
        config = cast("EvaluateConfig", validated)
        return max(
            answering_vram_gb(self.ow, model, config.quantization, engine=config.engine)
            for model in config.models
        )

    def awaited_jobs(self, validated: BaseModel) -> Sequence[str]:
        """The fine-tuning jobs among the models that have not completed."""
        return awaited_jobs(self.ow, cast("EvaluateConfig", validated).models)

    def needed_secrets(self, validated: BaseModel) -> Sequence[str]:
        """The organization's key, for a model of OpenAI, or a judge, on a project's worker."""
        config = cast("EvaluateConfig", validated)
        judged = any(choice.name in JUDGES for choice in config.measures)
        return openai_secrets(self.ow, config.models, judged=judged)

    def needs(self, validated: BaseModel) -> Sequence[Need]:
        """What the engine takes, and OpenAI's key for a model of theirs, or a judge."""
        config = cast("EvaluateConfig", validated)
        judged = any(choice.name in JUDGES for choice in config.measures)
        return answering_needs(
            config.models,
            config.engine,
            in_4bit=config.quantization is not None,
            judge="suite" if judged else None,
            field="models",
        )

    def validate(self, params: dict[str, Any]) -> EvaluateConfig:
        """The parameters, checked, with local files uploaded and models pinned.

        Raises:
            ConfigError: A line for each field that is wrong, and what would work.
            DatasetError: A local file has rows that cannot be used.
        """
        named = own_functions(params.get("suite"))
        wrong = source_problems([(str(own.file), own.name) for own in named], "suite")
        try:
            config = cast("EvaluateConfig", super().validate(params))
        except ConfigError as error:
            local = [("suite", own.name, str(own.file)) for own in named]
            wrong = wrong or local_function_problems(
                self.ow.settings, local, params.get("prompts"), split_gold
            )
            raise ConfigError("\n".join([str(error), *wrong])) from None
        if config.measures and config.prompts is None:
            wrong.append(
                f"prompts: {config.measures[0].name} scores answers to rows of yours; give a file "
                "of conversations (`ow eval --prompts FILE`)"
            )
        if wrong:
            raise ConfigError("\n".join(wrong))
        if config.prompts is not None and not config.measures:
            raise ConfigError(
                f"prompts: nothing in suite reads them; add {spelled(MEASURES)}, or "
                "'file.py:function', or remove them"
            )
        judged = any(choice.name in JUDGES for choice in config.measures)
        if config.judge != DEFAULT_JUDGE and not judged:
            raise ConfigError(
                f"judge: nothing in suite asks one; add {spelled(JUDGES)}, or remove it"
            )
        if config.samples > 1 and config.temperature == 0:
            raise ConfigError(
                "samples: at temperature 0 all would be the same; give a temperature, or samples=1"
            )
        models = pinned_models(self.ow, config.models, "models")
        prompts = config.prompts
        if prompts is not None:
            prompts = self.stored_dataset("prompts", prompts, PURPOSE)
        suite = self._stored_functions(config)
        return config.model_copy(update={"models": models, "prompts": prompts, "suite": suite})

    def _stored_functions(self, config: EvaluateConfig) -> list[str]:
        """The suite with ids of stored files in place of local ones: their text is part of what
        the job does.
        """
        stored: dict[str, str] = {}
        for choice in config.measures:
            if choice.file is not None and not choice.is_stored:
                path = Path(choice.file).expanduser()
                stored[choice.file] = self.ow.files.upload(path, MOUNT_PURPOSE)["id"]
        return cast("list[str]", with_files(config.suite, stored))

    def check(self, validated: BaseModel) -> None:
        """See that files are there, and that each row can be answered and scored.

        Raises:
            ConfigError: The store has no such file.
            DatasetError: Rows cannot be used; names line and field.
        """
        config = cast("EvaluateConfig", validated)
        if config.prompts is None:
            return
        compares = [choice.name for choice in config.measures if choice.name in GOLD_REWARDS]
        with self.open_stored("prompts", config.prompts) as content:
            problems, count, columns = Problems("prompts"), 0, {"id", "max_tokens"}
            for number, row in numbered_rows(content):
                count += 1
                columns |= row.keys()
                try:
                    _, gold = split_gold(row)
                    if compares and gold is None:
                        problems.add(number, "messages", _NO_GOLD.format(compares[0]))
                except ValueError as error:
                    problems.add_error(number, error)
        source = self.ow.backend.get_file(config.prompts).filename
        problems.raise_if_any(rows=count, source=source)
        own = [choice for choice in config.measures if choice.file is not None]
        if not own:
            return
        with self.open_stored("prompts", config.prompts) as content:
            rows = trial_rows(numbered_rows(content), split_gold)
        rows = [
            {"id": at, "max_tokens": 600, **row, "messages": row["prompt"]}
            for at, row in enumerate(rows)
        ]
        sources: list[tuple[str, str, bytes]] = []
        for choice in own:
            with self.open_stored("suite", str(choice.file)) as content:
                sources.append(("suite", choice.name, content.read()))
        if wrong := function_problems(self.ow.settings, sources, columns, rows):
            raise ConfigError("\n".join(wrong))

    def get_entrypoint(self, validated_params: BaseModel) -> str:
        """See `Jobs`."""
        return "python -m openweights.jobs.evaluate.run {job_id}"


_NO_GOLD = (
    "the last is not from the assistant, and {} compares with an answer; add it as last message, "
    "or as gold_response"
)
