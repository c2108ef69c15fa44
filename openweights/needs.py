"""What a job needs of the machine that runs it, and what of that this machine lacks.

With the store on this machine a job is run by the same Python, so what is missing is said when the
job is submitted. Of the machines of a project nothing is known.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec

from openweights.errors import ConfigurationError
from openweights.hardware import detect

TRAIN_EXTRA = "pip install 'openweights[train]'"
GPU_EXTRA = "pip install 'openweights[gpu]'"
# There is a GPU that nvidia-smi does not tell of: its own driver without that program, ROCm, WSL.
_DEVICES = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/kfd", "/dev/dxg")


@dataclass(frozen=True, slots=True)
class Need:
    """What a parameter asks for.

    Attributes:
        field: The parameter; empty for what every job of the kind needs.
        remedy: What else can be done.
        gpu: Whether it takes a GPU.
        packages: Python packages that it takes.
        variable: An environment variable that must be set.
    """

    field: str
    remedy: str
    gpu: bool = False
    packages: tuple[str, ...] = ()
    variable: str | None = None


def unmet_needs(
    needs: Iterable[Need],
    *,
    has_gpu: Callable[[], bool],
    has_package: Callable[[str], bool],
    has_variable: Callable[[str], bool],
) -> list[str]:
    """A line for each parameter whose needs are not met: what it needs, what is not there, and what
    to do.
    """
    lines: list[str] = []
    for need in needs:
        lacks = [f"the package {name}" for name in need.packages if not has_package(name)]
        if need.gpu and not has_gpu():
            lacks.insert(0, "a GPU")
        if need.variable is not None and not has_variable(need.variable):
            lacks.append(f"the variable {need.variable}")
        if lacks:
            subject = f"{need.field}: it" if need.field else "such a job"
            words = " and ".join(lacks)
            lines.append(f"{subject} needs {words}, which this machine lacks; {need.remedy}")
    return lines


def has_gpu(env: Mapping[str, str]) -> bool:
    """Whether jobs with these variables may have a GPU: False only where it is known that none is
    there.
    """
    try:
        found = detect(env)
    except ConfigurationError:  # nvidia-smi is there, and fails
        return True
    is_hidden = env.get("CUDA_VISIBLE_DEVICES") == ""
    return found.gpu_count > 0 or (not is_hidden and any(map(os.path.exists, _DEVICES)))


def has_package(name: str) -> bool:
    """Whether a job that runs here can import it, or has its program."""
    return find_spec(name) is not None or shutil.which(name) is not None
