"""`ow.weighted_sft`: SFT on conversations whose blocks have weights.

The same trainer as `ow.fine_tuning` with `loss="sft"`, with other defaults. Client-side.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel

from openweights.jobs.unsloth import FineTuning
from openweights.jobs.unsloth.validate import (
    SamplingCallback,
    StepSchedule,
    TrainingConfig,
)

if TYPE_CHECKING:
    from openweights.client.job_options import JobOptions, takes
    from openweights.client.jobs import Job
    from openweights.jobs.unsloth import Callbacks


class LogSamplingCallback(SamplingCallback):
    """`SamplingCallback` with another default."""

    eval_steps: StepSchedule = "log"


class WeightedSFTConfig(TrainingConfig):
    """`TrainingConfig` with the defaults of weighted SFT."""

    loss: Literal["sft"] = "sft"
    optim: Literal["adamw_8bit", "adamw", "adamw_torch", "adam", "sgd"] = "adamw_torch"
    eval_every_n_steps: StepSchedule = "log"
    sampling_callbacks: list[LogSamplingCallback] | None = None  # pyright: ignore[reportIncompatibleVariableOverride]


SFTConfig = WeightedSFTConfig  # its first name, which trl has for another thing


class WeightedSFT(FineTuning):
    """Submits weighted SFT: `ow.weighted_sft.create(model=…, training_file=…)`."""

    if TYPE_CHECKING:

        class _Arguments(WeightedSFTConfig, JobOptions):
            learning_rate: float | str = 1e-4  # pyright: ignore[reportIncompatibleVariableOverride]
            sampling_callbacks: Callbacks | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
            mcq_callbacks: Callbacks | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
            ft_id_suffix: str | None = None

        @takes(_Arguments)
        def create(self, **params: Any) -> Job: ...

    params: ClassVar[type[BaseModel]] = WeightedSFTConfig
    id_covers_mounts: ClassVar[bool] = False
    requires_vram_gb: ClassVar[int] = 60

    @property
    def id_prefix(self) -> str:
        """What the ids of its jobs begin with."""
        return "sftjob"

    def validate(self, params: dict[str, Any]) -> TrainingConfig:
        """Checked as in `FineTuning`; `ft_id_suffix` is another name for `job_id_suffix`."""
        if "job_id_suffix" not in params and "ft_id_suffix" in params:
            params = dict(params)
            params["job_id_suffix"] = params.pop("ft_id_suffix")
        return super().validate(params)
