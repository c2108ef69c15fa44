"""`ow.mmlu_pro`: what it asks, how it reads a letter, and a run with a folder of questions."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from openweights import OpenWeights
from openweights.errors import ConfigError, ConfigurationError
from openweights.jobs.evaluate.mmlu_pro import letter_of, open_subjects, question_text
from openweights.jobs.mmlu_pro import MMLUProConfig
from tests.client.conftest import QuietClient
from tests.tiny_model import make_tiny_model
from tests.waiting import HANGS_S


def question(number: int, subject: str) -> dict[str, Any]:
    return {
        "question_id": number,
        "question": f"What is {number}?",
        "options": ["one", "two", "N/A"],
        "answer": "B",
        "answer_index": 1,
        "cot_content": f"A: Let us see, {number}. The answer is (B).",
        "category": subject,
    }


@pytest.fixture
def folder(tmp_path: Path) -> str:
    data = tmp_path / "data"
    data.mkdir()
    for split, numbers in (("test", range(6)), ("validation", range(100, 106))):
        rows = [question(n, "law" if n % 2 else "computer science") for n in numbers]
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(data)


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("The answer is (C).", "C"),
        ("the answer is: (c)", "C"),
        ("The answer is A. No, the answer is (D)", "D"),
        ("Answer: F", "F"),
        ("I would say (G)", "G"),
        ("<think>The answer is (A)</think>It is B", "B"),
        ("The answer is (K)", None),
        ("", None),
    ],
)
def test_the_letter_of_an_answer(answer: str, letter: str | None) -> None:
    assert letter_of(answer) == letter


def test_questions_stand_behind_worked_examples_of_their_subject(folder: str) -> None:
    config = MMLUProConfig(model="a/b", dataset=folder, ntrain=2, selected_subjects="law")
    [task] = open_subjects(config)
    assert task.name == "law" and [row["id"] for row in task.rows] == [1, 3, 5]
    told, *turns = task.rows[0]["messages"]
    assert "about law" in told["content"] and len(turns) == 5
    assert turns[0]["content"] == "What is 101?\n(A) one\n(B) two"
    assert turns[1] == {"role": "assistant", "content": "Let us see, 101. The answer is (B)."}
    assert turns[-1]["content"] == question_text(question(1, "law"))
    with pytest.raises(ConfigurationError, match="no questions about .*'math'"):
        open_subjects(MMLUProConfig(model="a/b", dataset=folder, selected_subjects="math"))
    with pytest.raises(ConfigurationError, match="dataset: ./none cannot be had here"):
        open_subjects(MMLUProConfig(model="a/b", dataset="./none"))


def test_what_it_refuses(home: Path) -> None:
    client = QuietClient()
    for change, words in (
        ({"selected_subjects": "law,maths"}, "'maths' is no subject; did you mean 'math'"),
        ({"ntrain": 6}, "ntrain: must be at most 5"),
        ({"save_dir": "../up"}, "save_dir: .*leaves the job's folder"),
        ({"model": "openai/gpt-4o"}, "ow.inspect_ai.create"),
    ):
        with pytest.raises(ConfigError, match=words):
            client.mmlu_pro.create(**{"model": "a/b", **change})
    job = client.mmlu_pro.create(model="a/b", gpu_util="0.9")
    assert job.requires_vram_gb == 60 and job.id.startswith("mmlujob-")
    client.close()


@pytest.mark.usefixtures("warm_jobs")
def test_a_run(home: Path, folder: str, tmp_path: Path) -> None:
    client = OpenWeights()
    job = client.mmlu_pro.create(
        model=str(make_tiny_model(tmp_path / "tiny")),
        dataset=folder,
        ntrain=1,
        max_tokens=4,
        global_record_file="uploads/record.csv",
    )
    job.wait(timeout=HANGS_S)
    events = [event.data for event in job.events(type="evaluation")]
    assert [(e["task"], e["problems"]) for e in events] == [
        ("computer science", 3),
        ("law", 3),
        ("mmlu_pro", 6),
    ]
    job.download(tmp_path / "out")
    for name in ("record.csv", "mmlu_pro_summary.csv"):
        with (tmp_path / "out" / name).open() as file:
            [line] = csv.DictReader(file)
        assert float(line["mmlu_pro"]) == events[2]["score"] and line["ntrain"] == "1"
    client.close()
