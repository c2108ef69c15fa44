"""What every generation engine offers: requests in, their completions out, as a batch or a stream.

An engine advances all its requests together, `step` by `step`; how far a step goes is its own
choice (a token, or several). `generate` and `stream` are made of that. An engine is not for several
threads at once: one thread calls all its methods.

A completion is a function of weights, prompt, parameters and seed alone, whatever else the engine
works on; the process's own random state is neither read nor written.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from openweights import progress
from openweights.errors import ConfigError, InvalidStateError
from openweights.generation.params import (
    Completion,
    Delta,
    GenerationRequest,
    joined,
)


class GenerationEngine(Protocol):
    """Completes prompts with a model's current weights.

    Attributes:
        name: "transformers", "cuda_graph" or "vllm".
        end_token_ids: What ends a completion when its parameters do not say.
        max_length: Tokens that a prompt and its completion may have together.
        vocabulary: Tokens that the model has an embedding for, from 0.
        is_exact: Whether it computes with the model's own weights; log-probabilities then differ
            from a plain forward by rounding alone.
        replicas: Processes that compute its requests, each with the whole model.
    """

    name: str
    end_token_ids: tuple[int, ...]
    max_length: int
    vocabulary: int
    is_exact: bool = True
    replicas: int = 1

    @property
    @abstractmethod
    def adapters(self) -> tuple[str, ...]:
        """Names that requests may give."""

    @abstractmethod
    def set_adapter(self, name: str, folder: Path) -> None:
        """Load an adapter, in the place of one of that name.

        Raises:
            ConfigError: The folder holds none that fits the model.
            InvalidStateError: Requests are being worked on that use it.
        """

    @abstractmethod
    def remove_adapter(self, name: str) -> None:
        """Forget an adapter.

        Raises:
            ConfigError: There is none of that name.
            InvalidStateError: Requests are being worked on that use it.
        """

    @property
    @abstractmethod
    def is_idle(self) -> bool:
        """Whether every request is finished."""

    @abstractmethod
    def submit(self, request: GenerationRequest) -> None:
        """Take a request; `step` works on it from now on. When it raises, nothing was taken.

        Raises:
            ConfigError: It cannot be worked on (`check_request`).
        """

    @abstractmethod
    def step(self) -> list[Delta]:
        """Advance, and tell what has grown. Without requests, nothing.

        When it raises, all requests are to be aborted; the engine can then take others.
        """

    @abstractmethod
    def abort(self, request_id: str) -> None:
        """Drop a request with all its samples: no more deltas. Unknown ids are passed over."""

    def generate(self, requests: Sequence[GenerationRequest]) -> list[list[Completion]]:
        """For each request its `n` completions, in order. Ids of requests do not count here.

        Raises:
            ConfigError: A request cannot be worked on.
            InvalidStateError: The engine has requests already.
        """
        numbered = [replace(r, id=str(index)) for index, r in enumerate(requests)]
        samples: list[list[list[Delta]]] = [[[] for _ in range(r.params.n)] for r in requests]
        for delta in self.stream(numbered):
            samples[int(delta.request_id)][delta.sample].append(delta)
        return [[joined(deltas) for deltas in own] for own in samples]

    def stream(self, requests: Sequence[GenerationRequest]) -> Iterator[Delta]:
        """Deltas of the requests as they come. Closing the iterator drops what is not finished.

        Raises:
            ConfigError: A request cannot be worked on, or two have the same id.
            InvalidStateError: The engine has requests already.
        """
        if len({request.id for request in requests}) < len(requests):
            raise ConfigError("id: two requests have the same one; give each its own")
        if not self.is_idle:
            raise InvalidStateError(f"engine {self.name}: has requests already; finish them first")
        try:
            for request in requests:
                self.submit(request)
            while not self.is_idle:
                if deltas := self.step():
                    progress.advanced(sum(d.finish_reason is not None for d in deltas))
                yield from deltas
        finally:
            for request in requests:
                self.abort(request.id)


def check_request(engine: GenerationEngine, request: GenerationRequest) -> None:
    """See that an engine can work on a request.

    Raises:
        ConfigError: The prompt is empty, too long or has tokens that the model does not know, or
            the adapter is unknown.
    """
    length = len(request.prompt_ids)
    if length == 0:
        raise ConfigError("prompt: is empty; give at least one token")
    if length >= engine.max_length:
        raise ConfigError(
            f"prompt: has {length} tokens, and the model's context {engine.max_length} leaves no "
            "room for a completion; shorten it"
        )
    # On a GPU a look-up beside the embedding ends the process.
    for token in (min(request.prompt_ids), max(request.prompt_ids)):
        if not 0 <= token < engine.vocabulary:
            raise ConfigError(
                f"prompt: holds token id {token}, and the model knows 0 to {engine.vocabulary - 1}"
                "; use its own tokenizer"
            )
    if request.adapter is not None and request.adapter not in engine.adapters:
        known = ", ".join(engine.adapters) or "none"
        raise ConfigError(f"adapter: {request.adapter!r} is not loaded (there are: {known})")
