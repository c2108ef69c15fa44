"""Worker side of a fine-tuning job: `python -m openweights.jobs.unsloth.training JOB_ID`, or with
the path of a config in JSON instead.

Reads the config, loads model and data, lets the loss's own trainer train, and leaves the result
under `uploads/`. A custom trainer calls `train(config, extra_callbacks=[…])`. trl, transformers and
peft are imported after the engine was chosen, because unsloth must come before them.
"""

from __future__ import annotations

import json
import logging
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openweights import progress
from openweights.client.datasets import check_dataset
from openweights.errors import ConfigError
from openweights.events import Stage
from openweights.jobs.known_models import asks_hub
from openweights.jobs.model_source import ModelSource, fetch_model, stages
from openweights.jobs.pinning import shape_to_keep
from openweights.jobs.unsloth.config.file_rows import open_rows, rows_taken
from openweights.jobs.unsloth.config.first_look import beginning, check_files
from openweights.jobs.unsloth.config.rows import check_rows, held_out, numbered_rows
from openweights.jobs.unsloth.runtime.importing import importing
from openweights.jobs.unsloth.runtime.job_log import exit_status, set_up_logging
from openweights.jobs.unsloth.runtime.launcher import (
    EXIT_TERMINATED,
    is_rank,
    launched_ranks,
    rank,
    run_ranks,
)
from openweights.jobs.unsloth.runtime.reporting import (
    FolderReporter,
    FollowerReporter,
    Reporter,
    StoreReporter,
)
from openweights.jobs.unsloth.runtime.result import (
    UPLOADS,
    check_push,
    keep_result,
    push_model,  # noqa: F401 - trainers of one's own have it from here
)
from openweights.jobs.unsloth.tracking.report_to import check_report_to, report_callbacks
from openweights.jobs.unsloth.validate import DatasetRef, TrainingConfig, training_config
from openweights.settings import Settings

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback

    from openweights import OpenWeights
    from openweights.client.runs import Run
    from openweights.models.load import TrainingEngine

logger = logging.getLogger(__name__)

Rows = Sequence[dict[str, Any]]
# Why a run has taught the adapter nothing, where it has.
NOTHING_LEARNED = {
    "sft": "no row has a token to learn with a weight other than 0, or learning_rate was 0 all "
    "along; look at the weights, and at warmup_steps",
    "sdft": "no completion had a token that counts, or student and teacher agree; lower "
    "sdft_skip_tokens, or look at the demonstrations",
    "dpo": "no pair had a gradient; look at the rows, and at warmup_steps",
    "orpo": "no pair had a gradient; look at the rows, and at warmup_steps",
    "grpo": "in no step did the rewards of a prompt's completions differ, as they were equal or "
    "could not be had, so that none was better than another; look at the reward function and at "
    "what is sampled",
}


def train(
    config: TrainingConfig | Mapping[str, Any],
    *,
    run: Run | None = None,
    extra_callbacks: Sequence[TrainerCallback] = (),
) -> Trainer:
    """Run a fine-tuning job in the current folder, and return its trainer.

    Args:
        run: Receives events, samples and checkpoints; None for the run that this process belongs
            to, or, outside a job, the folder `uploads/`.
        extra_callbacks: Called after our own.

    Raises:
        OpenWeightsError: What was asked for cannot be done; one line.
        SystemExit: The job was asked to stop; its checkpoint is kept.
    """
    from openweights import OpenWeights

    ow = OpenWeights()
    if not isinstance(config, TrainingConfig):
        config = training_config({**shape_to_keep(ow, str(config.get("model", ""))), **config})
    check_report_to(config.report_to)
    check_push(config)
    reporter = _reporter(ow, config, run)
    with progress.heard_by(reporter.heartbeat):
        return _train(ow, config, reporter, extra_callbacks)


def _train(
    ow: OpenWeights,
    config: TrainingConfig,
    reporter: Reporter,
    extra_callbacks: Sequence[TrainerCallback],
) -> Trainer:
    reporter.log(Stage(doing="starting").data())
    with importing("torch"):
        from openweights.jobs.unsloth.runtime.ranks import join, leave, shares_layers
        from openweights.models.load import load_model, prepare_engine

    source = _fetched_model(ow, config, reporter)
    located = config.model_copy(update={"model": source.base})
    spread = shares_layers(located)
    with importing("trl"):
        engine = prepare_engine(located, goes_on=source.adapter is not None)
        from trl import SFTTrainer  # noqa: F401 - what nearly all of it is imported for
    from openweights.jobs.unsloth.callbacks import StopOnSignal
    from openweights.jobs.unsloth.runtime.memory import (
        out_of_memory_explained,
        refuse_what_cannot_fit,
    )
    from openweights.jobs.unsloth.runtime.record import reproducibility

    with StopOnSignal() as stop:
        data = _read_data(config, reporter, source)
        rows = _split(config, data)
        refuse_what_cannot_fit(located, gpus=launched_ranks() if spread else 1)
        if spread:
            logger.info("the model's layers are spread over %d processes", launched_ranks())
            join()
        reporter.log(Stage(doing="loading the model").data())
        model, tokenizer = load_model(located, engine, source.adapter, spread=spread)
        # The other ranks have copies of their own, and say nothing.
        record = {} if rank() else reproducibility(config, model, engine, source.base)
        callbacks = [
            *_callbacks(config, reporter, record, stop),
            *_trackers(config, reporter, model, tokenizer, data),
        ]
        callbacks += extra_callbacks
        with out_of_memory_explained(located):
            trainer = _train_by_loss(config, model, tokenizer, rows, callbacks, reporter, engine)
        if stop.signaled and trainer.state.global_step < trainer.state.max_steps:
            reporter.close(completed=False)
            leave()
            raise SystemExit(EXIT_TERMINATED)
    if trainer.is_world_process_zero():
        keep_result(config, trainer, tokenizer, reporter, record)
    leave()
    return trainer


def _reporter(ow: OpenWeights, config: TrainingConfig, run: Run | None) -> Reporter:
    if run is None and ow.settings.run_id is None:
        reporter: Reporter = FolderReporter(UPLOADS, config)
    else:
        reporter = StoreReporter(ow, run or ow.run, config.keep_checkpoints)
    return FollowerReporter(reporter, rank()) if rank() else reporter


def _fetched_model(ow: OpenWeights, config: TrainingConfig, reporter: Reporter) -> ModelSource:
    """Where the weights are by now; each rank has a copy of what comes from the store."""
    folder = Path("model") / f"rank-{rank()}" if rank() else Path("model")
    asking = "asking the hub for the model" if asks_hub(config.model) else "fetching the model"
    reporter.log(Stage(doing=asking).data())
    return fetch_model(ow, config.model, folder, stages(logger, reporter.log))


def _read_data(
    config: TrainingConfig, reporter: Reporter, source: ModelSource
) -> dict[DatasetRef, Rows]:
    """The rows of all datasets, checked as far as that can be done without the model's weights."""
    reporter.log(Stage(doing="reading the rows").data())
    data = {ref: _load_rows(config, reporter, ref) for ref in config.datasets()}
    _check_rendering(config, source, data)
    return data


def _load_rows(config: TrainingConfig, reporter: Reporter, ref: DatasetRef) -> Rows:
    with progress.transferring():
        path = reporter.fetch(ref.file, ref.local_path)
    rows = open_rows(path)
    if Path(ref.file).is_file():  # what is in the store has been checked when it was uploaded
        check_dataset(rows.stream(), ref.purpose, path.name)
    check_rows(numbered_rows(rows.stream()), config, ref)
    return rows


def _check_rendering(
    config: TrainingConfig, source: ModelSource, data: Mapping[DatasetRef, Rows]
) -> None:
    """Find out what the chat template and the limits do to rows before the model is loaded."""
    from openweights.models.load import tokenizer_of

    place = str(source.adapter or source.base)
    tokenizer = tokenizer_of(place, source.base, config.chat_template, config.template_options)
    for ref, rows in data.items():
        numbered = ((getattr(row, "line", number), row) for number, row in enumerate(rows, 1))
        check_files(tokenizer, [beginning(ref, numbered)], config)


def _split(config: TrainingConfig, data: Mapping[DatasetRef, Rows]) -> tuple[Rows, Rows | None]:
    """Rows to train on, and to test with where something is tested."""
    named = {ref.name: rows for ref, rows in data.items()}
    if config.holdout_fraction is not None:
        return hold_out(named["training_file"], config.holdout_fraction, config.seed)
    return named["training_file"], named.get("test_file")


def hold_out(rows: Rows, fraction: float, seed: int) -> tuple[Rows, Rows]:
    """Rows to train on and to test with, both in their order; the same ones for the same seed.

    Raises:
        DatasetError: There are too few rows for both.
    """
    count = held_out(len(rows), fraction)
    held = set(random.Random(seed).sample(range(len(rows)), count))
    logger.info("%d of %d rows are held out as the test set", count, len(rows))
    train = (index for index in range(len(rows)) if index not in held)
    return rows_taken(rows, train), rows_taken(rows, sorted(held))


def _is_tracked(config: TrainingConfig) -> bool:
    asked = (config.sampling_callbacks, config.logp_callback_datasets, config.mcq_callbacks)
    return any(asked) or config.kl_to_base_steps is not None


def _callbacks(
    config: TrainingConfig, reporter: Reporter, record: Mapping[str, Any], stop: TrainerCallback
) -> list[TrainerCallback]:
    from openweights.jobs.unsloth.callbacks import (
        AdapterMovement,
        CheckpointCallback,
        GPUStatsCallback,
        MetricsCallback,
        StepSeed,
    )

    return [
        StepSeed(),
        MetricsCallback(reporter, record, measures=_is_tracked(config)),
        GPUStatsCallback(reporter),
        AdapterMovement(reporter, NOTHING_LEARNED[config.loss]),
        *([] if rank() else report_callbacks(config.report_to, UPLOADS)),
        CheckpointCallback(reporter, config.save_minutes),
        stop,
    ]


def _trackers(
    config: TrainingConfig,
    reporter: Reporter,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    data: Mapping[DatasetRef, Rows],
) -> list[TrainerCallback]:
    """What measures the model while it trains."""
    from openweights.client.questions import parse_question
    from openweights.jobs.unsloth.tracking.callbacks import LogProbTracker, MultipleChoiceTracker
    from openweights.jobs.unsloth.tracking.logprob_rows import scored_rows
    from openweights.jobs.unsloth.tracking.sampling import Sampler
    from openweights.models.tokens import eos_token_ids

    trackers: list[TrainerCallback] = []
    if config.kl_to_base_steps is not None:
        from openweights.generation.choose import generation_engine
        from openweights.jobs.unsloth.distillation.following import DistanceToBase

        # It answers once: an engine with room of its own would keep that for the whole run.
        answering = generation_engine("transformers", model, tokenizer)
        schedule = config.kl_to_base_steps
        trackers.append(DistanceToBase(answering, tokenizer, reporter.log, schedule))
    for ref, rows in data.items():
        match ref.field, ref.key:
            case "sampling_callbacks", int(index):
                settings = (config.sampling_callbacks or [])[index]
                trackers.append(Sampler(settings, rows, tokenizer, reporter, seed=config.seed))
            case "logp_callback_datasets", str(name):
                scored = scored_rows(
                    rows,
                    tokenizer,
                    ends=eos_token_ids(model, tokenizer),
                    train_on=config.train_on,
                    limit=config.max_seq_length,
                    name=ref.name,
                )
                when = {"schedule": config.eval_every_n_steps, "batch_size": config.eval_batch_size}
                trackers.append(LogProbTracker(name, scored, tokenizer, reporter, **when))
            case "mcq_callbacks", int(index):
                asked = [parse_question(row) for row in rows]
                choices = (config.mcq_callbacks or [])[index]
                trackers.append(MultipleChoiceTracker(choices, asked, tokenizer, reporter))
    return trackers


def _train_by_loss(
    config: TrainingConfig,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: tuple[Rows, Rows | None],
    callbacks: Sequence[TrainerCallback],
    reporter: Reporter,
    engine: TrainingEngine,
) -> Trainer:
    reporter.log(Stage(doing="preparing the rows").data())
    with progress.transferring():
        checkpoint = reporter.newest_checkpoint(Path(config.output_dir))
    resume_from = None if checkpoint is None else str(checkpoint)
    common: dict[str, Any] = {"callbacks": callbacks, "resume_from": resume_from}
    match config.loss:
        case "sft":
            from openweights.jobs.unsloth.sft import sft_train

            return sft_train(config, model, tokenizer, *rows, **common)
        case "sdft":
            from openweights.jobs.unsloth.sdft import sdft_train

            common |= {"fetch": reporter.fetch, "log_event": reporter.log}
            return sdft_train(config, model, tokenizer, *rows, **common)
        case "grpo":
            from openweights.jobs.unsloth.grpo_ft import grpo_train

            common |= {"fetch": reporter.fetch, "log_event": reporter.log, "engine": engine}
            return grpo_train(config, model, tokenizer, *rows, **common)
        case "dpo" | "orpo":
            from openweights.jobs.unsloth.preference.trainer import preference_train

            return preference_train(config, model, tokenizer, *rows, **common)


def create_dataset(rows: Rows, loss: str) -> Dataset:
    """Rows as a `datasets.Dataset`, for trainers of one's own: of conversations their messages
    alone, of everything else all columns. The trainers here take the rows themselves.
    """
    from datasets import Dataset

    own = [{"messages": row["messages"]} if loss == "sft" else dict(row) for row in rows]
    return Dataset.from_list(own)


def load_config(source: str) -> TrainingConfig:
    """The config of a job, by the job's id or the path of a JSON file.

    Raises:
        OpenWeightsError: There is neither, or it is wrong.
    """
    if source.endswith(".json") or Path(source).is_file():
        try:
            params = json.loads(Path(source).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{source}: cannot be read as JSON ({error}); correct it") from None
        if not isinstance(params, dict):
            raise ConfigError(f"{source}: must hold one JSON object with the parameters")
        return training_config(params)
    from openweights import OpenWeights

    job = OpenWeights().jobs.retrieve(source)
    return training_config(job.params["validated_params"])


def main(arguments: Sequence[str]) -> int:
    """Train; the exit status tells whether it went well, the last line of the log why not."""
    set_up_logging()
    if len(arguments) != 1:
        logger.error("usage: python -m openweights.jobs.unsloth.training <job id | config.json>")
        return 2
    return exit_status(lambda: _run(arguments), "training failed")


def _run(arguments: Sequence[str]) -> int:
    config = load_config(arguments[0])
    if (processes := Settings.from_env().n_gpus) > 1 and not is_rank():
        return run_ranks(processes, arguments)
    train(config)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
