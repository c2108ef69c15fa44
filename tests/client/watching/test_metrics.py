"""Measures are a table by step and tag; figures, comparisons and DataFrames come of it."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from openweights import ConfigurationError, InvalidInputError
from openweights.client import Job
from openweights.client.watching.comparison import comparison_rows, curve_panels
from openweights.client.watching.differences import telling_apart
from openweights.client.watching.metrics import Row, series
from openweights.client.watching.panels import Layout, Line, layout, metric_panels
from openweights.client.watching.plot import draw_panels
from openweights.errors import closest
from openweights.types import Claim, JobRecord
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


def test_what_was_tracked_is_in_the_table(ow: QuietClient, claim: Callable[[], Claim]) -> None:
    job = Echo(ow).create(text="tracked")
    append(
        ow.backend,
        claim().run.id,
        {"type": "teacher_gate", "rows": 16, "logp_with": -7.0},
        {"type": "logprobs", "step": 0, "tag": "old", "old": 2.5, "file": "f", "path": "p"},
        {"type": "logprob_block", "step": 0, "tag": "kind", "row": 0, "logprobs": [-1.0, -3.0]},
        {"type": "logprob_block", "step": 0, "tag": "kind", "row": 1, "logprobs": [-5.0]},
        {"type": "multiple_choice", "step": 0, "tag": "cities", "accuracy": 0.5},
        {"type": "completions", "step": 0, "completions": []},
        {"type": "my_eval", "step": 2, "score": 0.25},
        {"type": "summary", "step": 2, "train_loss": 1.0},
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": 1.5},
        {"step": 2, "eval_loss": 1.75, "tag": "eval"},
    )
    assert job.metrics(as_dataframe=False) == [
        {"step": 0, "tag": "train", "teacher_gate/rows": 16, "teacher_gate/logp_with": -7.0},
        {"step": 0, "tag": "old", "logprobs/loss": 2.5},
        {"step": 0, "tag": "kind", "logprob_block/mean": -3.0},
        {"step": 0, "tag": "cities", "multiple_choice/accuracy": 0.5},
        {"step": 1, "tag": "train", "loss": 2.0},
        {"step": 2, "tag": "train", "my_eval/score": 0.25, "loss": 1.5},
        {"step": 2, "tag": "eval", "eval_loss": 1.75},
    ]
    (line,) = [line for line in job.download(ow.settings.home / "out") if line.suffix == ".jsonl"]
    assert line.name == "metrics.jsonl" and len(line.read_text().splitlines()) == 7


def test_blocks_of_two_sets_and_without_a_number(
    ow: QuietClient, claim: Callable[[], Claim]
) -> None:
    job = Echo(ow).create(text="blocks")
    block = {"type": "logprob_block", "step": 0, "tag": "kind"}
    append(
        ow.backend,
        claim().run.id,
        {**block, "source": "one", "logprobs": [-1.0]},
        {**block, "source": "two", "logprobs": [-9.0]},
        {**block, "source": "one", "logprobs": [-3.0]},
        {**block, "tag": "broken", "source": "one", "logprobs": [-1.0, "NaN"]},
        {**block, "tag": "odd", "source": "one", "logprobs": 3.0},
    )
    both, broken = job.metrics(as_dataframe=False)
    assert both["logprob_block/mean"] == -2.0 and both["logprob_block/mean of two"] == -9.0
    assert math.isnan(broken["logprob_block/mean"])


@pytest.mark.parametrize(
    "name",
    ["learning_rate_head", "grad_norm/max", "grad_norms", "odd\nname", "x[y]", "learning_rate"],
)
def test_every_name_has_its_place_among_the_panels(name: str) -> None:
    rows: list[Row] = [
        {"step": n, "tag": "train", "loss": n, name: n * n, "grad_norm": -n} for n in (1, 2, 3)
    ]
    panels = list(metric_panels(rows))
    assert panels[0] == "loss" and name.partition("[")[0] in panels
    assert panels[-1] in ("grad_norm", "learning_rate")


ROUNDED = "sampling_kl"
# What each loss logs, beside what never makes a panel, and the panels in their order.
LOGGED = {
    "sft": (
        ["learning_rate", "grad_norm", "mean_token_accuracy", "num_tokens", "entropy", "loss"],
        ["loss", "mean_token_accuracy", "entropy", "learning_rate", "grad_norm"],
    ),
    "sdft": (
        ["loss", "divergence", "teacher_drift", "rollout_s", "rollout_tokens_per_s", "agreement"]
        + ["completion_length", "eos_share"],
        ["loss", "eval_loss", "agreement", "teacher_drift", "completion_length", "eos_share"],
    ),
    "dpo": (
        [
            "logps/chosen",
            "rewards/chosen",
            "rewards/margins",
            "rewards/accuracies",
            "loss",
            "epoch",
        ],
        ["loss", "rewards/margins", "rewards/accuracies", "rewards/chosen", "logps/chosen"],
    ),
    "orpo": (
        ["nll_loss", "log_odds_ratio", "rewards/chosen", "loss"],
        ["loss", "rewards/chosen", "nll_loss", "log_odds_ratio"],
    ),
    "grpo": (
        ["completions/mean_length", "completions/min_length", "kl", "rewards/rouge_l/std", ROUNDED]
        + ["reward", "rewards/rouge_l/mean", "step_time", "clip_ratio/high_max", "loss"],
        ["reward", "loss", "kl", "completions/mean_length"],
    ),
}
# These are one value under two names.
SAME = {"divergence": "loss", "rewards/rouge_l/mean": "reward"}


@pytest.mark.parametrize("loss", LOGGED)
def test_panels_of_each_loss(loss: str) -> None:
    names, expected = LOGGED[loss]
    value = {SAME.get(name, name): float(place + 1) for place, name in enumerate(names)}
    rows: list[Row] = [
        {"step": step, "tag": "train"}
        | {name: step * value[SAME.get(name, name)] for name in names}
        for step in (1, 2)
    ]
    for row in rows:
        row[ROUNDED] = 1e-12 * row["step"]
    rows += [{"step": step, "tag": "eval", "eval_loss": 1.0 / step} for step in (1, 2)]
    rows += [{"step": step, "tag": "t", "clip_ratio/low_mean": 0.0} for step in (1, 2)]
    panels = metric_panels(rows, shares_loss=loss != "sdft")
    assert list(panels) == expected
    shared = [line.label for line in panels["loss"]]
    assert shared == (["train"] if loss == "sdft" else ["train", "eval"])


# A run that has tried the demonstrations twice, and measured itself.
FOLLOWED: list[Row] = [
    {"step": 0, "tag": "train", "teacher_gate/student": 0.2, "teacher_gate/teacher": 0.9}
    | {"teacher_gate/same_format": 0.1, "teacher_gate/rows": 16},
    {"step": 0, "tag": "everyday", "kl_to_base": 0.0},
    *(
        {"step": n, "tag": "train", "loss": 1.0 / n, "rollout_s": n * 0.1, "constant": 3.0}
        | {"learning_rate": 1e-4 * n, "copy_of_loss": 1.0 / n}
        for n in (1, 2)
    ),
    {"step": 2, "tag": "everyday", "kl_to_base": 0.1},
    {"step": 2, "tag": "train", "agreement/8-15": 0.5, "agreement/0": 0.25, "agreement/1": 0.5}
    | {"teacher_gate/student": 0.5, "teacher_gate/teacher": 0.9, "adapter_moved/weight_norm": 9.0},
    {"step": 3, "tag": "train", "agreement/8-15": 0.75, "agreement/0": 0.5, "agreement/1": 1.0},
]


def layout_of(rows: list[Row]) -> Layout:
    return layout(
        {name: tuple(zip(*points, strict=True)) for name, points in series(rows).items()}  # type: ignore[misc]
    )


def test_what_is_drawn_what_is_looked_up_and_what_stands_still() -> None:
    found = layout_of(FOLLOWED)
    assert {title: [line.label for line in lines] for title, lines in found.panels.items()} == {
        "loss": ["train"],
        "kl_to_base": ["everyday"],
        "teacher gate": ["student", "teacher", "begins and ends as teacher's"],
        "agreement by token": ["0", "1", "8-15"],
        "learning_rate": ["train"],
    }
    assert list(found.more) == ["rollout_s"]
    assert set(found.still) == {"constant", "teacher_gate/rows", "adapter_moved/weight_norm"}
    assert found.panels["kl_to_base"][0].name == "kl_to_base[everyday]"


def test_no_panel_is_a_single_point() -> None:
    """But where there is nothing else to draw."""
    before = [row for row in FOLLOWED if row["step"] == 0]
    assert not layout_of(before).panels
    assert "teacher gate" in metric_panels(before)
    jobs, tables = sweep()
    tables = [[*table, {"step": 2, "tag": "eval", "eval_loss": 1.0}] for table in tables]
    assert list(curve_panels(jobs, tables)) == ["loss", "logprobs/loss[old]"]
    assert list(curve_panels(jobs, tables, y=["eval_loss"])) == ["eval_loss"]


def test_a_figure_says_what_it_leaves_out_and_names_its_lines() -> None:
    pytest.importorskip("matplotlib")
    panels = metric_panels(FOLLOWED)
    figure = draw_panels(panels, title="t", path=None, has_one_legend=False, most=3)
    assert [axes.get_title() for axes in figure.axes] == list(panels)[:3]
    assert figure.get_supxlabel() == "2 more measures are in job.metrics()"
    legends = [axes.get_legend() for axes in figure.axes]
    words = [one and [text.get_text() for text in one.get_texts()] for one in legends]
    assert words == [None, ["everyday"], ["student", "teacher", "begins and ends as teacher's"]]
    figure = draw_panels(panels, title="t", path=None)
    assert figure.get_supxlabel() == "" and len(figure.legends) == 1


def sweep() -> tuple[list[JobRecord], list[list[Row]]]:
    """Two rates with two seeds each."""
    jobs, tables = [], []
    for rate in (1e-4, 1e-3):
        for seed in (1, 2):
            params = {"loss": "sft", "learning_rate": rate, "seed": seed, "meta": {"rate": rate}}
            stored = {"validated_params": params}
            jobs.append(JobRecord(f"ftjob-{rate}-{seed}", "fine-tuning", "", stored, "org/tiny"))
            tables.append(
                [
                    {"step": 1, "tag": "train", "loss": 1.0 * seed},
                    {"step": 1, "tag": "old", "logprobs/loss": 10.0 * seed},
                    {"step": 2, "tag": "train", "loss": 1000 * rate + seed},
                    {"step": 2, "tag": "old", "logprobs/loss": 20.0 * seed},
                ]
            )
    return jobs, tables


def test_a_line_for_each_job_or_for_each_group() -> None:
    jobs, tables = sweep()
    panels = curve_panels(jobs, tables)
    assert list(panels) == ["loss", "logprobs/loss[old]"]
    first = panels["loss"][0]
    assert (first.label, list(first.x), list(first.y), first.low) == (
        "learning_rate=1e-4, seed=1",
        [1, 2],
        [1.0, 1.1],
        (),
    )
    low, high = curve_panels(jobs, tables, band="seed", y=["loss"])["loss"]
    assert (low.label, list(low.y), list(low.low), list(low.high)) == (
        "learning_rate=1e-4",
        [1.5, 1.6],
        [1.0, 1.1],
        [2.0, 2.1],
    )
    assert high.label == "learning_rate=0.001"
    (path, _) = curve_panels(
        jobs, tables, x="logprobs/loss[old]", y=["loss"], group_by="meta.rate", band="seed"
    )["loss"]
    assert (path.label, list(path.x), list(path.y)) == ("meta.rate=1e-4", [15, 30], [1.5, 1.6])


@pytest.mark.parametrize("group_by", [None, "loss", "long"])
def test_the_band_of_jobs_that_no_short_words_name(group_by: str | None) -> None:
    jobs, tables = sweep()
    jobs, tables = jobs[:2], tables[:2]
    for job in jobs:
        job.params["validated_params"]["long"] = "n" * 90
    (line,) = curve_panels(jobs, tables, band="seed", y=["loss"], group_by=group_by)["loss"]
    assert line.label == ("loss=sft" if group_by == "loss" else f"{jobs[0].id} and 1 more")
    assert (list(line.y), list(line.low), list(line.high)) == ([1.5, 1.6], [1.0, 1.1], [2.0, 2.1])
    # The other way round each is a line of its own, by its own id.
    lines = curve_panels(jobs, tables, y=["loss"], group_by="long")["loss"]
    assert [line.label for line in lines] == [job.id for job in jobs]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"y": ["lss"]}, "no job has measured 'lss'; did you mean 'loss'?"),
        ({"x": "nothing"}, "no job has measured 'nothing': loss, logprobs/loss"),
        ({"band": "sed"}, "the jobs have no parameter 'sed'; did you mean 'seed'?"),
        ({"group_by": "meta.seed"}, "the jobs have no parameter 'meta.seed'; did you mean"),
    ],
)
def test_what_jobs_do_not_have(asked: dict[str, Any], said: str) -> None:
    jobs, tables = sweep()
    with pytest.raises(InvalidInputError, match=re.escape(said)):
        curve_panels(jobs, tables, **asked)


def test_a_parameter_is_known_by_its_initials() -> None:
    assert closest("lr", ["loss", "learning_rate", "lr_scheduler_type"]) == "learning_rate"
    assert closest("l", ["loss_kind", "learning_rate"]) is None
    assert closest("zq", ["loss", "learning_rate"]) is None


@pytest.mark.parametrize("name", ["figure.xyz", "figure"])
def test_a_figure_has_a_format_that_there_is(job: Job, tmp_path: Path, name: str) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(InvalidInputError, match=rf"^{name}: its ending .* use one of .*\.png, "):
        job.plot(tmp_path / name)
    assert not list(tmp_path.glob("figure*"))
    job.plot(tmp_path / "figure.SVG")  # the control
    assert (tmp_path / "figure.SVG").read_text().startswith("<?xml")


def test_comparing(job: Job, ow: QuietClient, tmp_path: Path) -> None:
    pytest.importorskip("pandas")
    other = Echo(ow).create(text="b")
    table = ow.compare([job, other.id[:10]])
    assert list(table.columns) == [
        "status",
        "text",
        "step",
        "loss",
        "eval_loss",
        "grad_norm",
        "epoch",
    ]
    assert list(ow.compare([]).columns) == [] and ow.compare([], as_dataframe=False) == []
    assert list(table.text) == ["a", "b"] and table.step[job.id] == 4
    ow.plot([job, other], tmp_path / "both.png", y="loss")
    assert (tmp_path / "both.png").stat().st_size > 1000
    with pytest.raises(InvalidInputError, match="none of these jobs has measured anything"):
        ow.plot([other])


def test_a_comparison_is_printed_whole_and_is_a_table(ow: QuietClient, claim: Any) -> None:
    pandas = pytest.importorskip("pandas")
    jobs = [Echo(ow).create(text=f"{n}" * 30) for n in range(9)]
    for _ in jobs:
        numbers = {f"measure_{n}": n + 0.5 for n in range(80)}
        append(ow.backend, claim().run.id, {"step": 1, **numbers})
    table = ow.compare(jobs)
    assert isinstance(table, pandas.DataFrame) and len(table) == 9 and table.shown == 83
    for text in (repr(table), table._repr_html_()):
        assert all(job.id in text for job in jobs)
        assert all(f"measure_{n}" in text for n in range(80)) and "..." not in text
    assert "..." in repr(pandas.DataFrame(table)), "what pandas does by itself"
    assert repr(ow.compare([]))


def test_jobs_are_called_by_the_fewest_words_that_tell_them_apart() -> None:
    jobs = [
        {"a": a, "file": f"{'f' * 30}-{a}-{b}", "b": b, "same": 1} for a in (1, 2) for b in (1, 2)
    ]
    assert telling_apart(jobs, ["file", "a", "b", "same"]) == ["file"]
    assert telling_apart(jobs, ["a", "b", "same"]) == ["a", "b"]
    assert telling_apart(jobs[:2], ["file", "a", "b"]) == ["b"]
    assert telling_apart([jobs[0], jobs[0]], ["a"]) == []


def test_a_parameter_and_a_measure_of_one_name() -> None:
    jobs, tables = sweep()
    other = replace(jobs[1], params={"validated_params": {"loss": "dpo", "seed": 1}})
    rows = comparison_rows([jobs[0], other], tables[:2])
    assert [row["params.loss"] for row in rows] == ["sft", "dpo"]
    assert rows[0]["loss (sft)"] == pytest.approx(1.1) and "loss (dpo)" not in rows[0]
    assert rows[1]["loss (dpo)"] == pytest.approx(2.1) and "loss (sft)" not in rows[1]


def test_a_column_keeps_its_meaning_while_jobs_run() -> None:
    """What nothing has measured yet is called as it will be."""
    jobs, tables = sweep()
    given = [{"loss": "sft", "learning_rate": 1e-4, "r": 8}, {"loss": "dpo", "r": 16}]
    two = [
        replace(job, params={"validated_params": own})
        for job, own in zip(jobs[:2], given, strict=True)
    ]
    before, after = comparison_rows(two, [[], []]), comparison_rows(two, tables[:2])
    names = ["params.loss", "params.learning_rate", "r"]
    for rows in (before, after):
        assert list(rows[0])[:6] == ["id", "status", *names, "step"]
    assert [{name: row[name] for name in names} for row in before] == [
        {name: row[name] for name in names} for row in after
    ]
    assert "loss (sft)" not in before[0] and isinstance(after[0]["loss (sft)"], float)


def test_table(job: Job, ow: QuietClient, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pandas")
    table = job.metrics()
    assert list(table.columns[:2]) == ["step", "tag"]
    assert table[table.tag == "train"].set_index("step").loss[3] == 1.0
    empty = Echo(ow).create(text="nothing logged").metrics()
    assert len(empty) == 0 and list(empty.columns) == ["step", "tag"]
    # As on a machine without pandas, of which nothing was imported.
    monkeypatch.delattr("openweights.client.watching.tables")
    monkeypatch.delitem(sys.modules, "openweights.client.watching.tables")
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
    assert set(panels) == {"loss"}, "what was measured once is left to the table"
    lines = {line.get_label(): list(line.get_xdata()) for line in panels["loss"].get_lines()}
    assert lines == {"train": [1, 2, 3, 4], "eval": [2]}
    assert had_pyplot or "matplotlib.pyplot" not in sys.modules, "it may start a window system"
    with pytest.raises(InvalidInputError, match="has logged no metrics to plot"):
        Echo(ow).create(text="nothing logged").plot()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigurationError, match="needs matplotlib: pip install"):
        job.plot()


def test_panels_have_one_range_of_steps() -> None:
    pytest.importorskip("matplotlib")
    panels = {"loss": [Line("train", [1, 40], [2.0, 1.0])], "kl": [Line("train", [0, 10], [0, 1])]}
    figure = draw_panels(panels, title="", path=None)
    low, high = figure.axes[0].get_xlim()
    assert low <= 0 and high >= 40 and figure.axes[1].get_xlim() == (low, high)
    # Against another measure each path has its own.
    figure = draw_panels(panels, title="", x="kl", path=None)
    assert figure.axes[1].get_xlim() != figure.axes[0].get_xlim()


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


def test_a_legend_fits_its_figure_however_long_its_labels() -> None:
    """As drawn: no label begins or ends outside, and as many as fit stand in a row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    for length, most_rows in ((5, 1), (32, 4), (80, 8)):
        lines = [Line(f"{at}" + "m" * (length - 1), [1, 2], [1.0, 2.0]) for at in range(8)]
        panels = {f"measure {at}": lines for at in range(3)}
        figure = draw_panels(panels, title="t", path=None)
        renderer = FigureCanvasAgg(figure).get_renderer()
        figure.draw(renderer)
        (legend,) = figure.legends
        box = legend.get_window_extent(renderer)
        assert box.x0 >= 0 and box.x1 <= figure.bbox.width, length
        assert (
            len({text.get_window_extent(renderer).y0 for text in legend.get_texts()}) <= most_rows
        )
