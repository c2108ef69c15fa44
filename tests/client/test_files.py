"""Files: content-addressed, streamed, without the uploader's path."""

from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import pytest

from openweights import InvalidInputError, NotFoundError
from openweights.errors import DatasetError
from tests.client.conftest import QuietClient, every_store  # noqa: F401 - a fixture
from tests.client.malformed_datasets import GOOD, lines


def test_upload_and_read_back(ow: QuietClient, home: Path, tmp_path: Path) -> None:
    path = tmp_path / "private" / "train.jsonl"
    path.parent.mkdir()
    path.write_bytes(lines(GOOD))
    file = ow.files.upload(str(path), purpose="conversations")
    assert file["id"].startswith("conversations:file-")
    assert len(file["id"]) == len("conversations:file-") + 12
    assert (file["object"], file["purpose"]) == ("file", "conversations")
    assert (file["filename"], file["bytes"]) == ("train.jsonl", len(lines(GOOD)))
    # What it holds is said by the upload, and kept nowhere.
    assert file.pop("holds", "").startswith("1 row, about ")
    assert ow.files.retrieve(file["id"]) == ow.files.get_by_id(file["id"]) == file
    assert ow.files.content(file["id"]) == lines(GOOD)
    # Equal content is the same file, whatever its name.
    again = ow.files.create(lines(GOOD), "conversations")
    assert {**again, "holds": None} == {**file, "holds": None}
    assert ow.files.list() == ow.files.list(purpose="conversations") == [file]
    assert ow.files.list(purpose="result") == []
    # Of where it came from, nothing is kept.
    for stored in home.rglob("*"):
        assert not stored.is_file() or b"private" not in stored.read_bytes()
    target = ow.files.download(file["id"], tmp_path / "new" / "copy.jsonl")
    assert target.read_bytes() == lines(GOOD)
    assert [entry.name for entry in target.parent.iterdir()] == ["copy.jsonl"]
    ow.files.delete(file["id"])
    ow.files.delete(file["id"])
    assert ow.files.list() == []
    with pytest.raises(NotFoundError):
        ow.files.content(file["id"])
    with pytest.raises(NotFoundError):
        ow.files.download(file["id"], tmp_path / "gone")
    assert not (tmp_path / "gone").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"weight": float("nan")}, "messages[1].weight: is NaN"),
        ({"weight": float("inf")}, "messages[1].weight: is NaN or Infinity"),
        ({"reasoning_content": float("nan")}, "messages[1].reasoning_content: is NaN"),
        ({"content": "a\ud800b"}, "messages[1].content: has half a surrogate pair"),
    ],
)
def test_rows_are_stored_as_they_are_or_refused(
    ow: QuietClient, changes: dict[str, Any], says: str
) -> None:
    """As the same rows in a file are: nothing is replaced on the way."""
    [asked, answer] = GOOD["messages"]
    with pytest.raises(DatasetError, match=re.escape(f"rows.jsonl:1: {says}")):
        ow.files.upload([{"messages": [asked, {**answer, **changes}]}], "conversations")
    row = {"messages": [asked, {**answer, "content": "a\0b ü 🙂"}]}
    stored = ow.files.upload([MappingProxyType(row)], "conversations")["id"]
    assert json.loads(ow.files.content(stored)) == row


def test_create_takes_what_can_be_read(ow: QuietClient, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines(GOOD))
    expected = ow.files.upload(path, "conversations")["id"]
    with path.open("rb") as file:
        assert ow.files.create(file, "conversations")["id"] == expected
    assert ow.files.create(io.BytesIO(lines(GOOD)), "conversations")["id"] == expected
    # A pipe cannot be read twice.
    reading, writing = os.pipe()
    os.write(writing, lines(GOOD))
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        assert ow.files.create(pipe, "conversations")["id"] == expected
    # From where the stream stands.
    stream = io.BytesIO(b"not json\n" + lines(GOOD))
    stream.readline()
    assert ow.files.validate(stream, "conversations")
    assert ow.files.create(stream, "conversations")["id"] == expected
    assert ow.files.create(b"anything", "result")["bytes"] == 8


@pytest.mark.parametrize("purpose", ["", "a b", "../x", "a:b", None, "x" * 65])
def test_wrong_purpose(ow: QuietClient, purpose: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"^purpose: "):
        ow.files.create(b"", purpose)


def test_wrong_file(ow: QuietClient, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"there is no file 'missing.jsonl' \(looked at /"):
        ow.files.upload("missing.jsonl", "conversations")
    with pytest.raises(InvalidInputError, match="is a folder"):
        ow.files.upload(tmp_path, "result")
    with pytest.raises(InvalidInputError, match="open it with mode 'rb'"):
        ow.files.create(cast("Any", io.StringIO("text")), "result")
    with pytest.raises(InvalidInputError, match="a int is no file"):
        ow.files.create(cast("Any", 3), "result")


def test_pipe_at_a_path_is_refused_at_once(ow: QuietClient, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(InvalidInputError, match="is a pipe or a device, not a file"):
            ow.files.upload(path, "conversations")


def test_download_where_nothing_can_be_written(ow: QuietClient, tmp_path: Path) -> None:
    file = ow.files.create(b"x", "result")["id"]
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "below", tmp_path / "file" / "a" / "b", tmp_path):
        with pytest.raises(InvalidInputError, match=f"cannot write {path}: "):
            ow.files.download(file, path)
    assert ow.files.download(file, tmp_path / ("x" * 255)).read_bytes() == b"x"


@pytest.mark.parametrize("file", ["log:run-9999", "log:run-abc", "log:run-", "log:run-" + "9" * 30])
def test_a_log_that_is_not_there_leaves_what_is(ow: QuietClient, tmp_path: Path, file: str) -> None:
    existing = tmp_path / "existing"
    existing.write_text("mine")
    with pytest.raises(NotFoundError):
        ow.files.download(file, existing)
    with pytest.raises(NotFoundError):
        ow.files.content(file)
    assert existing.read_text() == "mine"
    assert [entry.name for entry in tmp_path.iterdir() if entry.is_file()] == ["existing"]


@pytest.mark.parametrize("purpose", ["custom_job_file", "conversations"])
def test_validating_a_file_that_is_not_there(ow: QuietClient, purpose: str) -> None:
    with pytest.raises(InvalidInputError, match="there is no file '/no/file'"):
        ow.files.validate("/no/file", purpose)


def test_all_files_are_listed_without_a_limit(ow: QuietClient) -> None:
    for number in range(101):
        ow.files.create(str(number).encode(), "result")
    assert len(ow.files.list()) == 100
    assert len(ow.files.list(limit=None)) == 101


def test_large_files_are_streamed(ow: QuietClient) -> None:
    import tracemalloc

    class Zeros(io.RawIOBase):
        """48 MiB that are never in memory."""

        left = 48 << 20

        def readable(self) -> bool:
            return True

        def read(self, size: int = -1, /) -> bytes:
            count = self.left if size < 0 else min(size, self.left)
            self.left -= count
            return bytes(count)

    tracemalloc.start()
    file = ow.files.create(cast("Any", Zeros()), "result")
    with ow.backend.open_file(file["id"]) as content:
        size = sum(len(chunk) for chunk in iter(lambda: content.read(1 << 20), b""))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert file["bytes"] == size == 48 << 20
    assert peak < 24 << 20
