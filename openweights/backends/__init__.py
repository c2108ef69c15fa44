"""Stores of jobs, runs, events and files. `open_backend` opens the one that the settings name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from openweights.errors import ConfigurationError
from openweights.settings import Settings

if TYPE_CHECKING:
    from openweights.backends.base import Backend
    from openweights.backends.supabase.backend import SupabaseBackend


def open_backend(settings: Settings) -> Backend:
    """The Supabase project that `settings` name, else the store in `settings.home`.

    Opening it does no I/O.

    Raises:
        ConfigurationError: Of a project's address and keys some are missing, or the packages that
            it needs.
    """
    if settings.is_remote:
        return open_project(settings)
    from openweights.backends.local.backend import LocalBackend

    return LocalBackend(
        settings.home,
        lease_s=settings.lease_s,
        heartbeat_s=settings.heartbeat_s or 1.0,
        log_limit_bytes=int(settings.log_limit_mb * (1 << 20)),
        lane=settings.lane,
    )


def open_project(settings: Settings) -> SupabaseBackend:
    """The Supabase project that `settings` name, with what only a project can do; see
    `open_backend`.
    """
    url, anon_key, api_key = settings.supabase_url, settings.supabase_anon_key, settings.api_key
    if not (url and anon_key and api_key):
        raise ConfigurationError(_missing(settings))
    try:
        from openweights.backends.supabase.backend import SupabaseBackend
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"a store in a Supabase project needs the package {error.name}: "
            "pip install 'openweights[supabase]'"
        ) from error
    return SupabaseBackend(url, anon_key, api_key, heartbeat_s=settings.heartbeat_s)


def _missing(settings: Settings) -> str:
    needed = {
        "SUPABASE_URL": (settings.supabase_url, "the address of your Supabase project"),
        "SUPABASE_ANON_KEY": (settings.supabase_anon_key, "the project's public key"),
        "OPENWEIGHTS_API_KEY": (settings.api_key, "your key of the organization, ow_…"),
    }
    given = [name for name, (value, _) in needed.items() if value]
    absent = [f"{name} ({what})" for name, (value, what) in needed.items() if not value]
    text = f"a store in a Supabase project needs {' and '.join(absent)}"
    if given:
        return f"{text}; or unset {' and '.join(given)} to work on this machine"
    return f"{text}: `ow login` asks for them and stores them"
