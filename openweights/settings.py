"""The only reader of environment variables.

`Settings.from_env()` is called when a client or a worker is built, never at import, so that a
changed environment counts.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from openweights.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class Settings:
    """What the environment says.

    Attributes:
        home: Folder of the embedded store (`OPENWEIGHTS_HOME`, default `~/.openweights`).
        api_key: `OPENWEIGHTS_API_KEY`. It and `supabase_url` (`SUPABASE_URL`) name a store
            elsewhere, which this version refuses.
        run_id: `OPENWEIGHTS_RUN_ID`, set by the worker inside a job.
        spool_dir: `OPENWEIGHTS_SPOOL`, set by the worker inside a job: where events wait until they
            are stored.
        n_gpus: `N_GPUS`, set by the worker inside a job; 0 without a GPU.
        lease_s: `OPENWEIGHTS_LEASE_S`: a worker silent for longer loses its job.
        heartbeat_s: `OPENWEIGHTS_HEARTBEAT_S`: None lets the store choose.
        worker_idle_s: `OPENWEIGHTS_WORKER_IDLE_S`: a self-started worker goes away after this long
            without work.
        cancel_grace_s: `OPENWEIGHTS_CANCEL_GRACE_S`: from SIGTERM to SIGKILL when a job is stopped.
    """

    home: Path
    # Not shown: a printed client or a traceback with locals must not tell a secret.
    api_key: str | None = field(default=None, repr=False)
    supabase_url: str | None = None
    supabase_anon_key: str | None = field(default=None, repr=False)
    hf_token: str | None = field(default=None, repr=False)
    hf_org: str | None = None
    run_id: int | None = None
    spool_dir: Path | None = None
    n_gpus: int = 0
    lease_s: float = 60.0
    heartbeat_s: float | None = None
    worker_idle_s: float = 60.0
    cancel_grace_s: float = 20.0

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> Settings:
        """Read `env` (default: the process's environment).

        Raises:
            ConfigurationError: A variable does not hold what it must.
        """
        env = os.environ if env is None else env
        run_id = _number(env, "OPENWEIGHTS_RUN_ID")
        spool = env.get("OPENWEIGHTS_SPOOL")
        return cls(
            home=_home(env),
            api_key=env.get("OPENWEIGHTS_API_KEY") or None,
            supabase_url=env.get("SUPABASE_URL") or None,
            supabase_anon_key=env.get("SUPABASE_ANON_KEY") or None,
            hf_token=env.get("HF_TOKEN") or None,
            hf_org=env.get("HF_ORG") or env.get("HF_USER") or None,
            run_id=None if run_id is None else int(run_id),
            spool_dir=Path(spool).absolute() if spool else None,
            n_gpus=int(_number(env, "N_GPUS") or 0),
            lease_s=_lease(env),
            heartbeat_s=_number(env, "OPENWEIGHTS_HEARTBEAT_S"),
            worker_idle_s=_seconds(env, "OPENWEIGHTS_WORKER_IDLE_S", 60.0),
            cancel_grace_s=_seconds(env, "OPENWEIGHTS_CANCEL_GRACE_S", 20.0),
        )

    def child_env(self, env: Mapping[str, str] | None = None) -> dict[str, str]:
        """The environment of a worker process that must see these very settings, and no run of
        ours.

        Args:
            env: What it starts from (default: the process's environment).
        """
        child = dict(os.environ if env is None else env)
        for name in ("OPENWEIGHTS_RUN_ID", "OPENWEIGHTS_SPOOL"):
            child.pop(name, None)
        values = {
            "OPENWEIGHTS_HOME": self.home,
            "OPENWEIGHTS_API_KEY": self.api_key,
            "SUPABASE_URL": self.supabase_url,
            "SUPABASE_ANON_KEY": self.supabase_anon_key,
            "HF_TOKEN": self.hf_token,
            "HF_ORG": self.hf_org,
            "OPENWEIGHTS_LEASE_S": self.lease_s,
            "OPENWEIGHTS_HEARTBEAT_S": self.heartbeat_s,
            "OPENWEIGHTS_WORKER_IDLE_S": self.worker_idle_s,
            "OPENWEIGHTS_CANCEL_GRACE_S": self.cancel_grace_s,
        }
        child.update({name: str(value) for name, value in values.items() if value is not None})
        return child


def _home(env: Mapping[str, str]) -> Path:
    text = env.get("OPENWEIGHTS_HOME") or "~/.openweights"
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError:
        # expanduser() knows no such user, or no home for this one
        raise ConfigurationError(
            f"OPENWEIGHTS_HOME={text!r} names no folder; give a full path"
        ) from None


def _number(env: Mapping[str, str], name: str) -> float | None:
    text = env.get(name)
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise ConfigurationError(
            f"{name}={text!r} is not a number of at least 0; unset it or give one"
        )
    return value


def _lease(env: Mapping[str, str]) -> float:
    value = _seconds(env, "OPENWEIGHTS_LEASE_S", 60.0)
    if value == 0:
        raise ConfigurationError(
            "OPENWEIGHTS_LEASE_S must be greater than 0: every worker would lose its job at once; "
            "unset it"
        )
    return value


def _seconds(env: Mapping[str, str], name: str, default: float) -> float:
    value = _number(env, name)
    return default if value is None else value
