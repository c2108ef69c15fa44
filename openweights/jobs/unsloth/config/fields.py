"""The fields of a fine-tuning job, one flat set. Client-side: no torch here."""

from __future__ import annotations

import os
import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
)

from openweights.errors import shown
from openweights.jobs.numbers import (
    MOST,
    MOST_GB,
    MOST_ROWS,
    MOST_TOKENS,
    Amount,
    Count,
    Rows,
    Temperature,
    TemperatureOrGreedy,
    Tokens,
    TopP,
    Whole,
)
from openweights.jobs.unsloth.config.demonstrations import template_fields
from openweights.jobs.unsloth.config.grpo_fields import (
    BEST,
    DEFAULT_JUDGE,
    RewardSpec,
    check_gate_reward,
    judge_prompt_fields,
    refuse_functions,
    reward_choices,
)
from openweights.jobs.unsloth.config.learning_rate import parse_learning_rate
from openweights.models.checkpoint import DEFAULT_TARGET_MODULES
from openweights.models.names import ChatTemplate, ModelName, TemplateOptions, bare_name

Loss = Literal["sft", "sdft", "dpo", "orpo", "grpo"]
FILE_PURPOSES = {
    "sft": "conversations",
    "sdft": "conversations",
    "grpo": "conversations",
    "dpo": "preference",
    "orpo": "preference",
}
DEFAULT_WARMUP_STEPS = 5  # of a long run; a short one has a tenth of its steps


StepSchedule = Literal["log"] | Count


def _job_suffix(value: str) -> str:
    allowed = set(string.ascii_letters + string.digits + "-_.")
    if not value or len(value) > 64 or not set(value) <= allowed:
        raise ValueError(
            f"{shown(value)} must be 1 to 64 letters, digits, '-', '_' or '.'; shorten or rename it"
        )
    return value


class SamplingCallback(BaseModel):
    """Completions of a dataset's prompts, sampled while the model trains.

    Attributes:
        dataset: `conversations` file whose prompts are answered (the last assistant message is left
            out).
        eval_steps: Every so many steps, or "log": at steps 1 to 10, 20, 30, … 100, 200, …
        batch_size: Prompts that are answered at once.
        tag: Names this callback in its events.
        temperature: 0 for greedy.
        max_tokens: Longest completion.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    dataset: str
    eval_steps: StepSchedule = 10
    batch_size: Rows = 8
    tag: str = "samples"
    temperature: TemperatureOrGreedy = 0
    max_tokens: Tokens = 600


class MultipleChoiceCallback(BaseModel):
    """Questions with several answers, scored while the model trains.

    Attributes:
        dataset: `multiple_choice` file.
        eval_steps: As of `SamplingCallback`.
        batch_size: Choices scored in one forward.
        tag: Names this callback in its events.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    dataset: str
    eval_steps: StepSchedule = 10
    batch_size: Rows = 8
    tag: str = "multiple_choice"


@dataclass(frozen=True, slots=True)
class DatasetRef:
    """A dataset that a config reads.

    Attributes:
        field: Of the config.
        key: Name or index within it; None where the field is the file itself.
        file: File id, or a local path.
        purpose: That the file must have.
    """

    field: str
    key: str | int | None
    file: str
    purpose: str

    @property
    def name(self) -> str:
        """What messages call it."""
        match self.key:
            case None:
                return self.field
            case str():
                return f"{self.field}[{self.key!r}]"
            case _:
                return f"{self.field}[{self.key}].dataset"

    @property
    def local_path(self) -> Path:
        """Where it is read: a local file as it is, a stored one in `data/`."""
        if os.path.isfile(self.file):
            return Path(self.file)
        return Path("data") / f"{self.name.replace('/', '_')}.jsonl"


class TrainingFields(BaseModel):
    """A fine-tuning job's parameters, flat, each checked by itself.

    `docs/fields.md` is made of this: each field has its line here.

    Attributes:
        model: Hugging Face id, a folder on the machine that trains, or the id of a fine-tuning
            job. An adapter is trained on, and the result replaces it.
        training_file: File id from `ow.files.upload`, or a local path.
        test_file: Rows to evaluate on; see `test_file_eval_strategy`.
        chat_template: A Jinja template, or "default" for the tokenizer's own.
        template_options: What the template reads beside the messages: {"enable_thinking": False}.
            They hold in training, sampling and measuring, and go with the result's tokenizer.
        finetuned_model_id: Repository to push to; may hold {org_id}, {model_name}, {job_id} and the
            names of `model_naming_extra_parameters`.
        model_naming_extra_parameters: Further names for `finetuned_model_id`, and their values.
        job_id_suffix: Ends the job's id, and makes it another job than one without it.
        max_seq_length: Longest row, in tokens. Of longer ones sft, dpo and orpo cut the end, sdft
            and grpo leave them out; of how many is said at submission, and in the log.
        load_in_4bit: The base model's weights in 4 bit (nf4), on a CUDA GPU with bitsandbytes.
        is_peft: sft and sdft also train all weights in float32, with False: the result is a whole
            model, and what the adapter's fields say does not count.
        loss: What is minimised.
        target_modules: Names of the modules that get an adapter. Of the default ones those that the
            model has; of others all must be there.
        lora_bias: "all" trains the base model's biases, too.
        r: Rank of the adapter.
        lora_alpha: The adapter's scale: it is multiplied by this / sqrt(`r`), without `use_rslora`
            by this / `r`.
        lora_dropout: Share of the adapter's inputs that is dropped in training.
        use_rslora: Scale by the square root of the rank, so that a rate suits every rank.
        merge_before_push: Push the model with the adapter merged into it; False pushes the adapter.
        push_to_private: Make the repository private.
        push_to_hub: True or False; None pushes when `HF_TOKEN` is set on the worker.
        epochs: How often all rows are trained on, unless `max_steps` says otherwise.
        max_steps: Optimizer steps; counts instead of `epochs` when given.
        per_device_train_batch_size: Rows in one forward of one GPU; of grpo, completions.
        gradient_accumulation_steps: Forwards in an optimizer step.
        warmup_steps: In which the learning rate rises; the default is at most a tenth of all.
        learning_rate: A number, or arithmetic such as "2e-4 / 3". Of negative numbers only whole
            ones from -2 down are taken, as an exponent (-4 is 1e-4), with a warning.
        logging_steps: An event with the loss after so many steps.
        optim: The optimizer; "adamw_8bit" is "adamw_torch" without CUDA and bitsandbytes.
        weight_decay: Of the optimizer; adam has none.
        lr_scheduler_type: How the learning rate goes on after the warm-up; "constant" has none.
        seed: Of the adapter's first weights, the order of rows, dropout and sampling.
        beta: How strongly the model is held near what it was; grpo alone takes 0, which needs no
            reference model.
        max_grad_norm: Longer gradients are cut to this norm; 0 cuts none.
        memory_budget_gb: GPU memory that training may fill, in GiB, to recompute fewer activations;
            None for what the GPU has.
        save_steps: A checkpoint goes into the store after so many steps; a lost run resumes from
            it.
        save_minutes: And after so many minutes, so that a machine that is taken away costs no more.
        keep_checkpoints: The last so many stay after completion: `model="ftjob-…/checkpoint-100"`.
        output_dir: Folder for checkpoints, in the job's folder.
        train_on: The last answer of a conversation, all answers, or everything.
        train_on_responses_only: An older name; False is train_on="all".
        packing: Several rows in one sequence where the engine keeps them apart.
        logp_callback_datasets: Name -> `conversations` file whose answers' log-probabilities are
            followed: before training, every `eval_every_n_steps`, and at the end.
        eval_every_n_steps: Every so many steps, or "log": at steps 1 to 10, 20, 30, … 100, 200, …;
            `test_file` goes by `test_file_eval_strategy`.
        sampling_callbacks: Answers to the prompts of datasets, sampled while the model trains.
        kl_to_base_steps: How far the model has moved where nothing was to change, the KL to the
            base on everyday prompts: before training, every so many steps, or "log", and at the
            end. None leaves it out; sdft with its gate measures as often as that.
        mcq_callbacks: Questions with several answers, asked while the model trains.
        report_to: "wandb" or "tensorboard", where the package is installed.
        eval_batch_size: Rows in one forward when something is measured.
        test_file_eval_steps: With `test_file_eval_strategy="steps"`: every so many, or this share
            of all.
        test_file_eval_strategy: When the test set is evaluated.
        holdout_fraction: This share of the training rows, drawn by `seed`, is the test set.
        meta: Free; for `ow.jobs.find(meta={…})`.
        sdft_ema_alpha: Share of the student that the teacher takes over per step; 0 freezes it.
            Measured: level with a frozen teacher, at twice its KL to the base (135 M).
        sdft_demo_template: Teacher's last user turn; must hold {demonstration}, may hold {prompt}.
        sdft_demo_placement: "template" shows the demonstration in the last user turn, "turns" as
            earlier user and assistant turns; "auto" takes the one with which the teacher answers
            best. Measured: no place is best for both of two models.
        sdft_demo_repeats: How often it is shown as turns.
        sdft_gate: Before training, teacher and student answer some prompts; a teacher that is no
            better stops the run, or with "warn" is told of. "off" measures nothing, and "auto" is
            then "template". Measured: what it stops learns nothing.
        sdft_gate_margin: So much better must it be, on the scale of what is compared, and by more
            than chance explains in so few rows. Measured: teachers are far above it or far below.
        sdft_gate_reward: Compare by this reward, a name or `file.py:function` as of
            grpo_reward_function; None for the overlap with the right answer (ROUGE-L).
        sdft_gate_rows: How many prompts are answered; more see a smaller gain.
        sdft_gate_steps: While the model trains, the same again every so many steps, or "log", as in
            `eval_every_n_steps`, and at the end.
        sdft_max_new_tokens: Longest completion of the student.
        sdft_temperature, sdft_top_p: How the student's completions are drawn.
        sdft_divergence: KL(student || teacher), KL(teacher || student), or Jensen-Shannon.
            Measured: level where both have learned; "forward_kl" learns in fewer steps.
        sdft_skip_tokens: First tokens of a completion that are left out of the loss: 3 in the
            paper's code, which of a format of 0.59 taught 0.11.
        sdft_top_k: Compare on the student's so many likeliest words and the rest as one more; None
            for the whole vocabulary.
        sdft_rollout_engine: Draws the completions; "auto" takes the fastest that can.
        grpo_num_generations: Completions of each prompt, which are compared with one another.
        grpo_max_completion_length: Tokens; completions are cut here.
        grpo_temperature, grpo_top_p, grpo_top_k: How completions are drawn.
        grpo_stop: Texts or special tokens that end a completion beside the model's own ends.
        grpo_keep_special_tokens: Whether rewards see special tokens in the completions' texts.
        grpo_epsilon: The policy's ratio counts only within 1 ± this.
        grpo_loss_type: How token losses are averaged, as in trl.
        grpo_scale_rewards: Advantages are divided by the deviation of the group, of the batch, or
            not at all.
        grpo_enable_thinking: An older name of `template_options={"enable_thinking": …}`.
        grpo_think_end_tag: Ends the reasoning of a completion; rewards judge what comes after it.
        grpo_use_vllm: Draw completions with vLLM in the same process; else the fastest engine that
            can compute the model does.
        grpo_reward_function: A name, `file.py:function`, a list of them, or {name: weight}.
        grpo_judge_model: Grades the completions for the rewards whose names end in `_judge`.
        grpo_judge_prompt: What it is asked about an answer, in place of the reward's own question;
            must hold {answer}, may hold {prompt} and {reference}, and asks for one number.
        grpo_judge_best: The number that is a reward of 1; 0 is one of 0.
        grpo_max_failed_reward_fraction: The job ends when a larger share of rewards fails for
            several steps in a row.
        rollout_precision: "fp8" lets `cuda_graph` draw completions with fp8 copies of the weights,
            which is faster; what is trained is computed exactly.
        engine: "auto" is "transformers", whose rows are packed; "unsloth" takes more time and
            memory under sft and dpo.
        parallel: What several GPUs share: rows alone with "ddp", each has the model; the layers,
            too, with "fsdp" (FSDP2), for sft, sdft, dpo and orpo with an adapter. "auto" takes
            "fsdp" for a job that needs more memory than one of them has.
    """

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=()
    )

    model: ModelName
    training_file: str
    loss: Loss
    test_file: str | None = None
    chat_template: ChatTemplate = "default"
    template_options: TemplateOptions = Field(default_factory=dict)
    finetuned_model_id: str = "{org_id}/{model_name}-{job_id}"
    model_naming_extra_parameters: dict[str, str] | None = None
    job_id_suffix: Annotated[str, AfterValidator(_job_suffix)] | None = None
    max_seq_length: Tokens = 2048
    load_in_4bit: bool = False
    is_peft: bool = True
    target_modules: list[str] = Field(default_factory=lambda: list(DEFAULT_TARGET_MODULES))
    lora_bias: Literal["all", "none"] = "none"
    r: Whole = Field(default=16, ge=1, le=4096)
    lora_alpha: Whole = Field(default=16, ge=1, le=1_000_000)
    lora_dropout: Amount = Field(default=0.0, lt=1)
    use_rslora: bool = True
    merge_before_push: bool = True
    push_to_private: bool = True
    push_to_hub: bool | None = None
    epochs: Annotated[Count, Field(le=1_000_000)] = 1
    max_steps: Count | None = None
    per_device_train_batch_size: Rows = 2
    gradient_accumulation_steps: Rows = 8
    warmup_steps: Whole = Field(default=DEFAULT_WARMUP_STEPS, ge=0, le=MOST)
    learning_rate: Annotated[float, BeforeValidator(parse_learning_rate)] = 1e-4
    logging_steps: Count = 1
    optim: Literal["adamw_8bit", "adamw", "adamw_torch", "adam", "sgd"] = "adamw_8bit"
    weight_decay: Amount = Field(default=0.01, le=1000)
    lr_scheduler_type: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
    ] = "linear"
    seed: Whole = Field(default=3407, ge=0, lt=2**32)
    beta: Amount = Field(default=0.1, le=1000)
    max_grad_norm: Amount = Field(default=1.0, le=MOST)
    memory_budget_gb: float | None = Field(default=None, ge=0.001, le=MOST_GB)
    save_steps: Count = 5000
    save_minutes: float = Field(default=15.0, ge=1e-4, le=1_000_000)
    keep_checkpoints: int = Field(default=0, ge=0, le=MOST)
    output_dir: str = "./tmp"
    train_on: Literal["last", "responses", "all"] = "responses"
    train_on_responses_only: bool = True
    packing: bool = True
    logp_callback_datasets: dict[str, str] = Field(default_factory=dict)
    eval_every_n_steps: StepSchedule = 5000
    kl_to_base_steps: StepSchedule | None = None
    sampling_callbacks: list[SamplingCallback] | None = None
    mcq_callbacks: list[MultipleChoiceCallback] | None = None
    report_to: list[Literal["wandb", "tensorboard"]] = Field(default_factory=list)
    eval_batch_size: Rows = 8
    test_file_eval_steps: float | None = Field(default=None, ge=1e-6, le=MOST)
    test_file_eval_strategy: Literal["no", "steps", "epoch"] = "epoch"
    holdout_fraction: float | None = Field(default=None, ge=1e-6, lt=1)
    meta: dict[str, Any] | None = None
    sdft_ema_alpha: Amount = Field(default=0.02, le=1)
    sdft_demo_template: str | None = None
    sdft_demo_placement: Literal["auto", "template", "turns"] = "auto"
    sdft_demo_repeats: Annotated[Count, Field(le=1000)] = 1
    sdft_gate: Literal["stop", "warn", "off"] = "stop"
    sdft_gate_margin: Amount = Field(default=0.05, le=1e15)
    sdft_gate_reward: str | None = None
    sdft_gate_rows: Count = 16
    sdft_gate_steps: StepSchedule = 50
    sdft_max_new_tokens: Tokens = 256
    sdft_temperature: Temperature = 1.0
    sdft_top_p: TopP = 1.0
    sdft_divergence: Literal["reverse_kl", "forward_kl", "jsd"] = "reverse_kl"
    sdft_skip_tokens: int = Field(default=0, ge=0, le=MOST_TOKENS)
    sdft_top_k: Tokens | None = None
    sdft_rollout_engine: Literal["auto", "transformers", "cuda_graph", "vllm"] = "auto"
    grpo_num_generations: int = Field(default=8, ge=2, le=MOST_ROWS)
    grpo_max_completion_length: Tokens = 512
    grpo_temperature: Temperature = 0.9
    grpo_top_p: TopP = 1.0
    grpo_top_k: Tokens | None = None
    grpo_stop: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list[str])
    grpo_keep_special_tokens: bool = False
    grpo_epsilon: float = Field(default=0.2, ge=1e-6, le=1_000_000)
    grpo_loss_type: Literal["dapo", "grpo", "dr_grpo", "bnpo"] = "dapo"
    grpo_scale_rewards: Literal["group", "batch", "none"] = "group"
    grpo_enable_thinking: bool | None = None
    grpo_think_end_tag: str = Field(default="</think>", min_length=1)
    grpo_use_vllm: bool = False
    grpo_reward_function: RewardSpec = "rouge_l"
    grpo_judge_model: str = Field(default=DEFAULT_JUDGE, min_length=1)
    grpo_judge_prompt: str | None = None
    grpo_judge_best: float = Field(default=BEST, ge=1e-6, le=1e15)
    grpo_max_failed_reward_fraction: Amount = Field(default=0.5, lt=1)
    rollout_precision: Literal["model", "fp8"] = "model"
    engine: Literal["auto", "unsloth", "transformers"] = "auto"
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"

    @field_validator("training_file", "test_file", "output_dir")
    @classmethod
    def _not_empty(cls, value: str | None) -> str | None:
        return value if value is None else bare_name(value)

    @field_validator("output_dir")
    @classmethod
    def _can_be_made(cls, value: str) -> str:
        too_long = max(len(part.encode(errors="replace")) for part in value.split("/")) > 255
        if too_long or not value.isprintable():
            raise ValueError(f"{shown(value)} cannot be a folder's name; choose a short word")
        return value

    @field_validator("target_modules")
    @classmethod
    def _has_modules(cls, value: list[str]) -> list[str]:
        if not value or not all(name.strip() for name in value):
            raise ValueError("has no or empty module names; give some such as ['q_proj', 'v_proj']")
        return value

    @field_validator("sdft_demo_template")
    @classmethod
    def _is_demo_template(cls, value: str | None) -> str | None:
        if value is not None and "demonstration" not in template_fields(value):
            raise ValueError(
                "holds no {demonstration}; write {demonstration} where it should appear"
            )
        return value

    @field_validator("grpo_judge_prompt")
    @classmethod
    def _is_judge_prompt(cls, value: str | None) -> str | None:
        if value is not None and "answer" not in judge_prompt_fields(value):
            raise ValueError("holds no {answer}; write {answer} where the completion should appear")
        return value

    @field_validator("sdft_gate_reward", "grpo_reward_function", mode="before")
    @classmethod
    def _are_names(cls, value: object) -> object:
        refuse_functions(value)
        return value

    @field_validator("sdft_gate_reward")
    @classmethod
    def _is_gate_reward(cls, value: str | None) -> str | None:
        if value is not None:
            check_gate_reward(value)
        return value

    @field_validator("grpo_reward_function")
    @classmethod
    def _has_rewards(cls, value: RewardSpec) -> RewardSpec:
        reward_choices(value)
        return value

    @property
    def has_test_set(self) -> bool:
        """Whether something is evaluated."""
        return self.test_file is not None or self.holdout_fraction is not None

    @property
    def rewards(self) -> dict[str, RewardSpec]:
        """The rewards that the loss asks for, by field."""
        if self.loss == "grpo":
            return {"grpo_reward_function": self.grpo_reward_function}
        if self.loss == "sdft" and self.sdft_gate_reward is not None:
            return {"sdft_gate_reward": self.sdft_gate_reward}
        return {}

    @property
    def step_size(self) -> int:
        """Rows in an optimizer step of one process; of grpo, completions."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens of a micro-batch whose rows are as long as rows may be."""
        return self.per_device_train_batch_size * self.max_seq_length

    def datasets(self) -> list[DatasetRef]:
        """Every dataset that is read; the training data first."""
        own, talk = FILE_PURPOSES[self.loss], "conversations"
        refs = [DatasetRef("training_file", None, self.training_file, own)]
        if self.test_file is not None:
            refs.append(DatasetRef("test_file", None, self.test_file, own))
        for name, file in self.logp_callback_datasets.items():
            refs.append(DatasetRef("logp_callback_datasets", name, file, talk))
        for index, sampling in enumerate(self.sampling_callbacks or []):
            refs.append(DatasetRef("sampling_callbacks", index, sampling.dataset, talk))
        for index, questions in enumerate(self.mcq_callbacks or []):
            refs.append(DatasetRef("mcq_callbacks", index, questions.dataset, "multiple_choice"))
        return refs

    def with_files(self, files: Mapping[DatasetRef, str]) -> Self:
        """The same config with other files for its datasets."""
        changed: dict[str, Any] = {}
        for ref in self.datasets():
            file = files[ref]
            match ref.key:
                case None:
                    changed[ref.field] = file
                case str():
                    changed.setdefault(ref.field, {})[ref.key] = file
                case index:
                    callback = getattr(self, ref.field)[index]
                    changed.setdefault(ref.field, []).append(
                        callback.model_copy(update={"dataset": file})
                    )
        return self.model_copy(update=changed)
