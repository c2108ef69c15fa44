"""What `fine_tuning.create(...)` takes: one flat set of fields, checked before it costs anything.

`messages.training_config(params)` gives a `TrainingConfig` or raises one `ConfigError` that lists
every problem as `field: what is wrong; what to do`. Fields that belong to another loss are refused,
not ignored, and are left out of the dump, so that what is stored in a job holds only what counts.
Client-side: no torch here.
"""

from __future__ import annotations

import os
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from openweights.client.param_errors import shown, spelled
from openweights.errors import ConfigError
from openweights.jobs.unsloth.demonstrations import template_fields
from openweights.jobs.unsloth.learning_rate import parse_learning_rate

Loss = Literal["sft", "sdft", "dpo", "orpo", "grpo"]
AVAILABLE_LOSSES = ("sft", "sdft")
FILE_PURPOSES = {
    "sft": "conversations",
    "sdft": "conversations",
    "grpo": "conversations",
    "dpo": "preference",
    "orpo": "preference",
}
# Fields that only some losses read; all others count for every loss. `sdft_*` belongs to sdft.
FIELD_LOSSES: dict[str, tuple[str, ...]] = {
    "beta": ("dpo", "orpo"),
    "packing": ("sft",),
    "train_on_responses_only": ("sft",),
}
# What to do when a field of another loss was given; sdft_* and the rest have general words.
FIELD_REMEDIES = {
    ("packing", "sdft"): "remove it: sdft trains on the student's own completions, one by one",
    ("train_on_responses_only", "sdft"): "remove it: sdft always trains on completions only",
}
DEFAULT_TARGET_MODULES = [
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
]

Count = Annotated[int, Field(ge=1)]
StepSchedule = Literal["log"] | Count


def _job_suffix(value: str) -> str:
    allowed = set(string.ascii_letters + string.digits + "-_.")
    if not value or len(value) > 64 or not set(value) <= allowed:
        raise ValueError(
            f"{shown(value)} must be 1 to 64 letters, digits, '-', '_' or '.'; shorten or rename it"
        )
    return value


def _available_loss(value: object) -> object:
    if value in AVAILABLE_LOSSES:
        return value
    available = spelled(AVAILABLE_LOSSES)
    if value in get_args(Loss):
        raise ValueError(f"{value!r} is not available yet; use {available}")
    raise ValueError(f"must be {available}, not {shown(value)}")


def model_location(model: str) -> str:
    """A local folder in full, anything else as it is.

    Raises:
        ConfigError: It is written as a path, but no folder is there.
    """
    folder = Path(os.path.expanduser(model))
    if folder.is_dir():
        return str(folder.resolve())
    if _is_path(model):
        raise ConfigError(
            f"model: there is no folder {model} on this machine; correct the path, or give a "
            "Hugging Face id (org/name)"
        )
    return model


def _is_path(model: str) -> bool:
    return model.startswith(("/", "./", "../", "~"))


class SamplingCallback(BaseModel):
    """Completions of a dataset's prompts, sampled while the model trains.

    Attributes:
        dataset: `conversations` file whose prompts are answered (the last assistant message is left
            out).
        eval_steps: Every so many steps, or "log": at steps 1 to 10, 20, 30, … 100, 200, …
        tag: Names this callback in its events.
        temperature: 0 for greedy.
        max_tokens: Longest completion.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    dataset: str
    eval_steps: StepSchedule = 10
    batch_size: Count = 8
    tag: str = "samples"
    temperature: float = Field(default=0, ge=0)
    max_tokens: Count = 600


class TrainingConfig(BaseModel):
    """A fine-tuning job's parameters, flat.

    Attributes:
        model: Hugging Face id, or a folder on the machine that trains.
        training_file: File id from `ow.files.upload`, or a local path.
        test_file: Rows to evaluate on; see `test_file_eval_strategy`.
        chat_template: A Jinja template, or "default" for the tokenizer's own.
        finetuned_model_id: Repository to push to; may hold {org_id}, {model_name}, {job_id} and the
            names of `model_naming_extra_parameters`.
        max_seq_length: Tokens; what sft does with longer rows is told in its log, sdft drops them.
        loss: What is minimised.
        r, lora_alpha, lora_dropout, lora_bias, use_rslora, target_modules: The adapter.
        push_to_hub: True or False; None pushes when `HF_TOKEN` is set on the worker.
        learning_rate: A number, or arithmetic such as "2e-4 / 3"; negative means an exponent (-4 is
            1e-4).
        max_steps: Optimizer steps; counts instead of `epochs` when given.
        beta: dpo and orpo only.
        packing: sft only: several rows in one sequence where the engine keeps them apart.
        save_steps: A checkpoint goes into the store after so many steps; a lost run resumes from
            it.
        sdft_ema_alpha: Share of the student that the teacher takes over per step; 0 freezes it.
        sdft_demo_template: Teacher's last user turn; must hold {demonstration}, may hold {prompt}.
        sdft_demo_placement: "turns" shows the demonstration as earlier user and assistant turns.
        sdft_demo_repeats: How often it is shown then.
        sdft_skip_tokens: First tokens of a completion that are left out of the loss.
        sdft_top_k: Compare on the student's so many likeliest words and the rest as one more; None
            for the whole vocabulary.
        sdft_rollout_engine: Draws the completions; "auto" takes the fastest that can.
        engine: "auto" takes unsloth where CUDA and unsloth are there, else transformers.
        meta: Free; for `ow.jobs.find(meta={…})`.
    """

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=()
    )

    model: str
    training_file: str
    loss: Annotated[Loss, BeforeValidator(_available_loss)]
    test_file: str | None = None
    chat_template: str = "default"
    finetuned_model_id: str = "{org_id}/{model_name}-{job_id}"
    model_naming_extra_parameters: dict[str, str] | None = None
    job_id_suffix: Annotated[str, AfterValidator(_job_suffix)] | None = None
    max_seq_length: Count = 2048
    load_in_4bit: bool = False
    is_peft: bool = True
    target_modules: list[str] = Field(default_factory=lambda: list(DEFAULT_TARGET_MODULES))
    lora_bias: Literal["all", "none"] = "none"
    r: int = Field(default=16, ge=1, le=4096)
    lora_alpha: Count = 16
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    use_rslora: bool = True
    merge_before_push: bool = True
    push_to_private: bool = True
    push_to_hub: bool | None = None
    epochs: Count = 1
    max_steps: Count | None = None
    per_device_train_batch_size: Count = 2
    gradient_accumulation_steps: Count = 8
    warmup_steps: int = Field(default=5, ge=0)
    learning_rate: Annotated[float, BeforeValidator(parse_learning_rate)] = 1e-4
    logging_steps: Count = 1
    optim: Literal["adamw_8bit", "adamw", "adamw_torch", "adam", "sgd"] = "adamw_8bit"
    weight_decay: float = Field(default=0.01, ge=0)
    lr_scheduler_type: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
    ] = "linear"
    seed: int = Field(default=3407, ge=0, lt=2**32)
    beta: float = Field(default=0.1, gt=0)
    save_steps: Count = 5000
    output_dir: str = "./tmp"
    train_on_responses_only: bool = True
    packing: bool = True
    logp_callback_datasets: dict[str, str] = Field(default_factory=dict)
    sampling_callbacks: list[SamplingCallback] | None = None
    eval_batch_size: Count = 8
    test_file_eval_steps: float | None = Field(default=None, gt=0)
    test_file_eval_strategy: Literal["no", "steps", "epoch"] = "epoch"
    meta: dict[str, Any] | None = None
    sdft_ema_alpha: float = Field(default=0.02, ge=0, le=1)
    sdft_demo_template: str | None = None
    sdft_demo_placement: Literal["template", "turns"] = "template"
    sdft_demo_repeats: Count = 1
    sdft_max_new_tokens: Count = 256
    sdft_temperature: float = Field(default=1.0, gt=0)
    sdft_top_p: float = Field(default=1.0, gt=0, le=1)
    sdft_divergence: Literal["reverse_kl", "forward_kl", "jsd"] = "reverse_kl"
    sdft_skip_tokens: int = Field(default=0, ge=0)
    sdft_top_k: Count | None = None
    sdft_rollout_engine: Literal["auto", "transformers", "cuda_graph"] = "auto"
    engine: Literal["auto", "unsloth", "transformers"] = "auto"

    @field_validator("model", "training_file", "test_file", "output_dir")
    @classmethod
    def _not_empty(cls, value: str | None) -> str | None:
        if value is not None and (not value.strip() or value != value.strip()):
            raise ValueError(f"{shown(value)} is empty or padded with spaces; give the bare name")
        return value

    @field_validator("model")
    @classmethod
    def _is_model_name(cls, value: str) -> str:
        is_folder = _is_path(value) or Path(value).is_dir()
        if not is_folder and (value.count("/") > 1 or any(c.isspace() for c in value)):
            raise ValueError(
                f"{shown(value)} is neither a Hugging Face id (org/name) nor a folder; correct it"
            )
        return value

    @field_validator("is_peft")
    @classmethod
    def _is_lora(cls, value: bool) -> bool:
        if not value:
            raise ValueError(
                "False asks for full fine-tuning, which does not exist here; remove it to train a "
                "LoRA"
            )
        return value

    @field_validator("target_modules")
    @classmethod
    def _has_modules(cls, value: list[str]) -> list[str]:
        if not value or not all(name.strip() for name in value):
            raise ValueError("has no or empty module names; give some such as ['q_proj', 'v_proj']")
        return value

    @field_validator("chat_template")
    @classmethod
    def _is_template(cls, value: str) -> str:
        if value != "default" and ("messages" not in value or "{" not in value):
            raise ValueError(
                "is no Jinja template over `messages`; give its text, or 'default' for the "
                "model's own"
            )
        return value

    @field_validator("sdft_demo_template")
    @classmethod
    def _is_demo_template(cls, value: str | None) -> str | None:
        if value is not None and "demonstration" not in template_fields(value):
            raise ValueError(
                "holds no {demonstration}; write {demonstration} where it should appear"
            )
        return value

    @field_validator("logp_callback_datasets")
    @classmethod
    def _no_logp_callbacks(cls, value: dict[str, str]) -> dict[str, str]:
        if value:
            raise ValueError(
                "log-probability tracking is not available yet; remove it and use test_file or "
                "sampling_callbacks"
            )
        return value

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        problems = dict(_problems(self))
        if problems:
            text = "; ".join(f"{field}: {what}" for field, what in problems.items())
            raise PydanticCustomError("config", "{text}", {"text": text, "problems": problems})
        return self

    @model_serializer(mode="wrap")
    def _only_own_fields(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {k: v for k, v in handler(self).items() if self.loss in field_losses(k, self.loss)}


def field_losses(field: str, loss: str) -> tuple[str, ...]:
    """Losses that read `field`; with `loss` itself when every loss does."""
    if field.startswith("sdft_"):
        return ("sdft",)
    return FIELD_LOSSES.get(field, (loss,))


def _placeholders(template: str) -> set[str]:
    """Names in braces; a name with a format or a conversion counts as a name of its own."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"has a stray brace ({error}); write {{{{ and }}}} for braces") from None
    return {
        name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
        for _, name, spec, conversion in parts
        if name is not None
    }


def _problems(config: TrainingConfig) -> Iterator[tuple[str, str]]:
    """What is wrong between fields, as (field, what; what to do)."""
    yield from _foreign_fields(config)
    yield from _file_problems(config)
    yield from _tag_problems(config)
    yield from _sdft_problems(config)
    yield from _hub_problems(config)
    yield from _test_file_problems(config)


def _foreign_fields(config: TrainingConfig) -> Iterator[tuple[str, str]]:
    for field in sorted(config.model_fields_set):
        losses = field_losses(field, config.loss)
        if config.loss not in losses:
            owner = " or ".join(f"loss={name!r}" for name in losses)
            remedy = FIELD_REMEDIES.get((field, config.loss), f"remove it, or choose {owner}")
            yield field, f"belongs to {owner}, not to loss={config.loss!r}; {remedy}"


def _file_problems(config: TrainingConfig) -> Iterator[tuple[str, str]]:
    purpose = FILE_PURPOSES[config.loss]
    files = {"training_file": config.training_file, "test_file": config.test_file}
    for index, sampling in enumerate(config.sampling_callbacks or []):
        files[f"sampling_callbacks[{index}].dataset"] = sampling.dataset
    for field, value in files.items():
        if value is None or Path(value).is_file():
            continue
        wanted = purpose if field in ("training_file", "test_file") else "conversations"
        if not value.startswith(f"{wanted}:"):
            yield field, _file_problem(value, wanted, config.loss)


def _file_problem(value: str, purpose: str, loss: str) -> str:
    upload = f'ow.files.upload(path, purpose="{purpose}")["id"]'
    if ":file-" in value:
        had = shown(value.split(":", 1)[0])
        return (
            f"has the purpose {had}, but loss={loss!r} reads {purpose!r}; upload it with {upload}"
        )
    return f"{shown(value)} is neither a file id ({purpose}:file-…) nor a local file; give {upload}"


def _tag_problems(config: TrainingConfig) -> Iterator[tuple[str, str]]:
    """Tags name the files of samples, so equal ones would overwrite each other's."""
    tags = [sampling.tag.replace("/", "_") for sampling in config.sampling_callbacks or []]
    for index, tag in enumerate(tags):
        if tag in tags[:index]:
            text = f"{shown(tag)} is the tag of an earlier one, too; give each a tag of its own"
            yield f"sampling_callbacks[{index}].tag", text


def _sdft_problems(config: TrainingConfig) -> Iterator[tuple[str, str]]:
    if config.loss != "sdft":
        return
    if config.sdft_demo_repeats != 1 and config.sdft_demo_placement != "turns":
        yield (
            "sdft_demo_repeats",
            "only counts with sdft_demo_placement='turns'; set that, or remove it",
        )
    if config.sdft_demo_template is not None and config.sdft_demo_placement == "turns":
        yield (
            "sdft_demo_template",
            "is not used with sdft_demo_placement='turns'; remove one of the two",
        )
    if config.sdft_max_new_tokens >= config.max_seq_length:
        yield (
            "sdft_max_new_tokens",
            f"is {config.sdft_max_new_tokens}, which leaves no room for a prompt within "
            f"max_seq_length={config.max_seq_length}; lower it, or raise max_seq_length",
        )
    if config.sdft_skip_tokens >= config.sdft_max_new_tokens:
        yield (
            "sdft_skip_tokens",
            f"is {config.sdft_skip_tokens} of at most {config.sdft_max_new_tokens} tokens, so "
            "nothing would be learned; lower it",
        )


def _hub_problems(config: TrainingConfig) -> Iterator[tuple[str, str]]:
    field, extra = "finetuned_model_id", config.model_naming_extra_parameters or {}
    try:
        names = _placeholders(config.finetuned_model_id)
    except ValueError as error:
        yield field, str(error)
        return
    if unknown := sorted(names - {"org_id", "model_name", "job_id", *extra}):
        yield (
            field,
            f"holds {{{unknown[0]}}}, which nothing fills in; use org_id, model_name, job_id or a "
            "name of model_naming_extra_parameters",
        )
    org, _, name = config.finetuned_model_id.partition("/")
    if not org.strip() or not name.strip() or "/" in name:
        yield field, f"{shown(config.finetuned_model_id)} must be org/name; give both parts"
    elif org in ("datasets", "models", "unsloth", "None"):
        yield field, f"{org!r} is no organization of yours; begin with your own, or with {{org_id}}"


def _test_file_problems(config: TrainingConfig) -> Iterator[tuple[str, str]]:
    steps, strategy = config.test_file_eval_steps, config.test_file_eval_strategy
    if steps is not None and strategy != "steps":
        yield "test_file_eval_steps", "only counts with test_file_eval_strategy='steps'; set that"
    if strategy == "steps" and steps is None:
        yield (
            "test_file_eval_strategy",
            "'steps' needs test_file_eval_steps; give a number of steps",
        )
    if strategy == "steps" and config.test_file is None:
        yield (
            "test_file_eval_strategy",
            "'steps' has no test_file to evaluate; give test_file, or remove it",
        )
    if steps is not None and steps > 1 and steps != int(steps):
        yield (
            "test_file_eval_steps",
            f"is {steps}; give a whole number of steps, or a share of all below 1",
        )
