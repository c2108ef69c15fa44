"""Sampling on CUDA through captured decode steps: the `cuda_graph` rollout engine.

Prompts are prefilled in slices, then one graph is replayed for each token: decode step, sampling
and bookkeeping, without the host. Every `CHECK_STEPS` tokens the host looks how many rows are done;
when a smaller batch would do, the living rows move to the front and a smaller graph takes over.
Caches and graphs are kept from call to call, and the adapters are read where they are trained.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from openweights.generation.cuda.decoder import KVCache, LlamaDecoder, UnsupportedModelError
from openweights.generation.engine import Rollout, cut_at_eos, seeded
from openweights.generation.params import SamplingParams
from openweights.models.tokens import pad_right

CHECK_STEPS = 16
PREFILL_TOKENS = 16_384
SMALLEST_BATCH = 4
POSITION_STEP = 128
# Halves of a head are operands of tensor cores, which take 16 at least.
HEAD_DIMS = (32, 64, 128, 256)


class GraphRollout:
    """`RolloutEngine` for models that `LlamaDecoder` computes; greedy-equal to `generate`.

    Args:
        base: The causal language model, adapters included.
        pad_token_id: Fills up prompts and finished rows.

    Raises:
        UnsupportedModelError: Another kind of model.
    """

    def __init__(self, base: nn.Module, pad_token_id: int) -> None:
        from openweights.generation.cuda import triton_ops

        self._decoder = LlamaDecoder(base, triton_ops)
        if self._decoder.head_dim not in HEAD_DIMS:
            raise UnsupportedModelError(f"heads of {self._decoder.head_dim} dimensions")
        self._pad_token_id = pad_token_id
        self._session: _Session | None = None

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, *, seed: int
    ) -> Rollout:
        """See `RolloutEngine`."""
        started = time.perf_counter()
        device = self._decoder.embedding.device
        with torch.no_grad(), seeded(seed, device):
            self._decoder.refresh()
            longest = max(map(len, prompts)) + params.max_new_tokens
            session = self._session_for(len(prompts), longest, params)
            session.prefill(prompts)
            rows = session.decode()
        cut = [cut_at_eos(row, params.stop_token_ids or ()) for row in rows]
        return Rollout(
            completions=[row for row, _ in cut],
            ended=[ended for _, ended in cut],
            seconds=time.perf_counter() - started,
        )

    def _session_for(self, rows: int, positions: int, params: SamplingParams) -> _Session:
        """The kept caches and graphs, or new ones when these are too small."""
        kept = self._session
        if kept is None or not kept.fits(rows, positions, params):
            self._session = kept = None
            positions = -(-positions // POSITION_STEP) * POSITION_STEP
            kept = _Session(self._decoder, rows, positions, params, self._pad_token_id)
            self._session = kept
        kept.start(rows)
        return kept


class _Session:
    """Static buffers for up to so many rows, and the graphs that work on their first rows."""

    def __init__(
        self,
        decoder: LlamaDecoder,
        rows: int,
        positions: int,
        params: SamplingParams,
        pad_token_id: int,
    ) -> None:
        device = decoder.embedding.device
        decoder.prepare(positions)
        self._decoder, self._params, self._pad = decoder, params, pad_token_id
        self._cache = KVCache(decoder, rows, positions)
        self._tokens = torch.zeros(rows, dtype=torch.long, device=device)
        self._positions = torch.zeros_like(self._tokens)
        self._done = torch.zeros(rows, dtype=torch.bool, device=device)
        self._count = torch.zeros(1, dtype=torch.long, device=device)
        self._out = torch.zeros(rows, params.max_new_tokens, dtype=torch.long, device=device)
        self._eos = torch.tensor(params.stop_token_ids or (), dtype=torch.long, device=device)
        self._graphs: dict[int, Callable[[], None]] = {}
        self._rows = rows

    def fits(self, rows: int, positions: int, params: SamplingParams) -> bool:
        """Whether the buffers are large enough, and not more than twice too many rows."""
        enough = rows <= self._cache.rows < 2 * rows + 1 and positions <= self._cache.positions
        return enough and params == self._params

    def start(self, rows: int) -> None:
        """Begin anew with so many rows."""
        self._rows = rows
        self._done.fill_(False)
        self._out.fill_(self._pad)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> None:
        """Fill the cache and sample each row's first token."""
        device = self._tokens.device
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        self._positions[: self._rows] = lengths
        at_once = max(1, PREFILL_TOKENS // max(map(len, prompts)))
        logits = []
        for start in range(0, self._rows, at_once):
            part = prompts[start : start + at_once]
            ids, _ = pad_right(part, self._pad)
            part_lengths = lengths[start : start + at_once]
            logits.append(self._decoder.prefill(ids.to(device), part_lengths, self._cache, start))
        self._count.zero_()
        self._take(torch.cat(logits), self._rows)

    def decode(self) -> list[list[int]]:
        """Replay until every row is done; returns the rows' tokens in their order."""
        results: list[list[int]] = [[] for _ in range(self._rows)]
        row_ids = list(range(self._rows))
        batch = self._rows
        steps = self._params.max_new_tokens - 1
        for step in range(steps):
            if step % CHECK_STEPS == 0:
                living = (~self._done[:batch]).nonzero()[:, 0]
                smaller = _smaller_batch(batch, len(living))
                if len(living) == 0:
                    break
                if smaller < batch:
                    self._save(results, row_ids)
                    row_ids = [row_ids[i] for i in self._compact(living, smaller)]
                    batch = smaller
            self._graph(batch)()
        self._save(results, row_ids)
        return results

    def _save(self, results: list[list[int]], row_ids: list[int]) -> None:
        for row_id, tokens in zip(row_ids, self._out[: len(row_ids)].tolist(), strict=True):
            results[row_id] = tokens

    def _compact(self, living: Tensor, batch: int) -> list[int]:
        """Living rows to the front, filled up to `batch` with rows that are done."""
        finished = self._done[: self._rows].nonzero()[:, 0]
        order = torch.cat([living, finished[: batch - len(living)]]).sort().values
        self._cache.keep(order)
        for buffer in (self._tokens, self._positions, self._done, self._out):
            buffer[:batch] = buffer[order]
        return order.tolist()

    def _graph(self, batch: int) -> Callable[[], None]:
        if batch not in self._graphs:
            self._graphs[batch] = self._capture(batch)
        return self._graphs[batch]

    def _capture(self, batch: int) -> Callable[[], None]:
        state = [
            (buffer, buffer.clone())
            for buffer in (self._tokens, self._positions, self._done, self._count, self._out)
        ]
        rng = torch.cuda.get_rng_state()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles the kernels, lets cuBLAS choose
                self._step(batch)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step(batch)
        # The warm-up was real: what it sampled is taken back. The cache needs nothing, its
        # positions are written again before they are read.
        for buffer, before in state:
            buffer.copy_(before)
        torch.cuda.set_rng_state(rng)
        return graph.replay

    def _step(self, batch: int) -> None:
        logits = self._decoder.step(self._tokens[:batch], self._positions[:batch], self._cache)
        self._positions[:batch] += 1
        self._take(logits, batch)

    def _take(self, logits: Tensor, batch: int) -> None:
        """Sample, record, and note who is done."""
        token = sample(logits, self._params.temperature, self._params.top_p)
        done = self._done[:batch]
        token = torch.where(done, self._pad, token)
        self._tokens[:batch] = token
        self._out[:batch].index_copy_(1, self._count, token[:, None])
        done |= (token[:, None] == self._eos).any(-1)
        self._count += 1


def sample(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """One token a row from logits of shape (B, V), without the host: exponential race.

    argmax of p / e with e ~ Exp(1) is a sample of p.
    """
    probabilities = (logits.float() / temperature).softmax(-1)
    if top_p < 1:
        ordered, ids = probabilities.sort(-1, descending=True)
        ordered[ordered.cumsum(-1) - ordered >= top_p] = 0
        probabilities = torch.zeros_like(probabilities).scatter_(-1, ids, ordered)
    race = torch.empty_like(probabilities).exponential_()
    return (probabilities / race).argmax(-1)


def _smaller_batch(batch: int, living: int) -> int:
    """The smallest halving of `batch` that holds the living rows."""
    while batch // 2 >= max(living, SMALLEST_BATCH):
        batch //= 2
    return batch
