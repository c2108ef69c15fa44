"""Python files of the user's at work: they give values, and change nothing of ours.

A reward that changes the working directory, switches gradients off or reseeds torch would spoil the
training that asked it, most of it silently; one that calls `sys.exit()` would end the job as if it
were done.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from openweights.errors import ConfigError, JobFailedError, OpenWeightsError
from openweights.jobs.unsloth.runtime.launcher import EXIT_TERMINATED


@contextmanager
def undisturbed() -> Iterator[None]:
    """Afterwards the working directory, and torch's modes and random numbers, are as before."""
    folder = os.getcwd()
    gradients, dtype, device = (
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.get_default_device(),
    )
    gpus = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(gpus):
        try:
            yield
        finally:
            os.chdir(folder)
            torch.set_grad_enabled(gradients)
            torch.set_default_dtype(dtype)
            if torch.get_default_device() != device:
                torch.set_default_device(device)


@contextmanager
def calling(name: str, file: Path | None) -> Iterator[None]:
    """While a reward function computes: what it raises ends the job, with its name and line.

    Args:
        file: That it is defined in; None for one of ours.

    Raises:
        JobFailedError: It raised something.
    """
    try:
        yield
    except OpenWeightsError:
        raise
    except SystemExit as error:
        if error.code == EXIT_TERMINATED:  # the job itself is asked to stop
            raise
        raise JobFailedError(_raised(name, file, ended_by_exit(error), error)) from error
    except Exception as error:
        raise JobFailedError(_raised(name, file, error, error)) from error


def ended_by_exit(error: SystemExit) -> RuntimeError:
    """What is said of a call of `sys.exit`."""
    return RuntimeError(f"sys.exit({error.code!r}) was called")


def run_file(path: Path, place: str) -> Any:
    """The module that a file is.

    Args:
        place: What it is called in messages.

    Raises:
        ConfigError: It cannot be run.
    """
    spec = importlib.util.spec_from_file_location(f"openweights_reward_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{place}: is no Python file; give one that ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        with undisturbed():
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        if isinstance(error, SystemExit) and error.code == EXIT_TERMINATED:
            raise
        text = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{place}: cannot be run ({text}); correct it") from error
    return module


def _raised(name: str, file: Path | None, said: Exception, error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if file is None or frame.filename == str(file)]
    line = f" (line {lines[-1]})" if lines else ""
    return (
        f"reward {name}: raised {type(said).__name__}: {said}{line}; correct it, and let it return "
        "None for a completion that it cannot score"
    )
