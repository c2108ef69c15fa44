"""Every bad row is named with line, field and remedy; good ones pass; memory stays small."""

from __future__ import annotations

import inspect
import json
import logging
import math
import re
import tracemalloc
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openweights import DatasetError, InvalidInputError, OpenWeights
from openweights.client.datasets import MAX_LINE_BYTES, check_dataset
from openweights.client.files import Purpose
from openweights.jobs.unsloth.config.rows import read_rows
from openweights.json_values import Rewritten, UnfitJSONError, read_json
from tests.client.malformed_datasets import (
    ANSWER,
    ASKED,
    FILES,
    GOOD,
    PAIR,
    Malformed,
    lines,
    message,
)

TEXT = "tokens of text, without the chat template's marks"
BLOCK = {"type": "text", "text": "b" * 40}
ACCEPTED: list[tuple[str, bytes]] = [
    ("crlf and blank lines", b"\r\n".join([lines(GOOD).strip(), b"", lines(GOOD).strip(), b"  "])),
    ("byte order mark", b"\xef\xbb\xbf" + lines(GOOD, GOOD)),
    ("no line end", lines(GOOD, GOOD).rstrip()),
    ("other columns", lines({**GOOD, "id": 1, "score": None, "meta": {"a": [1.5]}})),
    ("text", lines({"text": "once upon a time"}, GOOD)),
    ("many turns", lines({"messages": [message("system"), message(), ANSWER, message(), ANSWER]})),
    ("ends with the user", lines({"messages": [message(), ANSWER, message()]})),
    ("demonstration, no answer", lines({"messages": [message()], "demonstration": "hi"})),
    (
        "blocks",
        lines(
            {
                "messages": [
                    message(),
                    message(
                        "assistant",
                        [
                            {"type": "text", "text": "a", "weight": -0.5, "tag": "x"},
                            {"text": "", "weight": 0},
                        ],
                    ),
                ]
            }
        ),
    ),
    ("not ascii", '{"text": "žluťoučký 🐎 \u2028 \\ud83d\\ude00"}\n'.encode()),
]


@pytest.mark.parametrize("bad", FILES, ids=lambda bad: bad.name)
def test_malformed_dataset_is_refused_by_line_and_field(bad: Malformed, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(bad.content)
    ow = OpenWeights()
    with pytest.raises(DatasetError) as caught:
        ow.files.upload(path, bad.purpose)
    problems = str(caught.value).splitlines()
    assert len(problems) == bad.errors, problems
    assert problems[0].startswith(f"rows.jsonl:{bad.line}: {bad.field}: "), problems
    assert bad.says in problems[0]
    assert all(";" in problem for problem in problems), "each problem comes with its remedy"
    assert str(tmp_path) not in str(caught.value)
    # Nothing of it was stored.
    assert ow.files.list() == []
    assert not ow.files.validate(path, bad.purpose)


@pytest.mark.parametrize(("name", "content"), ACCEPTED, ids=[name for name, _ in ACCEPTED])
def test_good_dataset_is_taken(name: str, content: bytes) -> None:
    assert (count := check_dataset(BytesIO(content), "conversations", name).rows) >= 1
    assert len(read_rows(BytesIO(content))) == count, "as who trains reads it"
    assert check_dataset(BytesIO(lines(PAIR)), "preference", name).rows == 1
    assert check_dataset(BytesIO(lines(ASKED)), "multiple_choice", name).rows == 1


def weighted(role: str, text: str, weight: float | None = None) -> dict[str, Any]:
    return message(role, text) | {"weight": weight}


@pytest.mark.parametrize(
    ("purpose", "row", "said"),
    [
        (
            "conversations",
            {"text": "é" * 4000},
            "2,000 tokens of text; 1 text to learn, about 2,000 tokens",
        ),
        (
            "conversations",
            {"messages": [message("user", "q" * 80), message("assistant", "a" * 40)]},
            f"30 {TEXT}; 1 answer to learn, about 10 tokens",
        ),
        # An answer of weight 0 is only read, and a question that has a weight is learned.
        (
            "conversations",
            {"messages": [message("user", "q" * 80), weighted("assistant", "a" * 40, 0)]},
            f"30 {TEXT}; no answers to learn",
        ),
        (
            "conversations",
            {"messages": [weighted("user", "q" * 80, -0.5), message("assistant", "a" * 40)]},
            f"30 {TEXT}; 2 answers to learn, about 30 tokens",
        ),
        (
            "conversations",
            {"messages": [message(), message("assistant", [BLOCK, {**BLOCK, "weight": 0}])]},
            f"21 {TEXT}; 1 answer to learn, about 10 tokens",
        ),
        (
            "preference",
            {**PAIR, "chosen": [message("assistant", "c" * 40)]},
            f"11 {TEXT}; 1 pair to learn, about 10 tokens",
        ),
        ("multiple_choice", ASKED, "3 tokens of text"),
        (
            "multiple_choice",
            {"question": "?", "choices": ["a", "b"], "answer": 0},
            "1 tokens of text",
        ),
    ],
)
def test_upload_says_what_is_learned(
    purpose: Purpose, row: dict[str, Any], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    ow = OpenWeights()
    for _ in range(2):  # said once, and on what is given back, which scripts and notebooks have
        assert ow.files.upload([row], purpose).get("holds") == f"1 row, about {said}"
    assert caplog.messages == [f"rows.jsonl: 1 row, about {said}"]


def test_errors_are_counted_to_the_end() -> None:
    rows = [{"messages": [message(content=""), message("ai")]} for _ in range(30)]
    with pytest.raises(DatasetError) as caught:
        check_dataset(BytesIO(lines(*rows)), "conversations", "x.jsonl")
    problems = str(caught.value).splitlines()
    assert len(problems) == 21
    # Each row has two: the empty content, and the role.
    assert problems[19].startswith("x.jsonl:10: messages[1].role: ")
    assert problems[20] == "… and 40 more errors; 30 of 30 rows of x.jsonl cannot be used"


def test_one_fault_of_every_row_is_said_once() -> None:
    pairs = lines(*[PAIR] * 200)
    with pytest.raises(DatasetError) as caught:
        check_dataset(BytesIO(pairs), "conversations", "x.jsonl")
    (problem,) = str(caught.value).splitlines()
    assert problem.startswith("x.jsonl:1: messages: is missing")
    assert problem.endswith("(so it is with all 200 rows)")
    # As a control: where one row is right, the others are named.
    with pytest.raises(DatasetError) as caught:
        check_dataset(BytesIO(pairs + lines(GOOD)), "conversations", "x.jsonl")
    assert len(str(caught.value).splitlines()) == 21


def test_what_is_no_file_is_told_what_is_one(tmp_path: Path) -> None:
    ow, path = OpenWeights(), tmp_path / "rows.jsonl"
    path.write_bytes(lines(GOOD))
    with pytest.raises(InvalidInputError, match=r"a list of rows \(each a dict\), a datasets"):
        ow.files.upload(cast("Any", {"a": 1}), "conversations")
    with pytest.raises(DatasetError, match="^the list holds no rows; "):
        ow.files.upload([], "conversations")
    for call in (ow.files.upload, ow.files.create, ow.files.validate):
        with pytest.raises(InvalidInputError, match="^purpose: is missing; .*'preference' or"):
            call(path)


def test_line_that_is_too_long_is_skipped_in_pieces() -> None:
    long = b'{"text": "' + b"x" * MAX_LINE_BYTES + b'"}\n'
    content = lines(GOOD) + long + lines({"text": 1})
    with pytest.raises(DatasetError) as caught:
        check_dataset(BytesIO(content), "conversations", "x.jsonl")
    first, second = str(caught.value).splitlines()
    assert first == "x.jsonl:2: row: is longer than 64 MiB; split it"
    assert second.startswith("x.jsonl:3: text: is the number 1")


class _EndlessRows:
    """A stream of `count` rows that are made while they are read."""

    def __init__(self, count: int, row: bytes) -> None:
        self._left = count
        self._row = row

    def readline(self, size: int) -> bytes:
        assert len(self._row) < size
        self._left -= 1
        return self._row if self._left >= 0 else b""


def test_memory_does_not_grow_with_the_file() -> None:
    def peak(row: Any, count: int) -> int:
        stream = cast("BinaryIO", _EndlessRows(count, json.dumps(row).encode() + b"\n"))
        tracemalloc.start()
        try:
            check_dataset(stream, "conversations", "x.jsonl")
        except DatasetError:
            pass
        finally:
            _, most = tracemalloc.get_traced_memory()
            tracemalloc.stop()
        return most

    for row in (GOOD, {"messages": []}):
        peak(row, 10)
        assert peak(row, 5000) < peak(row, 100) + 50_000


# Rows of other formats, and what the lines that the message gives make of them.
TALK = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Bye"}]
HI_BYE = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Bye"}]}
BRIEF = {"role": "system", "content": "Be brief."}
SAID = {role: [{"role": role, "content": role}] for role in ("user", "assistant")}
OTHER_FORMATS: dict[str, tuple[Any, Any]] = {
    "sharegpt": ({"id": "a", "conversations": TALK}, HI_BYE),
    "sharegpt with system": (
        {"conversations": TALK, "system": "Be brief."},
        {"messages": [BRIEF, *HI_BYE["messages"]]},
    ),
    "sharegpt with tools": ({"conversation": TALK, "system": ""}, HI_BYE),
    "sharegpt of roles": (
        {"conversations": [{"from": "system", "value": "Be brief."}, *TALK]},
        {"messages": [BRIEF, *HI_BYE["messages"]]},
    ),
    "alpaca": ({"instruction": "Hi", "input": "", "output": "Bye"}, HI_BYE),
    "alpaca with input": (
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"messages": [message(content="Add.\n\n1 2"), {"role": "assistant", "content": "3"}]},
    ),
    **{
        f"{asked} and {said}": ({asked: "Hi", said: "Bye"}, HI_BYE)
        for asked, said in (
            *(("prompt", "completion"), ("instruction", "response"), ("question", "answer")),
            *(("query", "response"), ("input", "output"), ("prompt", "response")),
        )
    },
    "trl": ({"prompt": SAID["user"], "completion": SAID["assistant"]}, None),
}
OTHER_PAIRS: dict[str, tuple[Any, Any]] = {
    "texts": (
        {"prompt": "user", "chosen": "assistant", "rejected": "no"},
        {"rejected": [{"role": "assistant", "content": "no"}]},
    ),
    "implicit": (
        {"chosen": SAID["user"] + SAID["assistant"], "rejected": [*SAID["user"], ANSWER]},
        {"rejected": [ANSWER]},
    ),
}
_CASES = [("conversations", *case) for case in OTHER_FORMATS.values()]
_CASES += [("preference", *case) for case in OTHER_PAIRS.values()]


@pytest.mark.parametrize(("purpose", "row", "wanted"), _CASES)
@pytest.mark.parametrize("form", ["lines", "array", "list"])
def test_the_lines_that_a_message_gives_convert_the_rows(
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    purpose: Purpose,
    row: Any,
    wanted: Any,
    form: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    path, ow = tmp_path / "train.jsonl", OpenWeights()
    path.write_bytes(
        lines(row, row) + b"\n" if form == "lines" else json.dumps([row, row]).encode()
    )
    given: Any = [row, row] if form == "list" else path
    with pytest.raises(DatasetError) as caught:
        ow.files.upload(given, purpose)
    code, names = str(caught.value), {"ow": ow, "rows": given, "json": json}
    if form == "array":
        [call] = re.findall(r"as (ow\.files\.upload\(.*\))", code)
        with pytest.raises(DatasetError) as caught:
            exec(call, names)  # noqa: S102 - as people paste it
        names["rows"], code = [row, row], str(caught.value)
    head, _, code = code.partition("\n")
    assert re.search(r":1: row: is .*; these lines make such rows ours, and upload them:$", head)
    exec(inspect.cleandoc(code), names)  # noqa: S102
    [file] = ow.files.list(purpose)
    made = [json.loads(line) for line in ow.files.content(file["id"]).splitlines()]
    wanted = wanted or {"messages": SAID["user"] + SAID["assistant"]}
    if purpose == "preference":
        wanted = {"prompt": SAID["user"], "chosen": SAID["assistant"], **wanted}
    assert made == [wanted, wanted]


@pytest.mark.parametrize("row", [ASKED, {"question": "Is it?", "answer": "yes"}])
def test_questions_with_choices_are_no_other_format(row: dict[str, Any]) -> None:
    try:
        assert check_dataset(BytesIO(lines(row)), "multiple_choice", "q.jsonl").rows == 1
    except DatasetError as error:
        assert "choices" not in row and str(error).startswith("q.jsonl:1: choices: ")


def test_rows_that_are_no_other_format_are_told_by_line() -> None:
    for rows in (lines(GOOD, {"prompt": "a", "completion": "b"}), lines({"prompt": "a", "n": 1})):
        with pytest.raises(DatasetError, match=r":[12]: messages: is missing; write the prompt as"):
            check_dataset(BytesIO(rows), "conversations", "train.jsonl")


_parts = st.sampled_from(
    [
        *'{}[]:,"',
        '"a"',
        '"b":',
        '{"a":',
        "1",
        "-0",
        "1.10",
        "2.5",
        "1e2",
        "1e999",
        "NaN",
        "-Infinity",
    ]
)


@settings(max_examples=500)
@given(st.lists(_parts, max_size=12).map("".join))
def test_json_is_read_as_by_a_reader_that_keeps_all_digits(text: str) -> None:
    """A key that comes twice, and numbers that JSON lacks, are refused; others that would be
    written in another way know how they were.
    """
    try:
        parts = json.loads(text, object_pairs_hook=Pairs, parse_float=Digits, parse_int=Digits)
    except json.JSONDecodeError:
        with pytest.raises((json.JSONDecodeError, UnfitJSONError)):
            read_json(text)
        return
    refused = any(problem in repr(parts) for problem in ("twice", "nan", "inf"))
    try:
        value = read_json(text)
    except UnfitJSONError:
        assert refused
    else:
        assert not refused and same(value, parts)


class Digits(str):
    """A number as it is written; one that no float holds says so."""

    def __repr__(self) -> str:
        return "inf" if math.isinf(float(self)) else str(self)


class Pairs(dict[str, Any]):
    """An object that says whether a key came twice."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self["…"] = "twice" if len(self) < len(pairs) else "once"


def same(value: Any, parts: Any) -> bool:
    if isinstance(parts, Digits):
        written = value.written if isinstance(value, Rewritten) else repr(value)
        return written == str(parts) and value == float(parts)
    if isinstance(parts, dict):
        own = {key: part for key, part in parts.items() if key != "…"}
        return value.keys() == own.keys() and all(same(value[key], own[key]) for key in own)
    if isinstance(parts, list):
        return len(value) == len(parts) and all(map(same, value, parts))
    return bool(value == parts)
