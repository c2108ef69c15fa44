"""The part of RunPod's GraphQL that version 1.12 of its SDK sends: text without variables."""

from __future__ import annotations

import re
from typing import Any

from tests.runpod_double.pods import GPUS, MachineRoom, NoStock, PodProcess

NO_STOCK = (
    "There are no longer any instances available with the requested specifications. "
    "Please refresh and try again."
)
_PAIR = re.compile(r'\{\s*key:\s*"([^"\\\n]*)",\s*value:\s*"([^"\\\n]*)"\s*\}')


class SyntaxFault(Exception):
    """The query is not GraphQL; the real one answers 400."""


def verb_of(query: str) -> str:
    """What a query does: start, terminate, stop, gpus, list, get."""
    for word, verb in (
        ("podFindAndDeployOnDemand", "start"),
        ("deployCpuPod", "start"),
        ("podTerminate", "terminate"),
        ("podStop", "stop"),
        ("gpuTypes", "gpus"),
        ("myself", "list"),
    ):
        if word in query:
            return verb
    return "get"


def pod_asked_for(query: str) -> dict[str, Any]:
    """The input of a deployment, parsed.

    Raises:
        SyntaxFault: The environment holds what the SDK does not escape.
    """
    block = re.search(r"\benv:\s*\[(.*?)\]\s*[,}\n]", query, re.DOTALL)
    pairs = _PAIR.findall(block[1]) if block else []
    if block and len(pairs) != block[1].count("key:"):
        raise SyntaxFault("Syntax Error: Expected :, found String")
    cloud = re.search(r"cloudType:\s*(\w+)", query)
    count = re.search(r"gpuCount:\s*(\d+)", query)
    ports = _text(query, "ports")
    return {
        "name": _text(query, "name"),
        "image": _text(query, "imageName"),
        "gpu": _text(query, "gpuTypeId"),
        "gpu_count": int(count[1]) if count else 1,
        "cloud": cloud[1] if cloud else "ALL",
        "env": dict(pairs),
        "ports": ports.split(",") if ports else [],
        "docker_args": _text(query, "dockerArgs"),
        "instance": _text(query, "instanceId"),
        "vcpus": _count(query, "minVcpuCount"),
        "memory_gb": _count(query, "minMemoryInGb"),
        "place": _text(query, "dataCenterId"),
    }


def answer(room: MachineRoom, query: str) -> dict[str, Any]:
    """What the real one answers to a query, faults aside."""
    verb = verb_of(query)
    if verb == "start":
        name = "podFindAndDeployOnDemand" if "podFind" in query else "deployCpuPod"
        try:
            return {"data": {name: _view(room.create(pod_asked_for(query)))}}
        except NoStock:
            return _error(NO_STOCK)
    if verb == "gpus":
        wanted = _text(query, "id")
        found = [_gpu(room, gpu) for gpu in GPUS if wanted in (None, gpu)]
        return {"data": {"gpuTypes": found}}
    if verb == "list":
        return {"data": {"myself": {"pods": [_view(pod) for pod in room.alive()]}}}
    pod = room.pods.get(_text(query, "podId") or "")
    if pod is None or pod.status == "TERMINATED":
        return {"data": {"pod": None}} if verb == "get" else _error("pod not found to terminate")
    if verb == "terminate":
        room.terminate(pod)
        return {"data": {"podTerminate": None}}
    return {"data": {"pod": _view(pod.refresh())}}


def _view(pod: PodProcess) -> dict[str, Any]:
    running = pod.status == "RUNNING"
    ports = [
        {
            "ip": "127.0.0.1",
            "isIpPublic": True,
            "privatePort": int(port.partition("/")[0]),
            "publicPort": 40000 + int(port.partition("/")[0]),
            "type": port.partition("/")[2],
        }
        for port in pod.ports
    ]
    return {
        "id": pod.id,
        "name": pod.name,
        "imageName": pod.image,
        "env": [f"{name}={value}" for name, value in pod.env.items()],
        # What is wanted of it, not what it does: a pod that boots says RUNNING and has no runtime.
        "desiredStatus": "RUNNING" if pod.status == "PROVISIONING" else pod.status,
        "costPerHr": pod.price if pod.status != "EXITED" else 0.0,
        "gpuCount": pod.gpu_count,
        "machineId": "m",
        "machine": {"podHostId": f"{pod.id}-host", "gpuDisplayName": pod.gpu},
        "runtime": {"ports": ports} if running else None,
    }


def _gpu(room: MachineRoom, gpu: str) -> dict[str, Any]:
    memory, secure, community = GPUS[gpu]
    return {
        "id": gpu,
        "displayName": gpu.removeprefix("NVIDIA "),
        "memoryInGb": memory,
        "securePrice": secure,
        "communityPrice": community,
        "lowestPrice": {"uninterruptablePrice": community if room.stock[gpu] else None},
    }


def _text(query: str, name: str) -> str | None:
    found = re.search(rf'\b{name}:\s*"([^"]*)"', query)
    return found[1] if found else None


def _count(query: str, name: str) -> int | None:
    found = re.search(rf"\b{name}:\s*(\d+)", query)
    return int(found[1]) if found else None


def _error(message: str) -> dict[str, Any]:
    return {"errors": [{"message": message}], "data": None}
