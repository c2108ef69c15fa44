"""Python files of the user's at work: they give values, and change nothing of ours.

A reward that changes the working directory, switches gradients off or reseeds torch would spoil the
training that asked it, most of it silently.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


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
