"""Which weights a job's model is, settled when the job is submitted.

A fine-tuning job that has not completed is pinned to its newest checkpoint, so that equal names
mean equal weights.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openweights.errors import ConfigError
from openweights.jobs.known_models import ADAPTER_CONFIG, check_name
from openweights.jobs.model_source import (
    base_name,
    check_kept,
    job_named,
    kept_checkpoints,
)
from openweights.models.checkpoint import adapter_shape
from openweights.models.hub_files import cached_file, hub_file, split_commit
from openweights.models.names import (
    CHECKPOINT,
    ModelReference,
    id_in_address,
    model_location,
    model_reference,
)
from openweights.types import ENDED

if TYPE_CHECKING:
    from openweights import OpenWeights

logger = logging.getLogger(__name__)


def pinned_model(ow: OpenWeights, model: str, *, may_wait: bool = False) -> str:
    """`model` with a folder in full, and a job that has not completed with its newest checkpoint.

    Args:
        may_wait: A job that has not ended stays as it is: its model is used once it has completed,
            as `awaited_job` makes sure.

    Raises:
        ConfigError: There is no such folder, job or checkpoint, the job has saved nothing yet, or
            no model is called so.
    """
    model = id_in_address(model)
    reference = model_reference(model)
    match reference.kind:
        case "repository":
            check_name(ow, reference.name)
            return model
        case "folder":
            _check_folder(ow, reference.name)
            return reference.name
        case "job":
            return _pinned_job(ow, reference, may_wait=may_wait)
        case _:
            return model


def _pinned_job(ow: OpenWeights, reference: ModelReference, *, may_wait: bool) -> str:
    job_id = reference.name
    job = job_named(ow, job_id)
    waits = may_wait and job.status not in ENDED
    if reference.part is None and (waits or job.status == "completed"):
        return job_id
    kept = kept_checkpoints(ow, job_id)
    if reference.part is not None:
        check_kept(reference, kept)
        return f"{job_id}/{reference.part}"
    if not kept:
        remedy = (
            f"restart it (`ow restart {job_id}`), or give another model"
            if job.status in ENDED
            else "wait until it has completed, or train with a smaller save_steps"
        )
        raise ConfigError(
            f"model: the job {job_id} is {job.status.replace('_', ' ')} and has saved no "
            f"checkpoint; {remedy}"
        )
    return f"{job_id}/{CHECKPOINT}{max(kept)}"


def pinned_models(ow: OpenWeights, models: Sequence[str], field: str) -> list[str]:
    """Models that are asked together, as `pinned_model` has them; jobs may still train.

    Args:
        field: The parameter that names them.

    Raises:
        ConfigError: One cannot be used, or is named twice.
    """
    pinned = [pinned_model(ow, model, may_wait=True) for model in models]
    if twice := [model for model in pinned if pinned.count(model) > 1]:
        raise ConfigError(f"{field}: {twice[0]} is named twice; give each once")
    return pinned


def check_has_weights(model: str) -> None:
    """See that a model which is to be trained, or computed step by step, is no service.

    Raises:
        ConfigError: It is OpenAI's.
    """
    if model_reference(model).kind == "openai":
        raise ConfigError(
            f"model: {model} is OpenAI's, which keeps its weights; give a model with open weights"
        )


def _check_folder(ow: OpenWeights, folder: str) -> None:
    """See that a folder is that of a model, or of an adapter, where its worker is this machine.

    Raises:
        ConfigError: It has not what each of them has.
    """
    if ow.settings.is_remote:
        logger.warning(
            "model: %s is a folder on this machine; only a worker that has the same folder can "
            "run the job. For pods push it to the Hugging Face hub, and give its id",
            folder,
        )
    elif not any((Path(folder) / name).is_file() for name in ("config.json", ADAPTER_CONFIG)):
        raise ConfigError(
            f"model: the folder {folder} has neither config.json nor {ADAPTER_CONFIG}, so that it "
            "holds no model; correct the path, or give a Hugging Face id (org/name)"
        )


def awaited_job(ow: OpenWeights, model: str) -> list[str]:
    """The job that has to complete before `model` can be used, if there is one."""
    reference = model_reference(model)
    if reference.kind != "job" or reference.part is not None:
        return []
    is_completed = ow.backend.get_job(reference.name).status == "completed"
    return [] if is_completed else [reference.name]


def awaited_jobs(ow: OpenWeights, models: Iterable[str]) -> list[str]:
    """As `awaited_job`, of all of them."""
    return [job_id for model in models for job_id in awaited_job(ow, model)]


def job_base(ow: OpenWeights, job_id: str) -> str:
    """What a fine-tuning job trains on.

    Raises:
        ConfigError: There is no such job.
    """
    return str(job_named(ow, job_id).model)


# ---- adapters ------------------------------------------------------------------------------------


def adapter_base(ow: OpenWeights, model: str, *, ask_hub: bool = True) -> str:
    """The base model that `model` is an adapter on, as far as the client can tell; else itself.

    Raises:
        ConfigError: There is no such job, or no such folder.
    """
    reference = model_reference(model)
    if reference.kind == "job":
        return adapter_base(ow, job_base(ow, reference.name), ask_hub=False)
    if reference.kind == "folder":
        config = Path(reference.name) / ADAPTER_CONFIG
        is_adapter = config.is_file()
        return model_location(split_commit(base_name(config))[0]) if is_adapter else reference.name
    if reference.kind == "repository" and ask_hub:
        return _base_on_hub(reference) or model
    return model


def shape_to_keep(ow: OpenWeights, model: str) -> dict[str, Any]:
    """The fields of a training config that an adapter fixes for what goes on from it, as far as the
    client can tell: of a job, a folder, and a repository that this machine has read before. Nothing
    for every other model.

    Raises:
        ConfigError: There is no such job.
    """
    try:
        reference = model_reference(model)
    except ConfigError:
        return {}  # the check of the config says why
    if reference.kind == "job":
        params = job_named(ow, reference.name).params["validated_params"]
        fields = ("r", "lora_alpha", "use_rslora", "lora_bias", "target_modules")
        is_adapter = params.get("is_peft", True)
        return {field: params[field] for field in fields if is_adapter and field in params}
    config = _config_here(reference)
    return {} if config is None else adapter_shape(json.loads(config.read_text(encoding="utf-8")))


def _config_here(reference: ModelReference) -> Path | None:
    """`adapter_config.json` of an adapter that lies on this machine; None for everything else."""
    if reference.kind == "repository":
        return cached_file(reference.name, _in_part(reference))
    config = Path(reference.name) / ADAPTER_CONFIG
    return config if reference.kind == "folder" and config.is_file() else None


def _base_on_hub(reference: ModelReference) -> str | None:
    """The base of an adapter on the hub; None for a model, and where the hub cannot be asked."""
    config = hub_file(reference.name, _in_part(reference))
    return None if config is None else split_commit(base_name(config))[0]


def _in_part(reference: ModelReference) -> str:
    return f"{reference.part}/{ADAPTER_CONFIG}" if reference.part else ADAPTER_CONFIG
