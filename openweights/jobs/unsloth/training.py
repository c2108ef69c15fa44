"""Worker side of a fine-tuning job: `python -m openweights.jobs.unsloth.training JOB_ID`, or with
the path of a config in JSON instead.

Reads the config, loads model and data, lets the loss's own trainer train, and leaves the result
under `uploads/`. A custom trainer calls `train(config, extra_callbacks=[…])`. trl, transformers and
peft are imported after the engine was chosen, because unsloth must come before them.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openweights.errors import ConfigError, OpenWeightsError
from openweights.jobs.unsloth.launcher import EXIT_TERMINATED, is_rank, rank, run_ranks
from openweights.jobs.unsloth.messages import training_config
from openweights.jobs.unsloth.reporting import FolderReporter, Reporter, StoreReporter
from openweights.jobs.unsloth.rows import check_rows, numbered_rows
from openweights.jobs.unsloth.validate import TrainingConfig
from openweights.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback

    from openweights.client.runs import Run

logger = logging.getLogger(__name__)

UPLOADS = Path("uploads")
Rows = list[dict[str, Any]]


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
    if not isinstance(config, TrainingConfig):
        config = training_config(config)
    reporter = _reporter(config, run)
    from openweights.jobs.unsloth.model import load_model, prepare_engine

    prepare_engine(config)
    from openweights.jobs.unsloth.callbacks import StopOnSignal
    from openweights.jobs.unsloth.ranks import leave

    with StopOnSignal() as stop:
        train_rows = _load_rows(config, reporter, "training_file", config.training_file)
        test_rows = None
        if config.test_file is not None:
            test_rows = _load_rows(config, reporter, "test_file", config.test_file)
        model, tokenizer = load_model(config)
        callbacks = _callbacks(config, reporter, tokenizer, stop)
        trainer = _train_by_loss(
            config,
            model,
            tokenizer,
            (train_rows, test_rows),
            [*callbacks, *extra_callbacks],
            reporter,
        )
        if stop.signaled and trainer.state.global_step < trainer.state.max_steps:
            reporter.close(completed=False)
            leave()
            raise SystemExit(EXIT_TERMINATED)
    if trainer.is_world_process_zero():
        _finish(config, trainer, tokenizer, reporter)
    leave()
    return trainer


def _reporter(config: TrainingConfig, run: Run | None) -> Reporter:
    from openweights import OpenWeights
    from openweights.jobs.unsloth.ranks import FollowerReporter

    ow = OpenWeights()
    if run is None and ow.settings.run_id is None:
        reporter: Reporter = FolderReporter(UPLOADS, config)
    else:
        reporter = StoreReporter(ow, run or ow.run)
    return FollowerReporter(reporter, rank()) if rank() else reporter


def _load_rows(config: TrainingConfig, reporter: Reporter, field: str, file: str) -> Rows:
    path = reporter.fetch(file, Path("data") / f"{field}.jsonl")
    with path.open("rb") as lines:
        numbered = list(numbered_rows(lines))
    check_rows(numbered, config, name=field)
    return [row for _, row in numbered]


def _callbacks(
    config: TrainingConfig,
    reporter: Reporter,
    tokenizer: PreTrainedTokenizerBase,
    stop: TrainerCallback,
) -> list[TrainerCallback]:
    from openweights.jobs.unsloth.callbacks import (
        CheckpointCallback,
        GPUStatsCallback,
        MetricsCallback,
        StepSeed,
    )
    from openweights.jobs.unsloth.sampling import Sampler

    samplers = []
    for index, sampling in enumerate(config.sampling_callbacks or []):
        field = f"sampling_callbacks[{index}].dataset"
        rows = _load_rows(config, reporter, field, sampling.dataset)
        samplers.append(Sampler(sampling, rows, tokenizer, reporter, seed=config.seed))
    return [
        StepSeed(),
        MetricsCallback(reporter),
        GPUStatsCallback(reporter),
        *samplers,
        CheckpointCallback(reporter),
        stop,
    ]


def _train_by_loss(
    config: TrainingConfig,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: tuple[Rows, Rows | None],
    callbacks: Sequence[TrainerCallback],
    reporter: Reporter,
) -> Trainer:
    checkpoint = reporter.newest_checkpoint(Path(config.output_dir))
    resume_from = None if checkpoint is None else str(checkpoint)
    match config.loss:
        case "sft":
            from openweights.jobs.unsloth.sft import sft_train

            return sft_train(
                config, model, tokenizer, *rows, callbacks=callbacks, resume_from=resume_from
            )
        case "sdft":
            from openweights.jobs.unsloth.sdft import sdft_train

            return sdft_train(
                config,
                model,
                tokenizer,
                *rows,
                callbacks=callbacks,
                resume_from=resume_from,
                log_event=reporter.log,
            )
        case other:
            raise ConfigError(f"loss: {other!r} is not available yet; use 'sft' or 'sdft'")


def _finish(
    config: TrainingConfig, trainer: Trainer, tokenizer: PreTrainedTokenizerBase, reporter: Reporter
) -> None:
    """Leave the result under uploads/, and push it when that is wanted."""
    from openweights.jobs.unsloth.record import reproducibility

    adapter = UPLOADS / "adapter"
    model: Any = trainer.model
    # "auto" would ask the hub about the base model's vocabulary; no adapter of ours trains it.
    model.save_pretrained(str(adapter), save_embedding_layers=False)
    tokenizer.save_pretrained(str(adapter))
    record = reproducibility(config, trainer)
    for name, content in (("config", config.model_dump(mode="json")), ("reproducibility", record)):
        text = json.dumps(content, indent=2, sort_keys=True)
        (UPLOADS / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    _push(config, adapter, reporter)
    reporter.close(completed=True)
    logger.info("done: the adapter is in %s", adapter)


def _push(config: TrainingConfig, adapter: Path, reporter: Reporter) -> None:
    """A push that fails is told in log and events: the training it would spoil has succeeded."""
    from openweights.jobs.unsloth.hub import push_result

    settings = Settings.from_env()
    if config.push_to_hub is False or (config.push_to_hub is None and not settings.hf_token):
        return
    try:
        if not settings.hf_token:
            raise ConfigError("push_to_hub: HF_TOKEN is not set where the job runs; set it there")
        repo = push_result(
            config, adapter, job_id=reporter.job_id, token=settings.hf_token, org=settings.hf_org
        )
    except Exception as error:  # noqa: BLE001 - whatever it is, the training it ends has succeeded
        known = isinstance(error, OpenWeightsError)
        text = str(error) if known else _one_line(error)
        logger.error("not pushed to the hub; the result is kept: %s", text, exc_info=not known)
        reporter.log({"type": "push", "push_error": text})
        return
    reporter.log({"type": "push", "pushed_to": repo})


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
    _set_up_logging()
    if len(arguments) != 1:
        logger.error("usage: python -m openweights.jobs.unsloth.training <job id | config.json>")
        return 2
    try:
        config = load_config(arguments[0])
        if (processes := Settings.from_env().n_gpus) > 1 and not is_rank():
            return run_ranks(processes, arguments)
        train(config)
    except OpenWeightsError as error:
        logger.debug("why", exc_info=True)
        logger.error("%s", error)
        return 1
    except Exception as error:  # noqa: BLE001 - the end of the process: told in full, then in one line
        logger.exception("training failed")
        logger.error("%s", _one_line(error))
        return 1
    return 0


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    full = isinstance(error, OSError) and error.errno == errno.ENOSPC
    if full or "No space left" in text or "failed writing file" in text:
        return "the disk is full; free some space, or raise save_steps"
    if "out of memory" in text.lower():
        return (
            "the GPU's memory is full; lower per_device_train_batch_size or max_seq_length, use "
            "load_in_4bit=True, or ask for more with requires_vram_gb"
        )
    return f"{type(error).__name__}: {text[:500]}"


def _set_up_logging() -> None:
    """Our lines on standard error, of several ranks those of the first, and errors.

    No progress bars: they would fill the log with fragments.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    logging.basicConfig(
        level=logging.ERROR if rank() else logging.INFO,
        format="%(asctime)s %(levelname)s %(message)s",
        stream=sys.stderr,
    )
    for noisy in ("httpx", "huggingface_hub", "filelock", "transformers.trainer_utils"):
        logging.getLogger(noisy).setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
