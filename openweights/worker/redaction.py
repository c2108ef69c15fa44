"""Secret values, taken out of a job's output before it is stored."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Collection, Iterator, Mapping
from typing import cast
from urllib.parse import quote

# A name with one of these words holds a secret. PUBLIC_KEY and the like do not, nor what only says
# where a secret lies; PWD alone is the current folder.
_SECRET_NAME = re.compile(
    r"(?:^|_)(?:TOKEN|SECRET|PASSWORD|PASSWD|(?<=_)PASS|(?<=_)PWD|PASSPHRASE|PAT|WEBHOOK|COOKIE"
    r"|(?<!PUBLIC_)KEYS?|APIKEYS?|CREDENTIALS?)(?:_?\d+)?(?:_|$)"
    r"|(?:TOKEN|SECRET|PASSWORD|APIKEY|(?:^|_)AUTH(?:ORIZATION)?)$",
    re.IGNORECASE,
)
_ONLY_WHERE = re.compile(
    r"_(?:PATH|FILE|DIR|FOLDER|NAME|ID|TYPE|LENGTH|LIMIT|SOCK)$", re.IGNORECASE
)
_URL_PASSWORD = re.compile(r"[a-z][a-z0-9+.-]*://[^\s/:@]*:([^\s/@]+)@", re.IGNORECASE)
_SCHEME = re.compile(r"(?:bearer|basic|token)\s+(\S+)", re.IGNORECASE)
MIN_LENGTH = 8  # shorter values are words such as "true", and replacing them would garble the log
_MIN_PART = 16  # of what is a part of a secret, or an encoding of it
_MOST_SPELLED = 8192
_LINE_LENGTHS = (64, 76)  # into which `openssl` and `base64` break what they encode


def secret_values(env: Mapping[str, str], named: Collection[str] = ()) -> dict[str, bytes]:
    """Values of `env` that must not be shown, by name; of a URL with a password, the password.

    Args:
        named: Names of further secrets, whatever they look like.
    """
    found = {name: value for name, value in env.items() if name in named or _is_secret(name)}
    for name, value in env.items():
        if name not in found and (url := _URL_PASSWORD.search(value)):
            found[name] = url[1]
    return {
        name: value.encode(errors="surrogateescape")
        for name, value in found.items()
        if len(value) >= MIN_LENGTH
    }


def _is_secret(name: str) -> bool:
    return bool(_SECRET_NAME.search(name)) and not _ONLY_WHERE.search(name)


def spellings(secret: bytes) -> set[bytes]:
    """A secret as it may be printed: itself, its lines, what it holds as JSON or after `Bearer`,
    and each of these as programs escape and encode it.
    """
    found = {secret}
    if len(secret) > _MOST_SPELLED:  # a whole file
        return found
    for part in {secret, *_parts(secret)}:
        found |= {spelled for spelled in _encoded(part) if len(spelled) >= MIN_LENGTH}
    return found


def _parts(secret: bytes) -> Iterator[bytes]:
    lines = [line.strip() for line in secret.splitlines()]
    if len(lines) > 1:
        yield from (line for line in lines if len(line) >= MIN_LENGTH and line[:5] != b"-----")
    text = secret.decode(errors="surrogateescape")
    if scheme := _SCHEME.fullmatch(text.strip()):
        yield scheme[1].encode(errors="surrogateescape")
    if text.lstrip().startswith(("{", "[")):
        try:
            yield from (leaf.encode() for leaf in _leaves(json.loads(text)))
        except (ValueError, RecursionError):
            return


def _leaves(value: object) -> Iterator[str]:
    """Texts in JSON that are long enough for a secret, and no addresses."""
    if isinstance(value, dict):
        value = list(cast("dict[str, object]", value).values())
    if isinstance(value, list):
        for item in cast("list[object]", value):
            yield from _leaves(item)
    elif isinstance(value, str) and len(value) >= _MIN_PART and "://" not in value:
        yield value


def _encoded(part: bytes) -> Iterator[bytes]:
    yield part
    text = part.decode(errors="surrogateescape")
    for escaped in (repr(text)[1:-1], json.dumps(text)[1:-1], quote(part, safe="")):
        yield escaped.encode(errors="surrogateescape")
    if len(part) >= MIN_LENGTH:
        yield part.hex().encode()
        yield from _in_base64(part)


def _in_base64(part: bytes) -> Iterator[bytes]:
    """What base64 makes of `part`, wherever it stands in what is encoded: without the characters
    that depend on what comes before and after it.
    """
    for shift in range(3):
        code = base64.b64encode(bytes(shift) + part)
        left, right = (0, 2, 3)[shift], (0, 3, 2)[(shift + len(part)) % 3]
        core = code[left : len(code) - right]
        pieces = [core]
        if shift == 0:
            pieces += [core[at : at + n] for n in _LINE_LENGTHS for at in range(0, len(core), n)]
        for piece in pieces:
            if len(piece) >= min(_MIN_PART, len(core)):
                yield piece
                yield piece.translate(bytes.maketrans(b"+/", b"-_"))


class Redactor:
    """Replaces secrets in a stream of bytes, also where a secret arrives in pieces.

    The end of what was fed is held back only while it may be the beginning of a secret, so ordinary
    output is not delayed.
    """

    def __init__(self, secrets: Mapping[str, bytes]) -> None:
        self._marks: dict[bytes, bytes] = {}
        self._held = b""
        self.add(secrets)

    def add(self, secrets: Mapping[str, bytes]) -> None:
        """Replace these, too, in what comes from now on, however they are spelled."""
        for name, value in secrets.items():
            mark = f"[{name} redacted]".encode()
            self._marks |= dict.fromkeys(spellings(value) if value else (), mark)
        # The value itself counts before a spelling of another one.
        self._marks |= {v: f"[{name} redacted]".encode() for name, v in secrets.items() if v}
        # Longest first: a secret that begins with another one is replaced as a whole.
        self._secrets = sorted(self._marks, key=len, reverse=True)
        self._pattern = re.compile(b"|".join(map(re.escape, self._secrets)))

    def feed(self, data: bytes) -> bytes:
        """What may be shown by now, including what was held back before."""
        if not self._secrets:
            return data
        text = self._held + data
        hold = self._possible_start(text, 0)
        shown: list[bytes] = []
        position = 0
        for match in self._pattern.finditer(text):
            if match.start() >= hold:
                break
            shown += text[position : match.start()], self._marks[match.group()]
            position = match.end()
        if position > hold:
            hold = self._possible_start(text, position)
        shown.append(text[position:hold])
        self._held = text[hold:]
        return b"".join(shown)

    def flush(self) -> bytes:
        """The rest, at the end of the stream."""
        held, self._held = self._held, b""
        return self._pattern.sub(lambda match: self._marks[match.group()], held) if held else b""

    def _possible_start(self, text: bytes, start: int) -> int:
        """Where the earliest beginning of a secret starts that runs into the end of `text`."""
        earliest = len(text)
        for secret in self._secrets:
            position = max(start, len(text) - len(secret) + 1) - 1
            while (position := text.find(secret[:1], position + 1, earliest)) >= 0:
                # The last byte first: a secret may be as long as a file, and is rarely there.
                is_end = secret[len(text) - position - 1] == text[-1]
                if is_end and secret.startswith(text[position:]):
                    earliest = position
        return earliest
