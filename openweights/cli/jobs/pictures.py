"""Pictures in a terminal: which kind it shows, found out by asking it, and writing them.

Protocols: https://sw.kovidgoyal.net/kitty/graphics-protocol, https://iterm2.com/documentation-images.html
and, of the VT340, sixels: six pixels of a column in one character, a colour after the other.
"""

# matplotlib's own annotations are partial.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import base64
import os
import re
import select
import sys
import time
from collections.abc import Iterator, Sequence
from io import BytesIO
from itertools import groupby
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Protocol = Literal["kitty", "iterm", "sixel"]

_ANSWER_S = 0.5
# A picture of one pixel for kitty, the terminal's name, and what every terminal answers, the last.
_QUESTIONS = b"\x1b_Gi=31,s=1,v=1,a=q,t=d,f=24;AAAA\x1b\\\x1b[>q\x1b[c"
_ATTRIBUTES = re.compile(rb"\x1b\[\?([\d;]*)c")
_SIXEL = b"4"  # among the attributes
_KITTY_CHUNK = 4096
_DPI = 80
_LEVELS = 6  # of each colour: 216 in all, of the 256 that terminals have


def picture_protocol() -> Protocol | None:
    """How this terminal shows pictures; None where it does not, or there is none."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return None
    import termios
    import tty

    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    try:
        tty.setcbreak(fd)
        os.write(sys.stdout.fileno(), _QUESTIONS)
        return understood(_answers(fd))
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def _answers(fd: int) -> bytes:
    """What comes up to the answer that every terminal gives."""
    found, until = b"", time.monotonic() + _ANSWER_S
    while (left := until - time.monotonic()) > 0 and not _ATTRIBUTES.search(found):
        if not select.select([fd], [], [], left)[0]:
            break
        found += os.read(fd, 1024)
    return found


def understood(answers: bytes) -> Protocol | None:
    """What the answers of a terminal say of it."""
    if b"\x1b_Gi=31;OK" in answers:
        return "kitty"
    if re.search(rb"\x1bP>\|(iTerm2|WezTerm)", answers):
        return "iterm"
    found = _ATTRIBUTES.search(answers)
    return "sixel" if found and _SIXEL in found[1].split(b";") else None


def show_figure(figure: Figure, protocol: Protocol) -> None:
    """Write the figure to the terminal."""
    content = BytesIO()
    if protocol == "sixel":
        figure.savefig(content, format="rgba", dpi=_DPI)
        width, height = (int(inches * _DPI) for inches in figure.get_size_inches())
        picture = sixels(content.getvalue(), width, height)
    else:
        figure.savefig(content, format="png", dpi=_DPI)
        picture = (_kitty if protocol == "kitty" else _iterm)(content.getvalue())
    sys.stdout.flush()
    sys.stdout.buffer.write(picture + b"\n")
    sys.stdout.buffer.flush()


def _kitty(png: bytes) -> bytes:
    text = base64.b64encode(png)
    chunks = [text[at : at + _KITTY_CHUNK] for at in range(0, len(text), _KITTY_CHUNK)]
    pieces: list[bytes] = []
    for place, chunk in enumerate(chunks):
        what = b"a=T,f=100," if place == 0 else b""
        more = b"1" if place < len(chunks) - 1 else b"0"
        pieces.append(b"\x1b_G" + what + b"m=" + more + b";" + chunk + b"\x1b\\")
    return b"".join(pieces)


def _iterm(png: bytes) -> bytes:
    head = f"\x1b]1337;File=inline=1;size={len(png)}:".encode()
    return head + base64.b64encode(png) + b"\x07"


def sixels(rgba: bytes, width: int, height: int) -> bytes:
    """An opaque picture, row by row of four bytes a pixel, in sixels."""
    step = 256 // _LEVELS + 1
    levels = bytes(value // step for value in range(256))
    red, green, blue = (rgba[at::4].translate(levels) for at in range(3))
    colours = [(r * _LEVELS + g) * _LEVELS + b for r, g, b in zip(red, green, blue, strict=True)]
    rows = [colours[start : start + width] for start in range(0, width * height, width)]
    palette = [_definition(colour) for colour in sorted(set(colours))]
    bands = ["$".join(_band(rows[at : at + 6])) for at in range(0, height, 6)]
    head = f'\x1bP0;1q"1;1;{width};{height}'
    return (head + "".join(palette) + "-".join(bands) + "\x1b\\").encode()


def _definition(colour: int) -> str:
    parts = (colour // _LEVELS**2, colour // _LEVELS % _LEVELS, colour % _LEVELS)
    return f"#{colour};2;" + ";".join(str(round(100 * part / (_LEVELS - 1))) for part in parts)


def _band(rows: Sequence[Sequence[int]]) -> Iterator[str]:
    """The lines of a band of up to six rows, one for each colour in it."""
    columns = list(zip(*rows, strict=True))
    for colour in sorted({colour for row in rows for colour in row}):
        bits = [
            sum(1 << at for at, own in enumerate(column) if own == colour) for column in columns
        ]
        runs = ((chr(63 + value), len(list(same))) for value, same in groupby(bits))
        yield f"#{colour}" + "".join(f"!{n}{c}" if n > 3 else c * n for c, n in runs)  # noqa: PLR2004
