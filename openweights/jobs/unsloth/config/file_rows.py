"""The rows of a file that may be large: held as text, they take a tenth of the memory.
No torch here.
"""

from __future__ import annotations

from abc import abstractmethod
from array import array
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar, overload

from openweights.jobs.unsloth.config.rows import FileRow, file_row

T = TypeVar("T")


class MadeSequence(Sequence[T]):
    """A sequence that holds no items: each is made whenever it is asked for."""

    @abstractmethod
    def made(self, at: int) -> T:
        """The item of an index that is not negative.

        Raises:
            IndexError: There is none.
        """

    @overload
    def __getitem__(self, at: int) -> T: ...
    @overload
    def __getitem__(self, at: slice) -> list[T]: ...
    def __getitem__(self, at: int | slice) -> T | list[T]:
        places = range(len(self))[at]
        return [*map(self.made, places)] if isinstance(places, range) else self.made(places)


class FileRows(MadeSequence[FileRow]):
    """Rows of a JSONL file, each parsed whenever it is asked for. What becomes of the file from
    then on is no matter.

    Args:
        content: The file's.
        starts: Where the line of each row begins.
        numbers: Of their lines.
    """

    def __init__(self, content: bytes, starts: array[int], numbers: array[int]) -> None:
        self._content = content
        self._starts = starts
        self._numbers = numbers

    def stream(self) -> BytesIO:
        """The whole file."""
        return BytesIO(self._content)

    def taken(self, places: Iterable[int]) -> FileRows:
        """The rows of these indices."""
        columns = (self._starts, self._numbers)
        places = array("q", places)
        starts, numbers = (array("q", map(column.__getitem__, places)) for column in columns)
        return FileRows(self._content, starts, numbers)

    def __len__(self) -> int:
        return len(self._starts)

    def made(self, at: int) -> FileRow:
        """A row.

        Raises:
            DatasetError: Its line is no JSON object.
        """
        start = self._starts[at]
        behind = self._content.find(b"\n", start) + 1 or len(self._content)
        return file_row(self._content[start:behind], self._numbers[at])


def open_rows(path: Path) -> FileRows:
    """The rows of a JSONL file."""
    content = path.read_bytes()
    starts, numbers, start = array("q"), array("q"), 0
    for number, line in enumerate(BytesIO(content), start=1):
        if line.strip():
            starts.append(start)
            numbers.append(number)
        start += len(line)
    return FileRows(content, starts, numbers)


def rows_taken(rows: Sequence[dict[str, Any]], places: Iterable[int]) -> Sequence[dict[str, Any]]:
    """The rows of these indices."""
    return rows.taken(places) if isinstance(rows, FileRows) else [rows[at] for at in places]
