"""Each Triton kernel against what `torch_ops` says it computes, and the captured engine against
`generate`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from openweights.generation.cuda import torch_ops
from openweights.generation.cuda.batch import Piece, TokenBatch, prefill_batch
from openweights.generation.cuda.decoder import Decoder, PagedCache
from openweights.generation.cuda.graph_engine import CudaGraphEngine
from openweights.generation.cuda.steps import Asked, RowState, Steps, rows_of
from openweights.generation.cuda.torch_ops import Norm
from openweights.generation.params import GenerationRequest, SamplingParams
from openweights.generation.selection import Rows
from openweights.models.tokens import pad_left
from tests.generation.cuda.test_decoder import (
    ARCHITECTURES,
    EVERYWHERE,
    PROMPTS,
    completed,
    is_tie,
    make_model,
    pack,
)
from tests.rounding import assert_sums_equal

pytestmark = pytest.mark.gpu

PAGE, PAGES = 64, 40
# Relative to the norm of what is expected: a few roundings of the type.
TYPES = [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)]


@pytest.fixture
def triton_ops() -> Any:
    from openweights.generation.cuda import triton_ops

    torch.manual_seed(0)
    return triton_ops


def near(actual: Tensor, expected: Tensor, tolerance: float) -> bool:
    """False for NaN."""
    difference = (actual.double() - expected.double()).norm()
    return bool(difference <= tolerance * expected.double().norm())


def random(*shape: int, dtype: torch.dtype, strided: bool = False) -> Tensor:
    """On the GPU; a strided one is a view of a wider matrix, as outputs beside adapters are."""
    *rest, last = shape
    wide = torch.randn(*rest, last + 16 * strided, device="cuda").to(dtype)
    return wide[..., :last]


@pytest.mark.parametrize(("dtype", "tolerance"), TYPES)
@pytest.mark.parametrize("from_one", [False, True])
@pytest.mark.parametrize(("rows", "size"), [(1, 64), (7, 3584), (33, 1000)])
def test_norms(
    triton_ops: Any, dtype: torch.dtype, tolerance: float, from_one: bool, rows: int, size: int
) -> None:
    x = random(rows, size, dtype=dtype, strided=True)
    residual = random(rows, size, dtype=dtype)
    norm = Norm(random(size, dtype=dtype), 1e-6, from_one)
    for post in (None, Norm(random(size, dtype=dtype), 1e-5, from_one)):
        sums = [residual.clone(), residual.clone()]
        expected = torch_ops.add_norm(x, sums[0], norm, post)
        assert near(triton_ops.add_norm(x, sums[1], norm, post), expected, tolerance)
        assert near(sums[1], sums[0], tolerance)
    assert near(triton_ops.rms_norm(x.contiguous(), norm), torch_ops.rms_norm(x, norm), tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), TYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_gates(triton_ops: Any, dtype: torch.dtype, tolerance: float, activation: str) -> None:
    both = random(5, 2400, dtype=dtype, strided=True)
    expected = torch_ops.gated(both, activation)
    assert near(triton_ops.gated(both, activation), expected, tolerance)


def batches(group: int) -> list[TokenBatch]:
    """Slices of prompts of several lengths, and a decode step at the borders of pages."""
    tables = torch.randperm(PAGES, device="cuda")[:32].view(4, 8).int()
    slices = [
        Piece(0, 0, [1] * 137, -1),
        Piece(2, 20, [1] * 9, 0),
        Piece(1, 299, [1], 1),
        Piece(3, 100, [1] * 200, 0),
    ]
    steps = [Piece(row, at, [1], -1) for row, at in enumerate((0, 63, 64, 500))]
    return [
        prefill_batch(slices, tables, PAGE, max(1, 64 // group)),
        prefill_batch(steps, tables, PAGE, 1),
    ]


@pytest.mark.parametrize(("dtype", "tolerance"), TYPES)
@pytest.mark.parametrize(
    ("kv_heads", "group", "dim", "window"),
    [(2, 2, 32, 0), (1, 7, 64, 5), (4, 7, 128, 0), (2, 3, 32, 40), (1, 4, 256, 0), (2, 4, 128, 64)],
)
def test_attention(
    triton_ops: Any,
    dtype: torch.dtype,
    tolerance: float,
    kv_heads: int,
    group: int,
    dim: int,
    window: int,
) -> None:
    for batch in batches(group):
        qkv = random(len(batch.ids), (group + 2) * kv_heads * dim, dtype=dtype, strided=True)
        cos, sin = random(2, 512, dim // 2, dtype=dtype)
        cache = random(2, PAGES, kv_heads, PAGE, dim, dtype=dtype)
        weights = random(2, dim, dtype=dtype)
        for from_one in (None, False, True):
            norms = None
            if from_one is not None:
                norms = Norm(weights[0], 1e-6, from_one), Norm(weights[1], 1e-5, from_one)
            (q, own), (other_q, other) = ((qkv.clone(), cache.clone()) for _ in range(2))
            torch_ops.rotate_and_store(q, cos, sin, batch, *own, norms)
            triton_ops.rotate_and_store(other_q, cos, sin, batch, *other, norms)
            assert near(other_q, q, tolerance) and near(other, own, tolerance)
        expected = torch_ops.attend(q, batch, *own, dim**-0.5, window)
        # Poison: what lies behind a sequence's last position must not be read.
        poisoned = own.clone()
        _poison(poisoned, batch)
        actual = triton_ops.attend(q, batch, *poisoned, dim**-0.5, window)
        assert near(actual, expected, tolerance)


def _poison(cache: Tensor, batch: TokenBatch) -> None:
    last = [0] * len(batch.tables)
    for row, position in zip(batch.rows.tolist(), batch.positions.tolist(), strict=True):
        last[row] = max(last[row], position)
    for row, position in enumerate(last):
        pages = batch.tables[row].long()
        cache[:, pages[position // PAGE], :, position % PAGE + 1 :] = float("nan")
        cache[:, pages[position // PAGE + 1 :]] = float("nan")


@pytest.mark.parametrize(("dtype", "tolerance"), TYPES)
@pytest.mark.parametrize("outputs", [[96], [200, 64], [160, 32, 32], [3584, 512, 512]])
@pytest.mark.parametrize(("adapters", "rank"), [(1, 16), (3, 32), (2, 48)])
@pytest.mark.parametrize("rows", [1, 21, 300])
def test_adapters(
    triton_ops: Any,
    dtype: torch.dtype,
    tolerance: float,
    outputs: Sequence[int],
    adapters: int,
    rank: int,
    rows: int,
) -> None:
    width = sum(outputs)
    both = random(rows, width + len(outputs) * adapters * rank, dtype=dtype)
    up = random(adapters * rank, width, dtype=dtype)
    of_rows = torch.randint(-1, adapters, (rows,), device="cuda").int()
    expected, actual = both.clone(), both.clone()
    for ops, result in ((torch_ops, expected), (triton_ops, actual)):
        ops.add_adapters(result[:, :width], result[:, width:], up, of_rows, rank, outputs)
    assert near(actual, expected, tolerance)


@pytest.mark.parametrize(("adapters", "rank"), [(0, 0), (2, 32)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_fp8_products(triton_ops: Any, adapters: int, rank: int, has_bias: bool) -> None:
    outputs = [3584, 512, 512]
    inner = len(outputs) * adapters * rank
    x = random(32, 3584, dtype=torch.bfloat16)
    weight, scale = torch_ops.narrowed(random(sum(outputs) + inner, 3584, dtype=torch.bfloat16))
    bias = random(sum(outputs) + inner, dtype=torch.bfloat16) if has_bias else None
    up = random(adapters * rank, sum(outputs), dtype=torch.bfloat16)
    of_rows = torch.arange(32, device="cuda").int() % 3 - 1
    arguments = (x, weight, scale, bias, up, of_rows, rank, outputs)
    expected = torch_ops.narrow_linear(*arguments)
    assert near(triton_ops.narrow_linear(*arguments), expected, 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_draws(triton_ops: Any, dtype: torch.dtype) -> None:
    params = [
        SamplingParams(temperature=t, logprobs_after_temperature=True)
        for t in (0.0, 1.0, 0.7, 2.0) * 16
    ]
    keys = [(i * 60_000_000 - 2**31, -i * 12_345_678) for i in range(len(params))]
    rows = Rows.of(params, keys, [()] * len(params), 152_064, "cuda")
    logits = random(len(params), 152_064, dtype=dtype) * 3
    for position in (0, 1, 977):
        positions = torch.full((len(params),), position, device="cuda")
        tokens, own = triton_ops.draw(logits, rows, positions)
        expected, scores = torch_ops.draw(logits, rows, positions)
        same = tokens == expected
        assert same.float().mean() > 0.95, "but for ties to rounding"
        # Sums over the vocabulary, by 1,024 threads and then over these.
        assert_sums_equal(own[same], scores[same], 152_064 // 1024 + 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_completions_equal_those_of_generate(name: str, dtype: torch.dtype) -> None:
    """In bfloat16 up to ties."""
    if "experts" in name and dtype == torch.bfloat16:
        pytest.skip("a tie between experts changes more than a tie between tokens")
    config, changes, modules = ARCHITECTURES[name]
    model = make_model(config, modules, **changes).to("cuda", dtype)
    check_greedy(model, exact=copy.deepcopy(model).float() if dtype == torch.bfloat16 else None)


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_captured_steps_are_the_uncaptured_ones(triton_ops: Any, name: str) -> None:
    config, changes, modules = ARCHITECTURES[name]
    model = make_model(config, modules, **changes).to("cuda", torch.bfloat16)
    decoder = Decoder(model.get_base_model(), ("default",), triton_ops)
    decoder.prepare(64)
    assert decoder.can_be_captured
    params = SamplingParams(logprobs=True)
    states = [
        RowState(
            GenerationRequest([token], params), (token, 1), frozenset(), token, 0, 0, row, 0, 63, []
        )
        for row, token in enumerate((5, 17, 80))
    ]
    tables = torch.arange(4, dtype=torch.int32, device="cuda")[:, None]
    rows = rows_of(states, 4, decoder.vocabulary, "cuda")
    plain, captured = (
        Steps(
            decoder,
            PagedCache(decoder, 4, PAGE),
            tables,
            rows,
            Asked(log_probs=True, top_count=0),
            narrow=False,
            memory=memory,
        ).run(states, rows, 12)
        for memory in (None, torch.cuda.graph_pool_handle())
    )
    assert plain == captured


def test_a_cache_that_grows_takes_its_captured_steps_along() -> None:
    config, changes, modules = ARCHITECTURES["llama"]
    model = make_model(config, modules, **changes).to("cuda")
    engine = CudaGraphEngine(model, None, rows=4)
    before = completed(engine)
    many = SamplingParams(
        max_new_tokens=150, temperature=0, stop_token_ids=(), detokenize=False, n=4
    )
    completed(engine, params=many)
    assert completed(engine) == before


def test_four_bit_bases() -> None:
    pytest.importorskip("bitsandbytes")
    model = make_model(*ARCHITECTURES["llama"][:1], EVERYWHERE).to("cuda", torch.bfloat16)
    pack(model.get_base_model(), torch.bfloat16)
    check_greedy(model, exact=model)


def check_greedy(model: Any, exact: Any) -> None:
    """Where the engine and `generate` part, the two tokens are a tie to rounding.

    Args:
        exact: The same weights in float32, which say how far `generate` itself is off; None where
            no difference is allowed.
    """
    ids, mask = pad_left(PROMPTS, 0, torch.device("cuda"))
    output = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    answers = output[:, ids.shape[1] :].tolist()
    for prompt, own, other in zip(
        PROMPTS, completed(CudaGraphEngine(model, None, rows=4)), answers, strict=True
    ):
        if own != other:
            assert exact is not None, "no rounding to speak of"
            assert is_tie(model, exact, prompt, own, other)


def test_log_probabilities_of_fp8_are_near() -> None:
    model = make_model(*ARCHITECTURES["llama"][:1], EVERYWHERE).to("cuda", torch.bfloat16)
    params = SamplingParams(
        temperature=0, max_new_tokens=2, stop_token_ids=(), detokenize=False, logprobs=True
    )
    requests = [GenerationRequest(prompt, params, "default") for prompt in PROMPTS]
    exact, narrow = (
        CudaGraphEngine(model, None, precision=precision).generate(requests)
        for precision in ("model", "fp8")
    )
    for one, two in zip(exact, narrow, strict=True):
        assert one[0].logprobs[0] == pytest.approx(two[0].logprobs[0], abs=1e-3), "the prompt's"
        assert one[0].logprobs[1] == pytest.approx(two[0].logprobs[1], abs=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_limited_draws(triton_ops: Any, dtype: torch.dtype) -> None:
    """What top_k, top_p and min_p leave, ties included: rounded logits have many."""
    limits: list[dict[str, Any]] = [
        {"top_p": 0.9},
        {"top_k": 5},
        {"top_k": 40, "top_p": 0.5},
        {"min_p": 0.2},
        {"top_p": 0.01},
        {"top_k": 1},
        {},
        {"top_p": 0.999, "min_p": 0.001},
    ]
    params = [SamplingParams(temperature=1.3, **each) for each in limits for _ in range(4)]
    keys = [(i * 60_000_000 - 2**31, i) for i in range(len(params))]
    rows = Rows.of(params, keys, [()] * len(params), 50_000, "cuda")
    logits = random(len(params), 50_000, dtype=dtype) * 3
    for given in (logits, (logits * 2).round() / 2):
        for position in (0, 977):
            positions = torch.full((len(params),), position, device="cuda")
            tokens, own = triton_ops.draw(given, rows, positions)
            expected, scores = torch_ops.draw(given, rows, positions)
            same = tokens == expected
            assert same.float().mean() > 0.9, "but for ties to rounding"
            assert_sums_equal(own[same], scores[same], 50_000 // 1024 + 32)
