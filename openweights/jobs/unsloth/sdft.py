"""Self-distillation fine-tuning (SDFT, arXiv 2601.19897) as an `SFTTrainer`.

The student sees a prompt x and samples its own completion y. The teacher, the same network with an
exponential moving average of the adapters, sees x together with a demonstration c. Both score y,
and the student moves towards the teacher:

    L = mean over sequences of the mean over their completion tokens t of
        D(student(. | x, y<t), teacher(. | x, c, y<t))

over the full vocabulary, with the teacher detached. D is reverse KL as in the paper's equations,
forward KL as in its results, or the Jensen-Shannon divergence (`divergence.py`). Where we differ
from algorithm 1: the average starts from the student's own adapters (`teacher.py`), one call
generates for all micro-batches of an optimizer step, the end-of-sequence token that the student
sampled is part of the loss, and a teacher prompt that does not fit is left out rather than cut.

The rows of an optimizer step are laid end to end, in as few micro-batches as fit, after this very
model was seen to keep such rows apart (`models/packing.py`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import SFTConfig

from openweights.events import Agreement, Completions, Stage
from openweights.generation.choose import generation_engine
from openweights.generation.engine import GenerationEngine
from openweights.generation.params import SamplingParams
from openweights.generation.transformers_engine import TransformersEngine
from openweights.jobs.unsloth.config.demonstrations import SHOWINGS, Showing, showings
from openweights.jobs.unsloth.config.rows import Row
from openweights.jobs.unsloth.data import learned_rows
from openweights.jobs.unsloth.distillation.following import DistanceToBase, GateFollower
from openweights.jobs.unsloth.distillation.gate import (
    Gate,
    load_showing,
    open_gate,
    save_showing,
)
from openweights.jobs.unsloth.divergence import (
    Divergence,
    DivergenceOutput,
    linear_divergence,
    logits_divergence,
)
from openweights.jobs.unsloth.rollout import (
    COMPLETIONS_LOGGED,
    Rollout,
    StepSampler,
    sampling_params,
    tells_completions,
)
from openweights.jobs.unsloth.runtime.memory import RecomputationCallback
from openweights.jobs.unsloth.runtime.ranks import (
    own_share,
    rows_of_step,
    sum_over_ranks,
    world_size,
)
from openweights.jobs.unsloth.runtime.reporting import Fetch, LogEvent
from openweights.jobs.unsloth.runtime.step_mean import ExactMeanTrainer
from openweights.jobs.unsloth.sdft_data import (
    SDFTDataCollator,
    SDFTRows,
    on_policy_dataset,
    places_in_completions,
    scoring_rows,
    sdft_examples,
    token_weights,
    unpad,
)
from openweights.jobs.unsloth.teacher import EMATeacher
from openweights.jobs.unsloth.trainer_args import precision, run_trainer, trainer_args
from openweights.jobs.unsloth.validate import TrainingConfig
from openweights.models.forward import (
    active_adapter,
    base_model,
    evaluating,
    frozen_head,
    output_logits,
)
from openweights.models.packing import divided, last_hidden, may_pack

logger = logging.getLogger(__name__)

EVENTS_EVERY_STEPS = 10
PLACE_RANGES = 24  # that double: more than a completion can have

ScoredRow = tuple[list[int], list[int], list[int]]  # prompt, teacher's prompt, completion


class EMATeacherCallback(TrainerCallback):
    """Moves the teacher after every optimizer step."""

    def __init__(self, teacher: EMATeacher) -> None:
        self._teacher = teacher

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._teacher.update()


class SDFTTrainer(ExactMeanTrainer):
    """`SFTTrainer` whose batches are the student's own completions, scored against an EMA teacher.

    Batches without on-policy columns get the ordinary SFT cross-entropy.

    Args:
        model: A causal language model with trainable parameters, usually a `PeftModel`.
        args: With `remove_unused_columns=False` and dataset preparation skipped.
        sampling: How the student's completions are drawn.
        divergence: Which divergence is minimised.
        ema_alpha: Share of the student in each teacher update.
        skip_tokens: First completion tokens that are left out of the loss (the paper's code uses 3
            against phrases that refer to the demonstration).
        top_k: Compare on the student's so many likeliest words and the rest as one more; None for
            the whole vocabulary.
        log_event: Receives sampled completions as JSON; None to drop them.
        asked: The rows, for the conversations that stand with these completions.
        engine: Draws the completions; None for the one that works wherever the model does.
        showing: Where the teacher reads the demonstrations; kept in checkpoints.
        micro_batch_tokens: Rows of a step are laid end to end in micro-batches of so many tokens of
            what the teacher reads, which the model must keep apart (`packing.keeps_rows_apart`).
            None pads the rows of each batch.
    """

    scoring_passes = 1  # the teacher's

    def __init__(
        self,
        model: nn.Module,
        args: SFTConfig,
        *,
        processing_class: PreTrainedTokenizerBase,
        sampling: SamplingParams,
        divergence: Divergence = "reverse_kl",
        ema_alpha: float = 0.02,
        skip_tokens: int = 0,
        top_k: int | None = None,
        log_event: LogEvent | None = None,
        asked: SDFTRows | None = None,
        engine: GenerationEngine | None = None,
        showing: Showing = SHOWINGS[0],
        micro_batch_tokens: int | None = None,
        callbacks: Iterable[TrainerCallback] = (),
        **kwargs: Any,
    ) -> None:
        pad_token_id = int(processing_class.pad_token_id)  # type: ignore[arg-type]
        super().__init__(
            model,
            args=args,
            processing_class=processing_class,
            data_collator=SDFTDataCollator(pad_token_id),
            callbacks=list(callbacks),
            **kwargs,
        )
        self.divergence: Divergence = divergence
        self.skip_tokens = skip_tokens
        self.top_k = top_k
        self.teacher = EMATeacher(model, ema_alpha)
        # First in line: what callbacks after it see, and save, is the teacher after the step.
        self.callback_handler.callbacks.insert(0, EMATeacherCallback(self.teacher))
        self.engine = engine or TransformersEngine(model, processing_class)
        self._sampler = StepSampler(self.engine, sampling)
        self._showing = showing
        self._pad_token_id = pad_token_id
        self._micro_batch_tokens = micro_batch_tokens
        self._log_event = log_event
        self._asked = asked
        prompts = asked.tokens.rows_of("prompt_ids") if asked else ()
        # By hashes: the rows' tokens are held once already.
        self._places = {hash(tuple(prompt)): at for at, prompt in enumerate(prompts)}
        # Sum of agreements, and of tokens, by the range of places in the completion.
        self._by_place: Tensor | None = None

    # ---- rollouts: once per optimizer step

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The micro-batches of an optimizer step, with completions that one call generated.

        Of the rows of all ranks this one gets those to score by which all have equally much to do.
        """
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches or "prompt_ids" not in batches[0]:
            return batches, num_items
        asked = rows_of_step([_prompts(batch) for batch in batches])
        rollout = self._rollout([prompt for prompt, _ in asked])
        completions = (completion.token_ids for completion in rollout.completions)
        rows = [(*prompts, own) for prompts, own in zip(asked, completions, strict=True)]
        share = own_share([_tokens_passed(row) for row in rows])
        sizes = [len(batch["prompt_ids"]) for batch in batches]
        return self._micro_batches([rows[index] for index in sorted(share)], sizes), len(rows)

    def _micro_batches(self, rows: Sequence[ScoredRow], sizes: Sequence[int]) -> list[Any]:
        """What is scored in one forward pass each.

        Args:
            sizes: Rows of each micro-batch as the Trainer asked for them.
        """
        remaining = iter(range(len(rows)))
        groups = [list(islice(remaining, size)) for size in sizes]
        if self._micro_batch_tokens is not None:
            lengths = [len(teacher) + len(completion) for _, teacher, completion in rows]
            fuller = divided(lengths, self._micro_batch_tokens)
            groups = fuller if len(fuller) <= len(groups) else groups
        batches = [self._scoring_batch([rows[index] for index in group]) for group in groups]
        return self._filled_up(batches, len(sizes))

    def _rollout(self, prompts: list[list[int]]) -> Rollout:
        step = self.state.global_step
        adapter = active_adapter(self._network)
        rollout = self._sampler.sample(prompts, adapter, seed=(self.args.seed, step))
        count = len(prompts)
        self._record("completion_length", rollout.tokens, count)
        self._record("eos_share", rollout.ended, count)
        self._record("truncated_share", count - rollout.ended, count)
        self._record("rollout_s", rollout.seconds, 1)
        self._record("rollout_tokens_per_s", rollout.tokens, rollout.seconds)
        if world_size() > 1:
            self._record("rollout_waiting_s", rollout.waiting_s, 1)
        is_told = tells_completions(step, self.state.max_steps)
        if self._log_event and is_told and self.args.process_index == 0:
            self._log_event(self._completions_event(step, prompts, rollout))
        return rollout

    def _completions_event(
        self, step: int, prompts: list[list[int]], rollout: Rollout
    ) -> dict[str, Any]:
        tokenizer: Any = self.processing_class
        rows = zip(prompts, rollout.completions, strict=True)
        told = [
            {
                "prompt": tokenizer.decode(prompt, skip_special_tokens=True),
                **self._messages(prompt),
                "completion": tokenizer.decode(completion.token_ids, skip_special_tokens=True),
                "ended": completion.ended,
            }
            for prompt, completion in list(rows)[:COMPLETIONS_LOGGED]
        ]
        return Completions(step=step + 1, completions=told).data()

    def _messages(self, prompt: Sequence[int]) -> dict[str, Any]:
        """The conversation that was rendered so, where it is known."""
        place = self._places.get(hash(tuple(prompt)))
        if self._asked is None or place is None:
            return {}
        return {"messages": self._asked[place].messages}

    def _scoring_batch(self, rows: Sequence[ScoredRow]) -> dict[str, Any]:
        """The rows as the student reads them, and, with a prefix, as the teacher does."""
        prompts, teacher_prompts, completions = zip(*rows, strict=True)
        student, teacher = (
            scoring_rows(
                own,
                completions,
                skip_tokens=self.skip_tokens,
                pad_token_id=self._pad_token_id,
                packed=self._micro_batch_tokens is not None,
            )
            for own in (prompts, teacher_prompts)
        )
        return student | {f"teacher_{name}": value for name, value in teacher.items()}

    # ---- scoring: once per micro-batch

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Mean over the step's sequences of each one's mean divergence per completion token."""
        if "teacher_input_ids" not in inputs:
            self._counted += 1
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        starts = inputs.get("cu_seq_lens_q")
        weights = token_weights(inputs["loss_mask"], starts, num_items_in_batch)
        output = self._score(inputs, weights)
        tokens = len(weights)
        self._counted += tokens
        self._record("divergence", float(output.per_token.sum()), tokens)
        self._record("entropy", float(output.entropy.sum()), tokens)
        self._record("agreement", output.agreement.sum(), tokens)
        self._add_places(inputs["loss_mask"], starts, output.agreement)
        loss = self._share(output.loss)
        return (loss, {}) if return_outputs else loss

    def _score(self, inputs: dict[str, Tensor], weights: Tensor) -> DivergenceOutput:
        base = base_model(self._network)
        head = frozen_head(base)
        started = time.perf_counter()
        with evaluating(self._network), self.teacher.acting(), self.accelerator.autocast():
            teacher = last_hidden(base, inputs, "teacher_")[inputs["teacher_loss_mask"]]
            if head is None:
                teacher = output_logits(base, teacher)
        teacher_done = time.perf_counter()
        with self.accelerator.autocast():
            student = last_hidden(base, inputs)[inputs["loss_mask"]]
            if head is None:
                student = output_logits(base, student)
        if head is None:
            output = logits_divergence(student, teacher, weights, self.divergence, self.top_k)
        else:
            output = linear_divergence(
                student, teacher, head, weights, self.divergence, top_k=self.top_k
            )
        self._record("teacher_s", teacher_done - started, 1)
        self._record("student_s", time.perf_counter() - teacher_done, 1)
        return output

    # ---- logs and checkpoints

    def _add_places(self, loss_mask: Tensor, starts: Tensor | None, agreement: Tensor) -> None:
        """Count agreements by where in its completion a token is."""
        places = places_in_completions(loss_mask, starts) + self.skip_tokens
        ranges = torch.frexp(places.float()).exponent.long()  # of 0, 1, 2-3, 4-7, …
        if self._by_place is None:
            self._by_place = agreement.new_zeros(2, PLACE_RANGES, dtype=torch.float32)
        self._by_place[0].index_add_(0, ranges, agreement.float())
        self._by_place[1].index_add_(0, ranges, torch.ones_like(agreement, dtype=torch.float32))

    def _log_places(self) -> None:
        if self._by_place is None:
            return
        sums = sum_over_ranks(self._by_place.flatten().tolist(), self.accelerator)
        self._by_place = None
        agreed, tokens = sums[:PLACE_RANGES], sums[PLACE_RANGES:]
        values = {
            _range_name(place): agreed[place] / tokens[place]
            for place in range(PLACE_RANGES)
            if tokens[place]
        }
        if self._log_event and self.args.process_index == 0:
            self._log_event(Agreement(step=self.state.global_step, values=values).data())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the teacher's drift, and every some steps where student and teacher agree."""
        if self._sums and "loss" in logs:
            logs["teacher_drift"] = self.teacher.drift()
            step = self.state.global_step
            if step % EVENTS_EVERY_STEPS == 0 or step == self.state.max_steps:
                self._log_places()
        super().log(logs, start_time)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
            self.teacher.save(folder)
            save_showing(self._showing, folder)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.teacher.load(Path(resume_from_checkpoint))


def _prompts(batch: Mapping[str, Tensor]) -> list[tuple[list[int], list[int]]]:
    """What student and teacher continue, of each row of a batch."""
    student, teacher = (
        unpad(batch[f"{name}_ids"], batch[f"{name}_mask"]) for name in ("prompt", "teacher_prompt")
    )
    return list(zip(student, teacher, strict=True))


def _tokens_passed(row: ScoredRow) -> int:
    """Through the layers, to score a row: once as the teacher, and as the student there and back,
    where the way back is twice as long.
    """
    prompt, teacher_prompt, completion = row
    return len(teacher_prompt) + 3 * len(prompt) + 4 * len(completion)


def _range_name(place: int) -> str:
    """`0`, `1`, `2-3`, `4-7`, … of the ranges in which places are counted."""
    first, last = (1 << place) >> 1, (1 << place) - 1
    return str(last) if last <= 1 else f"{first}-{last}"


def _drop_event(event: dict[str, Any]) -> None:
    """Receives events when nobody listens."""


def _local_file(file: str, target: Path) -> Path:
    """A file that is here already."""
    return Path(file)


def sdft_train(
    config: TrainingConfig,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    train_rows: Sequence[Row],
    test_rows: Sequence[Row] | None,
    *,
    callbacks: Sequence[TrainerCallback] = (),
    resume_from: str | None = None,
    fetch: Fetch = _local_file,
    log_event: LogEvent = _drop_event,
) -> SDFTTrainer:
    """Train `model` by self-distillation on `conversations` rows and return the trainer.

    Args:
        test_rows: Evaluated by cross-entropy on their answers, as in SFT.
        resume_from: Folder of a checkpoint.
        fetch: Makes the file of the gate's reward function readable.
        log_event: Receives the teacher gate, its figures while training, and sampled completions as
            JSON.

    Raises:
        ConfigError: The gate's reward function cannot be used.
        DatasetError: A row cannot be used, or no row fits into `max_seq_length`.
        JobFailedError: The teacher is no better than the student.
    """
    args = trainer_args(config, **precision(model))
    engine = generation_engine(
        config.sdft_rollout_engine, model, tokenizer, precision=config.rollout_precision
    )
    gate = open_gate(config, engine, active_adapter(model), tokenizer, train_rows, fetch)
    showing = _chosen_showing(config, gate, resume_from, log_event)
    examples = sdft_examples(config, tokenizer, train_rows, showing)
    is_packed = may_pack(model, examples.tokens.longest(2, "teacher_prompt_ids"))
    trainer = SDFTTrainer(
        model,
        args,
        processing_class=tokenizer,
        train_dataset=on_policy_dataset(examples),
        eval_dataset=_test_dataset(config, tokenizer, test_rows, engine) if test_rows else None,
        sampling=sampling_params(config),
        divergence=config.sdft_divergence,
        ema_alpha=config.sdft_ema_alpha,
        skip_tokens=config.sdft_skip_tokens,
        top_k=config.sdft_top_k,
        log_event=log_event,
        asked=examples,
        engine=engine,
        showing=showing,
        micro_batch_tokens=config.micro_batch_tokens if is_packed else None,
        callbacks=[*callbacks, RecomputationCallback(config.memory_budget_gb)],
    )
    logger.info("teacher: its averages take %.2f GiB", trainer.teacher.size_bytes / 2**30)
    if gate is not None:
        _follow(config, trainer, gate, showing, log_event)
    return run_trainer(trainer, resume_from)


def _chosen_showing(
    config: TrainingConfig, gate: Gate | None, resume_from: str | None, log_event: LogEvent
) -> Showing:
    """Where the teacher reads the demonstrations: as before, as the gate finds, or as asked."""
    if resume_from is not None:
        return load_showing(config, Path(resume_from))
    if gate is None:
        return showings(config.sdft_demo_placement, config.sdft_demo_repeats)[0]
    showing = gate.choose(log_event)
    log_event(Stage(doing="preparing the rows").data())
    return showing


def _follow(
    config: TrainingConfig,
    trainer: SDFTTrainer,
    gate: Gate,
    showing: Showing,
    log_event: LogEvent,
) -> None:
    """Measure while it trains what the loss does not say."""
    steps = config.sdft_gate_steps
    tokenizer: Any = trainer.processing_class
    model: Any = trainer.model
    trainer.add_callback(GateFollower(gate, trainer.teacher, showing, log_event, steps))
    if active_adapter(model) is not None and config.kl_to_base_steps is None:
        trainer.add_callback(DistanceToBase(trainer.engine, tokenizer, log_event, steps))


def _test_dataset(
    config: TrainingConfig,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    engine: GenerationEngine,
) -> Dataset:
    ends = engine.end_token_ids
    table = learned_rows(config, tokenizer, rows, ends=ends, name="test_file")
    return table.for_training(weighted=False)
