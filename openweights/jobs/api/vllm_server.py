"""A deployment by `vllm serve`: the same models under the same names, key and end."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import TYPE_CHECKING

from openweights.errors import ConfigError, JobFailedError
from openweights.jobs.api.deployment import (
    LOOK_S,
    Place,
    Use,
    end_unused,
    tell_served,
)
from openweights.jobs.model_source import ModelSource, fetch_model
from openweights.jobs.pinning import pinned_model
from openweights.models.names import location_here
from openweights.settings import Settings

if TYPE_CHECKING:
    from openweights import OpenWeights
    from openweights.jobs.api import ApiConfig

logger = logging.getLogger(__name__)

# vLLM takes these ranks alone.
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_ASK_TIMEOUT_S = 5.0
_REQUESTS = re.compile(r"^http_requests_total\{(?P<labels>[^}]*)\} (?P<count>\S+)$", re.MULTILINE)
_UNCOUNTED = ('handler="/metrics"', 'handler="/health"')


def serve_vllm(
    ow: OpenWeights,
    config: ApiConfig,
    base: ModelSource,
    fixed: Sequence[ModelSource],
    place: Place,
    use: Use | None = None,
) -> None:
    """Serve until nobody uses it, or until it is told to stop.

    Args:
        fixed: The adapters on it that do not change while they are served.
        use: What alone uses it, and is told its address.

    Raises:
        JobFailedError: vLLM ended by itself; its own log is above.
    """
    adapters = [*fixed, *_newest(ow, config)]
    port = place.listening.getsockname()[1]
    host = place.listening.getsockname()[0]
    place.listening.close()  # vLLM binds it itself
    command = vllm_command(config, base, adapters, Settings.from_env().n_gpus, host, port)
    # The key goes by the environment: the command line is logged.
    child = subprocess.Popen(command, env={**os.environ, "VLLM_API_KEY": str(config.api_key)})
    stopped: list[int] = []

    def stop(number: int, _: FrameType | None) -> None:
        stopped.append(number)
        child.terminate()

    signal.signal(signal.SIGTERM, stop)
    try:
        url = f"http://127.0.0.1:{port}"
        while not _is_healthy(url):
            if child.poll() is not None or stopped:
                raise JobFailedError(f"vllm serve ended with {child.wait()} before it was up")
            time.sleep(LOOK_S)
        if use is not None:
            use(place.base_url)
            return
        tell_served(ow, place, [config.model, *(source.name for source in adapters)])
        if _wait_unused(url, config.idle_timeout, child):
            end_unused(ow, config.idle_timeout)
        elif not stopped:
            raise JobFailedError(f"vllm serve ended by itself with {child.wait()}")
    finally:
        child.terminate()
        child.wait()


def vllm_command(
    config: ApiConfig,
    base: ModelSource,
    adapters: Sequence[ModelSource],
    gpus: int,
    host: str,
    port: int,
) -> list[str]:
    """The arguments of `vllm serve`.

    Raises:
        ConfigError: One of the adapters is a model of its own.
    """
    options: dict[str, object] = {
        "--served-model-name": config.model,
        "--host": host,
        "--port": port,
        "--max-model-len": config.max_model_len,
        "--max-num-seqs": config.max_num_seqs,
        # bitsandbytes cannot split a layer over several GPUs.
        _split(config): max(gpus, 1),
        "--quantization": config.quantization,
        "--kv-cache-dtype": config.kv_cache_dtype,
        "--chat-template": None if config.chat_template == "default" else config.chat_template,
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", location_here(base.base)]
    for name, value in options.items():
        command += [] if value is None else [name, str(value)]
    command.append("--enable-prefix-caching")
    if adapters:
        ranks = [_rank(source) for source in adapters]
        given = config.max_lora_rank
        rank = given if isinstance(given, int) else max(ranks)
        command += ["--enable-lora", "--max-lora-rank", str(_allowed_rank(rank))]
        count = len(adapters) if config.max_loras < 0 else config.max_loras
        command += ["--max-loras", str(count), "--lora-modules"]
        command += [f"{source.name}={source.adapter}" for source in adapters]
    return command


def _split(config: ApiConfig) -> str:
    four_bit = "4bit" in config.model.lower() or config.quantization == "bitsandbytes"
    return "--pipeline-parallel-size" if four_bit else "--tensor-parallel-size"


def _rank(source: ModelSource) -> int:
    if source.adapter is None:
        raise ConfigError(f"lora_adapters: {source.name} is a model, not an adapter")
    config: Mapping[str, object] = json.loads((source.adapter / "adapter_config.json").read_text())
    pattern = config.get("rank_pattern")
    ranks = [config["r"], *(pattern.values() if isinstance(pattern, dict) else ())]
    return max(int(str(rank)) for rank in ranks)


def _allowed_rank(rank: int) -> int:
    fitting = [allowed for allowed in _RANKS if allowed >= rank]
    if not fitting:
        raise ConfigError(f"max_lora_rank: {rank} is more than vLLM can serve ({_RANKS[-1]})")
    return fitting[0]


def _newest(ow: OpenWeights, config: ApiConfig) -> list[ModelSource]:
    """Of each fine-tuning job what it has saved last; vLLM keeps to that."""
    from pathlib import Path

    from openweights.jobs.api.deployment import is_followed

    found: list[ModelSource] = []
    for name in filter(is_followed, config.lora_adapters):
        source = fetch_model(ow, pinned_model(ow, name), Path("model"))
        found.append(ModelSource(source.base, source.adapter, name))
    return found


# ---- watching it ---------------------------------------------------------------------------------


def _is_healthy(url: str) -> bool:
    return _get(f"{url}/health") is not None


def _wait_unused(url: str, idle_s: float, child: subprocess.Popen[bytes]) -> bool:
    """Whether nobody asked for anything for so long; False when vLLM ended before."""
    seen, used_at = -1.0, time.monotonic()
    while child.poll() is None:
        metrics = _get(f"{url}/metrics")
        count = seen if metrics is None else count_requests(metrics)
        if count != seen:
            seen, used_at = count, time.monotonic()
        if time.monotonic() - used_at > idle_s:
            return True
        time.sleep(min(LOOK_S, idle_s / 4))
    return False


def count_requests(metrics: str) -> float:
    """How many requests it has answered, other than those that only look whether it lives."""
    running = sum(
        float(line.rsplit(" ", 1)[1])
        for line in metrics.splitlines()
        if line.startswith("vllm:num_requests_running")
    )
    answered = sum(
        float(found["count"])
        for found in _REQUESTS.finditer(metrics)
        if not any(label in found["labels"] for label in _UNCOUNTED)
    )
    # One that has been running for long is use, too: its tokens count.
    tokens = sum(
        float(line.rsplit(" ", 1)[1])
        for line in metrics.splitlines()
        if line.startswith("vllm:generation_tokens_total")
    )
    return answered + tokens + running


def _get(url: str) -> str | None:
    try:
        with urllib.request.urlopen(url, timeout=_ASK_TIMEOUT_S) as response:  # noqa: S310 - our own loopback
            return response.read().decode()
    except (urllib.error.URLError, OSError):
        return None
