"""`ow.secrets`: what jobs may need and nobody should read, kept by the organization.

A value is sealed on this machine, with the organization's public key, and cannot be read back: only
a worker that runs a job which names it opens it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from openweights.credentials import hand_over
from openweights.errors import (
    ConfigError,
    ConfigurationError,
    InvalidInputError,
    NotFoundError,
    shown,
)
from openweights.settings import job_variables
from openweights.types import JobRecord, JobSpec, SecretRecord

if TYPE_CHECKING:
    from openweights.backends.base import TeamStore
    from openweights.client import OpenWeights

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,199}", re.ASCII)
# The worker sets these for each job.
_TAKEN = frozenset({"PATH", "PYTHONPATH", "N_GPUS", "SUPABASE_URL", "SUPABASE_ANON_KEY"})
_KEY = "api_key"  # the parameter that holds one
_TAKEN_PREFIX = "OPENWEIGHTS_"
# Linux takes 128 KiB for one variable.
_MOST_BYTES = 64 << 10


class SecretCollection:
    """The organization's secrets, which become variables of the jobs that name them."""

    def __init__(self, ow: OpenWeights) -> None:
        self._ow = ow

    def create_key(self) -> str:
        """Make the pair of keys; returns the private one, which is stored nowhere.

        It belongs into the environment of workers, as `OPENWEIGHTS_SECRETS_KEY`; a cluster manager
        that has it gives it to its pods. Only an admin may make one.

        Raises:
            InvalidStateError: There are secrets, which only the present key opens.
            ConfigurationError: You are no admin, or the store is the one on this machine.
        """
        from openweights.backends.supabase.sealing import new_key_pair

        pair = new_key_pair()
        self._team.set_secrets_key(pair.public)
        return pair.private

    def has_key(self) -> bool:
        """Whether an admin has made the pair of keys."""
        return self._team.secrets_key() is not None

    def set(self, values: Mapping[str, str]) -> None:
        """Add or replace secrets, by name.

        Raises:
            InvalidInputError: One of them cannot be a variable of a job; nothing was stored.
            ConfigurationError: There is no public key yet, or the store is on this machine.
        """
        from openweights.backends.supabase.sealing import seal

        if not isinstance(cast("object", values), Mapping):
            raise InvalidInputError("the values are no dict; give {'HF_TOKEN': '…'}")
        content = {check_secret_name(name): _checked(name, text) for name, text in values.items()}
        team = self._team
        public_key = team.secrets_key()
        if public_key is None:
            raise ConfigurationError(
                "the organization has no key to seal secrets with: an admin makes it, with "
                "`ow env init`"
            )
        organization_id = team.organization_id
        for name, value in content.items():
            box = seal(value, public_key, organization_id=organization_id, name=name)
            team.set_secret(name, box)

    def list(self) -> list[SecretRecord]:
        """Names and moments, never values."""
        return self._team.list_secrets()

    def delete(self, name: str) -> None:
        """Remove one; raises NotFoundError."""
        if not self._team.delete_secret(check_secret_name(name)):
            raise NotFoundError(f"the organization has no secret {name}; `ow env ls` lists them")

    @property
    def _team(self) -> TeamStore:
        team = self._ow.backend.team
        if team is None:
            raise ConfigurationError(
                "secrets are kept by a Supabase project (`ow login`); a job of the store on this "
                "machine has the variables of its worker's environment"
            )
        return team


def without_keys(job: JobRecord) -> JobRecord:
    """The job as people and programs may be shown it: the key of a deployed model is hidden."""
    params = job.validated_params
    if not params.get(_KEY):
        return job
    hidden = {**params, _KEY: "(hidden)"}
    return replace(job, params={**job.params, "validated_params": hidden})


def wanted_secrets(ow: OpenWeights, names: Iterable[str] | str) -> list[str]:
    """What a job's `secrets` come to: sorted, each once.

    Raises:
        ConfigError: One is no name, or the organization has no such secret. The store on this
            machine cannot tell: there the run fails if its worker lacks the variable.
    """
    given = [names] if isinstance(names, str) else list(names)
    try:
        wanted = sorted({check_secret_name(name) for name in given})
    except InvalidInputError as error:
        raise ConfigError(f"secrets: {error}") from None
    if wanted and ow.backend.team is not None:
        known = {secret.name for secret in ow.secrets.list()}
        if absent := [name for name in wanted if name not in known]:
            raise ConfigError(
                f"secrets: the organization has no {', '.join(absent)}; `ow env set NAME` adds one"
                + (f", there are {', '.join(sorted(known))}" if known else "")
            )
    return wanted


def hand_over_keys(ow: OpenWeights, job: JobSpec) -> None:
    """Let a job on this machine have the keys of this process, not only those that its worker was
    started with, perhaps by another one.

    Raises:
        InvalidInputError: They cannot be kept below the home.
    """
    if ow.backend.team is None:
        home = ow.settings.home
        try:
            hand_over(home, job.id, job_variables(job.params.get("secrets", ())))
        except OSError as error:
            raise InvalidInputError(f"cannot write to {home}: {error.strerror}") from error


def check_secret_name(name: object) -> str:
    """The name.

    Raises:
        InvalidInputError: It cannot be that of a job's variable, or is one that workers set.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidInputError(
            f"{shown(name)} cannot name a secret: use letters, digits and '_', such as HF_TOKEN"
        )
    if name in _TAKEN or name.upper().startswith(_TAKEN_PREFIX):
        raise InvalidInputError(f"{name} is set by the worker, so it cannot be a secret")
    return name


def _checked(name: str, value: str) -> bytes:
    if not isinstance(cast("object", value), str):
        raise InvalidInputError(f"the value of {name} is no string; quote it")
    try:
        content = value.encode()
    except UnicodeEncodeError:
        raise InvalidInputError(f"the value of {name} is not UTF-8") from None
    if not content:
        raise InvalidInputError(f"the value of {name} is empty; `ow env rm {name}` removes one")
    if b"\0" in content or len(content) > _MOST_BYTES:
        raise InvalidInputError(
            f"the value of {name} cannot be a variable: it has a zero byte, or more than 64 KiB"
        )
    return content
