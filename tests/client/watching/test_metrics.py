"""Metrics are a table by step and tag; plots and DataFrames come of it."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from openweights import ConfigurationError, InvalidInputError
from openweights.client import Job
from openweights.types import Claim
from tests.client.conftest import QuietClient, append
from tests.client.kinds import Echo


@pytest.fixture
def job(ow: QuietClient, claim: Callable[[], Claim]) -> Job:
    """Trained twice: the second attempt repeats step 3."""
    job = Echo(ow).create(text="a")
    first = claim().run
    append(
        ow.backend,
        first.id,
        {"type": "start", "step": 0, "max_steps": 4},
        {"step": 1, "loss": 2.0, "epoch": 0.1},
        {"step": 1, "grad_norm": 0.5, "note": "text", "flag": True},
        {"step": 2, "loss": 1.5},
        {"step": 2, "loss": 1.75, "tag": "eval"},
        {"step": 3, "loss": 1.25, "only_first": 1.0},
        {"step": 2.5, "loss": 9},
        {"loss": 9},
        {"step": True, "loss": 9},
        {"step": 4},
        {"step": 4, "type": "samples", "count": 9},
    )
    ow.backend.release_run(first.id, first.attempt, reason="worker lost")
    second = claim().run
    append(ow.backend, second.id, {"step": 3, "loss": 1.0}, {"step": 4, "loss": "NaN"})
    return job


def test_rows(job: Job) -> None:
    rows = job.metrics(as_dataframe=False)
    assert math.isnan(rows[-1].pop("loss"))
    assert rows == [
        {"step": 1, "tag": "train", "loss": 2.0, "epoch": 0.1, "grad_norm": 0.5},
        {"step": 2, "tag": "train", "loss": 1.5},
        {"step": 2, "tag": "eval", "loss": 1.75},
        {"step": 3, "tag": "train", "loss": 1.0},
        {"step": 4, "tag": "train"},
    ]


def test_table(job: Job, ow: QuietClient, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pandas")
    table = job.metrics()
    assert list(table.columns[:2]) == ["step", "tag"]
    assert table[table.tag == "train"].set_index("step").loss[3] == 1.0
    empty = Echo(ow).create(text="nothing logged").metrics()
    assert len(empty) == 0 and list(empty.columns) == ["step", "tag"]
    # As on a machine without pandas.
    monkeypatch.setitem(sys.modules, "pandas", None)
    assert isinstance(job.metrics(), list)
    with pytest.raises(ConfigurationError, match="needs pandas: pip install"):
        job.metrics(as_dataframe=True)


def test_plot(job: Job, ow: QuietClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    had_pyplot = "matplotlib.pyplot" in sys.modules
    figure = job.plot(tmp_path / "figures" / "metrics.png")
    assert (tmp_path / "figures" / "metrics.png").read_bytes().startswith(b"\x89PNG")
    panels: dict[str, Any] = {axes.get_title(): axes for axes in figure.axes}
    assert set(panels) == {"loss", "grad_norm"}
    lines = {line.get_label(): list(line.get_xdata()) for line in panels["loss"].get_lines()}
    assert lines == {"train": [1, 2, 3, 4], "eval": [2]}
    assert had_pyplot or "matplotlib.pyplot" not in sys.modules, "it may start a window system"
    with pytest.raises(InvalidInputError, match="has logged no metrics to plot"):
        Echo(ow).create(text="nothing logged").plot()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigurationError, match="needs matplotlib: pip install"):
        job.plot()


def test_latest_values_are_of_the_last_run(job: Job, ow: QuietClient) -> None:
    assert ow.events.latest(["loss"], job_id=job.id) == {"loss": "NaN"}
    assert ow.events.latest("*", job_id=job.id) == {"step": 4, "loss": "NaN"}
    first = job.runs[0]
    fields = ["loss", "grad_norm", "missing"]
    assert ow.events.latest(fields, run_id=first.id) == {"loss": 9, "grad_norm": 0.5}
    assert fields == ["loss", "grad_norm", "missing"], "the caller's list is his own"
    assert ow.events.latest("loss", run_id=first.id) == {"loss": 9}
    with pytest.raises(InvalidInputError, match="job_id=… or run_id=…"):
        ow.events.list()
    with pytest.raises(InvalidInputError, match="one of them"):
        ow.events.latest("*", job_id=job.id, run_id=1)


def test_events_can_be_read_by_index(job: Job) -> None:
    event = job.events()[0]
    assert event["data"]["type"] == event.data["type"] == "start"
    with pytest.raises(KeyError):
        event["__class__"]
