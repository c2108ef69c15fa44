"""Puts the manager of an organization together from what the environment says."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Generator
from dataclasses import replace
from typing import Literal

from openweights.backends import open_project
from openweights.client.bundle import package_folder
from openweights.cluster.org_manager import OrganizationManager
from openweights.cluster.planning.limits import Limits
from openweights.cluster.pods.base import Machines, Pods
from openweights.cluster.pods.local import LocalPods
from openweights.cluster.pods.runpod import RunPod, check_value
from openweights.errors import ConfigurationError
from openweights.settings import ClusterSettings, Settings

ProviderName = Literal["runpod", "local"]


@contextlib.contextmanager
def open_manager(
    settings: Settings,
    cluster: ClusterSettings,
    provider: ProviderName = "runpod",
    limits: Limits | None = None,
) -> Generator[OrganizationManager]:
    """The manager of the organization whose key the settings hold.

    Raises:
        ConfigurationError: Something is not set.
        PodRefused: A variable that every pod gets cannot be passed on.
    """
    pods = open_pods(settings, cluster, provider)
    env = worker_env(settings, cluster)
    if provider == "runpod":
        for name, value in env.items():
            check_value(name, value)
    limits = replace(limits or Limits(), max_workers=cluster.max_workers)
    with contextlib.closing(open_project(settings)) as store:
        yield OrganizationManager(store, pods, limits=limits, worker_env=env)


def open_pods(settings: Settings, cluster: ClusterSettings, provider: ProviderName) -> Pods:
    """Where the organization's pods run.

    Raises:
        ConfigurationError: RunPod needs a key.
    """
    if provider == "runpod":
        return open_runpod(cluster)
    path = f"{package_folder().parent}:{cluster.machine_env.get('PYTHONPATH', '')}"
    env = {**cluster.machine_env, "PYTHONPATH": path.rstrip(":")}
    return LocalPods(settings.home / "pods", env, most=cluster.max_workers)


def open_runpod(cluster: ClusterSettings) -> RunPod:
    """The RunPod account of the settings.

    Raises:
        ConfigurationError: There is no key.
    """
    if not cluster.runpod_api_key:
        raise ConfigurationError(
            "RUNPOD_API_KEY is not set; RunPod's pages under Settings make one"
        )
    machines = Machines(
        cluster.min_vcpus_per_gpu, cluster.min_memory_gb_per_gpu, cluster.data_centers
    )
    return RunPod(cluster.runpod_api_key, cluster.runpod_url, machines)


def worker_env(settings: Settings, cluster: ClusterSettings) -> dict[str, str]:
    """What every worker's process needs to find the store; its key is made for it alone."""
    found = {
        "SUPABASE_URL": settings.supabase_url,
        "SUPABASE_ANON_KEY": settings.supabase_anon_key,
        "OPENWEIGHTS_SECRETS_KEY": settings.secrets_key,
    }
    return {**cluster.pod_env, **{name: value for name, value in found.items() if value}}


@contextlib.contextmanager
def sole_manager(settings: Settings, organization_id: str) -> Generator[None]:
    """One manager per organization on this machine: two would each start a pod for the same job.

    Raises:
        ConfigurationError: There is one already.
    """
    settings.home.mkdir(parents=True, exist_ok=True)
    with (settings.home / f"cluster-{organization_id}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigurationError(
                "this machine already runs the manager of this organization; end it first"
            ) from None
        yield
