"""`ow.fine_tuning`: fine-tuning jobs. Client-side; the trainers are imported by the worker only."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any, ClassVar, cast

from pydantic import BaseModel

from openweights.client.job_kinds import Jobs
from openweights.errors import ConfigError, NotFoundError
from openweights.jobs.unsloth.messages import training_config
from openweights.jobs.unsloth.rows import check_rows, numbered_rows
from openweights.jobs.unsloth.validate import FILE_PURPOSES, TrainingConfig, model_location
from openweights.types import JobType


class FineTuning(Jobs):
    """Submits fine-tuning jobs: `ow.fine_tuning.create(model=…, training_file=…, loss="sdft", …)`.

    The fields are those of `TrainingConfig`. Local datasets are uploaded first, and the rows are
    checked against the loss before the job is submitted.
    """

    params: ClassVar[type[BaseModel]] = TrainingConfig
    job_type: ClassVar[JobType] = "fine-tuning"
    id_covers_mounts: ClassVar[bool] = False

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
        config = training_config(params)
        model = model_location(config.model)
        return self._upload_local(config.model_copy(update={"model": model}))

    def get_entrypoint(self, validated_params: BaseModel) -> str:
        """See `Jobs`."""
        command = ["python", "-m", "openweights.jobs.unsloth.training"]
        return f"{shlex.join(command)} {{job_id}}"

    def check(self, validated: BaseModel) -> None:
        """See that the files are there and that the loss can use their rows.

        Raises:
            ConfigError: A file is not in the store, or a push was asked for without a token.
            DatasetError: Rows cannot be used; names line and field.
        """
        config = cast(TrainingConfig, validated)
        if config.push_to_hub and not self.ow.settings.hf_token:
            raise ConfigError(
                "push_to_hub: True needs a Hugging Face token; set HF_TOKEN, or remove push_to_hub "
                "(the result is kept in the store in any case)"
            )
        for index, sampling in enumerate(config.sampling_callbacks or []):
            self._check_file(config, f"sampling_callbacks[{index}].dataset", sampling.dataset)
        self._check_file(config, "training_file", config.training_file)
        if config.test_file is not None:
            self._check_file(config, "test_file", config.test_file)

    def _check_file(self, config: TrainingConfig, field: str, file: str) -> None:
        try:
            content = self.ow.backend.open_file(file)
        except NotFoundError:
            raise ConfigError(
                f"{field}: the store has no file {file}; upload it with "
                "ow.files.upload(path, purpose=…)"
            ) from None
        with content:
            check_rows(numbered_rows(content), config, name=field)

    def _upload_local(self, config: TrainingConfig) -> TrainingConfig:
        purpose = FILE_PURPOSES[config.loss]
        found: dict[str, Any] = {}
        for field in ("training_file", "test_file"):
            file = getattr(config, field)
            if file is not None and Path(file).is_file():
                found[field] = self.ow.files.upload(file, purpose)["id"]
        if config.sampling_callbacks:
            found["sampling_callbacks"] = [
                sampling.model_copy(
                    update={
                        "dataset": self.ow.files.upload(sampling.dataset, "conversations")["id"]
                    }
                )
                if Path(sampling.dataset).is_file()
                else sampling
                for sampling in config.sampling_callbacks
            ]
        return config.model_copy(update=found)
