"""Jobs of several losses beside one another: what cannot be compared is kept apart, and what was
chosen comes first; tables are printed so.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from openweights import InvalidInputError
from openweights.client.params import dumped
from openweights.client.watching.comparison import (
    comparison_columns,
    comparison_rows,
    curve_panels,
    measured_names,
)
from openweights.client.watching.metrics import Row
from openweights.client.watching.panels import columns_in_order
from openweights.client.watching.plot import draw_panels
from openweights.client.watching.unmeasured import asked_for_elsewhere, merged, unmeasured
from openweights.jobs.unsloth.validate import training_config
from openweights.types import JobRecord


def job_of(loss: str, **params: Any) -> JobRecord:
    """A job with all its parameters, of which only these were chosen."""
    purpose = "preference" if loss in ("dpo", "orpo") else "conversations"
    given = {"model": "org/tiny", "training_file": f"{purpose}:file-1", "loss": loss, **params}
    stored = {"validated_params": dumped(training_config(given))}
    name = "-".join(["ftjob", loss, *map(str, params.values())])
    return JobRecord(name, "fine-tuning", "", stored, "org/tiny")


def curve(**measures: float) -> list[Row]:
    return [{"step": n, "tag": "train"} | {k: v / n for k, v in measures.items()} for n in (1, 2)]


LOSSES = ("sft", "sdft", "dpo", "orpo", "grpo")
KINDS = ["loss (sft)", "loss (sdft, reverse_kl)", "loss (dpo)", "loss (orpo)", "loss (grpo, dapo)"]


def test_losses_of_different_kinds_share_no_panel_and_no_column() -> None:
    jobs = [job_of(loss) for loss in LOSSES]
    tables = [curve(loss=1.0, eval_loss=2.0) for _ in LOSSES]
    panels = curve_panels(jobs, tables, y=["loss"])
    assert list(panels) == KINDS and all(len(lines) == 1 for lines in panels.values())
    assert [lines[0].label for lines in panels.values()] == [f"loss={loss}" for loss in LOSSES]
    assert list(curve_panels(jobs, tables, y=["loss (dpo)"])) == ["loss (dpo)"]
    rows = comparison_rows(jobs, tables)
    assert [[name for name in KINDS if name in row] for row in rows] == [[kind] for kind in KINDS]
    assert [row["params.loss"] for row in rows] == list(LOSSES)
    with pytest.raises(InvalidInputError, match=re.escape("choose one of 'loss (sft)', 'loss (sd")):
        curve_panels(jobs, tables, x="loss", y=["eval_loss"])


def test_what_was_not_measured_is_said_with_what_asks_for_it() -> None:
    jobs = [job_of("sft"), job_of("sdft"), job_of("dpo")]
    everyday: list[Row] = [{"step": n, "tag": "everyday", "kl_to_base": 0.1 * n} for n in (0, 2)]
    tables = [curve(loss=1.0, eval_loss=1.0), curve(loss=1.0) + everyday, curve(loss=1.0)]
    found = asked_for_elsewhere(unmeasured(jobs, measured_names(comparison_rows(jobs, tables))))
    assert [one.words() for one in found] == [
        "eval_loss: not measured in ftjob-sdft, ftjob-dpo; test_file asks for it",
        "kl_to_base[everyday]: not measured in ftjob-sft, ftjob-dpo; kl_to_base_steps asks for it",
    ]
    same = comparison_rows(jobs[:1] * 2, [curve(loss=1.0)] * 2)
    assert asked_for_elsewhere(unmeasured(jobs[:1] * 2, measured_names(same))) == []


def test_a_curve_that_a_job_lacks_is_named_with_its_reason() -> None:
    """As its line is called in the figure; what was asked for is not said to be off."""
    asked = job_of("sft", kl_to_base_steps=2)
    jobs = [job_of("grpo", grpo_reward_function="caps_spanish"), asked, job_of("sft", seed=3)]
    measured = [["loss", "reward", "kl_to_base[everyday]"], ["loss"], ["loss"]]
    called = {job.id: name for job, name in zip(jobs, "abc", strict=True)}

    def said(jobs: Sequence[JobRecord]) -> list[str]:
        found = merged(unmeasured(jobs, measured, ["loss", "reward", "kl_to_base[everyday]"]))
        return [one.words(called) for one in found]

    assert said(jobs) == [
        "reward: not measured in b, c; it is of grpo",
        "kl_to_base[everyday]: not measured in b yet",
        "kl_to_base[everyday]: not measured in c; kl_to_base_steps asks for it",
    ]
    ended = [replace(job, status="failed") for job in jobs]
    assert said(ended)[1] == "kl_to_base[everyday]: not measured in b, which has ended"


@pytest.mark.parametrize("count", [2, 12])
def test_what_a_figure_lacks_stands_below_it(count: int) -> None:
    """And covers neither its legend nor its panels, however many lines there are."""
    jobs = [job_of("sft", seed=seed) for seed in range(count)]
    tables = [curve(loss=1.0, eval_loss=1.0), *[curve(loss=1.0)] * (count - 1)]
    panels = curve_panels(jobs, tables)
    notes = [f"measure {n}: not measured in seed=1; a parameter asks for it" for n in range(4)]
    figure = draw_panels(panels, title="t", path=None, notes=notes)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert legend.get_title().get_text().splitlines() == notes
    low = min(box.y0 for axes in figure.axes if (box := axes.get_tightbbox()) is not None)
    assert legend.get_window_extent().y0 >= 0 and legend.get_window_extent().y1 <= low


def test_what_is_of_one_thing_keeps_its_name() -> None:
    tables = [curve(loss=1.0, eval_loss=2.0, entropy=3.0)] * 2
    same = [job_of("sft", r=8), job_of("sft", r=16)]
    assert list(curve_panels(same, tables, y=["loss"])) == ["loss"]
    # SDFT's test set is measured as SFT's, its completions are not SFT's answers.
    rows = comparison_rows([job_of("sft"), job_of("sdft")], tables)
    assert [list(row)[-3:] for row in rows] == [
        ["loss (sft)", "eval_loss", "entropy (of answers)"],
        ["loss (sdft, reverse_kl)", "eval_loss", "entropy (of completions)"],
    ]
    # A job of somebody's own kind says nothing of its loss.
    own = JobRecord("mine-1", "custom", "", {"validated_params": {}})
    assert list(curve_panels([own, same[0]], tables, y=["loss"])) == ["loss"]


@pytest.mark.parametrize(
    ("one", "other", "measure", "names"),
    [
        (
            job_of("sdft", sdft_divergence="forward_kl"),
            job_of("sdft", sdft_divergence="reverse_kl"),
            "loss",
            ["loss (sdft, forward_kl)", "loss (sdft, reverse_kl)"],
        ),
        (
            job_of("sft"),
            job_of("sft", train_on="all"),
            "eval_loss",
            ["eval_loss (cross-entropy)", "eval_loss (cross-entropy, train_on all)"],
        ),
        (
            job_of("dpo"),
            job_of("orpo"),
            "rewards/margins",
            ["rewards/margins (dpo)", "rewards/margins (orpo)"],
        ),
        (
            job_of("grpo"),
            job_of("grpo", grpo_reward_function={"rouge_l": 1.0, "caps_spanish": 0.1}),
            "reward",
            ["reward (rouge_l)", "reward (rouge_l + 0.1 caps_spanish)"],
        ),
    ],
)
def test_one_name_for_two_things(
    one: JobRecord, other: JobRecord, measure: str, names: list[str]
) -> None:
    tables = [curve(**{measure: 1.0})] * 2
    assert list(curve_panels([one, other], tables, y=[measure])) == names


def test_what_was_chosen_comes_first_and_defaults_of_one_loss_last() -> None:
    jobs = [job_of("sft", r=8), job_of("sdft", sdft_gate_rows=4)]
    tables = [curve(loss=1.0, entropy=1.0, step_time=1.0), curve(loss=1.0, kl_to_base=0.1)]
    tables[1][0] |= {"teacher_gate/student": 0.5, "teacher_gate/turns_exact": 0.5}
    rows = comparison_rows(jobs, tables)
    columns, shown = comparison_columns(jobs, rows)
    losses = ["loss (sft)", "loss (sdft, reverse_kl)"]
    first = ["status", "params.loss", "r", "sdft_gate_rows", "step", *losses]
    assert columns[:shown] == [*first, "kl_to_base", "teacher_gate/student"]
    rest = columns[shown:]
    assert {"sdft_ema_alpha", "train_on", "entropy (of answers)"} < set(rest)
    assert set(rest[-2:]) == {"teacher_gate/turns_exact", "step_time"}
    assert sorted(columns) == sorted({name for row in rows for name in row} - {"id"}), "all of it"
    assert comparison_columns([], []) == ([], 0)


def test_jobs_that_measure_only_what_explains() -> None:
    jobs = [job_of("sft", r=8), job_of("sft", r=16)]
    rows = comparison_rows(jobs, [curve(entropy=1.0)] * 2)
    assert comparison_columns(jobs, rows) == (["status", "r", "step", "entropy"], 4)


def test_columns_of_metrics() -> None:
    counts = {"rollout_s": 9, "learning_rate": 9, "loss": 9, "mine": 9, "eval_loss": 3, "mcq": 1}
    ordered = ["loss", "eval_loss", "mine", "mcq", "learning_rate", "rollout_s"]
    assert columns_in_order(counts) == ordered


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> Any:
    pandas = pytest.importorskip("pandas")
    from openweights.client.watching.tables import metrics_table

    names = ["step", "tag", "loss", *(f"measure_{n}" for n in range(20)), "last"]
    rows = [{"step": n, "tag": "train", "loss": 0.5, "last": 2.0} for n in range(90)]
    monkeypatch.setenv("COLUMNS", "60")
    table = metrics_table(rows, names)
    assert isinstance(table, pandas.DataFrame) and list(table.columns) == names
    return table


def test_metrics_are_printed_with_the_first_columns_and_without_a_hole(wide: Any) -> None:
    for table in (wide, wide[wide.step > 3], wide.head(3)):
        lines = repr(table).splitlines()
        assert lines[0].split()[:3] == ["step", "tag", "loss"]
        assert max(map(len, lines[:-1])) <= 60 and "..." not in lines[0] and "NaN" not in lines[1]
        shown = len(lines[0].split())
        assert 3 < shown < 8
        assert lines[-1].startswith(f"{24 - shown} of 24 columns are not shown: measure_")
    assert len(repr(wide).splitlines()) < 25, "the middle of 90 rows is left out"
    html = wide._repr_html_()
    assert "measure_0<" in html and "4 of 24 columns are not shown" in html
    assert "columns are not shown" not in repr(wide[["step", "loss"]])


@pytest.mark.parametrize("width", ["1", "20", "400"])
def test_any_width_and_an_empty_table(
    wide: Any, width: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", width)
    heading, *_, last = repr(wide).splitlines()
    assert heading.split()[:2] == ["step", "tag"]
    assert ("not shown" in last) == (width != "400")
    assert repr(wide[wide.step < 0]) and repr(wide[[]])


def test_tables_go_through_pickles(wide: Any) -> None:
    from openweights.client.watching.tables import comparison_table

    again = pickle.loads(pickle.dumps(wide))
    assert repr(again) == repr(wide) and type(again) is type(wide)
    rows = [{"id": f"ftjob-{n}", "rows": n, "loss": n / 3, "more": 1} for n in (1, 2)]
    rows[0].pop("rows")
    table = comparison_table(rows, ["rows", "loss", "more"], 2)
    again = pickle.loads(pickle.dumps(table))
    assert repr(again) == repr(table)
    assert [line.split() for line in repr(table).splitlines()[:-1]] == [
        ["id", "ftjob-1", "ftjob-2"],
        ["rows", "2"],
        ["loss", "0.33333", "0.66667"],
    ]
    assert "1 of 3 columns are not shown: more" in repr(table)
    assert list(table.more) == [1, 1]
