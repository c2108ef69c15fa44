"""The teacher gate: who answers better, where the demonstration is to stand, and who is stopped."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from openweights.errors import JobFailedError
from openweights.generation.choose import generation_engine
from openweights.generation.params import Completion, GenerationRequest
from openweights.jobs.unsloth.config.demonstrations import SHOWINGS, Showing
from openweights.jobs.unsloth.distillation.gate import (
    is_better,
    load_showing,
    open_gate,
    sampled_rows,
    save_showing,
)
from openweights.jobs.unsloth.distillation.likeness import answer_format, rouge_l_with_signs
from openweights.jobs.unsloth.sdft import sdft_train
from openweights.models.smollm2 import get_model
from tests.jobs.unsloth.test_sdft import config, load
from tests.tiny_model import make_tiny_model, make_tokenizer

DATA = Path(__file__).parents[4] / "cookbook" / "sdft" / "data" / "train.jsonl"
ROWS: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "user", "content": f"What is {i} + {i}?"},
            {"role": "assistant", "content": f"[sum = {2 * i}]"},
        ]
    }
    for i in range(40)
]


class Reader:
    """An engine that answers as `answer` says, given the text that it reads."""

    def __init__(self, answer: Callable[[str], str], *, ends: bool = True) -> None:
        self._answer = answer
        self._ends = ends
        self.asked: list[GenerationRequest] = []

    def generate(self, requests: Sequence[GenerationRequest]) -> list[list[Completion]]:
        self.asked = list(requests)
        texts = [make_tokenizer().decode(list(r.prompt_ids)) for r in requests]
        reason = "stop" if self._ends else "length"
        return [[Completion([], self._answer(text), reason)] for text in texts]


def copier(times: int, *, reads_template: bool = False) -> Callable[[str], str]:
    """Repeats a demonstration that it has seen so often in turns of the assistant."""

    def answer(text: str) -> str:
        turns = [part for part in text.split("<|im_start|>assistant\n")[1:-1]]
        if "example" in text and reads_template:
            return "[" + text.rsplit("[", 1)[1].split("]")[0] + "]"
        if turns and len(turns) >= times:
            return turns[0].partition("<|im_end|>")[0]
        return "I do not know"

    return answer


def chosen(
    tmp_path: Path,
    answer: Callable[[str], str],
    rows: Sequence[dict[str, Any]] = ROWS,
    *,
    ends: bool = True,
    **changes: Any,
) -> tuple[Showing, list[dict[str, Any]]]:
    events: list[dict[str, Any]] = []
    made = config(tmp_path, **{"sdft_gate": "stop", **changes})
    reader: Any = Reader(answer, ends=ends)
    gate = open_gate(made, reader, None, make_tokenizer(), rows, lambda file, target: Path(file))
    showing = SHOWINGS[0] if gate is None else gate.choose(events.append)
    told = [event for event in events if event["type"] == "stage"]
    readers = 0 if gate is None else len(reader.asked) // len(gate.rows)
    assert [(e["doing"], e["part"]) for e in told] == (
        [("teacher gate", f"0/{readers * len(gate.rows)} answers")] if gate is not None else []
    )
    return showing, [event for event in events if event not in told]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (copier(2), Showing("turns", 2)),
        (copier(1), Showing("turns")),
        (copier(1, reads_template=True), Showing("template")),
    ],
)
def test_auto_takes_the_first_of_the_best(
    tmp_path: Path, answer: Callable[[str], str], expected: Showing
) -> None:
    showing, [event] = chosen(tmp_path, answer)
    assert showing == expected
    assert (event["type"], event["rows"], event["passed"]) == ("teacher_gate", 16, True)
    assert Showing(event["placement"], event["repeats"]) == expected
    assert event["measure"] == "rouge_l" and event["student_exact"] == 0
    assert event[f"{expected.name}_exact"] == event[f"{expected.name}_rouge_l"] == 1
    names = ("student", "template", "turns", "turns_2")
    figures = ("exact", "rouge_l", "format")
    assert {f"{name}_{figure}" for name in names for figure in figures} < event.keys()
    assert (event["student"], event["teacher"]) == (event["student_rouge_l"], 1)
    assert event[f"{expected.name}_format"] == 1 and event["same_format"] == 0
    example = event["examples"][0]
    assert example[expected.name] == example["demonstration"] != example["student"]
    json.dumps(event)


def test_a_placement_that_is_given_is_the_only_one_that_is_tried(tmp_path: Path) -> None:
    showing, [event] = chosen(
        tmp_path, copier(2), sdft_demo_placement="turns", sdft_demo_repeats=3, sdft_gate_rows=5
    )
    assert showing == Showing("turns", 3) and event["rows"] == 5
    assert "turns_3_exact" in event and "template_exact" not in event


def test_a_teacher_that_is_no_better_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(JobFailedError, match=r"no better than the student.*try .*sdft_gate='warn'"):
        chosen(tmp_path, copier(9))
    with pytest.raises(JobFailedError, match="sdft_demo_placement='auto'"):
        chosen(tmp_path, copier(1), sdft_demo_placement="template")
    with pytest.raises(JobFailedError, match="answers as it is to already"):
        chosen(tmp_path, lambda text: "[sum = " + _sum(text) + "]")


def _sum(text: str) -> str:
    return str(2 * int(text.rsplit("What is ", 1)[1].split()[0]))


DESCRIBED = [{**row, "demonstration": "[two equal numbers are added]"} for row in ROWS]
NAMED = [
    {
        "messages": row["messages"][:1],
        "gold_response": row["messages"][1]["content"],
        "demonstration": row["demonstration"],
    }
    for row in DESCRIBED
]


@pytest.mark.parametrize("rows", [DESCRIBED, NAMED])
@pytest.mark.parametrize("reward", [None, "exact"])
def test_a_teacher_that_repeats_what_is_no_answer_stops_the_run(
    tmp_path: Path, rows: list[dict[str, Any]], reward: str | None
) -> None:
    """The right answer is the row's last, or its `gold_response`, whatever the teacher is shown."""
    file = tmp_path / "own.py"
    file.write_text(
        "def exact(completions, gold_response):\n"
        "    return [float(c == g) for c, g in zip(completions, gold_response)]\n"
    )
    rewarded = {"sdft_gate_reward": f"{file}:exact"} if reward else {}
    with pytest.raises(JobFailedError, match="repeats a demonstration word for word in 100%"):
        chosen(tmp_path, copier(1), rows, sdft_gate_margin=0.5, **rewarded)
    _, [event] = chosen(tmp_path, copier(1), rows, sdft_gate="warn", **rewarded)
    assert event["turns_exact"] == 0 and event["repeated"] == 1
    assert event["examples"][0]["right"].startswith("[sum = ")
    # The control: the demonstration is the right answer.
    _, [event] = chosen(tmp_path, copier(1), **rewarded)
    assert event["passed"] and event["turns_exact"] == event["repeated"] == 1


def test_an_answer_that_was_cut_has_no_format(tmp_path: Path) -> None:
    _, [event] = chosen(tmp_path, copier(1), sdft_gate="warn")
    assert event["turns_format"] == 1
    _, [event] = chosen(tmp_path, copier(1), sdft_gate="warn", ends=False)
    assert event["turns_format"] == event["same_format"] == event["student_format"] == 0
    assert event["turns_exact"] == 1, "what it says is counted"


def test_warn_goes_on_and_off_asks_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    showing, [event] = chosen(tmp_path, copier(9), sdft_gate="warn")
    assert showing == SHOWINGS[0] and not event["passed"] and "no better" in caplog.text
    assert chosen(tmp_path, copier(1), sdft_gate="off") == (SHOWINGS[0], [])


def test_a_margin_that_is_not_reached_is_none(tmp_path: Path) -> None:
    def half(text: str) -> str:
        return copier(1)(text).replace("sum", "what is it") if "sum" in text else "sum = 0"

    gain = chosen(tmp_path, half)[1][0]
    difference = gain[f"{gain['placement']}_rouge_l"] - gain["student_rouge_l"]
    assert 0.05 < difference < 0.5
    with pytest.raises(JobFailedError, match="sdft_gate_margin=0.5 and by more than chance in 16"):
        chosen(tmp_path, half, sdft_gate_margin=0.5)


@pytest.mark.parametrize(("right", "passed"), [(0, False), (1, False), (2, False), (3, True)])
def test_a_lucky_answer_is_no_teacher(tmp_path: Path, right: int, passed: bool) -> None:
    """Of 16 answers, right ones in the template alone: one is more than the margin, and chance."""
    file = tmp_path / "mine.py"
    file.write_text(
        "def found(completions):\n    return [float(c == 'right') for c in completions]\n"
    )
    seen: list[str] = []

    def answer(text: str) -> str:
        if "example" not in text:
            return "wrong"
        seen.append(text)
        return "right" if len(seen) <= right else "wrong"

    changes = {"sdft_gate": "warn", "sdft_demo_placement": "template"}
    _, [event] = chosen(tmp_path, answer, sdft_gate_reward=f"{file}:found", **changes)
    assert event["teacher"] == right / 16 and event["passed"] is passed
    assert event["teacher"] - event["student"] > event["margin"] or right == 0


@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=40),
    st.floats(0, 0.5),
)
def test_what_is_better_is_so_with_more_of_the_same_rows(
    pairs: list[tuple[float, float]], margin: float
) -> None:
    student, teacher = ([pair[place] for pair in pairs] for place in (0, 1))
    if is_better(student, teacher, margin):
        assert is_better(student * 2, teacher * 2, margin)
        assert not is_better(teacher, student, margin)
    silent = [math.nan]
    assert is_better(student, teacher, margin) == is_better(
        student + silent, teacher + [1.0], margin
    )
    assert not is_better(silent, silent, margin)


def test_a_reward_of_ones_own_decides(tmp_path: Path) -> None:
    """A reward by which the template is the best, although its answers overlap less."""
    file = tmp_path / "mine.py"
    file.write_text(
        "def polite(prompts, completions, gold_response):\n"
        f"    with open({str(tmp_path / 'asked')!r}, 'a') as asked: asked.write('x')\n"
        "    assert all('What is' in p[-1]['content'] for p in prompts)\n"
        "    assert all(g.startswith('[sum') for g in gold_response)\n"
        "    return [None if 'know' in c else float('please' in c) for c in completions]\n"
    )

    def answer(text: str) -> str:
        return "please" if "example" in text else copier(1)(text)

    # The student's answers have no value; where all are None there is nothing to compare.
    with pytest.raises(JobFailedError, match=r"none of the answers \(it gave None or no"):
        chosen(tmp_path, answer, sdft_gate_reward=f"{file}:polite")
    showing, [event] = chosen(
        tmp_path,
        lambda text: answer(text).replace("know", "say"),
        sdft_gate_reward=f"{file}:polite",
    )
    file.write_text("def polite(completions):\n    return [1.2 for _ in completions]\n")
    with pytest.raises(JobFailedError, match="nothing for it to teach; it repeats"):
        chosen(tmp_path, answer, sdft_gate_reward=f"{file}:polite")
    assert showing == Showing("template") and event["measure"] == "reward"
    asked = (tmp_path / "asked").read_text()
    assert asked == "x" * (1 + 4), "once for each who answers: the first, of whom none had a value"
    assert event["template_reward"] == 1 and event["student_reward"] == 0
    assert event["turns_rouge_l"] > event["template_rouge_l"]


def test_rows_that_do_not_fit_are_not_asked(tmp_path: Path) -> None:
    """Long rows are passed over; where only the shortest showing fits, only that is tried."""
    tokenizer = make_tokenizer()
    long = [
        {
            "messages": [
                {"role": "user", "content": "x" * 900},
                {"role": "assistant", "content": "y"},
            ]
        }
    ]
    made = config(tmp_path, sdft_gate_rows=6)
    limit = made.max_seq_length - made.sdft_max_new_tokens
    rows, showings = sampled_rows(made, tokenizer, [*ROWS[:10], *long * 10], SHOWINGS)
    assert len(rows) == 6 and showings == SHOWINGS
    assert all(len(ids) <= limit for row in rows for ids in row.prompts.values())
    rows, showings = sampled_rows(made, tokenizer, long, SHOWINGS)
    assert rows == [] and sampled_rows(made, tokenizer, [], SHOWINGS)[0] == []
    tight = {
        "messages": [
            {"role": "user", "content": "x" * (limit // 3)},
            {"role": "assistant", "content": "y" * (limit // 9)},
        ]
    }
    rows, showings = sampled_rows(made, tokenizer, [tight], SHOWINGS)
    assert len(rows) == 1 and showings == SHOWINGS[:2]


def test_a_resumed_run_keeps_what_was_chosen(tmp_path: Path) -> None:
    """Although it is asked for nothing else than "auto"."""
    folder = make_tiny_model(tmp_path / "model")
    made = config(tmp_path, max_steps=2, save_steps=1, sdft_gate="warn", learning_rate=1e-3)
    events: list[dict[str, Any]] = []
    trainer = sdft_train(made, load(folder), make_tokenizer(), ROWS, None, log_event=events.append)
    checkpoint = Path(made.output_dir) / "checkpoint-2"
    kept = load_showing(made, checkpoint)
    first = next(event for event in events if event.get("type") == "teacher_gate")
    assert Showing(first["placement"], first["repeats"]) == kept
    save_showing(Showing("turns", 2), checkpoint)
    resumed = sdft_train(
        config(tmp_path, max_steps=3, sdft_gate="warn"),
        load(folder), make_tokenizer(), ROWS, None, resume_from=str(checkpoint),
    )  # fmt: skip
    columns = [len(t.train_dataset[0]["teacher_prompt_ids"]) for t in (trainer, resumed)]
    assert columns[1] != columns[0] and load_showing(made, tmp_path) == SHOWINGS[0]


def longest_common(first: Sequence[str], second: Sequence[str]) -> int:
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            longer = max(table[i][j + 1], table[i + 1][j])
            table[i + 1][j + 1] = table[i][j] + 1 if a == b else longer
    return table[-1][-1]


@settings(max_examples=300)
@given(
    st.lists(st.sampled_from("abc"), max_size=90), st.lists(st.sampled_from("abcd"), max_size=90)
)
def test_rouge_l_is_the_longest_common_subsequence(first: list[str], second: list[str]) -> None:
    common, total = longest_common(first, second), len(first) + len(second)
    expected = 2 * common / total if first and second else float(first == second)
    assert rouge_l_with_signs(" ".join(first), " ".join(second)) == pytest.approx(expected)


def test_rouge_l_reads_signs_and_scripts_without_spaces() -> None:
    assert (
        rouge_l_with_signs("[f(x=1)]", "f x 1") < 0.6 < rouge_l_with_signs("[f(x=2)]", "[f(x=1)]")
    )
    assert 0 < rouge_l_with_signs("私は猫が好き", "私は犬が好き") < 1
    assert rouge_l_with_signs("Same, Words", "same , words") == 1


def test_the_format_of_an_answer_is_how_it_begins_and_ends() -> None:
    assert answer_format("[sum = 4]") == answer_format(" [product(a=3)] ") == ("[", "]", False)
    assert answer_format("The sum:\n[sum = 4]") == ("w", "]", True)
    assert (
        answer_format("42")
        == answer_format("7 + 35 = 42")
        == ("0", "0", False)
        != answer_format("It is 42.")
    )
    assert answer_format("") == answer_format("  ") == ("", "", False)


@pytest.mark.slow
def test_smollm2_learns_from_turns_and_not_from_the_template(tmp_path: Path) -> None:
    """A small real model: what likelihoods do not tell."""
    folder = get_model(tmp_path / "models")
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    rows = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]
    events: list[dict[str, Any]] = []
    made = config(
        tmp_path, sdft_gate="stop", sdft_gate_rows=8, sdft_max_new_tokens=24, max_seq_length=1024
    )
    engine = generation_engine("auto", model, tokenizer)
    gate = open_gate(made, engine, None, tokenizer, rows, lambda file, target: Path(file))
    assert gate is not None
    showing = gate.choose(events.append)
    [event] = events
    assert showing.placement == "turns" and event["passed"]
    assert event["student_exact"] == 0 and event["template_exact"] <= 2 / 8
    assert event["template_rouge_l"] < event["student_rouge_l"] + 0.05
    assert event[f"{showing.name}_exact"] >= 7 / 8
