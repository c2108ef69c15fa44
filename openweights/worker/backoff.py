"""Trying again while the store is away."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

from openweights.errors import StoreUnavailableError

logger = logging.getLogger(__name__)
T = TypeVar("T")

FIRST_DELAY_S = 0.1
MOST_DELAY_S = 10.0


def delays() -> Iterator[float]:
    """Seconds to wait before each further try: doubling, bounded, and spread so that workers do not
    come back in step.
    """
    delay_s = FIRST_DELAY_S
    while True:
        yield delay_s * random.uniform(0.5, 1.0)
        delay_s = min(2 * delay_s, MOST_DELAY_S)


def persist(call: Callable[[], T], *, give_up: threading.Event) -> T:
    """The answer of `call`, tried again for as long as the store cannot be reached.

    Raises:
        StoreUnavailableError: `give_up` was set and the store is still away.
    """
    for delay_s in delays():
        try:
            return call()
        except StoreUnavailableError as error:
            logger.warning("the store is away, trying again in %.1f s: %s", delay_s, error)
            if give_up.wait(delay_s):
                raise
    raise AssertionError("delays() never ends")
