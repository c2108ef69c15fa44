"""What `ow.logprob` and `ow.multiple_choice` share: a model, a dataset, and no training."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, cast

from pydantic import BaseModel, ConfigDict, Field

from openweights.client.job_kinds import Jobs
from openweights.client.messages import Problems
from openweights.jobs.at_hand import look_at_hand
from openweights.jobs.numbers import Rows
from openweights.jobs.pinning import awaited_job, check_has_weights, pinned_model
from openweights.jobs.unsloth.config.first_look import check_each, first_rows
from openweights.jobs.unsloth.config.rows import numbered_rows
from openweights.models.names import AnyModel, ChatTemplate, TemplateOptions
from openweights.needs import TRAIN_EXTRA, Need

if TYPE_CHECKING:
    from openweights.client.job_options import JobOptions, takes
    from openweights.client.jobs import Job


class ScoringParams(BaseModel):
    """What is scored.

    Attributes:
        model: A model, an adapter or a fine-tuning job, as `InferenceConfig.model` names it.
        dataset: File id from `ow.files.upload`, or a local path.
        batch_size: Rows in one forward.
        chat_template: A Jinja template, or "default" for the tokenizer's own.
        template_options: What the template reads beside the messages: {"enable_thinking": False}.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    model: AnyModel
    dataset: str
    batch_size: Rows = 8
    chat_template: ChatTemplate = "default"
    template_options: TemplateOptions = Field(default_factory=dict)


class ScoringJobs(Jobs):
    """A kind that scores a dataset with a model.

    Attributes:
        purpose: Of its datasets.
        prefix: Of its ids.
        kind: What the worker is told to do.
    """

    if TYPE_CHECKING:

        class _Arguments(ScoringParams, JobOptions): ...

        @takes(_Arguments)
        def create(self, **params: Any) -> Job: ...

    params: ClassVar[type[BaseModel]] = ScoringParams
    requires_vram_gb: ClassVar[int] = 36
    purpose: ClassVar[str]
    prefix: ClassVar[str]
    kind: ClassVar[str]

    @property
    def id_prefix(self) -> str:
        """What the ids of its jobs begin with."""
        return self.prefix

    def check_row(self, row: dict[str, Any]) -> None:
        """See that a row can be scored.

        Raises:
            ValueError: `field: what is wrong; what to do`.
        """
        raise NotImplementedError

    @staticmethod
    def render_row(row: dict[str, Any], tokenizer: Any) -> object:
        """A row as the model reads it.

        Raises:
            ValueError: The chat template does not write what the row says.
        """
        raise NotImplementedError

    def validate(self, params: dict[str, Any]) -> ScoringParams:
        """The parameters, checked, with a local dataset uploaded and a model's folder in full.

        Raises:
            ConfigError: A line for each field that is wrong, and what would work.
            DatasetError: The dataset has rows that cannot be used.
        """
        given = cast("ScoringParams", super().validate(params))
        check_has_weights(given.model)
        model = pinned_model(self.ow, given.model, may_wait=True)
        dataset = self.stored_dataset("dataset", given.dataset, self.purpose)
        return given.model_copy(update={"model": model, "dataset": dataset})

    def needs(self, validated: BaseModel) -> Sequence[Need]:
        """What computes a model."""
        return [Need("", TRAIN_EXTRA, packages=("torch", "transformers", "peft"))]

    def awaited_jobs(self, validated: BaseModel) -> Sequence[str]:
        """The job that trains the model."""
        return awaited_job(self.ow, cast("ScoringParams", validated).model)

    def check(self, validated: BaseModel) -> None:
        """See that the dataset is there, and that its rows can be scored.

        Raises:
            ConfigError: It is not, or the chat template has no such option.
            DatasetError: Rows cannot be scored; names line and field.
        """
        params = cast("ScoringParams", validated)
        with self.open_stored("dataset", params.dataset) as content:
            problems, count = Problems("dataset"), 0
            for number, row in numbered_rows(content):
                count += 1
                try:
                    self.check_row(row)
                except ValueError as error:
                    problems.add_error(number, error)
        source = self.ow.backend.get_file(params.dataset).filename
        problems.raise_if_any(rows=count, source=source)
        self._check_rendering(params)

    def _check_rendering(self, params: ScoringParams) -> None:
        """See that the chat template writes what rows say, where the tokenizer is at hand."""
        with self.open_stored("dataset", params.dataset) as content:
            rows = first_rows(numbered_rows(content))
        look = partial(check_each, rows=rows, render=self.render_row, name="dataset")
        look_at_hand(params.model, params.chat_template, params.template_options, look)

    def get_entrypoint(self, validated_params: BaseModel) -> str:
        return f"python -m openweights.jobs.unsloth.tracking.scoring_job {self.kind} {{job_id}}"
