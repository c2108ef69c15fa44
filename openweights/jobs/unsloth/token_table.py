"""Rows of tokens as a trainer takes them, in flat arrays: 4 bytes a number, where a list has 8 and
each number its object. Of a large dataset nothing else is held.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from heapq import nlargest
from typing import Any
from uuid import uuid4

import pyarrow as pa
from datasets import Dataset

from openweights.jobs.unsloth.config.file_rows import MadeSequence

Example = dict[str, list[Any]]  # the columns of one row, a value for each token

_ARROW: Mapping[str, Callable[[], pa.DataType]] = {"i": pa.int32, "d": pa.float64}


class TokenTable(MadeSequence[Example]):
    """Rows that have in each column a number for each token.

    Args:
        columns: Of whole numbers.
    """

    def __init__(self, *columns: str) -> None:
        self._values: dict[str, array[Any]] = {name: array("i") for name in columns}
        # Where each row begins in its column, and behind the last the end.
        self._borders = {name: array("q", [0]) for name in columns}

    @property
    def columns(self) -> list[str]:
        """Their names."""
        return list(self._values)

    def append(self, row: Mapping[str, Sequence[float]]) -> None:
        """A further row, of which the table's own columns are taken."""
        for name, values in self._values.items():
            values.extend(row[name])
            self._borders[name].append(len(values))

    def add_reals(self, name: str, like: str, value: Callable[[int], float]) -> None:
        """A further column, whose numbers are made of those in the column `like`."""
        self._values[name] = array("d", map(value, self._values[like]))
        self._borders[name] = array("q", self._borders[like])

    def size(self, column: str) -> int:
        """How many numbers all rows have in it."""
        return len(self._values[column])

    def count(self, column: str, value: float) -> int:
        """How many of these are equal to one."""
        return self._values[column].count(value)

    def rows_of(self, column: str) -> Iterator[list[Any]]:
        """What each row has in it, one after the other."""
        return (self._row(column, at) for at in range(len(self)))

    def longest(self, count: int, column: str = "input_ids") -> list[Example]:
        """The longest rows of a column, the first of equal ones, as `input_ids`."""
        borders = self._borders[column]
        found = nlargest(count, range(len(self)), key=lambda at: borders[at + 1] - borders[at])
        return [{"input_ids": self._row(column, at)} for at in found]

    def dataset(self, *columns: str) -> Dataset:
        """These columns without a copy; nothing can be added to them from then on."""
        table = pa.table({name: self._arrow(name) for name in columns})
        # The library would make a fingerprint of a copy of all numbers.
        return Dataset(table, fingerprint=uuid4().hex)

    def _arrow(self, name: str) -> pa.LargeListArray:
        values, borders = self._values[name], self._borders[name]
        kind = _ARROW[values.typecode]()
        return pa.LargeListArray.from_arrays(
            pa.Array.from_buffers(pa.int64(), len(borders), [None, pa.py_buffer(borders)]),
            pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(values)]),
        )

    def _row(self, name: str, at: int) -> list[Any]:
        borders = self._borders[name]
        return self._values[name][borders[at] : borders[at + 1]].tolist()

    def __len__(self) -> int:
        return min(len(borders) for borders in self._borders.values()) - 1

    def made(self, at: int) -> Example:
        """A row."""
        return {name: self._row(name, at) for name in self._values}
