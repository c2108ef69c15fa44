"""What this machine has, asked of `nvidia-smi` so that no worker loads torch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from openweights.errors import ConfigurationError
from openweights.gpu_names import gpu_key

QUERY_TIMEOUT_S = 30.0
_NO_MEMORY = ("[N/A]", "[Not Supported]")
_MIG = "MIG-"
_SLICE = re.compile(r"MIG (?P<profile>\S*?\.(?P<gb>\d+)gb\S*)\s+Device.*\(UUID: (?P<uuid>[^)]+)\)")


@dataclass(frozen=True, slots=True)
class Hardware:
    """GPUs that jobs of this machine can use.

    Attributes:
        hardware_type: Such as "2x H100S"; "cpu" without a GPU.
        vram_gb: Memory of all GPUs together, in GiB, each rounded down.
    """

    hardware_type: str
    gpu_count: int
    vram_gb: int


CPU = Hardware("cpu", 0, 0)


def detect(env: Mapping[str, str]) -> Hardware:
    """The GPUs that `env` (PATH, CUDA_VISIBLE_DEVICES) makes usable.

    Raises:
        ConfigurationError: `nvidia-smi` is installed and fails: a machine that is paid for its GPUs
            must not go on as a CPU.
    """
    answer = ask_nvidia_smi(env, ["index", "uuid", "name", "memory.total"])
    visible = env.get("CUDA_VISIBLE_DEVICES")
    if answer is None:
        return CPU
    if visible is not None and visible.strip().startswith(_MIG):
        return summarize_slices(_nvidia_smi(env, ["-L"]) or "", visible)
    shared_mib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
    return summarize(answer, visible, shared_mib)


def ask_nvidia_smi(env: Mapping[str, str], fields: Sequence[str]) -> str | None:
    """What `nvidia-smi` says of `fields`, a row for each GPU; None where it is not installed.

    Raises:
        ConfigurationError: It is installed and fails.
    """
    return _nvidia_smi(env, [f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"])


def _nvidia_smi(env: Mapping[str, str], arguments: Sequence[str]) -> str | None:
    program = shutil.which("nvidia-smi", path=env.get("PATH"))
    if program is None:
        return None
    try:
        return subprocess.run(
            [program, *arguments],
            capture_output=True,
            text=True,
            timeout=QUERY_TIMEOUT_S,
            check=True,
            env=dict(env),
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stdout", None) or getattr(error, "stderr", None) or error
        reason = " ".join(str(detail).split())
        raise ConfigurationError(f"nvidia-smi is there but does not work: {reason}") from error


def summarize(answer: str, visible: str | None = None, shared_mib: int = 0) -> Hardware:
    """`nvidia-smi`'s rows of index, uuid, name and MiB, limited to the devices that
    CUDA_VISIBLE_DEVICES names.

    Args:
        shared_mib: The machine's memory: what a GPU without memory of its own, of which
            `nvidia-smi` says `[N/A]`, computes in.
    """
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.splitlines() if line]
    if visible is not None:
        rows = _visible(rows, visible)
    if not rows:
        return CPU
    try:
        vram_gb = sum((shared_mib if row[3] in _NO_MEMORY else int(row[3])) // 1024 for row in rows)
    except (IndexError, ValueError):
        raise ConfigurationError(f"nvidia-smi answered {answer.strip()!r}") from None
    return Hardware(f"{len(rows)}x {short_name(rows[0][2])}", len(rows), vram_gb)


def summarize_slices(listing: str, visible: str) -> Hardware:
    """Of `nvidia-smi -L` the slice (MIG) that CUDA_VISIBLE_DEVICES names; CUDA uses the first."""
    for found in _SLICE.finditer(listing):
        if found["uuid"] == visible.split(",")[0].strip():
            return Hardware(f"1x MIG {found['profile']}", 1, int(found["gb"]))
    return CPU


def short_name(name: str) -> str:
    """`NVIDIA H100 80GB HBM3` -> `H100S`; a name that is not known stays, without its maker."""
    return gpu_key(name) or name.removeprefix("NVIDIA ").strip()


def _visible(rows: list[list[str]], visible: str) -> list[list[str]]:
    """As CUDA reads the variable: up to the first entry that names no device."""
    chosen: list[list[str]] = []
    for entry in (part.strip() for part in visible.split(",")):
        match = next((r for r in rows if r[0] == entry or (entry and r[1].startswith(entry))), None)
        if match is None:
            break
        chosen.append(match)
    return chosen
