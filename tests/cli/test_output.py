"""Tables, JSON and the error boundary."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime, timedelta
from pathlib import Path

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openweights.cli import output
from openweights.errors import ConfigError, NotFoundError
from openweights.types import EventRecord

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-5, "0s"), (59.9, "59s"), (60, "1m"), (3_599, "59m"), (7_200, "2h"), (200_000, "2d")],
)
def test_age(seconds: float, text: str) -> None:
    assert output.age(NOW - timedelta(seconds=seconds), NOW) == text


def test_json_is_strict_whatever_was_logged(capsys: pytest.CaptureFixture[str]) -> None:
    record = EventRecord(1, 2, {"loss": math.nan, "x": [math.inf, 1.5], "s": "é", "n": None}, NOW)
    output.print_json([record])
    printed = capsys.readouterr().out

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    (value,) = json.loads(printed, parse_constant=refuse)
    assert value["created_at"] == "2026-01-02T03:04:05+00:00"
    assert value["data"] == {"loss": None, "x": [None, 1.5], "s": "é", "n": None}
    assert list(value) == ["id", "run_id", "data", "created_at"]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_json_array_is_an_array_however_long(
    capsys: pytest.CaptureFixture[str], count: int
) -> None:
    output.print_json_array(iter(range(count)))
    assert json.loads(capsys.readouterr().out) == list(range(count))


def test_piped_tables_are_not_cut_and_cells_are_no_markup(
    capsys: pytest.CaptureFixture[str],
) -> None:
    long = "x" * 500
    output.print_table(("id", "note"), [("job-1", "[bold]\x1b[31mred\n"), ("job-22", long)])
    header, first, second = capsys.readouterr().out.splitlines()
    assert header.split() == ["ID", "NOTE"]
    assert first.rstrip() == "job-1   [bold] [31mred"
    assert second.split() == ["job-22", long]


def test_terminal_tables_keep_ids_whole(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"FORCE_COLOR": "1", "COLUMNS": "40", "TERM": "xterm"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    output.print_table(("id", "note"), [("ftjob-0123456789ab", "n" * 100)])
    line = click.unstyle(capsys.readouterr().out).splitlines()[1]
    assert line == "ftjob-0123456789ab  " + "n" * 19 + "…"

    monkeypatch.setenv("COLUMNS", "10")  # too narrow for anything: the id stays whole all the same
    output.print_table(("id", "age", "note"), [("ftjob-0123456789ab", "2m", "n" * 100)])
    lines = [line.rstrip() for line in click.unstyle(capsys.readouterr().out).splitlines()]
    assert lines == ["ID                  AGE  NOTE", "ftjob-0123456789ab  2m   nnnnn…"]


def test_a_long_id_leaves_the_other_rows_their_room(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"FORCE_COLOR": "1", "COLUMNS": "60", "TERM": "xterm"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    long = "ftjob-0123456789ab-seed-0-of-the-sweep"
    rows = [("ftjob-0123456789ab", "completed", "n" * 100), (long, "failed", "m" * 3)]

    def printed() -> list[str]:
        output.print_table(("id", "status", "note"), rows)
        return [line.rstrip() for line in click.unstyle(capsys.readouterr().out).splitlines()][1:]

    assert printed() == [
        "ftjob-0123456789ab  completed  " + "n" * 28 + "…",
        long,
        " " * 20 + "failed     mmm",
    ]
    rows = [("ftjob-0123456789ab", "completed", "n"), (long, "failed", "mmm")]
    assert len(printed()) == 2, "the control: there is room for all"


@given(st.lists(st.integers(0, 60), min_size=1, max_size=8), st.integers(0, 200))
def test_columns_fit_and_the_first_is_whole(natural: list[int], room: int) -> None:
    widths = output.fit(natural, room)
    assert widths[0] == natural[0]
    assert all(width <= before for width, before in zip(widths, natural, strict=True))
    if sum(widths) + 2 * (len(widths) - 1) > room:
        assert all(width <= 6 for width in widths[1:])


INTERRUPTED_WITH_A_HINT = KeyboardInterrupt()
INTERRUPTED_WITH_A_HINT.add_note("the job goes on")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (NotFoundError("no job x"), 1, "ow: no job x\n"),
        (ConfigError("r: must be above 0\nloss: \x1b[2Junknown"), 1, "\n    loss:  [2Junknown\n"),
        (NotFoundError(), 1, "ow: NotFoundError\n"),
        (PermissionError(13, "Permission denied", "/a/b"), 1, "ow: /a/b: Permission denied\n"),
        (KeyboardInterrupt(), 130, ""),
        (INTERRUPTED_WITH_A_HINT, 130, "ow: the job goes on\n"),
    ],
)
def test_boundary_says_one_thing(
    capsys: pytest.CaptureFixture[str], error: BaseException, code: int, said: str
) -> None:
    with pytest.raises(SystemExit) as exit_, output.error_boundary():
        raise error
    assert exit_.value.code == code
    assert said in capsys.readouterr().err


def test_a_fault_of_ours_leaves_its_traceback_in_a_file(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_, output.error_boundary():
        raise ZeroDivisionError("one\ntwo")
    said = capsys.readouterr().err
    assert exit_.value.code == 1
    assert said.startswith("ow: ZeroDivisionError: one two (traceback in ")
    assert said.count("\n") == 1
    (path,) = (home / "errors").iterdir()
    assert str(path) in said
    assert "raise ZeroDivisionError" in path.read_text()


def test_the_traceback_finds_a_place_when_the_home_is_broken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OPENWEIGHTS_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(SystemExit), output.error_boundary():
        raise ZeroDivisionError
    path = Path(capsys.readouterr().err.rpartition("traceback in ")[2].strip().rstrip(")"))
    assert "ZeroDivisionError" in path.read_text()
    path.unlink()
