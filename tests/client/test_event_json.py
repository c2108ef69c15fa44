"""What can be logged: JSON and what trainers have at hand; the rest is refused by key."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openweights import InvalidInputError
from openweights.client.event_json import as_number, event_data, json_text

numpy = pytest.importorskip("numpy")


class Phase(Enum):
    TRAIN = "train"


class Scalar:
    """As a torch tensor of one value behaves."""

    def __init__(self, value: object) -> None:
        self._value = value

    def item(self) -> object:
        return self._value


def test_rows_of_files_are_json_and_otherwise_what_they_were() -> None:
    plain = {"text": "nul \0 and ž", "deep": [[[1.5]]]}
    assert json.loads(json_text(plain)) == plain and "ž" in json_text(plain, ensure_ascii=False)
    broken = {"logprobs": [None, -0.5, math.nan, -math.inf], "at": numpy.int64(3)}
    told = json.loads(json_text(broken), parse_constant=pytest.fail)
    assert told == {"logprobs": [None, -0.5, "NaN", "-Infinity"], "at": 3}


def test_values_of_trainers() -> None:
    moment = datetime(2026, 1, 2, tzinfo=UTC)
    given_data: dict[Any, Any] = {
        "step": numpy.int64(3),
        "loss": numpy.float32(0.5),
        "one": numpy.array([1.5]),
        "flag": numpy.bool_(True),
        "tensor": Scalar(2),
        "path": Path("a/b"),
        "at": moment,
        "phase": Phase.TRAIN,
        "nested": {"values": (1, [None, True]), 7: {3}},
        "nan": math.nan,
        "inf": Scalar(-math.inf),
        "text": "a\0b\ud800 ž",
    }
    data = event_data(given_data)
    assert data == {
        "step": 3,
        "loss": 0.5,
        "one": 1.5,
        "flag": True,
        "tensor": 2,
        "path": "a/b",
        "at": "2026-01-02T00:00:00+00:00",
        "phase": "train",
        "nested": {"values": [1, [None, True]], "7": [3]},
        "nan": "NaN",
        "inf": "-Infinity",
        "text": "a\ufffdb? ž",
    }
    assert type(data["step"]) is int and type(data["loss"]) is float
    json.dumps(data, allow_nan=False).encode()


def test_torch_scalars() -> None:
    torch = pytest.importorskip("torch")
    loss = torch.tensor(0.25, requires_grad=True, dtype=torch.bfloat16)
    assert event_data({"loss": loss}) == {"loss": 0.25}
    with pytest.raises(
        InvalidInputError, match=r"'logits' is a torch.Tensor of more than one value"
    ):
        event_data({"logits": torch.zeros(2)})


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"a": {"b": [1, object()]}}, r"'a\.b\[1\]' is a object, which is not JSON"),
        ({"x": b"bytes"}, "'x' is a bytes, which is not JSON"),
        ({"x": 1j}, "'x' is a complex, which is not JSON"),
        ({"x": numpy.zeros(3)}, r"'x' is a numpy.ndarray of more than one value; log value.tolist"),
        ([1], "takes a dict like .*, not list"),
        ("text", "not str"),
    ],
)
def test_what_is_no_json_is_refused_by_key(data: Any, says: str) -> None:
    with pytest.raises(InvalidInputError, match=says):
        event_data(data)


def test_value_that_holds_itself() -> None:
    loop: dict[str, Any] = {}
    loop["self"] = loop
    with pytest.raises(InvalidInputError, match="holds itself"):
        event_data(loop)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
    max_leaves=10,
)


@given(st.dictionaries(st.text(), JSON, max_size=5))
@settings(max_examples=50)
def test_whatever_is_taken_is_json_and_stays_so(data: dict[str, Any]) -> None:
    once = event_data(data)
    assert json.loads(json.dumps(once, allow_nan=False)) == once == event_data(once)


def test_numbers_come_back() -> None:
    stored = event_data({"a": 1, "b": 2.5, "c": math.inf, "d": math.nan, "e": True, "f": "1"})
    numbers = {key: as_number(value) for key, value in stored.items()}
    assert numbers.pop("d") != numbers.get("d")
    assert numbers == {"a": 1, "b": 2.5, "c": math.inf, "e": None, "f": None}
