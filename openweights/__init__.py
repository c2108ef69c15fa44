"""openweights: fine-tuning jobs with an OpenAI-like SDK, on this machine or on a cluster.

    from openweights import OpenWeights

    ow = OpenWeights()
    file = ow.files.upload("train.jsonl", purpose="conversations")["id"]
    job = ow.fine_tuning.create(model="Qwen/Qwen3-4B", training_file=file, loss="sdft")
    job.wait()

Importing the package loads nothing but the errors: the client comes with its first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from openweights.errors import (
    ConfigError,
    ConfigurationError,
    DatasetError,
    FencedError,
    InvalidInputError,
    InvalidStateError,
    JobCanceledError,
    JobFailedError,
    NotFoundError,
    OpenWeightsError,
    PlatformError,
    StoreUnavailableError,
    WaitTimeoutError,
)

if TYPE_CHECKING:
    from openweights.client import OpenWeights
    from openweights.client.job_kinds import Jobs, register

__version__ = "1.0.0"

__all__ = [
    "ConfigError",
    "ConfigurationError",
    "DatasetError",
    "FencedError",
    "InvalidInputError",
    "InvalidStateError",
    "JobCanceledError",
    "JobFailedError",
    "Jobs",
    "NotFoundError",
    "OpenWeights",
    "OpenWeightsError",
    "PlatformError",
    "StoreUnavailableError",
    "WaitTimeoutError",
    "__version__",
    "register",
]

_LAZY = {
    "OpenWeights": "openweights.client",
    "Jobs": "openweights.client.job_kinds",
    "register": "openweights.client.job_kinds",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'openweights' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
