"""One sample of a request as it grows: what ends it, its text, and what there is to tell of it."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

from openweights.generation.params import Delta, FinishReason, GenerationRequest
from openweights.generation.selection import row_key
from openweights.generation.text import Detokenizer, StopMatcher

TopLogprobs = dict[int, float]


class Sample:
    """Takes the tokens that an engine draws, and says what they amount to.

    Args:
        request: What it is a sample of.
        index: Which one, from 0.
        tokenizer: Decodes it; None when the request asks for no texts.
        end_token_ids: The engine's, for requests that name none.
        max_length: The engine's: the completion is cut where the context ends.
    """

    def __init__(
        self,
        request: GenerationRequest,
        index: int,
        tokenizer: Any,
        end_token_ids: Sequence[int],
        max_length: int,
    ) -> None:
        params = request.params
        own = params.stop_token_ids
        self.request = request
        self.index = index
        self.ends = frozenset(end_token_ids if own is None else own)
        self.key = row_key(request, index)
        self.limit = min(params.max_new_tokens, max_length - len(request.prompt_ids))
        self.count = 0
        self.drawn: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._text = (
            Detokenizer(tokenizer, skip_special_tokens=params.skip_special_tokens)
            if params.detokenize and tokenizer is not None
            else None
        )
        self._stop = StopMatcher(params.stop)

    @property
    def known_ids(self) -> list[int]:
        """The prompt and what has been drawn."""
        return [*self.request.prompt_ids, *self.drawn]

    @property
    def is_finished(self) -> bool:
        """Whether no token is wanted any more."""
        return self.finish_reason is not None

    def push(
        self,
        token_ids: Sequence[int],
        logprobs: Sequence[float] = (),
        top_logprobs: Sequence[TopLogprobs] = (),
    ) -> Delta:
        """Take new tokens in their order; those after its end are dropped."""
        before = self.count
        text = self._take_up_to_stop(token_ids)
        taken = self.count - before
        self.drawn += token_ids[:taken]
        return Delta(
            self.request.id,
            self.index,
            list(token_ids[:taken]),
            text,
            self.finish_reason,
            list(logprobs[:taken]),
            list(top_logprobs[:taken]),
        )

    def _take_up_to_stop(self, token_ids: Sequence[int]) -> str:
        """Take tokens up to the one that completes a stop text; returns the text to tell.

        Where no stop text is complete it does not matter at which token: decoding all of them at
        once takes a tenth of the time of decoding each.
        """
        if self.is_finished:
            return ""
        params, text, stop, count = self.request.params, self._text, self._stop, self.count
        if not params.stop or text is None:
            return self._take(token_ids)
        if count + 1 >= params.min_new_tokens:  # each of the tokens may end it
            self._text, self._stop = copy(text), copy(stop)
            told = self._take(token_ids)
            if not (self._stop.stopped or self._text.waits):
                return told
            self._text, self._stop, self.count, self.finish_reason = text, stop, count, None
        return "".join(self._take([token]) for token in token_ids if not self.is_finished)

    def _take(self, token_ids: Sequence[int]) -> str:
        """Take tokens up to the first that ends it, or the limit; returns the text to tell."""
        read: list[int] = []
        for token in token_ids:
            self.count += 1
            if token in self.ends and self._may_end:
                self.finish_reason = "stop"
                break
            read.append(token)
            if self.count >= self.limit:
                self.finish_reason = "length"
                break
        if self._text is None:
            return ""
        piece = self._text.push(read)
        if self.is_finished:
            piece += self._text.finish()
        if not self._may_end:
            return piece
        text = self._stop.push(piece)
        if self._stop.stopped:
            self.finish_reason = "stop"
        return text + self._stop.finish() if self.is_finished else text

    @property
    def _may_end(self) -> bool:
        return self.count >= self.request.params.min_new_tokens
