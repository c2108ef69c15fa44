"""Where the weights of a model come from: a folder, the hub, or a fine-tuning job of the store.

A job's model is its adapter; while it trains, its newest kept checkpoint.
"""

from __future__ import annotations

import json
import logging
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openweights.errors import ConfigError, NotFoundError
from openweights.events import Checkpoint, HubCommit, Stage
from openweights.jobs.known_models import ADAPTER_CONFIG, check_within_reach
from openweights.models.checkpoint import folder_state
from openweights.models.hub_files import at_commit, base_in, commit_of, hub_file, split_commit
from openweights.models.names import CHECKPOINT, ModelReference, location_here, model_reference
from openweights.progress import transferring
from openweights.types import JobRecord

if TYPE_CHECKING:
    from openweights import OpenWeights

logger = logging.getLogger(__name__)

# Where a fine-tuning job leaves an adapter, or a whole model that it has trained.
RESULTS = ("adapter/", "model/")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Weights that can be loaded.

    Attributes:
        base: Folder of the model, or its repository at the commit that the job takes, where the
            hub or its cache tells which that is (`at_commit`).
        adapter: Folder of an adapter on it; None for the model itself.
        name: What it is called.
    """

    base: str
    adapter: Path | None
    name: str

    @property
    def base_label(self) -> str:
        """What the base is called in a line, whatever its organization, folder or commit."""
        return Path(split_commit(self.base)[0]).name


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
        source = _described(ow, _fetch(ow, model_reference(model), target, say), model)
        check_within_reach(source.base)
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
        yield (job := job_named(ow, reference.name))
        model = str(job.model)


def job_named(ow: OpenWeights, job_id: str) -> JobRecord:
    """The job whose model is meant.

    Raises:
        ConfigError: There is none of that id.
    """
    try:
        return ow.backend.get_job(job_id)
    except NotFoundError:
        raise ConfigError(f"model: the store has no job {job_id}; correct the id") from None


def stages(told: logging.Logger, log: Callable[[dict[str, Any]], object]) -> Callable[[str], None]:
    """For `fetch_model`: what it says, in the log and as what the job does now."""

    def say(text: str) -> None:
        told.info("%s", text)
        log(Stage(doing=text).data())

    return say


def _fetch(
    ow: OpenWeights, reference: ModelReference, target: Path, say: Callable[[str], None]
) -> str:
    """Where the weights are to be loaded from, once they are here or the hub knows them."""
    if reference.kind == "job":
        return str(_fetch_job(ow, reference, target))
    if reference.part is not None:
        from openweights.models.hub import download

        check_within_reach(reference.name)
        commit = split_commit(_at_commit_of_job(ow, reference.name))[1]
        return str(download(reference.name, reference.part, commit=commit))
    from openweights.models.smollm2 import get_if_named

    get_if_named(reference.name, say)
    return reference.name


def _fetch_job(ow: OpenWeights, reference: ModelReference, target: Path) -> Path:
    folder = target / reference.name
    if reference.part is not None:
        kept = kept_checkpoints(ow, reference.name)
        check_kept(reference, kept)
        step = int(reference.part.removeprefix(CHECKPOINT))
        unpack_checkpoint(ow, kept[step], folder)
        return folder / reference.part
    runs = ow.jobs.retrieve(reference.name).runs
    for event in runs[-1].events if runs else ():
        path = str(event.data.get("path", ""))
        result, _, name = path.partition("/")
        if f"{result}/" in RESULTS and "/" not in name:
            ow.files.download(event.data["file"], folder / name)
    if not any((folder / name).is_file() for name in (ADAPTER_CONFIG, "config.json")):
        raise ConfigError(f"model: the job {reference.name} has left no model; choose another")
    return folder


def _described(ow: OpenWeights, location: str, name: str) -> ModelSource:
    from openweights.models.load import clear_load_errors

    with clear_load_errors(name):
        location = _at_commit_of_job(ow, location)
        config = _adapter_config(location_here(location))
    if config is None:
        return ModelSource(location, None, name)
    if not Path(location_here(location)).is_dir():
        from openweights.models.hub import download

        config = download(location) / ADAPTER_CONFIG
    base = base_name(config)
    with clear_load_errors(base):
        base = _at_commit_of_job(ow, base)
    return ModelSource(base if split_commit(base)[1] else location_here(base), config.parent, name)


def _adapter_config(location: str) -> Path | None:
    # Not by transformers or peft, which must not be imported before unsloth.
    if Path(location).is_dir():
        config = Path(location) / ADAPTER_CONFIG
        return config if config.is_file() else None
    return hub_file(location, ADAPTER_CONFIG)  # where that is None, loading says why


def _at_commit_of_job(ow: OpenWeights, location: str) -> str:
    """A repository at a commit, with what it is loaded from there in the hub's cache: the commit
    that it names, else the one that this job has found first, whatever its branch has by now. What
    is a folder here stays one; a repository whose commit nobody tells stays as it is.
    """
    repository, commit = split_commit(location)
    if commit is None and Path(location_here(location)).is_dir():
        return location
    commit = _recorded_commit(ow, repository, commit)
    if commit is None:
        return location  # loading says why
    from openweights.models.hub import download_commit

    download_commit(repository, commit)
    return at_commit(repository, commit)


def _recorded_commit(ow: OpenWeights, repository: str, named: str | None) -> str | None:
    """`named`, else what the job has recorded, else what the hub says; the first is recorded."""
    if ow.settings.run_id is None:
        return named or commit_of(repository)
    events = ow.backend.list_events(job_id=ow.run.job_id, type=HubCommit.type)
    known = [HubCommit.of(event.data) for event in events]
    first = next((each.commit for each in known if each.repository == repository), None)
    if (commit := named or first or commit_of(repository)) is not None and first is None:
        ow.run.log(HubCommit(repository=repository, commit=commit).data())
        ow.run.flush()  # the next model of this job may be of the same repository
    return commit


def base_name(config: Path) -> str:
    """What an adapter's config names as its base, at the commit that it says.

    Raises:
        ConfigError: It is no LoRA, or names none.
    """
    content: dict[str, Any] = json.loads(config.read_text(encoding="utf-8"))
    if not content.get("base_model_name_or_path") or content.get("peft_type") != "LORA":
        raise ConfigError(f"model: {config} is no LoRA adapter that names its base; choose another")
    return base_in(content)


# ---- checkpoints ---------------------------------------------------------------------------------


def kept_checkpoints(ow: OpenWeights, job_id: str) -> dict[int, str]:
    """The checkpoints of a job that are still in the store: step -> file id."""
    events = ow.backend.list_events(job_id=job_id, type=Checkpoint.type)
    named = {saved.step: str(saved.file) for saved in (Checkpoint.of(e.data) for e in events)}
    return {step: file for step, file in named.items() if _is_stored(ow, file)}


def _is_stored(ow: OpenWeights, file: str) -> bool:
    try:
        ow.backend.get_file(file)
    except NotFoundError:
        return False
    return True


def check_kept(reference: ModelReference, kept: Mapping[int, str]) -> None:
    """See that a checkpoint that is named is there.

    Raises:
        ConfigError: It is not; names those that are.
    """
    if any(reference.part == f"{CHECKPOINT}{step}" for step in kept):
        return
    known = ", ".join(f"{CHECKPOINT}{step}" for step in sorted(kept)) or "none"
    raise ConfigError(
        f"model: the job {reference.name} has no {reference.part}; kept: {known}. A job keeps its "
        "newest checkpoint while it trains, and its adapter afterwards"
    )


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
