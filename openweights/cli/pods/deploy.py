"""`ow deploy`."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

import click

from openweights import images
from openweights.cli.output import note
from openweights.errors import NotFoundError
from openweights.settings import ClusterSettings, Settings

if TYPE_CHECKING:
    from openweights.cluster.planning.observation import Pod
    from openweights.cluster.pods.base import PodRequest
    from openweights.cluster.pods.runpod import RunPod
    from openweights.cluster.store import ClusterStore

KEY_NAME = "ow deploy"


@click.command()
@click.option(
    "--image",
    default=images.MANAGER_IMAGE,
    envvar="OPENWEIGHTS_MANAGER_IMAGE",
    show_default=True,
    show_envvar=True,
    help="Container image of the manager.",
)
@click.option("--stop", "is_end", is_flag=True, help="End the manager's pod, and revoke its key.")
def deploy(image: str, is_end: bool) -> None:
    """Run the manager in a small pod of its own.

    The pod gets RUNPOD_API_KEY, an admin's key that is made for it and revoked with it,
    MAX_WORKERS, OPENWEIGHTS_SECRETS_KEY where it is set, and what OPENWEIGHTS_POD_ENV names.
    Whoever can look into this pod has these keys.
    """
    from openweights.backends import open_project
    from openweights.cluster.launch import open_runpod
    from openweights.cluster.pods.base import PodRequest

    settings, cluster = Settings.from_env(), ClusterSettings.from_env()
    runpod = open_runpod(cluster)
    with closing(open_project(settings)) as store:
        name = f"owmanager-{store.organization_id}"
        pods = [pod for pod in runpod.list_pods() if pod.name == name]
        running = next((pod for pod in pods if pod.is_running), None)
        if running is not None and not is_end:
            note(f"the manager runs already: {name}, pod {running.id}")
            return
        for pod in pods:  # one that has ended keeps its disk, which is paid for
            runpod.terminate(pod.id, name)
        _revoke_keys(store)
        if is_end:
            if not pods:
                raise NotFoundError(f"there is no pod {name}")
            click.echo(f"ended {name}; workers finish their jobs, wait half an hour, and end")
            return
        if told := images.to_be_built(image):
            note(told)
        env = {**_env(settings, cluster), "OPENWEIGHTS_API_KEY": _new_key(store)}
        request = PodRequest(name, image, None, 0, "SECURE", env, disk_gb=20)
        click.echo(f"started {name}, pod {_start(runpod, request, store).id}")


def _start(runpod: RunPod, request: PodRequest, store: ClusterStore) -> Pod:
    from openweights.cluster.pods.base import OutcomeUnknown

    try:
        return runpod.start(request)
    except OutcomeUnknown:
        note("look again with `ow deploy`, or end it with `ow deploy --stop`")
        raise
    except BaseException:
        _revoke_keys(store)  # nobody has got it
        raise


def _env(settings: Settings, cluster: ClusterSettings) -> dict[str, str]:
    from openweights.cluster.launch import worker_env

    return {
        **worker_env(settings, cluster),
        "OPENWEIGHTS_POD_ENV": ",".join(cluster.pod_env),
        "MAX_WORKERS": str(cluster.max_workers),
        # Not as RUNPOD_API_KEY, by which RunPod itself gives each pod a key that can do less.
        "OPENWEIGHTS_RUNPOD_API_KEY": cluster.runpod_api_key or "",
    }


def _new_key(store: ClusterStore) -> str:
    return store.create_key(KEY_NAME, "admin").key


def _revoke_keys(store: ClusterStore) -> None:
    for key in store.list_keys():
        if key.name == KEY_NAME and key.revoked_at is None:
            store.revoke_key(key.id)
