"""The `cuda_graph` engine: captured decode steps over a paged cache, with the batch kept full.

Prompts are computed in slices between blocks of decode steps. A row that has finished gives its
place to a waiting sample at the end of its block; samples of a request fork from one prompt, and
prompts that begin alike share the pages of what they have in common. Adapters that are trained are
read where they are trained, whenever the engine begins anew.

Everything but capture and kernels runs on a CPU as well, where the tests compare it with
`generate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from openweights.errors import ConfigError, InvalidStateError
from openweights.generation.cuda.decoder import Decoder
from openweights.generation.cuda.linear import UnsupportedModelError
from openweights.generation.cuda.pages import PagePool
from openweights.generation.cuda.runner import Runner
from openweights.generation.cuda.scheduler import Member, Scheduler, Work
from openweights.generation.cuda.steps import BLOCK_STEPS, Drawn, RowState
from openweights.generation.engine import GenerationEngine, check_request
from openweights.generation.params import Delta, GenerationRequest
from openweights.generation.samples import Sample
from openweights.generation.selection import row_key
from openweights.models.adapters import (
    adapter_names,
    has_own_weights,
    peft_name,
    with_adapter,
    without_adapter,
)
from openweights.models.forward import base_model
from openweights.models.tokens import eos_token_ids

PAGE_SIZE = 64
ROWS = 128
SLICE_TOKENS = 2_048  # of prompts between two blocks, while almost all rows decode
PREFILL_TOKENS = 16_384  # while few do
WAITING_BLOCK_STEPS = 8  # a row that finishes within a block is idle for the rest of it
POOL_STEP = 64  # pages by which the pool grows
# Halves of a head are operands of tensor cores, which take 16 at least.
HEAD_DIMS = (32, 64, 128, 256)


@dataclass(slots=True)
class _Growing:
    """A sample as it grows."""

    sample: Sample
    key: tuple[int, int]
    tokens: list[int] = field(default_factory=list[int])


class CudaGraphEngine(GenerationEngine):
    """`GenerationEngine` for models that `Decoder` computes; greedy-equal to `generate`.

    Args:
        model: The causal language model, with its adapters.
        tokenizer: Decodes completions, and knows what ends them; None where requests ask for no
            texts and name what ends them.
        rows: How many samples are worked on at a time.
        precision: "fp8" decodes with fp8 copies of the layers' weights: half of the bytes that a
            step reads, for half as much memory again as the weights take. "model" for none.
        page_size: Positions of a page of the cache.

    Raises:
        UnsupportedModelError: Another kind of model.
    """

    name = "cuda_graph"

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        rows: int = ROWS,
        precision: str = "model",
        page_size: int = PAGE_SIZE,
    ) -> None:
        self._model: Any = model
        self._tokenizer = tokenizer
        self._narrow = precision == "fp8"
        self.is_exact = not self._narrow
        self._row_limit, self._page_size = rows, page_size
        base = base_model(model)
        self.end_token_ids = tuple(eos_token_ids(base, tokenizer) if tokenizer else ())
        self.max_length = int(base.config.get_text_config().max_position_embeddings)
        self.vocabulary = int(base.config.get_text_config().vocab_size)
        self._growing: dict[tuple[str, int], _Growing] = {}
        self._submitted: list[Work] = []
        self._adapter_names: tuple[str, ...] = ()
        self._scheduler = Scheduler(PagePool(0, page_size), rows)
        self._decoder = self._read_model()
        self._runner = Runner(self._decoder, rows, page_size, self.max_length, narrow=self._narrow)

    def _read_model(self) -> Decoder:
        """A decoder for the adapters that the model has now."""
        self._adapter_names = adapter_names(self._model)
        base = base_model(self._model)
        if has_own_weights(self._model):
            raise UnsupportedModelError("an adapter with weights of the base's own layers")
        written = [peft_name(name) for name in self._adapter_names]
        decoder = Decoder(base, written, _ops(base), narrow=self._narrow)
        if decoder.device.type == "cuda" and decoder.head_dim not in HEAD_DIMS:
            raise UnsupportedModelError(f"heads of {decoder.head_dim} dimensions")
        return decoder

    def set_adapter(self, name: str, folder: Path) -> None:
        """See `GenerationEngine`."""
        self._refuse_in_use(name)
        try:
            self._model = with_adapter(self._model, name, folder)
            self._adapters_changed()
        except ConfigError:
            self._adapters_changed()
            raise
        except UnsupportedModelError as error:
            self.remove_adapter(name)
            raise ConfigError(
                f"adapter {name!r}: engine cuda_graph cannot compute it ({error}); use engine "
                "'transformers'"
            ) from None

    def remove_adapter(self, name: str) -> None:
        """See `GenerationEngine`."""
        if name not in self._adapter_names:
            raise ConfigError(f"adapter {name!r}: is not loaded")
        self._refuse_in_use(name)
        self._model = without_adapter(self._model, name)
        self._adapters_changed()

    def _refuse_in_use(self, name: str) -> None:
        if any(g.sample.request.adapter == name for g in self._growing.values()):
            raise InvalidStateError(f"adapter {name!r}: is in use; wait for its requests")

    def _adapters_changed(self) -> None:
        self._decoder = self._read_model()
        self._runner.replace_decoder(self._decoder)
        self._scheduler.pool.forget()

    @property
    def adapters(self) -> tuple[str, ...]:
        """See `GenerationEngine`."""
        return self._adapter_names

    @property
    def is_idle(self) -> bool:
        """See `GenerationEngine`."""
        return not self._submitted and self._scheduler.is_idle

    def submit(self, request: GenerationRequest) -> None:
        """See `GenerationEngine`."""
        check_request(self, request)
        room = self.max_length - len(request.prompt_ids)
        tokens = len(request.prompt_ids) + min(request.params.max_new_tokens, room)
        self._check_memory(self._scheduler.pool.pages_for(tokens), self._runner.page_limit())
        for index in range(request.params.n):
            sample = Sample(request, index, self._tokenizer, self.end_token_ids, self.max_length)
            self._growing[request.id, index] = _Growing(sample, row_key(request, index))
        prompt = list(request.prompt_ids)
        self._submitted.append(Work(request.id, prompt, request.params.n, tokens, request.adapter))

    def abort(self, request_id: str) -> None:
        """See `GenerationEngine`."""
        self._submitted = [work for work in self._submitted if work.id != request_id]
        self._scheduler.abort(request_id)
        for key in [key for key in self._growing if key[0] == request_id]:
            del self._growing[key]

    @torch.no_grad()
    def step(self) -> list[Delta]:
        """See `GenerationEngine`; a step is a slice of prompts and a block of tokens."""
        if self.is_idle:
            return []
        try:
            with torch.autocast(self._decoder.device.type, enabled=False), self._on_device():
                self._take_submitted()
                self._admit()
                deltas = self._compute_prompts()
                return deltas + self._decode()
        except Exception:
            # Pages have their names before they are computed, which these may not have been.
            self._scheduler.pool.forget()
            raise

    def _on_device(self) -> AbstractContextManager[Any]:
        device = self._decoder.device
        return torch.cuda.device(device) if device.type == "cuda" else nullcontext()

    def _take_submitted(self) -> None:
        """Hand requests to the scheduler, as far as the cache is large enough for them."""
        if self._submitted and self._scheduler.is_idle:
            self._begin()
        while self._submitted and self._fits(self._submitted[0]):
            self._scheduler.submit(self._submitted.pop(0))

    def _admit(self) -> None:
        """Give rows and pages to who waits; where pages alone are missing, the cache grows while
        there is memory, by half at least, since captured steps are lost with each time.
        """
        self._runner.seat(self._scheduler.admit())
        lacked, pool = self._lacked_pages(), self._scheduler.pool
        if not lacked:
            return
        wanted = _in_steps(pool.count + max(lacked, pool.count // 2))
        pages = min(wanted, self._runner.page_limit(keeping=True))
        if pages >= pool.count + POOL_STEP and self._runner.grow(pages):
            pool.grow(pages)
            self._take_submitted()
            self._runner.seat(self._scheduler.admit())

    def _lacked_pages(self) -> int:
        if self._submitted and not self._scheduler.waits:  # the next one is larger than the cache
            return self._scheduler.pool.pages_for(self._submitted[0].tokens)
        return self._scheduler.lacked_pages

    def _fits(self, work: Work) -> bool:
        return self._scheduler.pool.pages_for(work.tokens) <= self._scheduler.pool.count

    def _begin(self) -> None:
        """Read what may have been trained since, and see that the cache is large enough."""
        parameters = list(base_model(self._model).parameters())
        if any(parameter.requires_grad for parameter in parameters):
            self._decoder.refresh()
            self._scheduler.pool.forget()
        pages = self._wanted_pages()
        if pages > self._scheduler.pool.count:
            self._runner.resize(pages)
            self._scheduler = Scheduler(PagePool(pages, self._page_size), self._row_limit)

    def _wanted_pages(self) -> int:
        """Pages for as many of the largest samples as there are rows, or as memory holds.

        Raises:
            ConfigError: There is no memory for one of them.
        """
        needs = [-(-work.tokens // self._page_size) for work in self._submitted]
        each = [
            n for work, n in zip(self._submitted, needs, strict=True) for _ in range(work.samples)
        ]
        wanted = sum(sorted(each)[-self._row_limit :])
        limit = self._runner.page_limit()
        self._check_memory(max(needs), limit)
        return min(limit, _in_steps(wanted))

    def _check_memory(self, pages: int, limit: int) -> None:
        if pages > limit:
            raise ConfigError(
                f"max_new_tokens: a prompt and its completion may have {pages} pages of "
                f"{self._page_size} tokens, and there is memory for {limit}; ask for fewer tokens"
            )

    def _compute_prompts(self) -> list[Delta]:
        """A slice of the prompts that wait, or all of them while few rows decode."""
        deltas: list[Delta] = []
        while computing := self._scheduler.computing:
            running = len(self._scheduler.running)
            few = running < computing
            slices = self._scheduler.slices(slice_tokens(computing, running))
            starts = [member for part in slices for member in part.starts]
            drawn = self._runner.prefill(
                slices,
                [self._adapter_of(part.member.work) for part in slices],
                [self._state(member) for member in starts],
            )
            if drawn is not None:
                deltas += self._push(starts, drawn)
            if not few:
                break
        return deltas

    def _decode(self) -> list[Delta]:
        members = self._scheduler.running
        if not members:
            return []
        left = max(self._left(member) for member in members)
        most = WAITING_BLOCK_STEPS if self._scheduler.waits else BLOCK_STEPS
        drawn = self._runner.decode([self._state(member) for member in members], min(left, most))
        return self._push(members, drawn)

    def _push(self, members: Sequence[Member], drawn: Drawn) -> list[Delta]:
        """Give the samples their tokens; rows of those that are finished become free."""
        deltas: list[Delta] = []
        for row, member in enumerate(members):
            growing = self._growing[member.work.id, member.sample]
            delta = growing.sample.push(*drawn.of(row, growing.sample.request.params))
            growing.tokens += delta.token_ids
            deltas.append(delta)
            if growing.sample.is_finished:
                self._scheduler.finish(member)
                del self._growing[member.work.id, member.sample]
        return deltas

    def _left(self, member: Member) -> int:
        sample = self._growing[member.work.id, member.sample].sample
        return sample.limit - sample.count

    def _adapter_of(self, work: Work) -> int:
        return -1 if work.owner is None else self._adapter_names.index(work.owner)

    def _state(self, member: Member) -> RowState:
        growing = self._growing[member.work.id, member.sample]
        count, prompt = len(growing.tokens), member.work.prompt
        return RowState(
            request=growing.sample.request,
            key=growing.key,
            ends=growing.sample.ends,
            token=growing.tokens[-1] if count else prompt[-1],
            position=len(prompt) + count - 1,
            generated=count,
            row=member.row,
            adapter=self._adapter_of(member.work),
            limit=member.work.tokens - 1,
            completion=growing.tokens,
        )


def _in_steps(pages: int) -> int:
    return -(-pages // POOL_STEP) * POOL_STEP


def slice_tokens(computing: int, running: int) -> int:
    """How many tokens of prompts are computed between two blocks of decode steps.

    Rows that decode wait for them, and rows whose prompts are computed are idle until then; so the
    slice grows with the share of the latter. One of a fixed size falls behind where answers are
    short: more prompts come in a block than it holds, and ever more rows are idle.
    """
    if running <= computing:
        return PREFILL_TOKENS
    return min(PREFILL_TOKENS, max(SLICE_TOKENS, 2 * PREFILL_TOKENS * computing // running))


def _ops(base: Any) -> Any:
    """The fused operations for the device that a model is on."""
    if next(base.parameters()).device.type != "cuda":
        from openweights.generation.cuda import torch_ops

        return torch_ops
    from openweights.generation.cuda import triton_ops

    return triton_ops
