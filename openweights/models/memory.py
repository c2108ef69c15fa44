"""Whether a model fits into the memory that is free now, beside what else runs on this machine."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

import torch

from openweights.errors import ConfigurationError
from openweights.models.names import location_here

logger = logging.getLogger(__name__)

# Weights alone are not all: activations, the cache, what the loader holds for a moment.
ROOM = 1.25
POLL_S = 5.0


def weight_bytes(folder: Path) -> int:
    """What the weights in a folder take as they are saved; 0 where there are none."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def memory_bytes() -> tuple[int, int]:
    """Free and whole memory of where models are computed: the GPU, or the machine without one."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 2**62, 2**62  # nothing tells: try, and see
    values = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    return values["MemAvailable"], values["MemTotal"]


def wait_for_model(name: str, base: str, say: Callable[[str], None]) -> None:
    """As `wait_for_memory`, for what a model takes.

    Args:
        name: What it is called, as far as that is said.
        base: Its folder or repository.
    """
    needed = int(ROOM * weight_bytes(Path(location_here(base))))
    wait_for_memory(Path(name).name, needed, say=say)


def wait_for_memory(
    name: str,
    needed: int,
    memory: Callable[[], tuple[int, int]] = memory_bytes,
    pause: Callable[[float], None] = time.sleep,
    say: Callable[[str], None] = logger.warning,
) -> None:
    """Return once so many bytes are free.

    Args:
        memory: Free and whole memory, in bytes.
        say: Told, once, what is waited for.

    Raises:
        ConfigurationError: There never will be as many.
    """
    is_told = False
    while True:
        free, whole = memory()
        if needed <= free:
            return
        if needed > whole:
            raise ConfigurationError(
                f"{name} needs {needed / 2**30:.1f} GiB of memory, and this machine has "
                f"{whole / 2**30:.1f}; choose a smaller model"
            )
        if not is_told:
            free_gb, whole_gb = free / 2**30, whole / 2**30
            say(
                f"{name} waits for memory: it needs {needed / 2**30:.1f} GiB, and {free_gb:.1f} of "
                f"{whole_gb:.1f} are free; it goes on when another job or deployment ends"
            )
            is_told = True
        pause(POLL_S)
