"""`ow fields` says of each field what the docstrings say, and fails where they say nothing."""

from __future__ import annotations

import json

import pytest
from pydantic import BaseModel

from openweights.cli.jobs.fields import meanings
from tests.cli.conftest import Ow


def test_one_field(ow: Ow) -> None:
    assert ow("fields", "beta").stdout.splitlines() == [
        "beta  (dpo, orpo, grpo)",
        "  How strongly the model is held near what it was; grpo alone takes 0, which needs no "
        "reference model.",
        "  default: 0.1",
    ]
    assert (
        "  one of 'sft', 'sdft', 'dpo', 'orpo', 'grpo'\n  must be given"
        in ow("fields", "loss").stdout
    )
    answer = ow("fields", "lr")
    assert answer.exit_code == 1
    assert answer.stderr == "ow: there is no field lr; did you mean learning_rate?\n"
    unlike = ow("fields", "zzzzzzzz")
    assert unlike.stderr == "ow: there is no field zzzzzzzz; `ow fields` lists them\n"


def test_all_fields(ow: Ow) -> None:
    header, *rows = ow("fields").stdout.splitlines()
    assert header.split() == ["FIELD", "DEFAULT", "LOSSES", "MEANING"]
    assert any(row.startswith("sdft_gate_rows ") for row in rows)
    found = json.loads(ow("fields", "--json").stdout)
    assert found["Self-distillation"][0]["losses"] == ["sdft"]


def test_the_fields_of_a_loss(ow: Ow) -> None:
    _, *rows = ow("fields", "sdft").stdout.splitlines()
    names = {row.split()[0] for row in rows}
    assert "sdft_divergence" in names and not {"model", "train_on", "beta"} & names


def test_a_field_that_nobody_explains_is_found() -> None:
    class Params(BaseModel):
        """Parameters.

        Attributes:
            one, two: What they
                share.
        """

        one: int
        two: int

    class More(Params):
        three: int

    assert meanings(Params) == {"one": "What they share.", "two": "What they share."}
    with pytest.raises(KeyError, match="More says nothing of three"):
        meanings(More)
