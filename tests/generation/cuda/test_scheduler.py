"""Rows and pages by simulation: what lies in the pages is kept in a dict, and always what each
sequence wrote.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openweights.generation.cuda.graph_engine import SLICE_TOKENS, slice_tokens
from openweights.generation.cuda.pages import PagePool
from openweights.generation.cuda.scheduler import Member, Scheduler, Slice, Work

PAGE = 4
Content = tuple[str | None, tuple[Any, ...]]

works = st.lists(
    st.builds(
        lambda head, tail, samples, more, owner: (tuple([1] * head + tail), samples, more, owner),
        st.integers(0, 13),
        st.lists(st.integers(1, 2), min_size=1, max_size=6),
        st.integers(1, 4),
        st.integers(1, 11),
        st.sampled_from([None, "a"]),
    ),
    min_size=1,
    max_size=8,
)


class Simulation:
    """A device that only remembers: (page, offset) -> whose key it is and after which tokens."""

    def __init__(self, count: int, rows: int, requests: list[Any]) -> None:
        self.pool = PagePool(count, PAGE)
        self.scheduler = Scheduler(self.pool, rows)
        self.content: dict[tuple[int, int], Content] = {}
        self.written: dict[tuple[str, int], list[Any]] = {}
        self.finished: list[tuple[str, int]] = []
        self.computed = 0
        for index, (prompt, samples, more, owner) in enumerate(requests):
            work = Work(str(index), prompt, samples, len(prompt) + more, owner)
            self.scheduler.submit(work)

    def write(self, member: Member, position: int, tokens: tuple[Any, ...]) -> None:
        page = member.lease.pages[position // PAGE]
        self.content[page, position % PAGE] = (member.work.owner, tokens[: position + 1])

    def check(self, member: Member, tokens: tuple[Any, ...]) -> None:
        """Everything that a sequence reads is its own."""
        for position in range(len(tokens)):
            page = member.lease.pages[position // PAGE]
            expected = (member.work.owner, tokens[: position + 1])
            assert self.content[page, position % PAGE] == expected

    def compute(self, part: Slice) -> None:
        prompt = tuple(part.member.work.prompt)
        for position in range(part.start, part.stop):
            self.write(part.member, position, prompt)
        self.computed += part.stop - part.start
        self.check(part.member, prompt[: part.stop])
        for source, target in part.copies:
            for offset in range(PAGE):
                if (source, offset) in self.content:
                    self.content[target, offset] = self.content[source, offset]
        for member in part.starts:
            self.check(member, prompt)
            self.written[member.work.id, member.sample] = list(prompt)

    def decode(self, end: int) -> None:
        for member in self.scheduler.running:
            key = (member.work.id, member.sample)
            tokens = self.written[key]
            self.check(member, tuple(tokens))
            tokens.append((*key, len(tokens)))
            self.write(member, len(tokens) - 1, tuple(tokens))
            if len(tokens) == member.work.tokens or (len(tokens) * 7 + member.row) % end == 0:
                self.scheduler.finish(member)
                self.finished.append(key)

    def run(
        self, budget: int, end: int, aborts: dict[int, str], grows: Collection[int] = ()
    ) -> None:
        for turn in range(2_000):
            if turn in grows:
                self.pool.grow(self.pool.count + max(self.scheduler.lacked_pages, 1))
            if turn in aborts:
                self.scheduler.abort(aborts[turn])
            if self.scheduler.is_idle:
                return
            self.scheduler.admit()
            for part in self.scheduler.slices(budget):
                self.compute(part)
            self.decode(end)
        raise AssertionError("it never ends")


def _size(requests: list[Any], spare: int) -> int:
    return max(-(-(len(prompt) + more) // PAGE) for prompt, _, more, _ in requests) + spare


@settings(max_examples=150)
@given(
    works,
    st.integers(1, 5),
    st.integers(0, 12),
    st.integers(1, 20),
    st.integers(2, 9),
    st.sets(st.integers(0, 12), max_size=3),
)
def test_every_sample_ends_once_and_reads_its_own_pages(
    requests: list[Any], rows: int, spare: int, budget: int, end: int, grows: set[int]
) -> None:
    simulation = Simulation(_size(requests, spare), rows, requests)
    simulation.run(budget, end, {}, grows)
    expected = [(str(i), s) for i, (_, n, _, _) in enumerate(requests) for s in range(n)]
    assert sorted(simulation.finished) == sorted(expected)
    assert simulation.pool.available == simulation.pool.count, "no page is leaked"


@settings(max_examples=100)
@given(
    works,
    st.integers(1, 5),
    st.integers(1, 9),
    st.dictionaries(st.integers(0, 12), st.integers(0, 7).map(str), max_size=5),
)
def test_aborted_requests_leave_nothing_behind(
    requests: list[Any], rows: int, budget: int, aborts: dict[int, str]
) -> None:
    simulation = Simulation(_size(requests, 6), rows, requests)
    simulation.run(budget, 5, aborts)
    assert simulation.pool.available == simulation.pool.count
    kept = {(str(i), s) for i, (_, n, _, _) in enumerate(requests) for s in range(n)}
    kept = {key for key in kept if key[0] not in aborts.values()}
    assert kept <= set(simulation.finished) and len(set(simulation.finished)) == len(
        simulation.finished
    )


def test_common_beginnings_are_computed_once() -> None:
    head = tuple(range(100, 140))
    alike = [((*head, i), 3, 5, None) for i in range(6)]
    simulation = Simulation(200, 18, alike)
    simulation.run(1_000, 1_000, {})
    assert simulation.computed == 41 + 5 * 1, "the head once, and the last token of each"
    other = Simulation(200, 18, [(*alike[0][:3], owner) for owner in (None, "a", "b")])
    other.run(1_000, 1_000, {})
    assert other.computed == 3 * 41, "keys and values are the adapter's"


def test_what_is_forgotten_is_computed_again() -> None:
    pool = PagePool(10, PAGE)
    first = pool.lease([1] * 9, 10, None)
    assert first is not None and first.known_tokens == 0
    pool.release(first)
    again = pool.lease([1] * 9, 10, None)
    assert again is not None and again.known_tokens == 8
    pool.release(again)
    pool.forget()
    anew = pool.lease([1] * 9, 10, None)
    assert anew is not None and anew.known_tokens == 0 and pool.available == 7


def test_what_is_aborted_leaves_what_others_have_computed() -> None:
    simulation = Simulation(200, 4, [([1] * 41, 1, 5, None), ([2] * 41, 1, 5, None)])
    scheduler = simulation.scheduler
    scheduler.admit()
    for part in scheduler.slices(60):  # the second prompt is half computed
        simulation.compute(part)
    scheduler.abort("0")
    scheduler.abort("1")
    scheduler.abort("unknown")
    assert scheduler.is_idle and simulation.pool.available == 200
    scheduler.submit(Work("1", [3] * 41, 1, 46))  # an id may come again
    simulation.run(1_000, 1_000, {})
    assert simulation.finished == [("1", 0)]
    before = simulation.computed
    scheduler.abort("1")
    scheduler.submit(Work("2", [3] * 41, 1, 46))
    simulation.run(1_000, 1_000, {})
    assert simulation.computed == before + 1, "its prompt was known"


def test_an_aborted_prompt_that_others_wait_behind_leaves_its_id_free() -> None:
    simulation = Simulation(200, 4, [([1] * 41, 2, 5, None), ([2] * 41, 1, 5, None)])
    simulation.scheduler.admit()
    simulation.scheduler.abort("0")
    simulation.run(1_000, 1_000, {})
    simulation.scheduler.submit(Work("0", [4] * 9, 1, 12))
    simulation.run(1_000, 1_000, {})
    assert simulation.finished == [("1", 0), ("0", 0)]


def test_the_pages_that_are_lacked_let_all_free_rows_be_taken() -> None:
    simulation = Simulation(12, 4, [([i] * 21, 2, 7, None) for i in range(3)])
    scheduler = simulation.scheduler
    assert len(scheduler.admit()) == 2 and scheduler.waits
    simulation.pool.grow(12 + scheduler.lacked_pages)
    assert len(scheduler.admit()) == 2 and scheduler.lacked_pages == 0
    simulation.run(1_000, 1_000, {})
    assert len(simulation.finished) == 6


def test_a_request_larger_than_the_cache_is_refused() -> None:
    with pytest.raises(ValueError, match="41 tokens"):
        Scheduler(PagePool(10, PAGE), 2).submit(Work("x", [1] * 40, 1, 41))


def busy_share(tokens: Callable[[int, int], int], rows: int = 128) -> float:
    """Of the rows, those that decode, while any sample waits: long prompts, answers of all lengths.

    Args:
        tokens: How many of prompts are computed between two blocks, by the members whose prompts
            are not computed yet and by those that decode.
    """
    draw = random.Random(0)
    scheduler = Scheduler(PagePool(rows * 40, 64), rows)
    left: dict[str, int] = {}
    for index in range(4 * rows):
        prompt, answer = [index] * draw.randint(50, 1500), draw.randint(10, 512)
        scheduler.submit(Work(str(index), prompt, 1, len(prompt) + answer, None))
        left[str(index)] = answer
    shares: list[float] = []
    while scheduler.waits:
        scheduler.admit()
        while scheduler.computing:
            few = len(scheduler.running) < scheduler.computing
            scheduler.slices(tokens(scheduler.computing, len(scheduler.running)))
            if not few:
                break
        shares.append(len(scheduler.running) / rows)
        for member in scheduler.running:
            left[member.work.id] -= 8
            if left[member.work.id] <= 0:
                scheduler.finish(member)
    return sum(shares) / len(shares)


def test_prompts_keep_up_with_the_rows_that_become_free() -> None:
    assert busy_share(slice_tokens) > 0.9
    assert busy_share(lambda *_: SLICE_TOKENS) < 0.75, "the control"
    assert slice_tokens(1, 127) == SLICE_TOKENS, "one newcomer holds up the others for no longer"
