"""RunPod's REST API, version 2, as far as a cluster needs it: pods, their logs, the catalogue."""

from __future__ import annotations

import json
from typing import Any

from tests.runpod_double.graphql import NO_STOCK
from tests.runpod_double.pods import GPUS, MachineRoom, NoStock, PodProcess

Answer = tuple[int, Any]  # status, and JSON or the text of a stream

_KNOWN = {
    *("name", "image", "args", "disk", "ports", "env", "registry", "cloud", "cpu", "dataCenterIds"),
    *("globalNetworking", "gpu", "mounts", "startJupyter", "startSsh", "templateId"),
}


def verb_of(method: str, path: list[str]) -> str:
    """The same verbs as those of GraphQL."""
    match method, path:
        case "POST", ["pods"]:
            return "start"
        case "DELETE", ["pods", _]:
            return "terminate"
        case "GET", ["pods"]:
            return "list"
        case "GET", ["pods", _, "logs"]:
            return "logs"
        case "GET", ["catalog", "gpus"]:
            return "gpus"
        case _:
            return "get"


def pod_asked_for(body: dict[str, Any]) -> dict[str, Any]:
    """The body of a creation in the double's own words."""
    gpu = body.get("gpu")
    return {
        "name": body["name"],
        "image": body["image"],
        "gpu": gpu["id"] if gpu else None,
        "gpu_count": gpu.get("count", 1) if gpu else 1,
        "cloud": body.get("cloud", "SECURE"),
        "env": body.get("env", {}),
        "ports": body.get("ports", []),
    }


def answer(
    room: MachineRoom, method: str, path: list[str], query: dict[str, str], body: dict[str, Any]
) -> Answer:
    """What the real one answers to a request, faults aside."""
    match verb_of(method, path):
        case "start":
            return _start(room, body)
        case "list":
            return 200, {"pods": [_view(pod) for pod in room.alive()]}
        case "gpus":
            return _catalog(room, query)
        case verb:
            pod = room.pods.get(path[1]) if len(path) > 1 else None
            if pod is None or pod.status == "TERMINATED":
                return problem(404, "Not Found", "resource not found")
            if verb == "terminate":
                room.terminate(pod)
                return 204, None
            if verb == "logs":
                return 200, _stream(pod)
            return 200, _view(pod.refresh())


def problem(status: int, title: str, detail: str, errors: list[str] | None = None) -> Answer:
    """An error as RFC 9457 has it."""
    content: dict[str, Any] = {"title": title, "status": status, "detail": detail}
    return status, {**content, "errors": errors} if errors else content


def _start(room: MachineRoom, body: dict[str, Any]) -> Answer:
    wrong = [f"$: additional properties '{key}' not allowed" for key in body if key not in _KNOWN]
    wrong += [f"$: missing property '{key}'" for key in ("name", "image") if not body.get(key)]
    if body.get("cloud", "SECURE") not in ("SECURE", "COMMUNITY"):
        wrong.append("$.cloud: value must be one of 'SECURE', 'COMMUNITY'")
    if wrong:
        return problem(422, "Unprocessable Entity", "Request validation failed.", wrong)
    if ("gpu" in body) == ("cpu" in body):
        return problem(400, "Bad Request", "exactly one of gpu or cpu must be set")
    if "gpu" in body and body["gpu"]["id"] not in GPUS:
        return problem(404, "Not Found", "gpu type not found")
    try:
        return 201, _view(room.create(pod_asked_for(body)))
    except NoStock:
        return problem(400, "Bad Request", NO_STOCK)


def _catalog(room: MachineRoom, query: dict[str, str]) -> Answer:
    if "include" in query and "product" not in query:
        return problem(400, "Bad Request", "include=AVAILABILITY requires product")
    gpus = [
        {
            "id": gpu,
            "name": gpu.removeprefix("NVIDIA "),
            "memory": memory,
            "secure": True,
            "community": True,
            "price": {"secure": secure, "community": community},
            "availability": ["NONE", "LOW", "MEDIUM", "HIGH"][min(3, room.stock[gpu])],
        }
        for gpu, (memory, secure, community) in GPUS.items()
    ]
    return 200, {"gpus": gpus}


def _stream(pod: PodProcess) -> str:
    lines = pod.log.read_text(errors="replace").splitlines() if pod.log.exists() else []
    events = (
        f"id: {number}\ndata: {json.dumps({'source': 'container', 'line': line})}\n\n"
        for number, line in enumerate(lines)
    )
    return "".join(events)


def _view(pod: PodProcess) -> dict[str, Any]:
    return {
        "id": pod.id,
        "name": pod.name,
        "image": pod.image,
        "status": pod.status,
        "gpu": {"id": pod.gpu, "count": pod.gpu_count} if pod.gpu else None,
        "cloud": pod.cloud,
        "ports": pod.ports,
        "cost": pod.price if pod.status in ("PROVISIONING", "RUNNING") else 0.0,
    }
