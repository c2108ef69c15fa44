"""Secret values, taken out of a job's output before it is stored."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

# A name that ends so, or so with a number, holds a secret. PUBLIC_KEY and the like do not, and PWD
# alone is the current folder.
_SECRET_NAME = re.compile(
    r"(?:^|_)(?:TOKEN|SECRET|PASSWORD|PASSWD|(?<=_)PWD|PASSPHRASE|PAT|(?<!PUBLIC_)KEYS?|APIKEYS?"
    r"|CREDENTIALS?)(?:_?\d+)?$",
    re.IGNORECASE,
)
_URL_PASSWORD = re.compile(r"[a-z][a-z0-9+.-]*://[^\s/:@]*:([^\s/@]+)@", re.IGNORECASE)
MIN_LENGTH = 8  # shorter values are words such as "true", and replacing them would garble the log


def secret_values(env: Mapping[str, str], named: Collection[str] = ()) -> dict[str, bytes]:
    """Values of `env` that must not be shown, by name; of a URL with a password, the password.

    Args:
        named: Names of further secrets, whatever they look like.
    """
    found = {
        name: value for name, value in env.items() if name in named or _SECRET_NAME.search(name)
    }
    for name, value in env.items():
        if name not in found and (url := _URL_PASSWORD.search(value)):
            found[name] = url[1]
    return {
        name: value.encode(errors="surrogateescape")
        for name, value in found.items()
        if len(value) >= MIN_LENGTH
    }


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
        """Replace these, too, in what comes from now on."""
        self._marks |= {
            value: f"[{name} redacted]".encode() for name, value in secrets.items() if value
        }
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
