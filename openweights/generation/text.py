"""From tokens to text as they come: whole characters only, and stop texts across token borders."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

UNFINISHED = "\ufffd"  # what a decoder gives for bytes that are no character (yet)


class Detokenizer:
    """The text of a growing completion, in pieces that together are its decoded tokens.

    A piece never ends within a character: the tokens of one whose bytes are not all there wait.
    What was told stays, whatever follows: where a tokenizer has tokens of single bytes, its decoder
    writes a whole run of them as unknown characters when its last ones are no character.

    Args:
        tokenizer: A tokenizer of transformers.
    """

    def __init__(self, tokenizer: Any, *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._bytes = _byte_tokens(tokenizer)
        self._window: list[int] = []  # the tokens of the last piece, then those that wait
        self._told = 0  # so many of them are told

    @property
    def waits(self) -> bool:
        """Whether any token's text has not been told."""
        return len(self._window) > self._told

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that more tokens complete."""
        if len(token_ids) > 1 and not self._bytes.isdisjoint(token_ids):
            return "".join(self.push([token]) for token in token_ids)
        self._window = [*self._window, *token_ids]
        text = self._new_text()
        if not text or text.endswith(UNFINISHED):
            return ""
        # Decoders treat the first token of a text in their own way: the last piece stays before.
        self._window = self._window[self._told :]
        self._told = len(self._window)
        return text

    def finish(self) -> str:
        """What waited, whole or not."""
        text = self._new_text()
        self._told = len(self._window)
        return text

    def _new_text(self) -> str:
        """The text of what waits, behind the last piece."""
        before, after = self._decode(self._window[: self._told]), self._decode(self._window)
        if after.startswith(before):
            return after[len(before) :]
        return self._decode(self._window[self._told :])  # bytes that are not of one run with those

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(
            token_ids,
            skip_special_tokens=self._skip_special_tokens,
            clean_up_tokenization_spaces=False,
        )


@lru_cache(maxsize=16)
def _byte_tokens(tokenizer: Any) -> frozenset[int]:
    """Tokens of single bytes, with which some tokenizers write what their vocabulary lacks."""
    vocabulary = tokenizer.get_vocab()
    names = (f"<0x{byte:02X}>" for byte in range(256))
    return frozenset(vocabulary[name] for name in names if name in vocabulary)


class StopMatcher:
    """Finds the first of some texts in a text that comes in pieces, however it is cut.

    The first is the one that is complete first; of those complete at one place, the longest.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = sorted(stops, key=len, reverse=True)
        self._held = ""  # the beginning of what may become one of them
        self.stopped = False

    def push(self, piece: str) -> str:
        """The part of the text so far that is safe to tell now; all before a stop text."""
        if not self._stops:
            return piece
        text = self._held + piece
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        self._held = self._beginning(text)
        return text[: len(text) - len(self._held)]

    def finish(self) -> str:
        """What was held back, when nothing follows."""
        held, self._held = self._held, ""
        return held

    def _beginning(self, text: str) -> str:
        """The longest end of the text with which one of the stop texts begins."""
        longest = min(len(self._stops[0]) - 1, len(text))
        for length in range(longest, 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return end
        return ""
