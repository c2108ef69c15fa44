"""A worker whose key was revoked stops its job and ends; one refusal alone changes nothing."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from openweights.errors import ConfigurationError
from openweights.types import Instruction
from openweights.worker.heartbeat import Heartbeat
from tests.waiting import HANGS_S


class Refusing:
    """Refuses as `refusals` says, and goes on so."""

    def __init__(self, refusals: Iterator[bool]) -> None:
        self._refusals = refusals
        self.beats = 0
        self.has_beaten = threading.Event()

    def heartbeat(self, worker_id: str, run_id: int | None = None) -> Instruction:
        self.beats += 1
        if self.beats == 12:
            self.has_beaten.set()
        if next(self._refusals):
            raise ConfigurationError("the key has been revoked")
        return "continue"


def _two_of_three() -> Iterator[bool]:
    while True:
        yield from (True, True, False)


@pytest.mark.parametrize("is_revoked", [True, False])
def test_a_revoked_key_ends_the_run_and_the_worker(is_revoked: bool) -> None:
    store = Refusing(iter([True] * 12) if is_revoked else _two_of_three())
    told: list[Instruction] = []
    ended = threading.Event()
    with Heartbeat(store, "w", 0.01, ended.set) as heart, heart.watching(1, told.append):
        assert (ended if is_revoked else store.has_beaten).wait(HANGS_S)
    assert told == (["fenced"] if is_revoked else [])
    assert ended.is_set() == is_revoked
