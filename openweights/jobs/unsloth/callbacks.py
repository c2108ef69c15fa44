"""What happens beside the training steps: metrics, checkpoints, stops in good order, GPU figures.

Each callback writes through a `Reporter` and knows nothing of stores.
"""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from openweights.errors import JobFailedError
from openweights.events import AdapterMoved, Reproducibility, Stage, Started, Summary
from openweights.generation.params import derived_seed
from openweights.jobs.stage import CountedStage
from openweights.jobs.unsloth.runtime.launcher import EXIT_TERMINATED
from openweights.jobs.unsloth.runtime.ranks import any_rank
from openweights.jobs.unsloth.runtime.reporting import Reporter
from openweights.models.weights import WeightCopy
from openweights.progress import transferring

logger = logging.getLogger(__name__)

GPU_STATS_EVERY_STEPS = 10


class MetricsCallback(TrainerCallback):
    """Each entry of the trainer's log becomes one event and one line of the log.

    A loss that is no finite number ends the job. `record` is logged at the start, and with
    `measures` that callbacks behind this one measure something before the first step.
    """

    def __init__(
        self,
        reporter: Reporter,
        record: Mapping[str, Any] | None = None,
        *,
        measures: bool = False,
    ) -> None:
        self._reporter = reporter
        self._record = record
        self._measures = measures
        self._started_at = self._started_step = 0.0
        self._evaluation: CountedStage | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say how many steps there will be."""
        self._started_at, self._started_step = time.monotonic(), state.global_step
        logger.info("training for %d steps, from step %d", state.max_steps, state.global_step)
        started = Started(max_steps=state.max_steps, from_step=state.global_step)
        self._reporter.log(started.data())
        if self._record is not None:
            # Here, too, and not in the result alone: a run that fails was one nevertheless.
            self._reporter.log(Reproducibility(record=self._record).data())
        if self._measures and not state.global_step:
            self._reporter.log(Stage(doing="measuring before the first step").data())

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """However rarely it logs, a run that computes does not hang."""
        self._reporter.heartbeat()

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._reporter.heartbeat()
        if self._evaluation is not None:
            self._evaluation.of = len(kwargs.get("eval_dataloader") or ())
            self._evaluation.add(1)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._reporter.heartbeat()
        if not control.should_log:
            self._tell_evaluation(state, control)

    on_epoch_end = on_step_end

    def _tell_evaluation(self, state: TrainerState, control: TrainerControl) -> None:
        if control.should_evaluate:
            log, step = self._reporter.log, state.global_step
            told = CountedStage(log, "measuring the test set", unit="batches", step=step)
            self._evaluation = told

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        entry = {**(logs or {}), "step": state.global_step}
        if "train_runtime" in entry:
            entry = Summary(step=state.global_step, values=logs or {}).data()
        elif any(key.startswith("eval_") for key in entry):
            entry["tag"] = "eval"
        else:
            # By which whoever reads the last values alone knows when this step was reached.
            entry["elapsed_s"] = round(time.monotonic() - self._started_at, 3)
        self._reporter.log(entry)
        if "type" not in entry and "tag" not in entry:
            self._tell_evaluation(state, control)
        self._print(entry, state)
        loss = entry.get("loss")
        if isinstance(loss, float) and not math.isfinite(loss):
            raise JobFailedError(
                f"the loss is {loss} at step {state.global_step}, and nothing good can follow; "
                "lower learning_rate, or look at the rows of that step"
            )

    def _print(self, entry: dict[str, Any], state: TrainerState) -> None:
        if entry.get("type") == Summary.type:
            logger.info("trained %d steps in %.1f s", state.global_step, entry["train_runtime"])
            return
        if entry.get("tag") == "eval":
            logger.info("step %d: test %s", state.global_step, _figures(entry, "eval_"))
            return
        done = max(state.global_step - self._started_step, 1)
        per_step = (time.monotonic() - self._started_at) / done
        left = state.max_steps - state.global_step
        logger.info(
            "step %d/%d: %s, %.2f s a step%s",
            state.global_step,
            state.max_steps,
            _figures(entry),
            per_step,
            f", about {per_step * left:.0f} s to go" if left else "",
        )


def _figures(entry: Mapping[str, Any], prefix: str = "") -> str:
    """Loss and, where there is one, reward of a log entry, in words."""
    given = {
        name: entry.get(prefix + name) for name in ("loss", "reward") if prefix + name in entry
    }
    return ", ".join(
        f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}"
        for name, value in given.items()
    )


class AdapterMovement(TrainerCallback):
    """Says at the end how far the adapter moved, and ends a job that has taught it nothing, or
    whose last step has spoilt it, which no loss tells any more.

    Nothing, that is when no step had a gradient, or when every weight is what it was. (Weight decay
    alone shrinks weights, so the distance does not tell.)
    """

    def __init__(self, reporter: Reporter, nothing_learned: str) -> None:
        self._reporter = reporter
        self._nothing_learned = nothing_learned
        self._start: WeightCopy | None = None
        self._had_gradient = False

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Before a checkpoint is loaded: what counts is where the job began."""
        self._start = WeightCopy(kwargs["model"], device="cpu")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A resumed run has had one if its optimizer has kept something of it (sgd keeps nothing),
        or its log has a norm of it.
        """
        kept = kwargs["optimizer"].state.values() if state.global_step else ()
        logged = (entry.get("grad_norm") for entry in state.log_history)
        self._had_gradient = any(logged) or any(
            bool(value.any())
            for one in kept
            for name, value in one.items()
            # Of 8 bits, an average of 0 is a code that is not 0, and the table of codes never is;
            # the scales of its blocks are.
            if name != "step" and not name.startswith("qmap")
            if torch.is_tensor(value) and value.is_floating_point()
        )

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self._had_gradient:
            gradients = (p.grad for p in kwargs["model"].parameters())
            self._had_gradient = any(g is not None and bool(g.any()) for g in gradients)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._start is None or state.global_step < state.max_steps:
            return  # a run that was stopped goes on later, and has no end yet
        moved, norm = self._start.distance(), self._start.norm()
        event = AdapterMoved(step=state.global_step, weight_difference_norm=moved, weight_norm=norm)
        self._reporter.log(event.data())
        logger.info("what is trained moved by %.3g; its weights' norm was %.3g", moved, norm)
        if not math.isfinite(moved):
            raise JobFailedError(
                f"what is trained holds numbers that are none after {state.global_step} steps; "
                "lower learning_rate, or keep gradients short with max_grad_norm"
            )
        if not moved or not self._had_gradient:
            raise JobFailedError(
                f"what is trained is where it was after {state.global_step} steps: "
                f"{self._nothing_learned}"
            )


class StepSeed(TrainerCallback):
    """Makes the random numbers of a step a function of the seed and the step alone.

    What happens between steps, an evaluation or a resume, then changes no dropout.
    """

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        torch.manual_seed(derived_seed(args.seed, state.global_step, args.process_index))


class CheckpointCallback(TrainerCallback):
    """Hands each checkpoint on as soon as the trainer has written it, and asks for one when the
    last is `save_minutes` old: a machine that just disappears costs no more than that.

    Not the one of the last step: the trainer, resumed there, would take one step more, and the
    result itself is about to be kept.
    """

    def __init__(self, reporter: Reporter, save_minutes: float) -> None:
        self._reporter = reporter
        self._every_s = save_minutes * 60
        self._saved_at = time.monotonic()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._saved_at = time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # The clocks of ranks differ, and a checkpoint is made by all of them or by none.
        if any_rank(time.monotonic() - self._saved_at >= self._every_s):
            control.should_save = True

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._saved_at = time.monotonic()
        if state.global_step >= state.max_steps:
            return
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        with transferring():
            self._reporter.save_checkpoint(folder, state.global_step)
        logger.info("checkpoint of step %d saved", state.global_step)


class StopOnSignal(TrainerCallback):
    """On SIGTERM: save a checkpoint after the step that is going on, and stop.

    A context manager, because the signal is to be caught before training begins, too: until then it
    ends the process at once, as there is nothing to save.
    """

    def __init__(self) -> None:
        self.signaled = False
        self._training = False
        self._previous: Any = None

    def __enter__(self) -> StopOnSignal:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._on_signal)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._previous)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.signaled = True
        if not self._training:
            raise SystemExit(EXIT_TERMINATED)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._training = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Ranks are signaled at different moments and must stop after the same step.
        self.signaled = any_rank(self.signaled)
        if self.signaled:
            logger.info("asked to stop; saving at step %d", state.global_step)
            control.should_save = True
            control.should_training_stop = True
            control.should_evaluate = False

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stopped within an epoch, the trainer says that it has ended; nothing to test then."""
        if self.signaled and state.epoch != int(state.epoch or 0):
            control.should_evaluate = False

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._training = False


class GPUStatsCallback(TrainerCallback):
    """Memory of the GPU, every ten steps."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not torch.cuda.is_available() or state.global_step % GPU_STATS_EVERY_STEPS:
            return
        free, _ = torch.cuda.mem_get_info()
        self._reporter.log(
            {
                "step": state.global_step,
                "tag": "gpu",
                "gpu_name": torch.cuda.get_device_name(),
                "gpu_memory_allocated_mb": torch.cuda.memory_allocated() / 2**20,
                "gpu_memory_reserved_mb": torch.cuda.memory_reserved() / 2**20,
                "gpu_memory_free_mb": free / 2**20,
            }
        )
