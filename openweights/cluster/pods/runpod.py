"""Pods on RunPod, through its SDK: the only file that imports it.

Three properties of SDK 1.12 shape this file. Its key is a global of the module, so a process serves
one organization. It writes values into GraphQL text without escaping them, so what holds quotes or
newlines is refused here. And it keeps an HTTP answer that is no JSON to itself, so status and
`Retry-After` are read from the frames of its error.

What the SDK lacks, the catalogue with stock and the logs of a pod, comes from REST v2.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, cast

from openweights.cluster.planning.market import Listing, StockLevel
from openweights.cluster.planning.observation import Pod, PodCloud, PodStatus
from openweights.cluster.pods.base import (
    Machines,
    NoCapacity,
    OutcomeUnknown,
    PodRefused,
    PodRequest,
    PodsUnavailable,
    RateLimited,
    SpendingLimit,
)
from openweights.errors import ConfigurationError

logger = logging.getLogger(__name__)

T = TypeVar("T")

API_URL = "https://api.runpod.io"
TIMEOUT_S = 30.0
LOG_WAIT_S = 5.0  # the stream of a living pod's log does not end
LOG_LINES = 200
DEFAULT_RETRY_AFTER_S = 60.0
CPU_INSTANCE = "cpu3c-2-4"
_MARK = "openweights_key"
_UNSAFE = ('"', "\\", "\n", "\r")
_NO_CAPACITY = ("no longer any instances", "no instances currently available", "enough disk space")
_NO_MONEY = ("spending limit", "spend limit", "insufficient funds", "balance")
_CLOUDS: tuple[PodCloud, ...] = ("SECURE", "COMMUNITY")
_STATUSES: dict[str, PodStatus] = {
    "CREATED": "PROVISIONING",
    "RESTARTING": "STARTING",
    "RUNNING": "RUNNING",
    "PAUSED": "ERROR",
    "DEAD": "ERROR",
    "EXITED": "EXITED",
    "TERMINATED": "TERMINATED",
}


class RunPod:
    """`Pods` of one RunPod account.

    Args:
        api_key: Of the account; stays in this process.
        base_url: Of the API; the SDK reads the same from `RUNPOD_API_BASE_URL`.
        machines: What a pod's machine must have beside its GPUs, and where it may stand.
    """

    name = "runpod"

    def __init__(
        self, api_key: str, base_url: str | None = None, machines: Machines | None = None
    ) -> None:
        self._api_key = api_key
        self._machines = machines or Machines()
        self._base_url = (base_url or API_URL).rstrip("/")

    def start(self, request: PodRequest) -> Pod:
        attempts = [
            _arguments(request, self._machines, place) for place in self._machines.places(request)
        ]
        existing = self._find(request.name)
        if existing is not None:
            return existing
        for arguments in attempts[:-1]:
            with contextlib.suppress(NoCapacity):
                return self._create(request, arguments)
        return self._create(request, attempts[-1])

    def _create(self, request: PodRequest, arguments: Mapping[str, Any]) -> Pod:
        try:
            pod_id = self._call(lambda sdk: str(sdk.create_pod(**arguments)["id"]))
        except (RateLimited, ConfigurationError):
            raise
        except PodsUnavailable as error:
            # It may have been started all the same: only its name tells.
            return self._find_after(error, request.name)
        return Pod(pod_id, request.name, "PROVISIONING", request.usd_per_hour)

    def list_pods(self) -> list[Pod]:
        return self._call(lambda sdk: [_pod(pod) for pod in sdk.get_pods()])

    def terminate(self, pod_id: str, name: str) -> None:
        """The name is asked for once more, because what is ended cannot be had back."""
        pod = self._call(lambda sdk: sdk.get_pod(pod_id))
        if pod is None:
            return
        if pod["name"] != name:
            raise PodRefused(f"pod {pod_id} is called {pod['name']!r}, not {name!r}: left alone")
        try:
            self._call(lambda sdk: sdk.terminate_pod(pod_id))
        except PodRefused:
            # Somebody else may have ended it in between.
            if self._call(lambda sdk: sdk.get_pod(pod_id)) is not None:
                raise

    def address(self, pod_id: str) -> tuple[str, int] | None:
        """Host and port of a pod's SSH server, once it is reachable."""
        pod: dict[str, Any] = self._call(lambda sdk: sdk.get_pod(pod_id)) or {}
        runtime: dict[str, Any] = pod.get("runtime") or {}
        ports: list[dict[str, Any]] = runtime.get("ports") or []
        for port in ports:
            if port["privatePort"] == 22 and port["isIpPublic"]:  # noqa: PLR2004 - SSH
                return str(port["ip"]), int(port["publicPort"])
        return None

    def logs(self, pod_id: str) -> str:
        lines: list[str] = []
        deadline = time.monotonic() + LOG_WAIT_S
        for event in self._stream(f"/v2/pods/{pod_id}/logs"):
            lines.append(_line(event))
            if time.monotonic() > deadline:
                break
        return "\n".join(lines[-LOG_LINES:])

    def stock(self) -> list[Listing]:
        found: list[Listing] = []
        for cloud in _CLOUDS:
            query = {"include": "AVAILABILITY", "product": "POD", "cloud": cloud}
            answer = self._get("/v2/catalog/gpus", query)
            try:
                found += [_listing(gpu, cloud) for gpu in answer["gpus"]]
            except (AttributeError, KeyError, TypeError, ValueError):
                raise PodsUnavailable("RunPod's catalogue is not understood") from None
        return found

    # ---- calls -----------------------------------------------------------------------------------

    def _find(self, name: str) -> Pod | None:
        return next((pod for pod in self.list_pods() if pod.name == name), None)

    def _find_after(self, error: PodsUnavailable, name: str) -> Pod:
        try:
            pod = self._find(name)
        except PodsUnavailable:
            pod = None
        if pod is None:
            raise OutcomeUnknown(f"whether pod {name} was started is not known: {error}") from error
        return pod

    def _call(self, call: Callable[[Any], T]) -> T:
        """One call of the SDK, with its errors in our terms."""
        sdk = _sdk(self._api_key)
        import requests

        try:
            return call(sdk)
        except sdk.error.AuthenticationError:
            raise _bad_key() from None
        except sdk.error.QueryError as error:
            raise _refusal(str(error)) from None
        except ValueError as error:
            # requests' JSONDecodeError is one, too; what else raises it is a wrong argument.
            if not isinstance(error, requests.RequestException):
                raise PodRefused(f"RunPod: {error}") from None
            raise _unreadable(error) from None
        except (requests.RequestException, KeyError, TypeError) as error:
            raise _unreadable(error) from None

    def _get(self, path: str, query: Mapping[str, str]) -> Any:
        import httpx

        try:
            answer = httpx.get(
                self._base_url + path, params=query, headers=self._headers(), timeout=TIMEOUT_S
            )
            _check(answer.status_code, answer.headers)
            return answer.json()
        except (httpx.HTTPError, ValueError) as error:
            raise PodsUnavailable(f"RunPod cannot be reached: {type(error).__name__}") from None

    def _stream(self, path: str) -> Iterator[str]:
        import httpx

        timeout = httpx.Timeout(TIMEOUT_S, read=LOG_WAIT_S)
        url = self._base_url + path
        try:
            with httpx.stream("GET", url, headers=self._headers(), timeout=timeout) as answer:
                _check(answer.status_code, answer.headers)
                for line in answer.iter_lines():
                    if line.startswith("data:"):
                        yield line.removeprefix("data:").strip()
        except httpx.ReadTimeout:
            return  # nothing more for now
        except httpx.HTTPError as error:
            raise PodsUnavailable(f"RunPod cannot be reached: {type(error).__name__}") from None

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._api_key}"}


def check_value(name: str, value: str) -> None:
    """Refuse what the SDK would send as broken, or as other, GraphQL. The value is not shown.

    Raises:
        PodRefused: It holds a quote, a backslash or a line break.
    """
    if any(character in value for character in _UNSAFE):
        raise PodRefused(
            f"{name}: holds a quote, a backslash or a line break, which cannot be passed to a pod; "
            "encode it, for instance in base64"
        )


def _arguments(request: PodRequest, machines: Machines, place: str | None) -> dict[str, Any]:
    """Arguments of the SDK's `create_pod`.

    Args:
        place: A data centre; None for any.
    """
    for name, value in {"name": request.name, "image": request.image, **request.env}.items():
        check_value(name, value)
    arguments: dict[str, Any] = {
        "name": request.name,
        "image_name": request.image,
        "container_disk_in_gb": request.disk_gb,
        "env": dict(request.env),
        "ports": ",".join(request.ports) or None,
        "start_ssh": "22/tcp" in request.ports,
    }
    if request.gpu_id is None:
        return {**arguments, "cloud_type": "SECURE", "instance_id": CPU_INSTANCE}
    return {
        **arguments,
        "cloud_type": request.cloud,
        "gpu_type_id": request.gpu_id,
        "gpu_count": request.gpu_count,
        "min_vcpu_count": machines.vcpus_per_gpu * request.gpu_count,
        "min_memory_in_gb": machines.memory_gb_per_gpu * request.gpu_count,
        **({} if place is None else {"data_center_id": place}),
        "support_public_ip": "22/tcp" in request.ports,
    }


def _sdk(api_key: str) -> Any:
    """The SDK, with the key of this process's organization."""
    try:
        import runpod  # pyright: ignore[reportMissingTypeStubs]
    except ImportError:
        raise ConfigurationError(
            "the package runpod is not installed: pip install 'openweights[cluster]'"
        ) from None
    # Its import lets every logger print; this one has a line for every request.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    sdk = cast("Any", runpod)
    # At first it holds the key of ~/.runpod/config.toml, if there is one.
    if getattr(sdk, _MARK, api_key) != api_key:
        raise ConfigurationError(
            "another RunPod key is in use in this process; run one process per organization"
        )
    setattr(sdk, _MARK, api_key)
    sdk.api_key = api_key
    return sdk


def _pod(pod: Mapping[str, Any]) -> Pod:
    # One that is new to us counts as running: whether its worker lives, heartbeats tell.
    status = _STATUSES.get(pod["desiredStatus"], "RUNNING")
    # The wanted status; what it runs comes once it does.
    if status == "RUNNING" and pod.get("runtime") is None:
        status = "PROVISIONING"
    price = pod.get("costPerHr")
    return Pod(str(pod["id"]), str(pod.get("name") or ""), status, float(price) if price else None)


def _listing(gpu: Mapping[str, Any], cloud: PodCloud) -> Listing:
    prices: Mapping[str, Any] = gpu.get("price") or {}
    usd = prices.get(cloud.lower())
    stock = cast("StockLevel", gpu.get("availability") or "NONE")
    return Listing(str(gpu["id"]), cloud, stock, None if usd is None else float(usd))


def _line(event: str) -> str:
    """Of a pod's log; what is not understood is shown as it came."""
    try:
        return str(json.loads(event)["line"])
    except (ValueError, KeyError, TypeError):
        return event


# ---- errors --------------------------------------------------------------------------------------


def _refusal(sentence: str) -> NoCapacity | SpendingLimit | PodRefused:
    """What a sentence of RunPod's means; they have no codes."""
    text = sentence.lower()
    if any(phrase in text for phrase in _NO_CAPACITY):
        return NoCapacity(f"RunPod: {sentence}")
    if any(phrase in text for phrase in _NO_MONEY):
        return SpendingLimit(f"RunPod: {sentence}")
    return PodRefused(f"RunPod: {sentence}")


def _unreadable(error: Exception) -> Exception:
    """The error for an answer that is no JSON, not the JSON expected, or did not come."""
    answer = _answer_of(error)
    if answer is None:
        return PodsUnavailable(f"RunPod cannot be reached: {type(error).__name__}")
    try:
        _check(answer.status_code, answer.headers)
    except (PodsUnavailable, PodRefused, ConfigurationError) as known:
        return known
    return PodsUnavailable("RunPod answered something that is not understood")


def _answer_of(error: BaseException) -> Any:
    """The HTTP answer that a failed call of the SDK has got: a local of its own."""
    import requests

    trace = error.__traceback__
    while trace is not None:
        found = trace.tb_frame.f_locals.get("response")
        if isinstance(found, requests.Response):
            return found
        trace = trace.tb_next
    return None


def _check(status: int, headers: Mapping[str, str]) -> None:
    if status == 429:  # noqa: PLR2004
        seconds = _retry_after(headers)
        raise RateLimited(f"RunPod asks for a pause of {seconds:g} s", seconds)
    if status in (401, 403):
        raise _bad_key()
    if status == 410:  # noqa: PLR2004
        raise ConfigurationError(
            "RunPod has switched off this API (HTTP 410); upgrade openweights and runpod"
        )
    if status >= 500:  # noqa: PLR2004
        raise PodsUnavailable(f"RunPod fails with HTTP {status}")
    if status >= 400:  # noqa: PLR2004
        raise PodRefused(f"RunPod refuses the request with HTTP {status}")


def _retry_after(headers: Mapping[str, str]) -> float:
    text = headers.get("Retry-After") or headers.get("retry-after") or ""
    try:
        return max(1.0, float(text))
    except ValueError:  # absent, or a date
        return DEFAULT_RETRY_AFTER_S


def _bad_key() -> ConfigurationError:
    return ConfigurationError(
        "RunPod refuses the key; set RUNPOD_API_KEY to one that may manage pods"
    )
