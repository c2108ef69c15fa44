"""Stores of jobs, runs, events and files. `open_backend` opens the one on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from openweights.errors import ConfigurationError
from openweights.settings import Settings

if TYPE_CHECKING:
    from openweights.backends.base import Backend


def open_backend(settings: Settings) -> Backend:
    """The store in `settings.home`; opening it does no I/O.

    Raises:
        ConfigurationError: `settings` hold a key or a project: they mean a store elsewhere, which
            this version does not have.
    """
    if settings.api_key or settings.supabase_url:
        raise ConfigurationError(
            "this version runs jobs on this machine only; "
            "unset OPENWEIGHTS_API_KEY and SUPABASE_URL"
        )
    from openweights.backends.local import LocalBackend

    return LocalBackend(
        settings.home, lease_s=settings.lease_s, heartbeat_s=settings.heartbeat_s or 1.0
    )
