"""Every loss, and every other job that reads rows, against every kind of rows: what it cannot use
is refused with what the file holds, what is read, and which loss would learn from it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from openweights import OpenWeights
from openweights.client.datasets import HOLD
from openweights.errors import ConfigError, DatasetError
from openweights.jobs.unsloth.config.fields import FILE_PURPOSES
from openweights.settings import Settings
from tests.jobs.unsloth.malformed_configs import GOOD

ASKED, SAID = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
PAIR = {"prompt": [ASKED], "chosen": [SAID], "rejected": [{**SAID, "content": "c"}]}
# Kind of rows: one, and the purpose that it has.
ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "conversations": ({"messages": [ASKED, SAID]}, "conversations"),
    "demonstrations": ({"messages": [ASKED], "demonstration": "b"}, "conversations"),
    "texts": ({"text": "a"}, "conversations"),
    "alpaca": ({"instruction": "a", "output": "b"}, "conversations"),
    "pairs": (PAIR, "preference"),
    "pairs of texts": ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference"),
    "questions": ({"question": "a", "choices": ["b", "c"], "answer": 0}, "multiple_choice"),
}
OTHERS = {"conversations": ("sft", "sdft", "grpo"), "preference": ("dpo", "orpo")}


@pytest.fixture
def ow(home: Path) -> OpenWeights:
    return OpenWeights(settings=Settings(home=home))


def stored_as(tmp_path: Path, row: dict[str, Any]) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("\ufeff\n" + f"{json.dumps(row)}\n" * 16)
    return str(path)


@pytest.mark.parametrize("field", ["training_file", "test_file"])
@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("loss", FILE_PURPOSES)
def test_rows_of_another_loss_are_told_from_wrong_ones(
    ow: OpenWeights, tmp_path: Path, loss: str, kind: str, field: str
) -> None:
    row, held = ROWS[kind]
    good = next(row for row, purpose in ROWS.values() if purpose == FILE_PURPOSES[loss])
    kept = ow.files.create([good] * 16, FILE_PURPOSES[loss])["id"]
    params = {**GOOD, "loss": loss, "training_file": kept, field: stored_as(tmp_path, row)}
    if held == FILE_PURPOSES[loss]:
        try:
            ow.fine_tuning.validate(params)
        except DatasetError as error:  # with how they are made ours
            assert kind in ("alpaca", "pairs of texts") and "make such rows ours" in str(error)
        return
    with pytest.raises(ConfigError) as refused:
        ow.fine_tuning.validate(params)
    said = str(refused.value)
    assert said.startswith(f"{field}: 'rows.jsonl' holds {HOLD[held]}, but loss={loss!r} learns ")
    assert all(repr(name) in said for name in OTHERS.get(held, ())) and "upload" not in said


@pytest.mark.parametrize("loss", FILE_PURPOSES)
def test_a_stored_file_of_another_loss_is_told_so(ow: OpenWeights, loss: str) -> None:
    for held, names in OTHERS.items():
        if held == FILE_PURPOSES[loss]:
            continue
        with pytest.raises(ConfigError) as refused:
            ow.fine_tuning.validate({**GOOD, "loss": loss, "training_file": f"{held}:file-1"})
        said = str(refused.value)
        assert said.startswith(f"training_file: has the purpose {held!r}, but loss={loss!r} learns")
        assert all(repr(name) in said for name in names)


@pytest.mark.parametrize("loss", ["sdft", "grpo"])
def test_plain_text_is_no_conversation_to_answer(ow: OpenWeights, loss: str) -> None:
    file = ow.files.create([{"text": "a"}] * 16, "conversations")["id"]
    config = ow.fine_tuning.validate({**GOOD, "loss": loss, "training_file": file})
    with pytest.raises(DatasetError, match=rf"text: is plain text, but loss='{loss}' .* 'sft'|$"):
        ow.fine_tuning.check(config)


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize(
    ("name", "field", "purpose"),
    [
        ("inference", "input_file_id", "conversations"),
        ("logprob", "dataset", "conversations"),
        ("multiple_choice", "dataset", "multiple_choice"),
        ("evaluate", "prompts", "conversations"),
        ("weighted_sft", "training_file", "conversations"),
    ],
)
def test_other_jobs_say_what_a_file_holds(
    ow: OpenWeights, tmp_path: Path, name: str, field: str, purpose: str, kind: str
) -> None:
    row, held = ROWS[kind]
    if held == purpose:
        return
    asked = {"models": "org/name", "suite": "rouge_l"} if name == "evaluate" else {"model": "o/n"}
    with pytest.raises(ConfigError) as refused:
        getattr(ow, name).validate({**asked, field: stored_as(tmp_path, row)})
    assert str(refused.value).startswith(f"{field}: 'rows.jsonl' holds {HOLD[held]}")
    assert f"give a file of {HOLD[purpose].partition(' (')[0]}" in str(refused.value)


@pytest.mark.parametrize("name", ["fine_tuning", "inference"])
def test_a_folder_is_no_file(ow: OpenWeights, tmp_path: Path, name: str) -> None:
    params = {"model": "org/name", "input_file_id": str(tmp_path)}
    if name == "fine_tuning":
        params = {**GOOD, "training_file": str(tmp_path)}
    with pytest.raises(ConfigError, match=" is a folder; give the file in it that holds conv"):
        getattr(ow, name).validate(params)


@pytest.mark.parametrize("loss", FILE_PURPOSES)
def test_rows_of_the_training_file_in_the_test_file_are_told(
    ow: OpenWeights, caplog: pytest.LogCaptureFixture, loss: str
) -> None:
    def stored(numbers: Iterable[int]) -> str:
        talk = [[ASKED, {**SAID, "content": str(number)}] for number in numbers]
        rows: list[dict[str, Any]] = [{"messages": both} for both in talk]
        if FILE_PURPOSES[loss] == "preference":
            rows = [{**PAIR, "rejected": both[1:]} for both in talk]
        # What nothing learns makes no other row of it.
        return ow.files.create(
            [{**row, "id": at + len(rows)} for at, row in enumerate(rows)], FILE_PURPOSES[loss]
        )["id"]

    def told(test: str) -> str:
        caplog.clear()
        asked = {**GOOD, "loss": loss, "training_file": training, "test_file": test}
        ow.fine_tuning.check(ow.fine_tuning.validate(asked))
        return " ".join(r.getMessage() for r in caplog.records if "test_file" in r.getMessage())

    training = stored(range(16))
    assert told(training).startswith("test_file: all 16 rows stand in training_file, too")
    assert told(stored(range(14, 22))).startswith("test_file: 2 of 8 rows (25.0%) stand in")
    assert told(stored(range(16, 22))) == ""
