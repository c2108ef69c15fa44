"""Series: what is a measure, what a resumed run replaces, and that thinning loses no peak."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openweights import OpenWeights
from openweights.dashboard.series import Series, SeriesCache, measures, points, thinned


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"step": 3, "loss": 0.5, "tag": "train"}, {"loss": 0.5}),
        ({"step": 3, "loss": 0.5, "tag": "eval"}, {"eval/loss": 0.5}),
        ({"step": 3, "loss": "Infinity"}, {"loss": math.inf}),
        (
            {"step": 3, "type": "multiple_choice", "tag": "arc", "accuracy": 0.5, "path": "x"},
            {"multiple_choice/arc/accuracy": 0.5},
        ),
        ({"loss": 0.5}, {}),
        ({"step": "three", "loss": 0.5}, {}),
        ({"step": 1, "done": True, "name": "x"}, {}),
    ],
)
def test_measures_are_the_numbers_of_events_with_a_step(
    data: dict[str, Any], expected: dict[str, float]
) -> None:
    found = {name: value for name, _, value in measures(data)}
    assert found == expected


def test_a_resumed_run_replaces_the_steps_that_it_repeats() -> None:
    series = Series()
    for step, value in [(1, 1.0), (2, 2.0), (3, 3.0), (2, 20.0), (4, 40.0)]:
        series.add(step, value, 0.0)
    assert list(series.steps) == [1, 2, 4]
    assert list(series.values) == [1.0, 20.0, 40.0]


@given(
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=600),
    st.integers(2, 40),
)
def test_thinning_keeps_ends_and_extremes_in_order(ys: list[float], buckets: int) -> None:
    xs = [float(x) for x in range(len(ys))]
    kept = thinned(xs, ys, buckets)
    assert kept == sorted(set(kept))
    assert kept[0] == 0 and kept[-1] == len(ys) - 1
    assert max(ys[i] for i in kept) == max(ys)
    assert min(ys[i] for i in kept) == min(ys)
    assert len(kept) <= 4 * buckets


def test_equal_steps_are_thinned_too() -> None:
    kept = thinned([1.0] * 100, [float(i) for i in range(100)], 3)
    assert {0, 99} <= set(kept) and len(kept) <= 12


def test_what_is_no_finite_number_is_a_gap() -> None:
    series = Series()
    for step, value in enumerate([1.0, math.nan, math.inf, 2.0]):
        series.add(step, value, 0.0)
    assert points(series, 10)["value"] == [1.0, None, None, 2.0]


def test_a_long_history_is_read_in_pieces(ow: OpenWeights, run_job: Any) -> None:
    run_job("ftjob-long", [{"step": step, "loss": 1.0} for step in range(9000)])
    cache = SeriesCache(ow.backend)
    first = cache.of("ftjob-long", seconds=0)
    assert not first.complete and len(first.by_name["loss"].steps) == 2000
    while not first.complete:
        cache.of("ftjob-long", seconds=0)
    assert list(first.by_name["loss"].steps) == [float(step) for step in range(9000)]
