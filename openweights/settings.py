"""The only reader of environment variables.

`Settings.from_env()` is called when a client or a worker is built, never at import, so that a
changed environment counts.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from openweights.credentials import Credentials, read_credentials
from openweights.errors import ConfigurationError
from openweights.types import CloudType, Lane


@dataclass(frozen=True, slots=True)
class PodSettings:
    """What a cluster manager tells the worker in a pod; all None for a worker on its own.

    Attributes:
        worker_id: `WORKER_ID`: the row that was written for it.
        docker_image: `DOCKER_IMAGE`: the image that the pod was started with.
        cloud_type: `OPENWEIGHTS_CLOUD_TYPE`: the tier of the pod.
        pod_id: `RUNPOD_POD_ID`, set by RunPod.
        ttl_hours: `TTL_HOURS`: the worker takes no further job after this long, and ends.
        notice_s: `OPENWEIGHTS_NOTICE_S`: from SIGTERM to SIGKILL when the machine is taken away.
        idle_gpu_minutes: `OPENWEIGHTS_IDLE_GPU_MINUTES`: a job whose GPUs do next to nothing for so
            long is ended, and the pod with it; 0 for never.
    """

    worker_id: str | None = None
    docker_image: str | None = None
    cloud_type: CloudType | None = None
    pod_id: str | None = None
    ttl_hours: float | None = None
    notice_s: float | None = None
    idle_gpu_minutes: float = 20.0

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> PodSettings:
        """Read `env`; raises ConfigurationError."""
        cloud_type = env.get("OPENWEIGHTS_CLOUD_TYPE") or None
        if cloud_type not in (None, "SECURE", "COMMUNITY"):
            raise ConfigurationError(
                f"OPENWEIGHTS_CLOUD_TYPE={cloud_type!r} must be SECURE or COMMUNITY; unset it"
            )
        idle_minutes = _number(env, "OPENWEIGHTS_IDLE_GPU_MINUTES")
        return cls(
            worker_id=env.get("WORKER_ID") or None,
            docker_image=env.get("DOCKER_IMAGE") or None,
            cloud_type=cloud_type,
            pod_id=env.get("RUNPOD_POD_ID") or None,
            ttl_hours=_number(env, "TTL_HOURS"),
            notice_s=_number(env, "OPENWEIGHTS_NOTICE_S"),
            idle_gpu_minutes=20.0 if idle_minutes is None else idle_minutes,
        )


@dataclass(frozen=True, slots=True)
class ClusterSettings:
    """What a cluster manager reads from its own environment.

    Attributes:
        runpod_api_key: `OPENWEIGHTS_RUNPOD_API_KEY`, else `RUNPOD_API_KEY`; never enters a
            worker's pod.
        runpod_url: `RUNPOD_API_BASE_URL`, which RunPod's SDK reads, too.
        max_workers: `MAX_WORKERS`: pods at most, over all kinds of jobs together.
        min_vcpus_per_gpu, min_memory_gb_per_gpu: `OPENWEIGHTS_POD_MIN_VCPUS` and
            `OPENWEIGHTS_POD_MIN_MEMORY_GB`: what a pod's machine has for each GPU at least.
        data_centers: `OPENWEIGHTS_DATA_CENTERS`, with commas between: where pods may stand, tried
            in this order; empty for anywhere.
        pod_env: Variables, named by `OPENWEIGHTS_POD_ENV` with commas between, that every pod gets.
        machine_env: What a process on this very machine needs besides; nothing secret.
    """

    runpod_api_key: str | None = field(default=None, repr=False)
    runpod_url: str | None = None
    max_workers: int = 8
    min_vcpus_per_gpu: int = 4
    min_memory_gb_per_gpu: int = 16
    data_centers: tuple[str, ...] = ()
    pod_env: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)
    machine_env: Mapping[str, str] = field(default_factory=dict[str, str])

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> ClusterSettings:
        """Read `env` (default: the process's environment).

        Raises:
            ConfigurationError: A variable does not hold what it must.
        """
        env = os.environ if env is None else env
        max_workers = _number(env, "MAX_WORKERS")
        vcpus = _number(env, "OPENWEIGHTS_POD_MIN_VCPUS")
        memory_gb = _number(env, "OPENWEIGHTS_POD_MIN_MEMORY_GB")
        places = env.get("OPENWEIGHTS_DATA_CENTERS", "").split(",")
        return cls(
            runpod_api_key=env.get("OPENWEIGHTS_RUNPOD_API_KEY")
            or env.get("RUNPOD_API_KEY")
            or None,
            runpod_url=env.get("RUNPOD_API_BASE_URL") or None,
            max_workers=8 if max_workers is None else int(max_workers),
            min_vcpus_per_gpu=4 if vcpus is None else int(vcpus),
            min_memory_gb_per_gpu=16 if memory_gb is None else int(memory_gb),
            data_centers=tuple(name.strip() for name in places if name.strip()),
            pod_env=_pod_env(env),
            machine_env={name: env[name] for name in _OF_THE_MACHINE if name in env},
        )


_NO = ("no", "0", "false", "off")


@dataclass(frozen=True, slots=True)
class Settings:
    """What the environment says.

    Attributes:
        home: Folder of the embedded store (`OPENWEIGHTS_HOME`, default `~/.openweights`).
        api_key: `OPENWEIGHTS_API_KEY`: a key of the organization. It and `supabase_url`
            (`SUPABASE_URL`) name a store in a Supabase project, instead of the embedded one.
        supabase_anon_key: `SUPABASE_ANON_KEY`: the project's public key. Where `SUPABASE_URL` is
            not set, not even to nothing, all three come from what `ow login` has stored.
        secrets_key: `OPENWEIGHTS_SECRETS_KEY`: opens the organization's secrets, on a worker.
        hf_token, openai_api_key: `HF_TOKEN` and `OPENAI_API_KEY`, of those who answer to them.
        image, vllm_image: `OPENWEIGHTS_IMAGE` and `OPENWEIGHTS_VLLM_IMAGE`: the container images
            that jobs and deployed models ask for when they name none.
        run_id: `OPENWEIGHTS_RUN_ID`, set by the worker inside a job.
        spool_dir: `OPENWEIGHTS_SPOOL`, set by the worker inside a job: where events wait until they
            are stored.
        n_gpus: `N_GPUS`, set by the worker inside a job; 0 without a GPU.
        lease_s: `OPENWEIGHTS_LEASE_S`: a worker silent for longer loses its job.
        heartbeat_s: `OPENWEIGHTS_HEARTBEAT_S`: None lets the store choose.
        worker_idle_s: `OPENWEIGHTS_WORKER_IDLE_S`: a worker that was not started by hand goes away
            after this long without work.
        cancel_grace_s: `OPENWEIGHTS_CANCEL_GRACE_S`: from SIGTERM to SIGKILL when a job is stopped.
        log_limit_mb: `OPENWEIGHTS_LOG_LIMIT_MB`: most of a run's log in the embedded store.
        try_functions: `OPENWEIGHTS_TRY_FUNCTIONS`: "no" submits jobs with reward functions of one's
            own without calling those once before.
        keep_days: `OPENWEIGHTS_KEEP_DAYS`: workers of the embedded store remove once a day what
            nobody has needed for so long; None for never. See `Backend.collect_garbage`.
        lane: Which jobs of the embedded store a worker takes; None for all. No variable says it,
            but who starts the worker.
        pod: What a worker in a cluster's pod is told.
    """

    home: Path
    # Not shown: a printed client or a traceback with locals must not tell a secret.
    api_key: str | None = field(default=None, repr=False)
    supabase_url: str | None = None
    supabase_anon_key: str | None = field(default=None, repr=False)
    secrets_key: str | None = field(default=None, repr=False)
    hf_token: str | None = field(default=None, repr=False)
    openai_api_key: str | None = field(default=None, repr=False)
    hf_org: str | None = None
    image: str | None = None
    vllm_image: str | None = None
    run_id: int | None = None
    spool_dir: Path | None = None
    n_gpus: int = 0
    lease_s: float = 60.0
    heartbeat_s: float | None = None
    worker_idle_s: float = 60.0
    cancel_grace_s: float = 20.0
    log_limit_mb: float = 64.0
    try_functions: bool = True
    keep_days: float | None = None
    lane: Lane | None = None
    pod: PodSettings = PodSettings()

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> Settings:
        """Read `env` (default: the process's environment).

        Raises:
            ConfigurationError: A variable does not hold what it must.
        """
        env = os.environ if env is None else env
        run_id = _number(env, "OPENWEIGHTS_RUN_ID")
        spool = env.get("OPENWEIGHTS_SPOOL")
        home = home_folder(env)
        # The address first: a stored key is not for another project.
        stored = None if "SUPABASE_URL" in env else read_credentials(home)
        stored = stored or Credentials("", "", "")
        return cls(
            home=home,
            api_key=env.get("OPENWEIGHTS_API_KEY") or stored.api_key or None,
            supabase_url=env.get("SUPABASE_URL") or stored.supabase_url or None,
            supabase_anon_key=env.get("SUPABASE_ANON_KEY") or stored.supabase_anon_key or None,
            secrets_key=env.get("OPENWEIGHTS_SECRETS_KEY") or None,
            hf_token=env.get("HF_TOKEN") or None,
            openai_api_key=env.get("OPENAI_API_KEY") or None,
            hf_org=env.get("HF_ORG") or env.get("HF_USER") or None,
            image=env.get("OPENWEIGHTS_IMAGE") or None,
            vllm_image=env.get("OPENWEIGHTS_VLLM_IMAGE") or None,
            run_id=None if run_id is None else int(run_id),
            spool_dir=Path(spool).absolute() if spool else None,
            n_gpus=int(_number(env, "N_GPUS") or 0),
            lease_s=_lease(env),
            heartbeat_s=_number(env, "OPENWEIGHTS_HEARTBEAT_S"),
            worker_idle_s=_seconds(env, "OPENWEIGHTS_WORKER_IDLE_S", 60.0),
            cancel_grace_s=_seconds(env, "OPENWEIGHTS_CANCEL_GRACE_S", 20.0),
            log_limit_mb=_number(env, "OPENWEIGHTS_LOG_LIMIT_MB") or 64.0,
            try_functions=env.get("OPENWEIGHTS_TRY_FUNCTIONS", "").lower() not in _NO,
            keep_days=_number(env, "OPENWEIGHTS_KEEP_DAYS"),
            pod=PodSettings.from_env(env),
        )

    @property
    def is_remote(self) -> bool:
        """Whether the store is a Supabase project, and not the one on this machine."""
        return bool(self.api_key or self.supabase_url)

    @property
    def scratch(self) -> Path | None:
        """Where the large temporary files of a job belong: in its folder, which goes with them also
        when the job is killed. None outside a job, for what the system has.
        """
        return self.spool_dir and self.spool_dir.parent

    def child_env(self, env: Mapping[str, str] | None = None) -> dict[str, str]:
        """The environment of a worker process or a job that must see these very settings, and
        neither a run of ours nor the key that opens secrets.

        Args:
            env: What it starts from (default: the process's environment).
        """
        child = dict(os.environ if env is None else env)
        for name in ("OPENWEIGHTS_RUN_ID", "OPENWEIGHTS_SPOOL", "OPENWEIGHTS_SECRETS_KEY"):
            child.pop(name, None)
        if not self.is_remote:
            # Set to nothing, it also keeps the child from what `ow login` has stored meanwhile.
            child["SUPABASE_URL"] = ""
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
            "OPENWEIGHTS_LOG_LIMIT_MB": self.log_limit_mb,
            "OPENWEIGHTS_KEEP_DAYS": self.keep_days,
        }
        child.update({name: str(value) for name, value in values.items() if value is not None})
        return child


def home_folder(env: Mapping[str, str] | None = None) -> Path:
    """The folder `OPENWEIGHTS_HOME` of `env` (default: the process's environment).

    Raises:
        ConfigurationError: It names none.
    """
    env = os.environ if env is None else env
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


def service_variables() -> dict[str, str]:
    """Of this process's variables what a service that is installed from it needs: where programs
    and units lie.
    """
    return {name: os.environ[name] for name in ("PATH", "XDG_CONFIG_HOME") if name in os.environ}


def job_variables(secrets: Iterable[str]) -> dict[str, str]:
    """Of this process's variables those that a job on this machine gets from whoever submits it:
    the secrets that it names, and the keys that the package's own jobs use.
    """
    names = {*secrets, *_KEYS_OF_JOBS}
    return {name: os.environ[name] for name in sorted(names) if os.environ.get(name)}


def add_to_environment(values: Mapping[str, str]) -> None:
    """Set variables of this process, for what reads its settings afterwards."""
    os.environ.update(values)


_KEYS_OF_JOBS = ("HF_TOKEN", "HF_ORG", "HF_USER", "OPENAI_API_KEY", "WANDB_API_KEY")
_OF_THE_MACHINE = (
    *("PATH", "PYTHONPATH", "HOME", "LANG", "TMPDIR", "LD_LIBRARY_PATH", "OMP_NUM_THREADS"),
    *("CUDA_VISIBLE_DEVICES", "HF_HOME", "HF_HUB_OFFLINE"),
)

# A pod that had these could start others, or act for the whole organization.
_NEVER_IN_PODS = frozenset(
    {
        "RUNPOD_API_KEY",
        "OPENWEIGHTS_RUNPOD_API_KEY",
        "OPENWEIGHTS_API_KEY",
        "SUPABASE_SERVICE_ROLE_KEY",
    }
)


def _pod_env(env: Mapping[str, str]) -> dict[str, str]:
    names = [name.strip() for name in env.get("OPENWEIGHTS_POD_ENV", "").split(",")]
    wanted = [name for name in names if name]
    for name in wanted:
        if name in _NEVER_IN_PODS:
            raise ConfigurationError(
                f"OPENWEIGHTS_POD_ENV: {name} must not enter a pod; take it out"
            )
        if name not in env:
            raise ConfigurationError(
                f"OPENWEIGHTS_POD_ENV: {name} is not set; set it or take it out"
            )
    return {name: env[name] for name in wanted}
