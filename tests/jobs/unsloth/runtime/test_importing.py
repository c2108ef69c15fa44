"""Imports among which nobody looks for garbage."""

from __future__ import annotations

import gc

from openweights.jobs.unsloth.runtime.importing import importing


class Ring:
    """Garbage that only a collection finds."""

    def __init__(self) -> None:
        self.me = self


def test_what_was_imported_is_never_looked_at_again() -> None:
    before = gc.get_freeze_count()
    with importing("json"):
        assert gc.isenabled(), "it was imported before"
    assert gc.get_freeze_count() == before
    gc.collect()
    with importing("a_module_that_is_not_there"):
        assert not gc.isenabled()
        made = [Ring() for _ in range(1000)]
    assert gc.isenabled() and gc.get_freeze_count() >= before + 1000
    del made
    assert gc.collect() < 1000, "what was made inside stays"
    later = [Ring() for _ in range(1000)]
    del later
    assert gc.collect() >= 1000, "what is made afterwards does not"
