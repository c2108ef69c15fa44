"""What the study of skills says while it runs, and of what it lacks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cookbook.sdft.skills import plan
from cookbook.sdft.skills import run as study
from cookbook.sdft.skills.results import Run
from cookbook.sdft.skills.study import Study
from cookbook.sdft.skills.telling import at_most_every, at_work, lacking, planned
from openweights.types import WorkerSpec
from tests.client.conftest import QuietClient
from tests.cookbook.test_skills_study import RUNS
from tests.tiny_model import make_tiny_model


def test_the_whole_count_is_known_from_the_start() -> None:
    scale = plan.small("org/model")
    first = plan.frontier(scale)
    later = plan.sequence(scale, {"sft": 1e-4, "sdft_forward": 3e-4})
    assert plan.whole(scale) == len(first) + len(later) == 6
    at_some = replace(scale, later_rates=(1e-4,))
    assert plan.whole(at_some) == len(first) + len(plan.sequence(at_some, {})) == 5
    assert planned(4, 6) == (
        "6 runs: 4 now, and 2 runs of the later skills at the rates that did best"
    )
    assert planned(5, 5) == "5 runs"


def test_what_is_missing_is_named() -> None:
    ended = RUNS[:4]
    last, other = (Run("sdft_forward", 3e-4, 1, stage) for stage in (1, 2))
    assert lacking(4, ended) == "", "the control: all are there"
    assert lacking(5, ended, [(last, "training, step 3/24")]) == (
        "4 of 5 runs; missing: SDFT, forward KL 3e-4, seed 1, stage 1 (training, step 3/24); "
        "the same command goes on"
    )
    assert lacking(7, ended, [(last, ""), (other, "")]).split("missing: ")[1] == (
        "SDFT, forward KL 3e-4, seed 1, stage 1 (not begun); "
        "SDFT, forward KL 3e-4, seed 1, stage 2 (not begun); 1 more; the same command goes on"
    )
    stopped = replace(last, stopped="failed: the gate")
    assert lacking(5, [*ended, stopped]) == (
        "4 of 5 runs; missing: SDFT, forward KL 3e-4, seed 1, stage 1 (stopped)"
    )
    assert at_work([(last, "training, step 3/24"), (other, "")]) == (
        "SDFT, forward KL 3e-4, seed 1, stage 1: training, step 3/24; 1 run waits"
    )


def test_a_line_comes_at_most_so_often() -> None:
    now, told = [0.0], []
    call = at_most_every(60, lambda: told.append(now[0]), lambda: now[0])
    for moment in (0.0, 59.0, 60.0, 61.0, 119.0, 130.0):
        now[0] = moment
        call()
    assert told == [60.0, 130.0]


def test_a_study_that_is_cut_short_says_so(
    tmp_path: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ow, out = QuietClient(), tmp_path / "out"
    tiny = make_tiny_model(tmp_path / "tiny")
    scale = replace(plan.small(str(tiny)), rates=(1e-2,), rates_of={}, steps=1)
    made = Study(ow, scale, out)
    ended, lack = study.carry_out(made, scale, out, deadline=0.0)
    assert ended == [] and lack.startswith("0 of 5 runs; missing: base (not begun); ")
    assert lack.endswith("; 2 more; the same command goes on")
    assert capsys.readouterr().out.startswith("5 runs: 3 now, and 2 runs of the later skills")
    worker = ow.backend.register_worker(WorkerSpec(id="worker-1"))
    assert ow.backend.claim_job(worker.id) is not None
    [(busy, doing)] = [(run, words) for run, words in made.waiting() if words]
    assert doing == ("training" if busy.stage else "measuring")
    study.draw(scale.skills, RUNS, out, lack)
    assert (out / "results.md").read_text().endswith(f"\n{lack}")
