"""Each kind of event is defined once, is read as it was written, and is spelled nowhere else."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import openweights
from openweights import events
from openweights.events import Checkpoint, LogProbs, Started, TypedEvent

PACKAGE = Path(openweights.__file__).parent
KINDS = [
    kind
    for kind in vars(events).values()
    if isinstance(kind, type) and issubclass(kind, TypedEvent) and kind is not TypedEvent
]
TYPES = {kind.type for kind in KINDS}


def test_kinds_have_types_of_their_own() -> None:
    assert len(TYPES) == len(KINDS) > 10
    for kind in KINDS:
        assert f"`{kind.__name__}`" in str(events.__doc__), "the table says who writes and reads it"


def test_an_event_is_read_as_it_was_written() -> None:
    started = Started(max_steps=9, from_step=0)
    assert started.data() == {"type": "started", "max_steps": 9, "from_step": 0}
    assert Started.of({**started.data(), "added": "later"}) == started
    saved = Checkpoint(step=4, file="checkpoint:file-1")
    assert saved.data() == {"type": "checkpoint", "step": 4, "file": "checkpoint:file-1"}
    assert Checkpoint.of(saved.data()) == saved
    followed = LogProbs(step=1, tag="poems", values={"poems": 2.5})
    assert followed.data() == {"type": "logprobs", "step": 1, "tag": "poems", "poems": 2.5}
    assert LogProbs.of(followed.data()) == followed


def spelled(source: str) -> Iterator[int]:
    """Lines where a type of event is given to "type", or compared with it."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Dict():
                pairs = list(zip(node.keys, node.values, strict=True))
            case ast.Assign(targets=[ast.Subscript(slice=key)]):
                pairs = [(key, node.value)]
            case ast.keyword(arg="type"):
                pairs = [(ast.Constant("type"), node.value)]
            case ast.Compare():
                sides = [node.left, *node.comparators]
                keys = [one for side in sides for one in ast.walk(side)]
                pairs = [(key, value) for key in keys for value in keys]
            case _:
                continue
        if any(_is(key, {"type"}) and _is(value, TYPES) for key, value in pairs):
            yield node.lineno


def _is(node: ast.AST | None, texts: set[str]) -> bool:
    return isinstance(node, ast.Constant) and node.value in texts


@pytest.mark.parametrize(
    "line",
    [
        'log({"type": "checkpoint", "step": 1})',
        'found = [e for e in events if e.data.get("type") == "checkpoint"]',
        'found = e.data["type"] in ("push", "started")',
        'entry["type"] = "summary"',
        'events = backend.list_events(job_id=job, type="checkpoint")',
    ],
)
def test_a_type_that_is_spelled_is_found(line: str) -> None:
    assert list(spelled(line)) == [1]


def test_no_other_module_spells_a_type() -> None:
    wrong = [
        f"{path.relative_to(PACKAGE)}:{line}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path != Path(str(events.__file__))
        for line in spelled(path.read_text(encoding="utf-8"))
    ]
    assert wrong == []
