"""Why a job has failed, as far as its last lines and the kernel tell, and what to lower when it was
for lack of memory.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

Cause = Literal["oom", "hub"]

_OUT_OF_MEMORY = re.compile(
    r"OutOfMemoryError|CUDA (?:error: )?out of memory|CUBLAS_STATUS_ALLOC_FAILED"
    r"|does not fit into the GPU's memory|DefaultCPUAllocator: (?:can't|not enough)"
    r"|^(?:\w+\.)*_?(?:Array)?MemoryError\b|Cannot allocate memory",
    re.MULTILINE,
)
# It could not be reached, or could not answer; what it refuses, it refuses again.
_NO_HUB = re.compile(
    r"Hugging Face hub cannot be reached|LocalEntryNotFoundError|(?:failed \d+ times, last: )"
    r"|(?:couldn't connect to|Max retries exceeded|Connection error).*(?:huggingface\.co|hf\.co)"
    r"|(?:429|50[0234]) (?:Client|Server) Error.*(?:huggingface\.co|hf\.co)",
    re.IGNORECASE,
)
_KILLED = frozenset({-signal.SIGKILL, 128 + signal.SIGKILL})
# What a job's memory grows with, the most first: (field, the least that can be lowered).
_GROWS_WITH: tuple[tuple[str, float], ...] = (
    ("per_device_train_batch_size", 2),
    ("per_device_eval_batch_size", 2),
    ("batch_size", 2),
    ("max_num_seqs", 2),
    ("grpo_max_completion_length", 2),
    ("sdft_max_new_tokens", 2),
    ("max_seq_length", 2),
    ("max_model_len", 2),
    ("max_tokens", 2),
    ("r", 2),
)
_OF_LOSS = {"grpo_max_completion_length": "grpo", "sdft_max_new_tokens": "sdft"}
_CGROUPS = Path("/sys/fs/cgroup")


def cause_of(exit_code: int | None, last_lines: str, *, oom_kills: int = 0) -> Cause | None:
    """What a failure came from, or None where nothing tells.

    Args:
        last_lines: Of what the job has printed.
        oom_kills: Processes that the kernel has killed for lack of memory while it ran.
    """
    if exit_code in _KILLED:
        return "oom" if oom_kills > 0 else None
    if _OUT_OF_MEMORY.search(last_lines):
        return "oom"
    return "hub" if _NO_HUB.search(last_lines) else None


def advice(params: Mapping[str, Any]) -> str:
    """The two settings of a job to lower when memory ran out, with their values."""
    found = [
        f"{field} ({params[field]})"
        for field, least in _GROWS_WITH
        if isinstance(params.get(field), int | float)
        and params[field] >= least
        and _OF_LOSS.get(field) in (None, params.get("loss"))
    ]
    if len(found) > 1:
        return f"lower {found[0]} or {found[1]}"
    more = "ask for more with requires_vram_gb"
    return f"lower {found[0]}, or {more}" if found else more


def oom_kills() -> int:
    """Processes that the kernel has killed for lack of memory since it, or this container, started;
    0 where that cannot be known.
    """
    return sum(_counts())


def _counts() -> Iterator[int]:
    places = [*_cgroup_files(), Path("/proc/vmstat")]
    for path in places:
        with suppress(OSError, ValueError):
            for line in path.read_text(encoding="ascii").splitlines():
                name, _, value = line.partition(" ")
                if name == "oom_kill":
                    yield int(value)


def _cgroup_files() -> Iterator[Path]:
    """Of both versions, for this process's group."""
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            below = path.lstrip("/")
            if not controllers:
                yield _CGROUPS / below / "memory.events"
            elif "memory" in controllers.split(","):
                yield _CGROUPS / "memory" / below / "memory.oom_control"
