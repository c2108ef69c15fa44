"""What a training leaves: adapter or model under `uploads/`, with its record, and on the hub."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openweights.errors import ConfigError, JobFailedError, OpenWeightsError
from openweights.events import Pushed, Stage
from openweights.jobs.unsloth.runtime.job_log import one_line
from openweights.jobs.unsloth.runtime.reporting import Reporter
from openweights.jobs.unsloth.validate import TrainingConfig
from openweights.models.hub_files import split_commit
from openweights.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

logger = logging.getLogger(__name__)

UPLOADS = Path("uploads")


def check_push(config: TrainingConfig) -> None:
    """Before anything costs time: the last step of the job must be able to work.

    Raises:
        ConfigError: It is to push, and has no token.
    """
    if config.push_to_hub and not Settings.from_env().hf_token:
        raise ConfigError("push_to_hub: HF_TOKEN is not set where the job runs; set it there")


def keep_result(
    config: TrainingConfig,
    trainer: Trainer,
    tokenizer: PreTrainedTokenizerBase,
    reporter: Reporter,
    record: Mapping[str, Any],
) -> None:
    """Leave the result under uploads/, and push it when that is wanted.

    Raises:
        JobFailedError: It had to be pushed, and was not; the result is kept.
    """
    from openweights.jobs.unsloth.runtime.model_card import model_card

    step = trainer.state.global_step
    reporter.log(Stage(doing="saving the result", step=step).data())
    result, base = _save(config, trainer.model, tokenizer)
    record = {**record, "steps": step}
    for name, content in (("config", record["config"]), ("reproducibility", record)):
        text = json.dumps(content, indent=2, sort_keys=True)
        (UPLOADS / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    history = trainer.state.log_history
    card = partial(model_card, config, record, history, base=base, job_id=reporter.job_id)
    (result / "README.md").write_text(card(), encoding="utf-8")
    error = _push(config, result, reporter, card(is_merged=True))
    reporter.close(completed=True)
    logger.info("done: the %s is in %s", "adapter" if config.is_peft else "model", result)
    if error is not None and config.push_to_hub:
        raise JobFailedError(f"not pushed to the hub as push_to_hub=True asks: {error}")


def _save(
    config: TrainingConfig, model: Any, tokenizer: PreTrainedTokenizerBase
) -> tuple[Path, str]:
    """Write adapter or model, and the tokenizer; their folder, and the name of the base model.

    A whole model is saved in the type in which it came, from float32.
    """
    if config.is_peft:
        folder, base = UPLOADS / "adapter", model.peft_config["default"].base_model_name_or_path
        model.save_pretrained(str(folder))
    else:
        from openweights.models.load import saved_dtype

        folder, base = UPLOADS / "model", str(model.config.name_or_path)
        model.to(saved_dtype(base)).save_pretrained(str(folder), max_shard_size="5GB")
    tokenizer.save_pretrained(str(folder))
    return folder, split_commit(base)[0]


def _push(config: TrainingConfig, result: Path, reporter: Reporter, merged_card: str) -> str | None:
    """Push the result where that is wanted; returns why it is not there, after saying so.

    The training that a failed push would spoil has succeeded: the result is kept in any case, and
    the job fails only where `push_to_hub` is True.
    """
    from openweights.models.hub import push_result

    settings = Settings.from_env()
    if config.push_to_hub is False or not settings.hf_token:
        return None
    reporter.log(Stage(doing="pushing to the hub").data())
    try:
        repo = push_result(
            config,
            result,
            job_id=reporter.job_id,
            token=settings.hf_token,
            org=settings.hf_org,
            merged_card=merged_card,
            scratch=settings.scratch,
        )
    except Exception as error:  # noqa: BLE001 - whatever it is, the training it ends has succeeded
        known = isinstance(error, OpenWeightsError)
        text = str(error) if known else one_line(error)
        logger.error("not pushed to the hub; the result is kept: %s", text, exc_info=not known)
        reporter.log(Pushed(push_error=text).data())
        return text
    reporter.log(Pushed(pushed_to=repo).data())
    return None


def push_model(
    config: TrainingConfig,
    finetuned_model_id: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> str:
    """Push a trained adapter, or with `merge_before_push` the model that it makes, as `train` does
    by itself; returns the repository.

    Raises:
        ConfigError: HF_TOKEN is not set.
        ConfigurationError: The hub refused it, or could not be reached.
    """
    from openweights.models.hub import push_result

    settings = Settings.from_env()
    if not settings.hf_token:
        raise ConfigError("push_model: HF_TOKEN is not set where the job runs; set it there")
    named = config.model_copy(update={"finetuned_model_id": finetuned_model_id})
    with tempfile.TemporaryDirectory(dir=settings.scratch) as folder:
        model.save_pretrained(folder, save_embedding_layers=False)
        tokenizer.save_pretrained(folder)
        asked = {"job_id": "", "token": settings.hf_token, "org": settings.hf_org}
        return push_result(named, Path(folder), scratch=settings.scratch, **asked)
