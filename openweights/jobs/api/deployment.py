"""What every deployment does, whoever computes it: its place, its adapters, its beginning and end.

It ends when it has not been asked for anything for a while: it cancels its own job then, so that
deploying the same again starts it anew.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from openweights.errors import InvalidStateError
from openweights.events import Served, Stage
from openweights.jobs.api import ApiConfig
from openweights.jobs.model_source import ModelSource, fetch_model
from openweights.models.names import model_reference
from openweights.types import SERVED_PORT

if TYPE_CHECKING:
    from openweights import OpenWeights

logger = logging.getLogger(__name__)

LOOK_S = 2.0

# What is done with a server once it is up, in a thread of its own; the server ends when it returns.
Use = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a deployment listens.

    Attributes:
        listening: Bound already, so that nobody else gets the port.
        base_url: What clients are told.
        pod_id: The pod whose proxy it stands behind; None on this machine.
    """

    listening: socket.socket
    base_url: str
    pod_id: str | None

    @classmethod
    def find(cls, pod_id: str | None) -> Place:
        """The pod's public port, or a free one of this machine that only it can reach."""
        if pod_id is not None:
            url = f"https://{pod_id}-{SERVED_PORT}.proxy.runpod.net/v1"
            return cls(socket.create_server(("0.0.0.0", SERVED_PORT)), url, pod_id)  # noqa: S104 - the proxy reaches it there, and every request needs the key
        listening = socket.create_server(("127.0.0.1", 0))
        return cls(listening, f"http://127.0.0.1:{listening.getsockname()[1]}/v1", None)


def fixed_adapters(ow: OpenWeights, config: ApiConfig) -> list[ModelSource]:
    """The adapters that do not change while they are served."""
    names = [name for name in config.lora_adapters if not is_followed(name)]
    return [fetch_model(ow, name, Path("model")) for name in names]


def is_followed(name: str) -> bool:
    """Whether a name means the newest state of a fine-tuning job."""
    reference = model_reference(name)
    return reference.kind == "job" and reference.part is None


def tell_served(ow: OpenWeights, place: Place, models: Sequence[str]) -> None:
    """Say that it can be asked."""
    served = Served(base_url=place.base_url, models=list(models), pod_id=place.pod_id)
    ow.run.log(served.data())
    ow.run.log(Stage(doing="serving").data())
    ow.run.flush()
    logger.info("serving %s at %s", ", ".join(models), place.base_url)


def end_unused(ow: OpenWeights, idle_s: float) -> None:
    """End the job of a deployment that nobody uses."""
    logger.info("nobody has asked for anything for %.0f s; it ends", idle_s)
    try:
        ow.jobs.retrieve(ow.run.job_id).cancel()
    except InvalidStateError as error:
        logger.info("%s", error)
