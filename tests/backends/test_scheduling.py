"""The decisions about when a job may run, against other ways to find the same."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from openweights.backends.scheduling import cycle_through

NAMES = st.sampled_from("abcdef")
GRAPHS = st.dictionaries(NAMES, st.lists(NAMES, max_size=3), max_size=6)


def closure(start: list[str], graph: dict[str, list[str]]) -> set[str]:
    """All that can be reached, by going on until nothing is new."""
    found = set(start)
    while more := {needed for name in found for needed in graph.get(name, [])} - found:
        found |= more
    return found


@given(GRAPHS, st.lists(NAMES, max_size=3))
def test_cycles(graph: dict[str, list[str]], after: list[str]) -> None:
    path = cycle_through("a", after, lambda name: graph.get(name, []))
    assert (path is not None) == ("a" in closure(after, graph | {"a": []}))
    if path is not None:
        assert path[0] == path[-1] == "a" and path[1] in after
        assert len(set(path)) == len(path) - 1
        steps = zip(path[1:-1], path[2:], strict=True)
        assert all(later in graph[earlier] for earlier, later in steps)
