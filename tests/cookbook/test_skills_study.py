"""The study of skills: its rows, its grades, what it concludes from runs, and the whole of it."""

from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cookbook.sdft.skills import plan
from cookbook.sdft.skills import run as study
from cookbook.sdft.skills.data import SKILLS, exploring, skill_rows
from cookbook.sdft.skills.figures import differences, draw_frontier, draw_sequence, table
from cookbook.sdft.skills.grading import is_right, near, score
from cookbook.sdft.skills.results import (
    LABELS,
    Run,
    chosen_rates,
    difference,
    estimate,
    exact,
    frontier_points,
    in_order,
    shared_seconds,
)
from cookbook.sdft.skills.study import Study
from openweights import OpenWeights
from openweights.errors import InvalidInputError
from openweights.jobs.evaluate.intervals import mean_difference, mean_score
from openweights.jobs.unsloth.config.rows import check_rows
from tests.client.conftest import QuietClient
from tests.tiny_model import make_tiny_model

SHIPPED = ("arithmetic", "orders")
CALL = {
    "function": {
        "name": "geo.area",
        "parameters": {
            "type": "dict",
            "properties": {"width": {"type": "integer"}, "unit": {"type": "string"}},
            "required": ["width"],
        },
    },
    "values": {"geo.area": {"width": [3], "unit": ["cm", ""]}},
}


@pytest.mark.parametrize("skill", [*SHIPPED, pytest.param("tool_use", marks=pytest.mark.slow)])
@pytest.mark.parametrize("easy", [False, True])
def test_rows_are_right_and_held_out(skill: str, easy: bool, home: Path) -> None:
    split = skill_rows(skill, easy=easy)
    assert len(split.train) >= 192 and len(split.test) >= 64
    rows = [*split.train, *split.test]
    for row in rows:
        gold = row["messages"][-1]["content"]
        assert is_right(gold, gold, row["skill"], row["right"]), row
        assert not is_right(f"Sure! {gold}", gold, row["skill"], row["right"]), "another format"
    asked = [json.dumps(row["messages"][:-1]) for row in rows]
    assert len(set(asked)) == len(asked), "no prompt stands twice, nor on both sides"
    assert len({row["id"] for row in split.test}) == len(split.test)
    assert skill_rows(skill, easy=easy) == split


def test_rows_pass_the_checks_of_every_method(tmp_path: Path, home: Path) -> None:
    door = OpenWeights().fine_tuning
    for name, fields in plan.METHODS.items():
        for skill in SHIPPED:
            file = tmp_path / f"{skill}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in skill_rows(skill).train))
            made = Study(OpenWeights(), plan.small("org/model"), tmp_path / "out")
            config = door.validate(
                {"model": "org/model", "training_file": str(file)}
                | fields
                | made._own_fields(name, skill)
            )
            rows = list(enumerate(skill_rows(skill).train, 1))
            check_rows(rows, config, config.datasets()[0])  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("[geo.area(width=3)]", True),
        (" [geo.area(unit='CM', width=3)]\n", True),
        ("geo.area(width=3)", False),
        ("[geo.area(width=3)] is the call.", False),
        ("[geo.area(width=4)]", False),
        ("[geo.area(3)]", False),
        ("[geo.area(width='3')]", False),
        ("[area(width=3)]", False),
        ("[geo.area(width=3), geo.area(width=3)]", False),
        ("[geo.area(width=__import__('os').getpid())]", False),
        ("[geo.area(width={{}: 3})]", False),
        ("[geo.area(width={[3]})]", False),
        ("[" * 500, False),
        ("", False),
    ],
)
def test_a_call_is_right_in_its_format_alone(answer: str, right: bool) -> None:
    assert is_right(answer, "", "tool_use", json.dumps(CALL)) is right


@pytest.mark.parametrize(
    ("answer", "thirds"),
    [
        ("[geo.area(width=3)]", 3),
        ("[geo.area(width=3, unit='m')]", 2.5),
        ("[geo.area(width=4)]", 2),
        ("[area(width=3)]", 1),
        ("[geo.area()]", 2),
        ("```python\n[geo.area(width=3)]\n```", 0),
        ("```python\ngeo.area(width=3)\n```", 0),
        ("geo.area(width=3)", 0),
        ("[geo.area(width=3), geo.area(width=3)]", 0),
        ('{"name": "geo.area", "parameters": {"type": "dict"}}', 0),
        ("", 0),
    ],
)
def test_an_answer_is_worth_more_the_nearer_it_is(answer: str, thirds: float) -> None:
    found = near([answer], [""], ["tool_use"], [json.dumps(CALL)])
    assert found == [pytest.approx(thirds / 3)]
    assert (found == [1.0]) == is_right(answer, "", "tool_use", json.dumps(CALL))


def test_every_second_row_shows_what_form_a_call_has() -> None:
    messages = [{"role": "system", "content": "Call."}, {"role": "user", "content": "3 wide"}]
    rows = [{"messages": messages, "id": number} for number in range(4)]
    shown = exploring(rows)
    systems = [row["messages"][0]["content"] for row in shown]
    assert [text == "Call." for text in systems] == [False, True, False, True]
    assert all(row["messages"][1:] == messages[1:] for row in shown)
    assert messages[0]["content"] == "Call.", "the rows of the others are as they were"
    plain = skill_rows("arithmetic").train
    assert exploring(plain) == plain, "where no system turn tells what is wanted"


PIECES = (
    "[",
    "]",
    "(",
    ")",
    "{",
    "}",
    "geo",
    ".area",
    "width",
    "unit",
    "=",
    "3",
    ", ",
    "'cm'",
    "**",
)


@given(st.text() | st.lists(st.sampled_from(PIECES)).map("".join), st.sampled_from(SKILLS))
@example(f"[geo{'.a' * 2000}(width=3)]", "tool_use")
@example(f"[geo.area(width=0x{'f' * 5000})]", "tool_use")
@example("9" * 5000, "arithmetic")
def test_no_answer_breaks_the_reward(answer: str, skill: str) -> None:
    """Each is worth 0 to 1, and one in another form than the skill's nothing."""
    gold = {"tool_use": "", "arithmetic": "3", "orders": "x 3"}[skill]
    found = [reward([answer], [gold], [skill], [json.dumps(CALL)]) for reward in (score, near)]
    assert all(0 <= value <= 1 for [value] in found)
    form = {"tool_use": r"\[.*\(.*\)\]", "arithmetic": r"-?\d+", "orders": "x 3"}[skill]
    if not re.fullmatch(form, answer.strip(), re.DOTALL):
        assert found == [[0.0], [0.0]]


@given(st.text(), st.integers(-999, 999))
def test_arithmetic_takes_the_number_alone(text: str, number: int) -> None:
    values = score(
        [str(number), text, f" {number}\n"], [str(number)] * 3, ["arithmetic"] * 3, ["null"] * 3
    )
    assert values[0] == values[2] == 1
    assert values[1] == float(text.strip().isascii() and text.strip() == str(number)) or (
        text.strip().lstrip("-").isdigit()
    )


def made(method: str, rate: float, seed: int, right: int, kl: float, stage: int = 1) -> Run:
    scores = {"orders": [1.0] * right + [0.0] * (20 - right), "arithmetic": [0.0] * 20}
    solved = 10 - round(10 * kl)
    kept = {"humaneval": [1.0] * solved + [0.0] * (20 - solved)}
    return Run(method, rate, seed, stage, "ftjob-1", scores, kept, kl, 60 * rate)


RUNS = [
    made("base", 0.0, 0, 0, 0.0, stage=0),
    *(made("sft", 1e-5, seed, 10, 0.1) for seed in (1, 2)),
    *(made("sft", 3e-5, seed, 19, 0.2) for seed in (1, 2)),
    *(made("sft", 1e-4, seed, 20, 0.4) for seed in (1, 2)),
    *(made("sdft_forward", 3e-5, seed, 4 * seed, 0.05) for seed in (1, 2)),
    *(made("sft", 3e-5, seed, 15, 0.3, stage=2) for seed in (1, 2)),
]


def test_a_run_is_what_its_json_says() -> None:
    for run in RUNS:
        again = Run.of(json.loads(json.dumps(run.data())))
        assert again.data() == run.data() and again.scores == run.scores and again.key == run.key
    gate = {"placement": "template", "repeats": 1, "student": [0.0], "teacher": [0.0]}
    stopped = Run("sdft_template", 1e-5, 1, 1, "ftjob-1", gate=gate, stopped="failed: the gate")
    assert Run.of(json.loads(json.dumps(stopped.data()))) == stopped
    assert study.measured([*RUNS, stopped]) == RUNS
    assert in_order(RUNS[::-1]) == in_order(RUNS) and in_order(RUNS[::-1])[0].method == "base"


def test_the_rate_is_the_gentlest_of_the_nearly_best() -> None:
    points = frontier_points(RUNS, "orders")
    assert [len(point.skill) for point in points] == [1, 2, 2, 2, 2], (
        "the second stage is not there"
    )
    assert chosen_rates(points) == {"sft": 3e-5, "sdft_forward": 3e-5}


def test_the_interval_knows_of_rows_and_of_seeds() -> None:
    alike = [made("sft", 1e-5, seed, 10, 0.1) for seed in (1, 2, 3)]
    apart = [made("sft", 1e-5, seed, right, 0.1) for seed, right in ((1, 2), (2, 10), (3, 18))]
    one = estimate(alike[:1], "orders")
    narrow, wide = estimate(alike, "orders"), estimate(apart, "orders")
    assert one.value == narrow.value == wide.value == 0.5
    assert one.low < narrow.low < 0.5 < narrow.high < one.high, "more rows tell more"
    assert wide.high - wide.low > 1.5 * (narrow.high - narrow.low), (
        "and seeds that differ tell less"
    )
    none = estimate(alike, "arithmetic")
    assert none == mean_score([0.0] * 20) and none.value == none.low == 0 < none.high < 0.2


def test_a_difference_pairs_rows_and_draws_seeds() -> None:
    first = [made("sft", 1e-5, seed, 12, 0.1) for seed in (1, 2)]
    second = [made("sdft_forward", 1e-5, seed, 10, 0.1) for seed in (1, 2)]
    found = difference(first, second, "orders")
    assert found.value == pytest.approx(0.1) and 0 <= found.low < 0.1 < found.high <= 0.3
    same = difference(first, first, "orders")
    assert same == mean_difference([0.0] * 20), "rows that all answer alike tell nothing apart"
    assert same.value == 0 and same.low < 0 < same.high, "nor are 20 of them certain of it"
    pairs = [0.0] * 10 + [1.0] * 2 + [0.0] * 8
    of_one = difference(first[:1], second[:1], "orders")
    assert of_one == mean_difference(pairs), "of one seed each as ow.evaluate says"
    apart = [made("sdft_forward", 1e-5, seed, 14 * seed - 10, 0.1) for seed in (1, 2)]
    wide = difference(first, apart, "orders")
    assert wide.low < 0 < wide.high and wide.high - wide.low > found.high - found.low


def test_a_moment_costs_by_the_share_of_who_ran() -> None:
    assert shared_seconds((0, 10), []) == 10
    assert shared_seconds((0, 10), [(20, 30), (-5, 0)]) == 10
    assert shared_seconds((0, 10), [(0, 10)]) == 5
    assert shared_seconds((0, 10), [(-5, 4), (2, 20)]) == pytest.approx(2 / 2 + 2 / 3 + 6 / 2)
    spans = [(0.0, 7.0), (2.0, 9.0), (4.0, 11.0)]
    shares = [shared_seconds(s, [o for o in spans if o != s]) for s in spans]
    assert sum(shares) == pytest.approx(11), "together they took the machine, no more and no less"


@pytest.mark.parametrize(
    ("rate", "text"), [(5e-5, "5e-5"), (1e-4, "1e-4"), (0.01, "1e-2"), (2.5e-6, "2.5e-6")]
)
def test_a_rate_is_told_as_it_is_typed(rate: float, text: str) -> None:
    assert exact(rate) == text and float(text) == rate


def test_seeds_that_agree_are_drawn(tmp_path: Path) -> None:
    """Of equal values the mean may be rounded to below them; a whisker is never negative."""
    alike = [made("sft", 1e-5, seed, 14, 0.7) for seed in (1, 2, 3)]
    assert fmean(run.kl for run in alike) < 0.7 == alike[0].score("orders")
    later = [replace(run, stage=2) for run in alike]
    draw_frontier(frontier_points(alike, "orders"), "orders", tmp_path / "frontier.png")
    draw_sequence([*alike, *later], ("orders", "arithmetic"), tmp_path / "sequence.png")


def whiskers(axes: Any, axis: int) -> list[list[tuple[float, float]]]:
    """Of each method, from where to where they reach along x (0) or y (1)."""
    found: list[list[tuple[float, float]]] = []
    for drawn in axes.containers:
        lines = drawn.lines[2]
        reach = lines[axis if len(lines) > 1 else 0].get_segments()
        found.append([(float(ends[0][axis]), float(ends[1][axis])) for ends in reach])
    return found


@pytest.mark.parametrize("seeds", [(1,), (1, 2)])
def test_whiskers_are_the_intervals_of_the_table(tmp_path: Path, seeds: tuple[int, ...]) -> None:
    """Of a single seed, too, whose interval is over rows; seeds are small points where there are
    several.
    """
    runs = [made("sft", 1e-5, seed, 10 + seed, 0.1) for seed in seeds]
    runs += [replace(run, stage=2) for run in runs]
    frontier = draw_frontier(frontier_points(runs, "orders"), "orders", tmp_path / "a.png")
    [new, kept] = [estimate(runs[: len(seeds)], name) for name in ("orders", "humaneval")]
    assert new.low < new.value < new.high
    by_kept, by_kl = frontier.axes
    assert whiskers(by_kept, 0) == [[pytest.approx(kept[1:])]]
    assert whiskers(by_kept, 1) == whiskers(by_kl, 1) == [[pytest.approx(new[1:])]]
    assert "closer to the base" in by_kl.get_xlabel()
    sequence = draw_sequence(runs, ("orders", "arithmetic"), tmp_path / "b.png")
    assert whiskers(sequence.axes[0], 1) == [[pytest.approx(new[1:])] * 2]
    taught = [[text.get_text() for text in axes.texts] for axes in sequence.axes]
    assert taught == [["taught here"], ["taught here"], []]
    drawn_of = "seeds and held-out rows" if len(seeds) > 1 else "held-out rows"
    for figure in (frontier, sequence):
        assert f"95 % interval over {drawn_of}, as in the table" in figure.get_supxlabel()
        assert ("small points" in figure.get_supxlabel()) == (len(seeds) > 1)


def test_figures_and_table(tmp_path: Path) -> None:
    frontier = draw_frontier(frontier_points(RUNS, "orders"), "orders", tmp_path / "frontier.png")
    assert [axes.get_xlabel()[:5] for axes in frontier.axes] == ["share", "KL to"]
    figure = draw_sequence(RUNS, ("orders", "arithmetic"), tmp_path / "sequence.png")
    assert [axes.get_title() for axes in figure.axes] == ["orders", "arithmetic", "humaneval"]
    assert all(
        (tmp_path / name).stat().st_size > 10_000 for name in ("frontier.png", "sequence.png")
    )
    lines = table(RUNS, ("orders", "arithmetic")).splitlines()
    assert len(lines) == 2 + 6 and lines[2].startswith("| base |  |  | 0.00 [0.00, 0.16]")
    assert "| SFT, 3e-5 | orders, arithmetic | 2 | 0.75" in lines[-1]
    less = differences(RUNS, ("orders", "arithmetic")).splitlines()
    assert len(less) == 2 + 1, "only 3e-5 was run by both"
    assert less[2].startswith("| SDFT, forward KL less SFT, 3e-5 | orders | **-0.65 [")
    assert differences(RUNS[:4], ("orders", "arithmetic")) == ""


def test_the_documents_say_what_was_measured() -> None:
    """The means of the runs that are kept are those of the tables in docs/sdft.md."""
    root = Path(__file__).parents[2]
    text = (root / "docs" / "sdft.md").read_text(encoding="utf-8")
    data = json.loads((root / "tests" / "benchmarks" / "skills.json").read_text())
    runs = [Run.of(run) for run in data["runs"]]
    runs = study.measured(runs)
    points = frontier_points(runs, "tool_use")
    first = [p for p in points if p.method not in ("grpo", "sft_grpo")]
    assert len(first) == 13 and all(len(point.skill) == 3 for point in first[1:])
    for point in first:
        rate = exact(point.rate) if point.rate else ""
        skill, kept = f"{fmean(point.skill):.2f}", f"{fmean(point.kept):.2f}"
        row = rf"\| {LABELS[point.method]} \| {rate} ?\| {skill} \[.*\] \| {kept} \["
        assert re.search(row, text), (point.method, point.rate)
    [grpo] = [point for point in points if point.method == "grpo"]
    assert len(grpo.skill) == 6 and min(grpo.skill) >= 0.6, "each seed learns it"
    assert re.search(
        rf"\| 5e-5 \| {fmean(grpo.skill):.2f} \[.*\] \| {fmean(grpo.kept):.2f} \[", text
    )
    sequences = [("sft", 2e-5), ("sft", 5e-5), ("sdft_forward", 2e-5), ("sdft_forward", 5e-5)]
    taught = itertools.product([*sequences, ("sdft_reverse", 2e-5)], (1, 2, 3))
    for (method, rate), stage in taught:
        own = [run for run in runs if (run.method, run.rate, run.stage) == (method, rate, stage)]
        names = ("tool_use", "arithmetic", "orders", "humaneval")
        means = [f"{fmean(run.score(name) for run in own):.2f}" for name in names]
        cells = r"[^|]* \| ".join([f"{LABELS[method]}, {exact(rate)}", *means])
        kl = f"{fmean(run.kl for run in own):.3f}"
        assert re.search(rf"{cells}[^|]* \| {kl} \|", text), (method, rate, stage)
        assert len(own) == 3
    for point in frontier_points([Run.of(run) for run in data["of_150_steps"]], "tool_use"):
        cells = [LABELS[point.method], exact(point.rate)]
        cells += [rf"{fmean(own):.2f} \[.*\]" for own in (point.skill, point.kept)]
        assert re.search(
            r"\| ".join(f"{cell} " for cell in [*cells, f"{fmean(point.kl):.3f}"]), text
        )
    again = frontier_points([Run.of(run) for run in data["grid_in_one_piece"]], "tool_use")
    for point in again:
        [before] = [p for p in first if (p.method, p.rate) == (point.method, point.rate)]
        assert abs(fmean(point.skill) - fmean(before.skill)) < 0.015
        assert abs(fmean(point.kept) - fmean(before.kept)) < 0.025
    assert len(again) == 8
    assert all(len(run.rows("tool_use")) == 300 for run in runs)
    assert all(len(run.rows("humaneval")) == 164 for run in runs)


def test_the_plan_has_whole_seeds_and_what_each_run_goes_on_from() -> None:
    scale = plan.Scale("org/model", methods=("sft_grpo", "sft"), rates=(1e-5, 3e-5), seeds=(1, 2))
    first = plan.frontier(scale)
    assert [run.method for run in first[1:4]] == ["sft", "sft", "sft_grpo"]
    assert [run.seed for run in first] == [0, 1, 1, 1, 2, 2, 2]
    later = plan.sequence(scale, {"sft": 3e-5, "sft_grpo": 5e-5})
    assert [(run.rate, run.seed, run.stage) for run in later] == [
        (3e-5, seed, stage) for seed in (1, 2) for stage in (2, 3)
    ]
    known = {run.key for run in first}
    for run in [*first, *later]:
        start = plan.start_of(run, scale)
        assert start is None or start.key in known, "it is submitted before"
        known.add(run.key)
    assert plan.start_of(later[0], scale) == Run("sft", 3e-5, 1, 1)


def test_later_rates_are_those_at_which_every_method_goes_on() -> None:
    scale = plan.Scale(
        "org/model", methods=("grpo", "sft", "sdft_forward"), rates=(1e-5, 3e-5), seeds=(1,)
    )
    at_one = plan.sequence(replace(scale, later_rates=(3e-5, 1e-3)), {})
    assert [(run.method, run.rate, run.stage) for run in at_one] == [
        (method, 3e-5, stage) for method in ("sft", "sdft_forward") for stage in (2, 3)
    ], "a rate that the first skill was not taught at has nothing to go on from"
    assert plan.sequence(replace(scale, later_rates=()), {"sft": 1e-5}) == []


def test_the_longest_chains_of_a_seed_are_queued_first() -> None:
    scale = plan.Scale(
        "org/model",
        methods=tuple(plan.METHODS),
        rates=(1e-5, 3e-5),
        later_rates=(3e-5,),
        seeds=(1, 2),
    )
    runs = [*plan.frontier(scale), *plan.sequence(scale, {})]
    queued = plan.chains(runs)
    assert sorted(run.key for chain in queued for run in chain) == sorted(run.key for run in runs)
    assert set(plan.LONGEST_FIRST) == set(plan.METHODS)
    seeds = [chain[0].seed for chain in queued]
    assert seeds == sorted(seeds), "a seed after the other"
    of_one = [chain[0].method for chain in queued if chain[0].seed == 1]
    assert of_one[0] == "sdft_forward" and of_one[-1] == plan.GOES_ON
    known: set[tuple[str, float, int, int]] = set()
    for chain in queued:
        assert len({(run.method, run.rate, run.seed) for run in chain}) == 1
        assert [run.stage for run in chain] == sorted(run.stage for run in chain)
        for run in chain:
            start = plan.start_of(run, scale)
            assert start is None or start.key in known, "what it goes on from is queued before"
            known.add(run.key)


@pytest.mark.slow
def test_the_study_runs_and_is_taken_up(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tiny random model, which learns nothing: the gate stops SDFT, and the study says so."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    tiny, out = make_tiny_model(tmp_path / "tiny"), tmp_path / "out"
    command = ["run.py", "--small", "--model", str(tiny), "--steps", "2", "--test-rows", "2"]
    monkeypatch.setattr("sys.argv", [*command, "--rates", "1e-2", "--out", str(out)])
    study.main()
    told = capsys.readouterr().out
    assert "SDFT, forward KL 1e-2, seed 1, stage 1: ftjob-" in told and "teacher gate" in told
    data: dict[str, Any] = json.loads((out / "results.json").read_text())
    results: list[dict[str, Any]] = [run for run in data["runs"] if "stopped" not in run]
    stopped: list[dict[str, Any]] = [run for run in data["runs"] if "stopped" in run]
    assert [(r["method"], r["stage"]) for r in stopped] == [("sdft_forward", 1)]
    assert stopped[0]["gate"]["teacher"] == [0.0]
    assert data["study"]["model"] == "tiny" and data["study"]["steps"] == 2
    assert [(r["method"], r["stage"]) for r in results] == [("base", 0), ("sft", 1), ("sft", 2)]
    assert all(set(r["scores"]) == {"orders", "arithmetic"} for r in results)
    assert results[0]["kl"] == 0 < results[1]["kl"]
    ow = OpenWeights()
    runs = len(ow.runs.list())
    study.main()
    assert len(ow.runs.list()) == runs + 1, "what failed is tried again, what is done is not"
    assert all((out / name).is_file() for name in ("frontier.png", "sequence.png", "results.md"))


def test_a_run_that_cannot_begin_stops_no_other(tmp_path: Path, home: Path) -> None:
    """A seed's start has ended without a model when what goes on from it is queued, as where the
    gate has stopped it; another's does so later.
    """
    ow = QuietClient()
    tiny = make_tiny_model(tmp_path / "tiny")
    scale = replace(plan.small(str(tiny)), methods=("sft",), rates=(1e-2,), seeds=(1, 2), steps=1)
    made = Study(ow, scale, tmp_path / "out")
    made.submit([Run("base", 0.0, 0, 0)])
    for run in plan.frontier(scale)[1:]:
        made.submit([run])
    first, second = (ow.jobs.find(meta={"seed": seed})[0] for seed in (1, 2))
    first.cancel()
    for chain in plan.chains(plan.sequence(scale, {"sft": 1e-2})):
        made.submit(chain)
    second.cancel()
    ended = {run.key: run for run in itertools.islice(made.ended(math.inf), 4)}
    assert {key[2:] for key in ended} == {(1, 1), (1, 2), (2, 1), (2, 2)}
    assert ended["sft", 1e-2, 1, 1].stopped == "canceled"
    later = ended["sft", 1e-2, 1, 2]
    assert later.stopped == f"it goes on from {first.id}, which has failed" and later.job_id == ""
    assert "it was to come after job" in ended["sft", 1e-2, 2, 2].stopped
    [base] = ow.jobs.list(status="pending")
    base.cancel().delete()
    [last] = made.ended(math.inf)
    assert (last.method, last.stopped) == ("base", "its job was deleted")


def asked(monkeypatch: pytest.MonkeyPatch, *words: str) -> plan.Scale:
    monkeypatch.setattr("sys.argv", ["run.py", "--small", "--model", "org/model", *words])
    return study.scale_of(study.arguments(), OpenWeights())


def test_what_is_asked_for_twice_is_done_once(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    twice = "--rates 1e-4 1e-4 --seeds 2 1 2 --skills orders orders --methods sft sft"
    more = "--grpo-rates 1e-5 1e-5 --later-rates 1e-4"
    scale = asked(monkeypatch, *f"{twice} {more}".split())
    assert (scale.rates, scale.seeds, scale.skills) == ([1e-4], [2, 1], ["orders"])
    assert scale.methods == ["sft"] and scale.rates_at("grpo") == [1e-5]
    keys = [run.key for run in plan.frontier(scale)]
    assert len(set(keys)) == len(keys) == 3


def test_a_method_goes_on_from_the_rates_that_it_had(
    monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    scale = asked(monkeypatch, "--later-rates", "1e-4")
    known = {run.key for run in plan.frontier(scale)}
    later = plan.sequence(scale, {})
    assert [run.method for run in later] == ["sft"], "SDFT has the first skill at another"
    starts = [plan.start_of(run, scale) for run in later]
    assert all(start is not None and start.key in known for start in starts)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--rates 0", "--rates: give a learning rate such as 1e-4"),
        ("--rates nan", "--rates: give a learning rate such as 1e-4"),
        ("--later-rates -1", "--later-rates: give a learning rate such as 1e-4"),
        ("--later-rates 0.5", "--later-rates: no method teaches the first skill at 0.5"),
        ("--seeds -1", "--seeds: give a whole number from 0 on"),
        ("--minutes nan", "--minutes: give a number from 0 on"),
        ("--memory-gb -2", "--memory-gb: give a number from 0 on"),
        ("--methods sft_grpo", "--methods: sft_grpo goes on from sft; add sft"),
    ],
)
def test_nonsense_is_refused_before_anything_is_queued(
    words: str,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    home: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stopped:
        asked(monkeypatch, *words.split())
    assert told in f"{stopped.value}{capsys.readouterr().err}"


def test_what_is_no_result_is_not_drawn(tmp_path: Path) -> None:
    about, file = {"skills": ["orders"]}, tmp_path / "results.json"
    fine = made("sft", 1e-5, 1, 10, 0.1).data()
    stopped = Run("sft", 1e-5, 1, 1, stopped="failed").data()
    others: list[Any] = [
        [],
        {"runs": []},
        {"study": about, "runs": [3]},
        {"study": about, "runs": [{**fine, "method": "magic"}]},
        {"study": about, "runs": [{**fine, "colour": "red"}]},
        {"study": about, "runs": [{**fine, "scores": {"orders": ""}}]},
        {"study": about, "runs": [fine, {**fine, "scores": {"orders": "11"}}]},
        {"study": {"skills": ["juggling"]}, "runs": [fine]},
    ]
    for text in ("", '{"study":', *map(json.dumps, others)):
        file.write_text(text)
        with pytest.raises(InvalidInputError, match="results.json: holds no results of this study"):
            study.draw_again(file, tmp_path / "drawn")
    file.write_text(json.dumps({"study": about, "runs": [stopped]}))
    with pytest.raises(InvalidInputError, match="no run has completed"):
        study.draw_again(file, tmp_path / "drawn")
    assert not (tmp_path / "drawn").exists()
    file.write_text(json.dumps({"study": about, "runs": [stopped, fine]}))
    study.draw_again(file, tmp_path / "drawn")
    drawn = (tmp_path / "drawn" / "results.md").read_text()
    study.draw(["orders"], [made("sft", 1e-5, 1, 10, 0.1)], tmp_path / "own")
    assert (tmp_path / "own" / "results.md").read_text() == drawn, "as by the study itself"


def test_every_skill_of_the_study_has_rows_and_a_length() -> None:
    scale = plan.Scale("org/model")
    assert set(scale.new_tokens) == set(SKILLS) == set(scale.skills)
    assert set(scale.methods) <= set(plan.METHODS)
