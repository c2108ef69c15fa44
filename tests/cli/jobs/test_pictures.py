"""`ow plot` in terminals that show pictures, and elsewhere; `ow top`."""

from __future__ import annotations

import base64
import os
import pty
import random
import re
import select
import struct
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from openweights.backends.base import Backend
from openweights.cli.jobs.pictures import sixels, understood
from openweights.cli.jobs.top import COLUMNS, fitting, spark
from tests.cli.conftest import Ow, claim, log_events, process_env, submit

XTERM = b"\x1b[?62;22c"
TERMINALS: dict[str, tuple[bytes, str | None]] = {
    "kitty": (b"\x1b_Gi=31;OK\x1b\\\x1bP>|kitty(0.35)\x1b\\\x1b[?62c", "kitty"),
    "iterm": (b"\x1bP>|iTerm2 3.5.1\x1b\\\x1b[?62;4c", "iterm"),
    "wezterm": (b"\x1bP>|WezTerm 20240203\x1b\\" + XTERM, "iterm"),
    "foot": (b"\x1bP>|foot(1.16)\x1b\\\x1b[?62;4;22c", "sixel"),
    "xterm": (b"\x1bP>|XTerm(390)\x1b\\" + XTERM, None),
    "kitty says no": (b"\x1b_Gi=31;ENOTSUPPORTED\x1b\\" + XTERM, None),
    "nothing": (b"", None),
}


@pytest.mark.parametrize("name", TERMINALS)
def test_a_terminal_is_known_by_what_it_answers(name: str) -> None:
    answers, protocol = TERMINALS[name]
    assert understood(answers) == protocol


def _read_sixels(text: str) -> tuple[dict[tuple[int, int], int], Mapping[int, str]]:
    """Pixel -> colour, and what the colours are."""
    body = re.fullmatch(r'\x1bP0;1q"1;1;\d+;\d+(.*)\x1b\\', text, re.DOTALL)
    assert body
    palette = {int(c): rest for c, rest in re.findall(r"#(\d+);2;([\d;]+)", body[1])}
    pixels: dict[tuple[int, int], int] = {}
    for band, line in enumerate(re.sub(r"#\d+;2;[\d;]+", "", body[1]).split("-")):
        for part in line.split("$"):
            number, runs = re.fullmatch(r"#(\d+)(.*)", part, re.DOTALL).groups()  # type: ignore[union-attr]
            x = 0
            for count, sign in re.findall(r"(?:!(\d+))?([?-~])", runs):
                for _ in range(int(count or 1)):
                    for bit in range(6):
                        if (ord(sign) - 63) >> bit & 1:
                            pixels[x, band * 6 + bit] = int(number)
                    x += 1
    return pixels, palette


def test_sixels_are_the_picture() -> None:
    random.seed(1)
    width, height = 37, 15
    levels = [0, 51, 102, 153, 204, 255]
    picture = [[tuple(random.choices(levels, k=3)) for _ in range(width)] for _ in range(height)]
    picture[3] = [(255, 0, 51)] * width  # a run
    rgba = b"".join(bytes((*pixel, 255)) for row in picture for pixel in row)
    pixels, palette = _read_sixels(sixels(rgba, width, height).decode())
    assert pixels.keys() == {(x, y) for x in range(width) for y in range(height)}
    for (x, y), colour in pixels.items():
        assert palette[colour] == ";".join(str(part * 100 // 255) for part in picture[y][x])


def in_terminal(answers: bytes, *arguments: str, seconds: float = 60, stop: bytes = b"") -> bytes:
    """What `ow` writes to a terminal that answers its questions so."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "openweights.cli", *arguments],
        env=process_env() | {"TERM": "xterm-256color", "COLUMNS": "120", "LINES": "30"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    written, until = b"", time.monotonic() + seconds
    try:
        while time.monotonic() < until and not (stop and stop in written):
            if not select.select([ours], [], [], 0.1)[0]:
                continue
            try:
                written += os.read(ours, 65536)
            except OSError:  # the process has ended
                break
            if written.endswith(b"\x1b[c"):
                os.write(ours, answers)
    finally:
        process.terminate()
        process.wait()
        os.close(ours)
    return written


@pytest.fixture
def job(backend: Backend) -> str:
    run = claim(backend, "ftjob-drawn").run
    log_events(backend, run.id, *({"step": step, "loss": 2 / step} for step in range(1, 40)))
    return "ftjob-drawn"


def _width(png: bytes) -> int:
    """Raises when it is no PNG."""
    signature, _, kind, width = struct.unpack(">8sI4sI", png[:20])
    assert (signature, kind) == (b"\x89PNG\r\n\x1a\n", b"IHDR") and png[-8:-4] == b"IEND"
    return width


def test_a_plot_is_shown_in_the_terminal(job: str) -> None:
    written = in_terminal(TERMINALS["kitty"][0], "plot", job)
    chunks = re.findall(rb"\x1b_G(?:a=T,f=100,)?m=[01];([A-Za-z0-9+/=]+)\x1b\\", written)
    assert _width(base64.b64decode(b"".join(chunks))) > 200


def test_elsewhere_a_plot_is_a_file(
    job: str, ow: Ow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = ow("plot", job)
    assert (result.exit_code, result.output) == (0, "ftjob-drawn.png\n")
    assert _width((tmp_path / "ftjob-drawn.png").read_bytes()) > 200


def test_a_figure_of_no_format_is_refused_as_an_option(job: str, ow: Ow, tmp_path: Path) -> None:
    result = ow("plot", job, "-o", str(tmp_path / "f7.xyz"))
    assert result.exit_code == 2 and ".png" in result.stderr
    assert "traceback" not in result.stderr


def test_top_is_printed_once_where_nobody_looks(job: str, backend: Backend, ow: Ow) -> None:
    ended = claim(backend, "ftjob-ended").run
    backend.finish_run(ended.id, ended.attempt, "failed", error="CUDA out of memory")
    submit(backend, "ftjob-waits")
    lines = ow("top").output.splitlines()
    assert [line.split()[0] for line in lines[1:]] == [job, "ftjob-waits", "ftjob-ended"]
    assert "█" in lines[1] and "▁" in lines[1] and "step 39" in lines[1]
    assert lines[3].endswith("CUDA out of memory")


def test_top_is_live_in_a_terminal(job: str, backend: Backend) -> None:
    written = in_terminal(b"", "top", "--every", "0.2", stop=b"step 39")
    assert b"\x1b[?1049h" in written and b"ftjob-drawn" in written


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], ""),
        ([1.0], ""),
        ([1.0, 1.0], "▁▁"),
        ([0.0, 1.0], "▁█"),
        ([3.0, float("nan"), 1.0], "█▁"),
    ],
)
def test_spark(values: list[float], expected: str) -> None:
    assert spark(values) == expected
    assert len(spark([float(at % 5) for at in range(1000)])) == 16


def test_a_narrow_window_has_what_jobs_say() -> None:
    last = "step 12/32 · 4.1 s/step · 1m20s left · loss 0.52"
    rows = [
        ["ftjob-0123456789ab", "in_progress", "sft", "org/a-model-1B", "2m", "█▆▄▃▂▁▁▁", last],
        ["ftjob-0123456789ab-" + "seed" * 9, "pending", "sdft", "org/a-model-1B", "2m", "", "-"],
    ]
    room = {width: fitting(rows, width) for width in (200, 100, 60, 40)}
    assert [[*widths] for widths, _ in room.values()] == [
        [*COLUMNS],
        [*COLUMNS],
        ["id", "status", "age", "last"],
        ["id", "status", "last"],
    ]
    for width, (widths, lines) in room.items():
        assert all(len(line) == len(widths) for line in lines)
        assert width == 40 or sum(widths.values()) + 2 * (len(widths) - 1) <= width
        assert width == 40 or widths["last"] >= 20
    assert room[100][1][0][3] == "org/a-model-1B"
    rows[0][3] = "an-organization-of-a-much-longer-name/a-model-1B"
    assert [fitting(rows, width)[1][0][3] for width in (200, 100)] == [rows[0][3], "a-model-1B"]
    assert fitting([], 80)[1] == []
