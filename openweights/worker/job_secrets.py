"""The secrets that a job names, opened on the worker that runs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

from openweights.backends.base import Backend
from openweights.credentials import hand_over, jobs_with_handed_over
from openweights.errors import ConfigurationError, InvalidInputError, NotFoundError
from openweights.settings import Settings
from openweights.types import ENDED


def secret_names(params: Mapping[str, object]) -> list[str]:
    """The names in a job's `params`; whatever else is there, none."""
    names = params.get("secrets")
    if not isinstance(names, list):
        return []
    return [name for name in cast("list[object]", names) if isinstance(name, str)]


def drop_handed_over(backend: Backend, home: Path) -> None:
    """Keep nothing for jobs that have ended."""
    for job_id in jobs_with_handed_over(home):
        try:
            is_over = backend.get_job(job_id).status in ENDED
        except NotFoundError:
            is_over = False  # it is just being submitted, unless it was deleted
        if is_over:
            hand_over(home, job_id, {})


def open_secrets(
    names: Sequence[str],
    run_id: int,
    backend: Backend,
    settings: Settings,
    env: Mapping[str, str],
) -> dict[str, str]:
    """Name -> value, for all of `names`.

    In a project they are the organization's; on this machine they are of the environment `env`, of
    who submitted the job, and of its worker.

    Raises:
        InvalidInputError: There is no such secret, or its box was tampered with.
        ConfigurationError: This worker has not the key that opens them.
    """
    if not names:
        return {}
    if backend.team is None:
        remedy = "neither who submitted the job nor its worker has {}: set it, and submit it again"
        _check_all(names, env, remedy)
        return {name: env[name] for name in names}
    if not settings.secrets_key:
        raise ConfigurationError(
            f"this worker has no OPENWEIGHTS_SECRETS_KEY to open {', '.join(names)} with: start "
            "it, or the cluster manager, with the key that `ow env init` has printed"
        )
    from openweights.backends.supabase.sealing import unseal

    boxes = backend.team.job_secrets(run_id)
    _check_all(names, boxes, "the organization has no secret {} (any more): `ow env set` adds it")
    organization_id = backend.organization_id
    return {
        name: unseal(
            boxes[name], settings.secrets_key, organization_id=organization_id, name=name
        ).decode()
        for name in names
    }


def _check_all(names: Sequence[str], found: Mapping[str, str], message: str) -> None:
    absent = [name for name in names if name not in found]
    if absent:
        raise InvalidInputError(message.format(", ".join(absent)))
