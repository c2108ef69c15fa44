"""Series: what is a measure, what a resumed run replaces, and that thinning loses no peak."""

from __future__ import annotations

import math
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from openweights import OpenWeights
from openweights.client.watching.metrics import series
from openweights.dashboard.series import Series, SeriesCache, points, thinned


def test_measures_are_called_as_in_python(ow: OpenWeights, run_job: Any) -> None:
    """As `ow.compare`, plots and `job.metrics` have them, whatever was logged."""
    run_job(
        "ftjob-a",
        [
            {"step": 1, "loss": 0.5, "tag": "train"},
            {"step": 1, "loss": 0.75, "tag": "eval"},
            {"step": 1, "type": "multiple_choice", "tag": "arc", "accuracy": 0.5, "path": "x"},
            {"type": "logprob_block", "step": 1, "tag": "kind", "logprobs": [-1.0, -3.0]},
            {"type": "logprob_block", "step": 1, "tag": "kind", "logprobs": [-5.0]},
            {"type": "checkpoint", "step": 1, "file": "x", "kept": True},
            {"step": 2, "loss": "Infinity", "done": True, "name": "x"},
            {"loss": 0.5},
            {"step": "three", "loss": 0.5},
        ],
    )
    found = SeriesCache(ow.backend).of("ftjob-a").by_name
    assert {name: list(one.values) for name, one in found.items()} == {
        "loss": [0.5, math.inf],
        "eval_loss": [0.75],
        "multiple_choice/accuracy[arc]": [0.5],
        "logprob_block/mean[kind]": [-3.0],
    }
    assert found.keys() == series(ow.jobs.retrieve("ftjob-a").metric_rows()).keys()


def test_a_resumed_run_replaces_the_steps_that_it_repeats() -> None:
    one = Series()
    points = [(1, 1.0, 1), (2, 2.0, 1), (3, 3.0, 1), (2, 20.0, 2), (4, 40.0, 2), (3, 30.0, 2)]
    for step, value, run_id in [*points, (4, 44.0, 2)]:
        one.add(step, value, 0.0, run_id)
    assert list(one.steps) == [1, 2, 3, 4]
    assert list(one.values) == [1.0, 20.0, 30.0, 44.0]


def test_a_long_series_stays_small_and_keeps_its_peaks() -> None:
    one = Series()
    for step in range(200_000):
        one.add(step, 1e6 if step == 77_777 else -1e6 if step == 123 else float(step % 7), 0.0, 1)
    assert len(one.steps) == len(one.values) == len(one.times) <= 1 << 15
    assert one.steps[0] == 0 and one.steps[-1] == 199_999
    assert (one.values[one.steps.index(77_777)], one.values[one.steps.index(123)]) == (1e6, -1e6)


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
    one = Series()
    for step, value in enumerate([1.0, math.nan, math.inf, 2.0, math.nan]):
        one.add(step, value, 0.0, 1)
    assert points(one, 10)["value"] == [1.0, None, None, 2.0, None]
    assert one.ends() == (1.0, 2.0)


def test_a_long_history_is_read_in_pieces(ow: OpenWeights, run_job: Any) -> None:
    run_job("ftjob-long", [{"step": step, "loss": 1.0} for step in range(9000)])
    cache = SeriesCache(ow.backend)
    first = cache.of("ftjob-long", seconds=0)
    assert not first.complete and len(first.by_name["loss"].steps) == 2000
    while not first.complete:
        cache.of("ftjob-long", seconds=0)
    assert list(first.by_name["loss"].steps) == [float(step) for step in range(9000)]
