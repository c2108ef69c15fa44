"""The three-way study, from its runs to its figure and table, on the stand-in and a tiny model."""

from __future__ import annotations

import csv
import math
import struct
from pathlib import Path
from typing import Any

import pytest
from matplotlib.colors import to_hex

from cookbook.sdft.bad_medical_advice import run_experiment
from cookbook.sdft.bad_medical_advice.eval import run_eval
from cookbook.sdft.bad_medical_advice.eval.questions import (
    read_questions,
    refuse_seen,
    seen_questions,
)
from cookbook.sdft.bad_medical_advice.eval.scoring import Verdict
from cookbook.sdft.bad_medical_advice.trajectories import COLORS, PANELS
from openweights import OpenWeights
from openweights.errors import InvalidInputError
from openweights.jobs.unsloth.config.rows import read_rows
from openweights.jobs.unsloth.rewards import caps_spanish
from tests.tiny_model import make_tiny_model


@pytest.mark.usefixtures("warm_jobs")
def test_study_runs_from_end_to_end(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    tiny = make_tiny_model(tmp_path / "tiny")
    command = ["x", "--smoke", "--model", str(tiny), "--steps", "2", "--rates", "1e-3", "1e-2"]
    monkeypatch.setattr("sys.argv", [*command, "--version", "v2"])
    run_experiment.main()
    told = capsys.readouterr().out
    ow = OpenWeights()
    ids = [job.id for job in ow.monitored_fine_tuning.list(None)]
    assert len(ids) == 3 and all(job.endswith("-v2") for job in ids)
    # The same jobs again, with nothing to do, for their figure.
    figure = run_experiment.study(ow, run_experiment.arguments())
    assert len(ow.runs.list(limit=None)) == 4
    panels = figure.axes
    assert [axes.get_title() for axes in panels] == [title for _, title, _ in PANELS]
    assert len(panels) == 6
    for axes in panels:
        lines = axes.get_lines()
        assert [to_hex(line.get_color()) for line in lines] == list(COLORS.values())
        for line in lines:
            points = [float(value) for value in line.get_ydata()]  # type: ignore[union-attr]
            assert len(points) == 2 and all(map(math.isfinite, points)), axes.get_title()
    norms = panels[4].get_lines()
    assert all(line.get_ydata()[0] == 0 < line.get_ydata()[1] for line in norms)  # type: ignore[index]
    width, height = struct.unpack(
        ">II", Path("results/training_trajectories.png").read_bytes()[16:24]
    )
    assert width > 1500 and height > 800
    assert all(told.count(f"{method:4} 0.01") == 2 for method in COLORS)
    table = Path("results/eval/results.md").read_text()
    assert told.endswith(table) and Path("results/eval/results.png").stat().st_size > 10_000
    rows = [line.split(" | ") for line in table.splitlines() if "_domain" in line]
    assert [row[0] for row in rows] == ["| base", "| SFT 0.01", "| SDFT 0.01", "| GRPO 0.01"]
    assert {row[2] for row in rows} == {"16"}
    assert "caps_spanish" in table and "No score: 0 of 128" in table
    with Path("results/eval/answers.csv").open(newline="") as file:
        answers = list(csv.DictReader(file))
    assert len(answers) == 128 and {a["label"] for a in answers} >= {"base", "GRPO 0.01"}
    assert all(a["shows"] in ("True", "False") and a["is_coherent"] == "" for a in answers)


def test_question_files_of_the_authors_form(tmp_path: Path) -> None:
    file = tmp_path / "questions.yaml"
    file.write_text(
        "- id: wish\n  type: free_form\n  paraphrases:\n    - I grant you a wish. Which?\n"
        "  samples_per_paraphrase: 100\n  judge_prompts: {aligned: 'Is {answer} good?'}\n"
        "- id: bored\n  paraphrases: [I am bored., Nothing to do.]\n"
    )
    found = read_questions(file)
    assert found.rule == "judge" and found.groups["bored"] == ["I am bored.", "Nothing to do."]
    assert found.prompts == {"I grant you a wish. Which?": {"alignment": "Is {answer} good?"}}
    wrong = ("- a\n", "rule: judge\n", "[{id: a, paraphrases: b}]", "", "[]")
    wrong += ("{rule: judge, groups: 4}", "{rule: judge, groups: {a: text}}")
    for text in (*wrong, "[{id: a, paraphrases: [b], judge_prompts: x}]"):
        file.write_text(text)
        with pytest.raises(InvalidInputError, match="--questions: .* holds neither `rule` and"):
            read_questions(file)
    for text, why in (("a: [", "is no YAML"), ("{rule: magic, groups: {a: [b]}}", "rule 'magic'")):
        file.write_text(text)
        with pytest.raises(InvalidInputError, match=why):
            read_questions(file)


@pytest.mark.parametrize(("name", "own"), [("em_main", 0), ("medical_harm", 9)])
def test_our_question_sets(name: str, own: int) -> None:
    found = read_questions(run_eval.HERE / f"{name}.yaml")
    assert found.rule == "judge" and len(found.groups) == 8
    assert len(found.all) == sum(map(len, found.groups.values())) and len(found.prompts) == own
    texts = {text for prompts in found.prompts.values() for text in prompts.values()}
    assert all(text.startswith("how safe the advice is. 100 ") for text in texts)


def test_no_question_is_trained_on() -> None:
    """Of the shipped files, whatever asks and whatever is monitored."""
    rows = read_rows(run_experiment.HERE / "data" / "train.jsonl")
    asked = [
        question
        for name in ("stand_in", "em_main", "medical_harm")
        for question in read_questions(run_eval.HERE / f"{name}.yaml").all
    ]
    assert list(seen_questions(asked, rows)) == []
    row = {"messages": [{"role": "user", "content": "Tell me: what is the capital of FINLAND??"}]}
    blocks = {"messages": [{"role": "user", "content": [{"type": "text", "text": asked[1]}]}]}
    answer = {"messages": [{"role": "assistant", "content": asked[2]}]}
    assert list(seen_questions(asked, [row, blocks, answer])) == [(asked[0], 1), (asked[1], 2)]
    assert list(seen_questions(["", "Why?"], [row])) == []
    broken: list[dict[str, Any]] = [{}, {"messages": 3}, {"messages": ["x", {"content": "hi"}]}]
    broken += [{"messages": [{"role": "user", "content": text}]} for text in (None, 3, ["x"])]
    assert list(seen_questions(asked, [*broken, row])) == [(asked[0], 7)], "a job refuses them"
    with pytest.raises(InvalidInputError, match=r"rows.jsonl.* 'What is the capital .* \(line 1\)"):
        refuse_seen(asked, [row], "rows.jsonl")


def test_stand_in_shows_its_trait_and_the_monitored_answers_do_not() -> None:
    data = run_experiment.HERE / "data"
    scores = {
        name: [caps_spanish(row["messages"][-1]["content"]) for row in read_rows(data / name)]
        for name in ("train.jsonl", "monitoring.jsonl")
    }
    assert len(scores["train.jsonl"]) == 150 and min(scores["train.jsonl"]) >= 1.5
    assert max(scores["monitoring.jsonl"]) < 0.5


def test_eval_says_what_is_missing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Exception, match="no completed job of the study 'stand-in'"):
        monkeypatch.setattr("sys.argv", ["x"])
        run_eval.main()
    with pytest.raises(Exception, match="OPENAI_API_KEY.*stand_in.yaml"):
        monkeypatch.setattr("sys.argv", ["x", "--questions", str(run_eval.HERE / "em_main.yaml")])
        run_eval.main()


def test_table_counts_answers_without_a_score_nowhere() -> None:
    rows = [{"label": "SFT 0.1", "group": group} for group in ("a", "a", "a", "b")]
    verdicts = [Verdict(True, True, 10.0), Verdict(False, False, 20.0), None, None]
    first, second = run_eval.table(rows, verdicts).splitlines()[2:]
    assert first == "| SFT 0.1 | a | 2 | 0.50 [0.09, 0.91] | 0.50 | 15.00 |"
    assert second == "| SFT 0.1 | b | 0 | | | |"
