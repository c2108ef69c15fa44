"""Free-form parameters come back from the store as they were given, or are refused by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import BaseModel

from openweights import Jobs, OpenWeights
from openweights.client.params import plain
from openweights.errors import ConfigError
from tests.client.conftest import QuietClient, every_store  # noqa: F401 - fixtures

FILE = '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}\n'
NAN = float("nan")


class Free(BaseModel):
    notes: dict[str, Any] = {}
    limit: float = 1.0


class Anything(Jobs):
    """A kind whose parameters are free."""

    params = Free
    requires_vram_gb = None

    def get_entrypoint(self, validated_params: BaseModel) -> str:
        return "true"


@pytest.fixture
def metas(ow: QuietClient, tmp_path: Any) -> dict[str, Callable[[Any], Any]]:
    """What submits a value, and gives it back from the store."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(FILE * 8)

    def trained(value: Any) -> Any:
        job = ow.fine_tuning.create(
            model="org/name-135M", training_file=str(rows), loss="sft", meta={"k": value}
        )
        return ow.jobs.retrieve(job.id).params["validated_params"]["meta"]["k"]

    def own(value: Any) -> Any:
        job = Anything(ow).create(notes={"k": value})
        return ow.jobs.retrieve(job.id).params["validated_params"]["notes"]["k"]

    return {"meta": trained, "notes": own}


STRANGE: list[tuple[Any, str, str]] = [
    (NAN, "k", "must be a finite number, not nan"),
    (math.inf, "k", "must be a finite number, not inf"),
    (-math.inf, "k", "must be a finite number, not -inf"),
    ({"a": [1, {"b": NAN}]}, "k.a[1].b", "must be a finite number"),
    ("a\0b", "k", "holds NUL"),
    (["\ud800"], "k[0]", "half a surrogate pair"),
    ({"a\0": 1}, "k", "holds NUL"),
    ({NAN: 1}, "k", "must be a finite number"),
    (10**5000, "k", "more than 4,000 digits"),
]
EXACT: list[Any] = [
    *(0.1, 1e20, 5e-324, 2**70, 10**400, True, None, "ü ❤ 🙂", "NaN", ""),
    {"a": [1, {"b": [None, False]}], "": 0},
]


@pytest.mark.parametrize("field", ["meta", "notes"])
@pytest.mark.parametrize(("value", "place", "problem"), STRANGE, ids=range(len(STRANGE)))
def test_what_no_store_holds_is_refused_by_its_place(
    field: str, value: Any, place: str, problem: str, metas: dict[str, Callable[[Any], Any]]
) -> None:
    with pytest.raises(ConfigError) as refused:
        metas[field](value)
    assert str(refused.value).startswith(f"{field}.{place}: ")
    assert problem in str(refused.value)


@pytest.mark.parametrize("field", ["meta", "notes"])
def test_all_else_comes_back_as_it_was_given(
    field: str, metas: dict[str, Callable[[Any], Any]]
) -> None:
    for value in EXACT:
        found = metas[field](value)
        assert found == value and isinstance(found, bool) == isinstance(value, bool)


def test_a_number_of_its_own_and_a_search_are_exact_too(ow: QuietClient) -> None:
    with pytest.raises(ConfigError, match=r"^limit: must be a finite number, not inf"):
        Anything(ow).create(limit=math.inf)
    with pytest.raises(ConfigError, match=r"^meta\.k: must be a finite number, not nan"):
        OpenWeights().jobs.find(meta={"k": NAN})
    numpy = pytest.importorskip("numpy")
    with pytest.raises(ConfigError, match=r"^a\[0\]: must be a finite number"):
        plain([numpy.float64("nan")], "a")
    assert plain({"a": numpy.float32(0.5)}, "p") == {"a": 0.5}
