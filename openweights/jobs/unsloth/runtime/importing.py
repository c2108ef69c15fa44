"""Imports of hundreds of megabytes, without looking for garbage among what they make.

torch, transformers and trl make half a million objects, all of which stay. Python looks through
them again and again while they are made, and at each full collection afterwards, such as
accelerate's when a trainer starts: a fifth of the processor's time that the imports take.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing(module: str) -> Iterator[None]:
    """Inside, `module` and what it needs is imported; nothing is done where it has been before.

    All that is there at the end is never garbage, so nothing else should happen inside.
    """
    if module in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
