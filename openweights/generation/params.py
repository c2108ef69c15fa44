"""What is asked of a generation engine and what it gives back; plain values, without torch."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from typing import Literal, cast

from openweights.errors import ConfigError

FinishReason = Literal["stop", "length"]

MOST_TOP_LOGPROBS = 20
SEEDS = 2**63


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the completions of a prompt are drawn.

    The likeliest `top_k` tokens stay, of them the fewest that hold `top_p` of what is left, of them
    those at least `min_p` times as likely as the likeliest; all after the penalties and the
    temperature. One of these is drawn.

    Attributes:
        max_new_tokens: Completions are cut here, or where the model's context ends.
        min_new_tokens: Nothing ends a completion before it has so many.
        temperature: 1 samples from the model itself; 0 takes the likeliest token.
        top_p: 1 for the whole vocabulary.
        top_k: None for the whole vocabulary.
        min_p: 0 for the whole vocabulary.
        n: Completions of the prompt. They differ by their sample index alone.
        stop_token_ids: Each ends a completion and is its last token; None for the model's own ends
            (`GenerationEngine.end_token_ids`), () for none.
        stop: Texts that end a completion. The text stops before them, the token ids with the token
            that completed them.
        logprobs: Whether completions tell the log-probability of each of their tokens.
        top_logprobs: And those of so many likeliest tokens, at most 20.
        logprobs_after_temperature: Whether these are of the logits divided by the temperature, as
            policy gradients need them; else the model's own. Never after top_p and the like.
        seed: With weights, prompt and the other parameters all that a completion depends on.
        presence_penalty: Subtracted from the logits of tokens that the completion has already.
        frequency_penalty: The same for each time that it has them.
        skip_special_tokens: Whether texts leave special tokens out.
        detokenize: Whether completions have texts; stop texts need them.

    Raises:
        ConfigError: A value cannot be used.
    """

    max_new_tokens: int = 256
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    n: int = 1
    stop_token_ids: tuple[int, ...] | None = None
    stop: tuple[str, ...] = ()
    logprobs: bool = False
    top_logprobs: int = 0
    logprobs_after_temperature: bool = False
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    skip_special_tokens: bool = True
    detokenize: bool = True

    def __post_init__(self) -> None:
        problems = [f"{name}: {what}" for name, what in _type_problems(self) or _problems(self)]
        if problems:
            raise ConfigError("; ".join(problems))

    @property
    def has_penalties(self) -> bool:
        """Whether earlier tokens change the logits of later ones."""
        return bool(self.presence_penalty or self.frequency_penalty)

    def with_seed(self, *parts: int) -> SamplingParams:
        """The same, with a seed made of `parts`."""
        return replace(self, seed=derived_seed(*parts))


_WHOLE = ("max_new_tokens", "min_new_tokens", "n", "top_logprobs", "seed")
_NUMBERS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty")


def _type_problems(params: SamplingParams) -> list[tuple[str, str]]:
    """What is of another type than it must be; a text would pass as a list of its letters."""
    given: dict[str, object] = {f.name: getattr(params, f.name) for f in fields(params)}
    top_k, ends, stops = given["top_k"], given["stop_token_ids"], given["stop"]
    whole = {name: given[name] for name in _WHOLE} | ({} if top_k is None else {"top_k": top_k})
    wrong = [(name, "a whole number") for name, v in whole.items() if not _is_number(v, Integral)]
    wrong += [(name, "a number") for name in _NUMBERS if not _is_number(given[name], Real)]
    if ends is not None and not _are(ends, lambda value: _is_number(value, Integral)):
        wrong.append(("stop_token_ids", "a tuple of token ids, or None"))
    if not _are(stops, lambda value: isinstance(value, str)):
        wrong.append(("stop", "a tuple of texts"))
    return [(name, f"is {given[name]!r}; give {what}") for name, what in wrong]


def _is_number(value: object, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _are(values: object, fits: Callable[[object], bool]) -> bool:
    return isinstance(values, tuple | list) and all(map(fits, cast("Sequence[object]", values)))


def _problems(params: SamplingParams) -> Iterator[tuple[str, str]]:
    yield from _length_problems(params)
    yield from _number_problems(params)
    if params.top_k is not None and params.top_k < 1:
        yield "top_k", f"is {params.top_k}; give 1 or more, or None for the whole vocabulary"
    if params.n < 1:
        yield "n", f"is {params.n}; give 1 or more"
    if not 0 <= params.top_logprobs <= MOST_TOP_LOGPROBS:
        yield "top_logprobs", f"is {params.top_logprobs}; give 0 to {MOST_TOP_LOGPROBS}"
    elif params.top_logprobs and not params.logprobs:
        yield "top_logprobs", "needs logprobs=True; set it, or remove top_logprobs"
    if not 0 <= params.seed < SEEDS:
        yield "seed", f"is {params.seed}; give 0 or more, below 2**63"
    if params.stop and not params.detokenize:
        yield "stop", "needs detokenize=True; set it, or remove stop"
    if any(not text for text in params.stop):
        yield "stop", "holds an empty text, which would end every completion at once; remove it"
    if any(token < 0 for token in params.stop_token_ids or ()):
        yield "stop_token_ids", "holds a negative number; give token ids"


def _length_problems(params: SamplingParams) -> Iterator[tuple[str, str]]:
    if params.max_new_tokens < 1:
        yield "max_new_tokens", f"is {params.max_new_tokens}; give 1 or more"
    if params.min_new_tokens < 0:
        yield "min_new_tokens", f"is {params.min_new_tokens}; give 0 or more"
    elif params.min_new_tokens > max(params.max_new_tokens, 1):
        yield (
            "min_new_tokens",
            f"is {params.min_new_tokens}, above max_new_tokens={params.max_new_tokens}; lower it",
        )


def _number_problems(params: SamplingParams) -> Iterator[tuple[str, str]]:
    if not (math.isfinite(params.temperature) and params.temperature >= 0):
        yield "temperature", f"is {params.temperature}; give 0 (greedy) or more"
    if not 0 < params.top_p <= 1:
        yield "top_p", f"is {params.top_p}; give more than 0, at most 1"
    if not 0 <= params.min_p <= 1:
        yield "min_p", f"is {params.min_p}; give 0 to 1"
    for name in ("presence_penalty", "frequency_penalty"):
        value = getattr(params, name)
        if not -2 <= value <= 2:
            yield name, f"is {value}; give -2 to 2"


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A prompt to complete.

    Attributes:
        prompt_ids: At least one token.
        adapter: One of the engine's `adapters`; None for the base model alone.
        id: Names it in a stream; unique among the requests that an engine works on.
    """

    prompt_ids: Sequence[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    adapter: str | None = None
    id: str = ""

    def with_samples(self, n: int) -> GenerationRequest:
        """The same, completed `n` times."""
        return replace(self, params=replace(self.params, n=n))


@dataclass(frozen=True, slots=True)
class Delta:
    """What one sample of a request has grown by.

    Attributes:
        request_id: The request.
        sample: Which of its `n` samples, from 0.
        token_ids: New tokens, none when only held back text is let go.
        text: New text: never half a character, nothing of what may become a stop text. It lags
            behind the tokens; when the sample is finished it is complete.
        finish_reason: "stop" (an end token or text) or "length"; None as long as it goes on.
        logprobs: One for each new token when asked for, in nats.
        top_logprobs: For each new token id -> log-probability of the likeliest, when asked for.
    """

    request_id: str
    sample: int
    token_ids: list[int]
    text: str
    finish_reason: FinishReason | None = None
    logprobs: list[float] = field(default_factory=list[float])
    top_logprobs: list[dict[int, float]] = field(default_factory=list[dict[int, float]])


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished sample: all its deltas in one.

    Attributes:
        token_ids: Without padding; the end token is the last when one ended it.
        text: Without end token and stop text.
        finish_reason: "stop" (an end token or text) or "length".
        logprobs: One for each token when asked for, in nats.
        top_logprobs: For each token id -> log-probability of the likeliest, when asked for.
    """

    token_ids: list[int]
    text: str
    finish_reason: FinishReason
    logprobs: list[float] = field(default_factory=list[float])
    top_logprobs: list[dict[int, float]] = field(default_factory=list[dict[int, float]])

    @property
    def ended(self) -> bool:
        """Whether it ended by itself, and was not cut."""
        return self.finish_reason == "stop"


def joined(deltas: Sequence[Delta]) -> Completion:
    """The completion that the deltas of a sample make, of which the last finishes it."""
    reason = deltas[-1].finish_reason
    assert reason is not None, "the sample is not finished"
    return Completion(
        token_ids=[token for delta in deltas for token in delta.token_ids],
        text="".join(delta.text for delta in deltas),
        finish_reason=reason,
        logprobs=[value for delta in deltas for value in delta.logprobs],
        top_logprobs=[values for delta in deltas for values in delta.top_logprobs],
    )


def derived_seed(*parts: int) -> int:
    """A seed for a step, a rank or a row that does not depend on what was sampled before."""
    return random.Random("/".join(map(str, parts))).getrandbits(63)
