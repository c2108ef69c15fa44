"""Measures and comparisons as DataFrames, printed so that a terminal shows what matters. pandas is
optional: only this imports it, and nothing imports this before a table is wanted.
"""

# pandas has no annotations of its own.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportMissingTypeStubs=false, reportUntypedBaseClass=false

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import partial
from shutil import get_terminal_size
from typing import Any

import pandas

from openweights.number_words import number_words

_ROWS = {"max_rows": 60, "min_rows": 20}  # so many at most; of more only as many as this
_NOTEBOOK_COLUMNS = 20
# As `ow compare` has them: 4 and not 4.0, where another job has no such parameter.
_CELLS: dict[str, Any] = {"na_rep": "", "float_format": partial(number_words, digits=5)}


class Metrics(pandas.DataFrame):
    """What was measured: its columns come by what they tell, and printing leaves out the last of
    them, where pandas cuts out the middle. So do its parts, as `table[table.tag == "eval"]`.
    """

    @property
    def _constructor(self) -> type[Metrics]:
        return Metrics

    def __repr__(self) -> str:
        width, every = get_terminal_size().columns, range(len(self.columns) + 1)
        shown = max(bisect_right(every, width, key=self._width) - 1, min(2, len(self.columns)))
        return self._text(shown) + _left_out(self.columns[shown:], len(self.columns))

    def _repr_html_(self) -> str:
        shown = self.iloc[:, :_NOTEBOOK_COLUMNS]
        html = shown.to_html(na_rep="", max_rows=_ROWS["max_rows"])
        return html + _left_out(self.columns[_NOTEBOOK_COLUMNS:], len(self.columns))

    def _width(self, columns: int) -> int:
        """Of what is printed with so many columns."""
        return max(map(len, self._text(columns).splitlines()))

    def _text(self, columns: int) -> str:
        return self.iloc[:, :columns].to_string(na_rep="", **_ROWS)


class Comparison(pandas.DataFrame):
    """What differs between jobs, and where they ended: a row for each job, printed as a column for
    each, as `ow compare` does. What is cut out of it is a plain DataFrame.
    """

    _metadata = ["shown"]  # noqa: RUF012 - what pandas carries along into copies and pickles
    shown: int

    def __repr__(self) -> str:
        width = get_terminal_size().columns
        text = self.iloc[:, : self.shown].T.to_string(line_width=width, **_CELLS)
        return text + _left_out(self.columns[self.shown :], len(self.columns))

    def _repr_html_(self) -> str:
        html = self.iloc[:, : self.shown].T.to_html(**_CELLS)
        return html + _left_out(self.columns[self.shown :], len(self.columns))


def metrics_table(rows: Sequence[dict[str, Any]], columns: list[str]) -> Metrics:
    """A row for each of these."""
    return Metrics(rows, columns=columns)


def comparison_table(rows: Sequence[dict[str, Any]], columns: list[str], shown: int) -> Comparison:
    """A row for each job, by its id.

    Args:
        shown: So many of the columns are printed.
    """
    ids = pandas.Index([row["id"] for row in rows], name="id", dtype=object)
    table = Comparison(rows, index=ids, columns=columns)
    table.shown = shown
    return table


def _left_out(names: pandas.Index, of: int) -> str:
    """A line that says what is not printed."""
    if not len(names):
        return ""
    first = ", ".join(map(str, names[:3]))
    return f"\n{len(names)} of {of} columns are not shown: {first}, … (`.columns` names them)"
