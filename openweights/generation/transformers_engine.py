"""Generation through the forward pass of transformers: wherever the model runs, CPUs included.

The rows of a batch share a cache, padded on the left. Finished rows leave it at once, waiting
prompts take their places: prompts of similar lengths are read together, and the samples of one
prompt share its reading. Plain LoRA adapters may differ from row to row; where an adapter is of
another kind (DoRA, layers that are trained whole), the rows of a batch have one in common.

A row of a model with LongRoPE (`models/rotary.py`) is read again where it grows beyond the length
of the first table: what the cache holds of it was turned by that. So each token is drawn as one
forward of all before it tells, and as by `generate` of transformers without a cache. (With one,
that of 5.17 drops the cache there and reads the last token alone.)
"""

from __future__ import annotations

import inspect
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedTokenizerBase

from openweights.errors import ConfigError, InvalidStateError
from openweights.generation.engine import GenerationEngine, check_request
from openweights.generation.own_answers import KNOWN, answers_are_own
from openweights.generation.params import Delta, GenerationRequest
from openweights.generation.row_cache import can_join, filled_width, join, keep_rows, set_width
from openweights.generation.samples import Sample
from openweights.generation.selection import Rows, log_probs, select, top_log_probs
from openweights.models.adapters import (
    acting,
    adapter_names,
    can_mix,
    peft_name,
    with_adapter,
    without_adapter,
)
from openweights.models.forward import active_adapter, base_model, evaluating
from openweights.models.packing import use_packed_attention
from openweights.models.rotary import turn_by_row
from openweights.models.shape import longest_row, short_length
from openweights.models.sharding import is_spread, own_passes
from openweights.models.tokens import eos_token_ids, pad_left

logger = logging.getLogger(__name__)

MAX_ROWS = 64
CACHE_TOKENS = 65_536  # rows times columns of the cache
PREFILL_TOKENS = 8_192  # tokens, padding included, that are read in one forward


class TransformersEngine(GenerationEngine):
    """See `GenerationEngine`.

    Args:
        model: A causal language model or a `PeftModel`; its current weights are used.
        tokenizer: Decodes completions, and knows what ends them.
        max_rows: So many samples grow at a time.

    Raises:
        ConfigError: The model's answers are not those of its own forward, not even one by one.
    """

    name = "transformers"

    def __init__(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, *, max_rows: int = MAX_ROWS
    ) -> None:
        base = base_model(model)
        if base.device.type == "cpu":
            use_packed_attention(base)  # whose attention under a mask is faster there, too
        turn_by_row(base)
        self._short = short_length(base.config.get_text_config())
        self._model: Any = model
        self._mixes = can_mix(model)
        self._tokenizer = tokenizer
        self._max_rows = max_rows
        self._waiting: deque[list[Sample]] = deque()  # samples of one request each
        self._batch: _Batch | None = None
        known = inspect.signature(base.forward).parameters
        self._keeps_logits = "logits_to_keep" in known
        self._keeps_states = "cache_params" in known  # as Mamba calls its cache
        # A config may ask for the routers' loss, which a step over a cache cannot have: the mask is
        # that of all tokens, and the routers saw the last ones.
        self._routes = "output_router_logits" in known
        # Rows whose layers keep a state of another kind are read together, and none joins them.
        self._joins = can_join(DynamicCache(config=base.config))
        self.end_token_ids = tuple(eos_token_ids(base, tokenizer))
        self.max_length = longest_row(base.config.get_text_config())
        self.vocabulary = int(base.config.get_text_config().vocab_size)
        if base.config.get_text_config().model_type not in KNOWN:
            self._compare_answers()

    def _compare_answers(self) -> None:
        """Take rows one by one where the architecture confuses those that grow together."""
        kind = type(base_model(self._model)).__name__
        # Ranks that share a model's layers do not make their engines at the same time.
        if is_spread(self._model):
            logger.warning(
                "engine transformers: answers of a %s whose layers are spread over several GPUs "
                "are not compared with its own forward, as they are on one GPU",
                kind,
            )
            return
        if answers_are_own(self, self._model):
            return
        self._waiting.clear()
        self._batch, self._max_rows = None, 1
        if not answers_are_own(self, self._model):
            raise ConfigError(
                f"engine transformers: the model is a {kind}, whose answers with a cache are not "
                "those of its own forward, or fail; use engine 'vllm', or another model"
            )
        logger.warning(
            "engine transformers: a %s answers rows of one batch otherwise than each alone, or "
            "fails; prompts are answered one by one",
            kind,
        )

    # ---- adapters

    @property
    def adapters(self) -> tuple[str, ...]:
        """See `GenerationEngine`."""
        return adapter_names(self._model)

    def set_adapter(self, name: str, folder: Path) -> None:
        """See `GenerationEngine`."""
        self._refuse_in_use(name)
        try:
            self._model = with_adapter(self._model, name, folder)
        finally:
            self._mixes = can_mix(self._model)

    def remove_adapter(self, name: str) -> None:
        """See `GenerationEngine`."""
        if name not in self.adapters:
            raise ConfigError(f"adapter {name!r}: is not loaded")
        self._refuse_in_use(name)
        self._model = without_adapter(self._model, name)
        self._mixes = can_mix(self._model)

    def _refuse_in_use(self, name: str) -> None:
        batch = self._batch.samples if self._batch else []
        if any(s.request.adapter == name for s in [*batch, *(own[0] for own in self._waiting)]):
            raise InvalidStateError(f"adapter {name!r}: is in use; wait for its requests")

    # ---- requests

    @property
    def is_idle(self) -> bool:
        """See `GenerationEngine`."""
        return not self._waiting and self._batch is None

    def submit(self, request: GenerationRequest) -> None:
        """See `GenerationEngine`."""
        check_request(self, request)
        self._waiting.append(
            [
                Sample(request, index, self._tokenizer, self.end_token_ids, self.max_length)
                for index in range(request.params.n)
            ]
        )

    def abort(self, request_id: str) -> None:
        """See `GenerationEngine`."""
        self._waiting = deque(own for own in self._waiting if own[0].request.id != request_id)
        if self._batch is not None:
            self._keep([s.request.id != request_id for s in self._batch.samples])

    def stream(self, requests: Sequence[GenerationRequest]) -> Iterator[Delta]:
        """See `GenerationEngine`."""
        with own_passes(self._model), self._evaluating():  # once, not at each step
            yield from super().stream(requests)

    def step(self) -> list[Delta]:
        """See `GenerationEngine`. One token for each row, or the first ones of newcomers."""
        with torch.no_grad(), self._evaluating():
            if newcomers := self._admitted():
                groups = _groups(newcomers) if self._joins else [newcomers]
                return [delta for group in groups for delta in self._prefill(group)]
            if outgrown := self._outgrown():
                groups = _groups([[sample] for sample in outgrown])
                return [delta for group in groups for delta in self._prefill(group)]
            return self._decode() if self._batch else []

    def _evaluating(self) -> Any:
        return evaluating(self._model) if self._model.training else nullcontext()

    # ---- who is worked on

    def _admitted(self) -> list[list[Sample]]:
        """The waiting samples that find a place now, by request."""
        rows = self._batch.samples if self._batch else []
        free = self._max_rows - len(rows)
        waiting = sum(map(len, self._waiting))
        if rows and (free < min(waiting, max(1, self._max_rows // 8)) or not self._can_join()):
            return []  # a few free places are not worth a forward of their own
        width = max(map(_final_length, rows), default=0)
        admitted: list[list[Sample]] = []
        count = len(rows)
        adapter = (rows or self._waiting[0])[0].request.adapter if self._waiting else None
        while self._waiting and count < self._max_rows:
            samples = self._waiting[0]
            if not self._mixes and samples[0].request.adapter != adapter:
                break
            width = max(width, *map(_final_length, samples))
            room = min(self._max_rows, max(CACHE_TOKENS // width, 1)) - count
            if room <= 0:
                break
            admitted.append(samples[:room])
            count += len(admitted[-1])
            self._waiting.popleft()
            if samples[room:]:
                self._waiting.appendleft(samples[room:])
        return admitted

    def _can_join(self) -> bool:
        return self._batch is None or can_join(self._batch.cache)

    def _keep(self, kept: Sequence[bool]) -> None:
        """Rows that are not kept leave the batch."""
        assert self._batch is not None
        if not any(kept):
            self._batch = None
        elif not all(kept):
            self._batch.keep([index for index, stays in enumerate(kept) if stays])

    def _outgrown(self) -> list[Sample]:
        """Takes the rows out of the batch whose next token has another rotary table than those
        before it.
        """
        samples = self._batch.samples if self._batch and self._short else []
        found = [len(s.request.prompt_ids) + s.count - 1 == self._short for s in samples]
        if any(found):
            self._keep([not is_due for is_due in found])
        return [sample for sample, is_due in zip(samples, found, strict=True) if is_due]

    # ---- forwards

    def _prefill(self, group: list[list[Sample]]) -> list[Delta]:
        """Read the prompts of a group, or what there is of a sample, draw the next token of each
        sample, and join the batch.
        """
        device = next(self._model.parameters()).device
        requests = [samples[0].request for samples in group]
        ids, mask = pad_left([samples[0].known_ids for samples in group], 0, device)
        cache = DynamicCache(config=base_model(self._model).config)
        logits = self._forward(
            [r.adapter for r in requests],
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            past_key_values=cache,
        )
        if not self._keeps_states and filled_width(cache) != mask.shape[1]:
            raise ConfigError(
                "engine transformers: this model's forward, which another package has patched, "
                "fills no cache; train with engine='transformers'"
            )
        samples = [sample for own in group for sample in own]
        if len(samples) > len(group):
            rows = [index for index, own in enumerate(group) for _ in own]
            order = torch.tensor(rows, device=device)
            keep_rows(cache, order)
            mask, logits = mask[order], logits[order]
        batch = _Batch(samples, cache, mask, logits.shape[-1])
        deltas = batch.draw(logits)
        waiting, self._batch = self._batch, batch
        self._drop_finished()
        if waiting is not None and self._batch is not None:
            waiting.join(self._batch)
        self._batch = waiting or self._batch
        return deltas

    def _decode(self) -> list[Delta]:
        batch = self._batch
        assert batch is not None
        positions = batch.mask.sum(-1, keepdim=True)
        batch.mask = torch.cat([batch.mask, batch.mask.new_ones(len(batch.mask), 1)], 1)
        logits = self._forward(
            [s.request.adapter for s in batch.samples],
            input_ids=batch.tokens[:, None],
            attention_mask=batch.mask,
            position_ids=positions,
            past_key_values=batch.cache,
        )
        deltas = batch.draw(logits)
        self._drop_finished()
        return deltas

    def _drop_finished(self) -> None:
        assert self._batch is not None
        self._keep([not sample.is_finished for sample in self._batch.samples])

    def _forward(self, adapters: Sequence[str | None], **inputs: Any) -> Tensor:
        """Logits of the last position, shape (B, V)."""
        if self._keeps_logits:
            # By index, which copies them: of a slice that lies among the others, a CPU would make a
            # copy of the head for each row.
            inputs["logits_to_keep"] = inputs["input_ids"].new_tensor([-1])
        if self._routes:
            inputs["output_router_logits"] = False
        if self._keeps_states:
            inputs["cache_params"] = inputs.pop("past_key_values")
            if inputs["input_ids"].shape[1] == 1:  # the mask is for the tokens of a prompt
                del inputs["attention_mask"]
        active = active_adapter(self._model)
        if self._mixes and any(name != active for name in adapters):
            names = list(map(peft_name, adapters))
            return self._model(**inputs, use_cache=True, adapter_names=names).logits[:, -1]
        with acting(self._model, adapters[0]):
            return base_model(self._model)(**inputs, use_cache=True).logits[:, -1]


class _Batch:
    """Samples that grow together, a row each.

    Attributes:
        mask: Shape (B, T), 0 for padding on the left.
        tokens: Shape (B,), what each row has drawn last.
    """

    def __init__(
        self, samples: list[Sample], cache: DynamicCache, mask: Tensor, vocabulary: int
    ) -> None:
        self.samples, self.cache, self.mask = samples, cache, mask
        self.tokens = torch.zeros(len(samples), dtype=torch.long, device=mask.device)
        self._vocabulary = vocabulary
        self._counts: Tensor | None = None  # (B, V) once a row has penalties
        self._set_rows()

    def _set_rows(self) -> None:
        self._rows = Rows.of(
            [s.request.params for s in self.samples],
            [s.key for s in self.samples],
            [s.ends for s in self.samples],
            self._vocabulary,
            self.mask.device,
        )
        if self._rows.penalizes and self._counts is None:
            self._counts = self.mask.new_zeros(len(self.samples), self._vocabulary)
            for own, sample in zip(self._counts, self.samples, strict=True):
                drawn = torch.tensor(sample.drawn, dtype=torch.long, device=own.device)
                own.scatter_add_(0, drawn, torch.ones_like(drawn))

    def draw(self, logits: Tensor) -> list[Delta]:
        """The next token of each row, from logits of shape (B, V)."""
        counts = [s.count for s in self.samples]
        positions = torch.tensor(counts, device=logits.device)
        self.tokens = select(logits, self._rows, positions, self._counts)
        if self._counts is not None:
            self._counts.scatter_add_(1, self.tokens[:, None], torch.ones_like(self._counts))
        chosen = [[token] for token in self.tokens.tolist()]
        if not any(s.request.params.logprobs for s in self.samples):
            return [s.push(token) for s, token in zip(self.samples, chosen, strict=True)]
        values = log_probs(logits, self.tokens, self._rows).tolist()
        tops = self._tops(logits)
        return [
            s.push(token, [value], [top] if s.request.params.top_logprobs else ())
            if s.request.params.logprobs
            else s.push(token)
            for s, token, value, top in zip(self.samples, chosen, values, tops, strict=True)
        ]

    def _tops(self, logits: Tensor) -> list[dict[int, float]]:
        wanted = [s.request.params.top_logprobs for s in self.samples]
        if not any(wanted):
            return [{} for _ in wanted]
        values, ids = top_log_probs(logits, max(wanted), self._rows)
        rows = zip(ids.tolist(), values.tolist(), wanted, strict=True)
        return [dict(zip(i[:count], v[:count], strict=True)) for i, v, count in rows]

    def keep(self, rows: list[int]) -> None:
        """Only these rows, and only the columns that they need."""
        order = torch.tensor(rows, device=self.mask.device)
        self.samples = [self.samples[index] for index in rows]
        keep_rows(self.cache, order)
        self.tokens, self.mask = self.tokens[order], self.mask[order]
        if self._counts is not None:
            self._counts = self._counts[order]
        width = int(self.mask.sum(-1).max())
        if width < self.mask.shape[1] and can_join(self.cache):
            self._set_width(width)
        self._set_rows()

    def join(self, other: _Batch) -> None:
        """Take the rows of another batch in."""
        width = max(self.mask.shape[1], other.mask.shape[1])
        self._set_width(width)
        other._set_width(width)
        if self._counts is not None or other._counts is not None:
            self._counts = torch.cat([self._all_counts(), other._all_counts()])
        join(self.cache, other.cache)
        self.samples = [*self.samples, *other.samples]
        self.tokens = torch.cat([self.tokens, other.tokens])
        self.mask = torch.cat([self.mask, other.mask])
        self._set_rows()

    def _set_width(self, width: int) -> None:
        set_width(self.cache, width)
        self.mask = nn.functional.pad(self.mask, (width - self.mask.shape[1], 0))

    def _all_counts(self) -> Tensor:
        if self._counts is not None:
            return self._counts
        # Rows that joined without penalties need no counts.
        return self.mask.new_zeros(len(self.mask), self._vocabulary)


def _final_length(sample: Sample) -> int:
    return len(sample.request.prompt_ids) + sample.limit


def _groups(admitted: list[list[Sample]]) -> Iterator[list[list[Sample]]]:
    """Requests of similar lengths, which are read together without much padding."""
    group: list[list[Sample]] = []
    for samples in sorted(admitted, key=lambda own: len(own[0].known_ids)):
        length = len(samples[0].known_ids)
        if group:
            shortest = len(group[0][0].known_ids)
            if length > 1.5 * shortest + 16 or length * (len(group) + 1) > PREFILL_TOKENS:
                yield group
                group = []
        group.append(samples)
    yield group
