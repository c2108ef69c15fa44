"""The Triton kernel of log-probabilities and packed flash attention, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from openweights.models.forward import Head
from openweights.models.log_probs import linear_scores, scored_log_probs
from openweights.models.packing import use_packed_attention
from openweights.models.tokens import IGNORED, Collator
from tests.models.test_packing import CONFIGS, ROWS, _model

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.5, 20.0)])
@pytest.mark.parametrize("vocabulary", [97, 5000, 32_003])
def test_scores_of_a_frozen_head(
    dtype: torch.dtype, scale: float, softcap: float | None, vocabulary: int
) -> None:
    draw = torch.Generator().manual_seed(0)
    weight = (torch.randn(vocabulary, 64, generator=draw) * 0.2).to(dtype)
    rows = torch.randn(37, 64, generator=draw).to(dtype)
    targets = torch.randint(vocabulary, (37,), generator=draw)
    wanted = torch.randn(37, generator=draw)

    hidden = rows.cuda().requires_grad_()
    head = Head(weight.cuda(), None, scale, softcap)
    found = linear_scores(hidden, head, targets.cuda(), chunk_tokens=16)
    (found.log_probs * wanted.cuda()).sum().backward()

    exact = rows.double().requires_grad_()
    oracle = linear_scores(
        exact, Head(weight.double(), None, scale, softcap), targets, chunk_tokens=64
    )
    (oracle.log_probs * wanted.double()).sum().backward()
    # Inputs are the same numbers; float32 sums of 64 products each, and of the vocabulary.
    assert float((found.log_probs.cpu() - oracle.log_probs).abs().max()) < 1e-4
    assert float((found.entropy.cpu() - oracle.entropy).abs().max()) < 1e-4
    assert found.is_top.cpu().tolist() == oracle.is_top.float().tolist()
    loose = 2e-2 if dtype == torch.bfloat16 else 1e-4
    assert hidden.grad is not None and exact.grad is not None
    error = float((hidden.grad.cpu().double() - exact.grad).abs().max())
    assert error < loose * float(exact.grad.abs().max())


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_rows_on_the_gpu(name: str) -> None:
    """In bf16, packed by flash attention, as near to float64 as padded rows are."""
    exact: Any = _model(CONFIGS[name])
    rows = [{"input_ids": row, "labels": row} for row in ROWS]

    def values(model: Any, packed: bool, device: str) -> torch.Tensor:
        batch = Collator(0, packed)(rows)
        batch = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        return scored_log_probs(model, batch, batch["labels"] != IGNORED).detach().cpu().double()

    expected = values(exact, False, "cpu")
    half = exact.to(torch.bfloat16).cuda()
    padded = float((values(half, False, "cuda") - expected).abs().max())
    assert use_packed_attention(half)
    packed = float((values(half, True, "cuda") - expected).abs().max())
    assert packed < 2 * padded + 1e-3
