"""What a config takes of the machine that trains. Client-side: no torch here."""

from __future__ import annotations

from openweights.jobs.unsloth.config.fields import TrainingFields
from openweights.jobs.unsloth.config.grpo_fields import JUDGES, reward_choices
from openweights.needs import GPU_EXTRA, TRAIN_EXTRA, Need

_TRAINS_WITH = ("torch", "transformers", "trl", "peft", "datasets", "accelerate")
_FOUR_BIT = Need(
    "load_in_4bit",
    f"remove it, or where there is a GPU {GPU_EXTRA}",
    gpu=True,
    packages=("bitsandbytes",),
)
_OTHER = "use 'auto' or 'transformers'"
_SET_KEY = "export OPENAI_API_KEY=…, and OPENAI_BASE_URL for another server than OpenAI's"


def training_needs(config: TrainingFields) -> list[Need]:
    """What it needs, by the fields that ask for it; a field that the loss does not read asks for
    nothing.
    """
    rollout = config.sdft_rollout_engine if config.loss == "sdft" else "auto"
    tracking = tuple(config.report_to)
    asked = [
        (True, Need("", TRAIN_EXTRA, packages=_TRAINS_WITH)),
        (config.load_in_4bit, _FOUR_BIT),
        (config.engine == "unsloth", Need("engine", _OTHER, gpu=True, packages=("unsloth",))),
        (rollout == "vllm", Need("sdft_rollout_engine", _OTHER, packages=("vllm",))),
        (rollout == "cuda_graph", Need("sdft_rollout_engine", _OTHER, gpu=True)),
        (
            config.loss == "grpo" and config.grpo_use_vllm,
            Need("grpo_use_vllm", "remove it", packages=("vllm",)),
        ),
        (
            config.loss in ("sdft", "grpo") and config.rollout_precision == "fp8",
            Need("rollout_precision", "remove it", gpu=True),
        ),
        (True, Need("report_to", "pip install 'openweights[tracking]'", packages=tracking)),
        *((True, need) for need in _judging_needs(config)),
    ]
    return [need for is_asked, need in asked if is_asked]


def _judging_needs(config: TrainingFields) -> list[Need]:
    return [
        Need(field, _SET_KEY, packages=("openai",), variable="OPENAI_API_KEY")
        for field, spec in config.rewards.items()
        if any(choice.name in JUDGES for choice in reward_choices(spec))
    ]
