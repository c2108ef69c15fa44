"""What tokenizer and config of a model tell of a job's rows and limits, when it is submitted."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from openweights import OpenWeights
from openweights.errors import ConfigError, DatasetError
from openweights.jobs.unsloth.config.encoding import EncodedRows, Reader
from openweights.jobs.unsloth.config.first_look import CHECKED_ROWS, first_rows, known_ends
from openweights.models.at_hand import tokenizer_at_hand
from openweights.models.tokens import eos_token_ids
from tests.tiny_model import SECOND_EOS, make_tiny_model

Rows = list[dict[str, Any]]

POSITIONS = 512  # of the tiny model


def said(prompt: str, answer: str) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": answer},
        ]
    }


def pair(prompt: str, answer: str) -> dict[str, Any]:
    asked, *sides = (
        [{"role": role, "content": text}]
        for role, text in (("user", prompt), ("assistant", answer), ("assistant", "no"))
    )
    return dict(zip(("prompt", "chosen", "rejected"), (asked, *sides), strict=True))


SHORT, LONG = said("q", "a"), said("q" * 300, "a" * 30)
PAIR, LONG_PAIR = pair("q", "a"), pair("q" * 300, "a" * 30)
SDFT: dict[str, Any] = {"loss": "sdft", "sdft_max_new_tokens": 8, "sdft_gate_rows": 2}
GRPO: dict[str, Any] = {
    **{"loss": "grpo", "grpo_max_completion_length": 8, "grpo_num_generations": 2},
    "grpo_reward_function": "rouge_l",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    make_tiny_model(folder)
    return folder


@pytest.fixture
def plan(model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Callable[..., str]:
    """Plans a job on rows, and gives what was said of its files."""

    def planned(rows: Rows, **params: Any) -> str:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        caplog.clear()
        given = {"model": str(model), "training_file": str(path), "max_steps": 30, **params}
        callbacks: list[dict[str, Any]] = given.get("sampling_callbacks", [])
        given |= {"sampling_callbacks": [{"dataset": str(path), **own} for own in callbacks]}
        with caplog.at_level(logging.WARNING):
            OpenWeights().fine_tuning.plan(**given)
        return "\n".join(m for m in caplog.messages if m.partition(":")[0].endswith(("_file", "t")))

    return planned


FITTING: list[tuple[Rows, dict[str, Any]]] = [
    ([SHORT] * 8, {"loss": "sft"}),
    ([PAIR] * 8, {"loss": "dpo"}),
    ([PAIR] * 8, {"loss": "orpo"}),
    ([SHORT] * 8, SDFT),
    ([SHORT] * 8, GRPO),
    ([SHORT] * 8, {"loss": "sft", "sampling_callbacks": [{"max_tokens": 8}]}),
]


@pytest.mark.parametrize(("rows", "params"), FITTING)
def test_of_rows_that_fit_nothing_is_said(
    rows: Rows, params: dict[str, Any], plan: Callable[..., str]
) -> None:
    assert plan(rows, max_seq_length=POSITIONS, **params) == ""


@pytest.mark.parametrize(
    ("rows", "params", "refused"),
    [
        ([SHORT] * 8, {"loss": "sft", "max_seq_length": 5}, "nothing to learn is left of any row"),
        ([{"text": "t"}], {"loss": "sft", "max_seq_length": 1}, "nothing to learn is left of any"),
        ([PAIR] * 8, {"loss": "dpo", "max_seq_length": 5}, "nothing to compare is left of any row"),
        ([PAIR] * 8, {"loss": "orpo", "max_seq_length": 5}, "nothing to compare is left of any"),
        ([SHORT] * 8, {**SDFT, "max_seq_length": 20}, "no row fits: .* beside 8 tokens for a comp"),
        ([SHORT] * 8, {**GRPO, "max_seq_length": 20}, "no row fits: .* raise max_seq_length to"),
        (
            [SHORT] * (CHECKED_ROWS + 1),
            {"loss": "sft", "max_seq_length": 5},
            "nothing to learn is left of any row: rows have up to",
        ),
        ([said("q" * 600, "a")] * 8, SDFT, "prompts have up to .* or set max_seq_length to 512"),
        ([said("q" * 600, "a")] * 8, GRPO, "and the 512 positions .* leave no room for an answer"),
        (
            [said("q" * 600, "a")],
            {"loss": "sft", "sampling_callbacks": [{"max_tokens": 8}]},
            r"sampling_callbacks\[0\].dataset: prompts have up to .*; shorten them$",
        ),
    ],
)
def test_what_leaves_nothing_is_refused(
    rows: Rows, params: dict[str, Any], refused: str, plan: Callable[..., str]
) -> None:
    with pytest.raises(DatasetError, match=refused):
        plan(rows, **params)


@pytest.mark.parametrize(
    ("rows", "params", "warned"),
    [
        (
            [SHORT] * 6 + [LONG] * 2,
            {"loss": "sft", "max_seq_length": 60},
            "training_file: 2 of 8 rows (25%) are longer than max_seq_length=60 and lose their end",
        ),
        (
            [SHORT] * 6 + [LONG] * 2,
            {"loss": "sft", "max_seq_length": 60},
            "training_file: 2 of 8 rows dropped: nothing to learn is left",
        ),
        (
            [PAIR] * 7 + [LONG_PAIR],
            {"loss": "dpo", "max_seq_length": 60},
            "training_file: 1 of 8 rows dropped: nothing to compare is left",
        ),
        ([SHORT] * 6 + [LONG] * 2, {**SDFT, "max_seq_length": 330}, "2 of 8 rows dropped (25%)"),
        ([SHORT] * 6 + [LONG] * 2, {**GRPO, "max_seq_length": 330}, "2 of 8 rows dropped (25%)"),
        (
            [SHORT] * 8,
            {**GRPO, "grpo_max_completion_length": 500},
            "prompts of 8 of 8 rows leave fewer tokens than grpo_max_completion_length=500 of the",
        ),
        (
            [SHORT] * 8,
            {"loss": "sft", "sampling_callbacks": [{"max_tokens": 500}]},
            "leave fewer tokens than sampling_callbacks[0].max_tokens=500 of the 512 positions",
        ),
        (
            [said("q" * 600, "a")],
            {"loss": "sft"},
            "1 of 1 rows have more tokens than the 512 positions that the model was made for",
        ),
        (
            # The first rows fit nowhere, a later one does.
            [LONG] * (CHECKED_ROWS + 8) + [SHORT] * 8,
            {"loss": "sft", "max_seq_length": 60},
            f"{CHECKED_ROWS + 8} of the first {CHECKED_ROWS + 9} rows dropped: nothing to learn",
        ),
    ],
)
def test_what_is_lost_is_said(
    rows: Rows, params: dict[str, Any], warned: str, plan: Callable[..., str]
) -> None:
    assert warned in plan(rows, **params)


def test_inference_knows_which_prompts_leave_no_room(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    asking = [{"messages": said("q" * count, "a")["messages"][:2]} for count in (3, 600)]
    path.write_text("".join(json.dumps(row) + "\n" for row in asking))
    asked: dict[str, Any] = {"model": str(model), "input_file_id": str(path)}
    with pytest.raises(DatasetError, match=r":2: the prompt has \d+ tokens, and the context 512"):
        OpenWeights().inference.plan(**asked)
    with pytest.raises(DatasetError, match="and the context 20; shorten it"):
        OpenWeights().inference.plan(**asked, max_model_len=20)
    path.write_text(json.dumps(asking[0]))
    OpenWeights().inference.plan(**asked)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
    ],
)
def test_a_length_that_the_rotary_table_excludes_is_refused(
    rope: dict[str, Any], tmp_path: Path, plan: Callable[..., str]
) -> None:
    make_tiny_model(tmp_path / "model")
    file = tmp_path / "model/config.json"
    config = json.loads(file.read_text())
    config.pop("rope_parameters", None)
    file.write_text(json.dumps({**config, **rope}))
    asked = {"model": str(tmp_path / "model"), "loss": "sft"}
    with pytest.raises(ConfigError, match=f"max_seq_length: 513 is more than {POSITIONS} posi"):
        plan([SHORT] * 8, **asked, max_seq_length=POSITIONS + 1)
    assert plan([SHORT] * 8, **asked, max_seq_length=POSITIONS) == ""


def test_the_ends_of_the_generation_config_are_known(model: Path) -> None:
    tokenizer: Any = tokenizer_at_hand(str(model))
    assert SECOND_EOS in known_ends(tokenizer)
    assert SECOND_EOS not in tokenizer.convert_ids_to_tokens(tokenizer.eos_token_id)
    assert tokenizer.convert_tokens_to_ids(SECOND_EOS) in eos_token_ids(None, tokenizer)


@pytest.mark.parametrize(("characters", "looked_at"), [(100, CHECKED_ROWS), (1_200_000, 4)])
def test_of_long_rows_fewer_are_looked_at(characters: int, looked_at: int) -> None:
    rows: Any = [(line, said("q", "a" * characters)) for line in range(1, 100)]
    assert first_rows(rows) == rows[:looked_at]
    read = EncodedRows("training_file", Reader(lambda row: (row, ()), length=len))
    assert len([*read.encoded(rows, CHECKED_ROWS)]) == read.given == looked_at


def test_long_rows_of_which_nothing_is_left_are_looked_at_until_one_can_be_used() -> None:
    rows: Any = [(line, said("q", "a" * 1_200_000)) for line in range(1, 100)]
    reader = Reader(lambda row: (row, ()), length=len, is_useful=lambda row: row is rows[49][1])
    read = EncodedRows("training_file", reader)
    assert [row for row, _ in read.encoded(rows, CHECKED_ROWS)] == [rows[49][1]]
    assert (read.given, read.useless) == (50, 49)
