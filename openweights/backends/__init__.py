"""Stores of jobs, runs, events and files. `open_backend` picks the one that the settings name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from openweights.errors import ConfigurationError
from openweights.settings import Settings

if TYPE_CHECKING:
    from openweights.backends.base import Backend


def open_backend(settings: Settings) -> Backend:
    """The store that `settings` name; opening it does no I/O.

    Raises:
        ConfigurationError: A key without a project, or a project without a key.
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
