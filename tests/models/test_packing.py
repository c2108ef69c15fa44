"""Rows laid end to end: kept apart, whatever the architecture; divided well; nothing lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from openweights.models.log_probs import scored_log_probs
from openweights.models.packing import (
    divided,
    packed_attention,
    repacked,
    use_packed_attention,
)
from openweights.models.tokens import IGNORED, Collator
from tests.rounding import assert_equal_in_float64

SMALL: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "mistral, window of 5": MistralConfig(**SMALL, sliding_window=5),
    "qwen 2": Qwen2Config(**SMALL),
    "qwen 3": Qwen3Config(**SMALL),
    "gemma 3, window of 5": Gemma3TextConfig(
        **SMALL, sliding_window=5, layer_types=["sliding_attention", "full_attention"]
    ),
}
ROWS = [[5, 6, 7, 30, 31, 8, 9, 10, 11, 12], [9, 8], list(range(40, 60)), [4, 4, 4]]


def _model(config: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").double().eval()


def _values(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    return scored_log_probs(model, batch, batch["labels"] != IGNORED)


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_rows_are_scored_and_learned_as_alone(name: str) -> None:
    model = _model(CONFIGS[name])
    rows = [{"input_ids": row, "labels": row} for row in ROWS]
    alone = [_values(model, Collator(0)([row])) for row in rows]
    sum(value.square().sum() for value in alone).backward()  # type: ignore[union-attr]
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()

    assert use_packed_attention(model)
    packed = _values(model, Collator(0, packed=True)(rows))
    assert_equal_in_float64(packed, torch.cat(alone))
    packed.square().sum().backward()
    for found, expected in zip(model.parameters(), gradients, strict=True):
        # Some architectures normalise in float32, whatever they are given.
        assert float((found.grad - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    # Padded rows, and rows without borders, go on as before.
    padded = _values(model, Collator(0)(rows))
    assert_equal_in_float64(padded, torch.cat(alone))
    batch = Collator(0, packed=True)(rows)
    unknown = {key: batch[key] for key in ("input_ids", "labels", "position_ids")}
    assert_equal_in_float64(_values(model, unknown), torch.cat(alone))


def test_without_borders_rows_would_see_each_other() -> None:
    """The control: one long row is not its parts."""
    model = _model(CONFIGS["llama"])
    alone = torch.cat([_values(model, Collator(0)([{"input_ids": r, "labels": r}])) for r in ROWS])
    ids = [token for row in ROWS for token in row]
    labels = [label for row in ROWS for label in [IGNORED, *row[1:]]]
    joined = _values(model, Collator(0)([{"input_ids": ids, "labels": labels}]))
    assert float((joined - alone).detach().abs().max()) > 1e-3


def test_attention_of_another_kind_is_left_alone() -> None:
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"], attn_implementation="eager")
    assert not use_packed_attention(model)
    assert model.config._attn_implementation == "eager"


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 120))
def test_rows_are_divided_within_the_budget(lengths: list[int], budget: int) -> None:
    groups = divided(lengths, budget)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or sum(lengths[index] for index in group) <= budget
    # First-fit decreasing fills all bins but one by more than half.
    sums = sorted(sum(lengths[index] for index in group) for group in groups)
    assert all(2 * total > min(budget, 2 * max(lengths)) for total in sums[1:]) or budget < 2


@given(
    st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=4), min_size=1, max_size=6),
    st.integers(1, 80),
)
def test_repacked_batches_hold_the_same_rows(lengths: list[list[int]], budget: int) -> None:
    count, batches = 0, []
    for batch in lengths:
        rows = []
        for length in batch:
            ids = list(range(count, count + length))
            rows.append({"input_ids": ids, "labels": ids, "weights": [1.0] * length})
            count += length
        batches.append(Collator(0, packed=True)(rows))

    def rows_of(packs: Any) -> list[list[int]]:
        return sorted(
            part.tolist()
            for pack in packs
            for part in pack["input_ids"][0].split(pack["cu_seq_lens_q"].diff().tolist())
        )

    packs = repacked(batches, budget)
    assert rows_of(packs) == rows_of(batches)
    assert len(packs) <= len(batches)
    total = sum(float(pack["item_counts"].sum()) for pack in packs)
    assert total == sum(float(batch["item_counts"].sum()) for batch in batches)
    for pack in packs:
        assert pack["max_length_q"] == int(pack["cu_seq_lens_q"].diff().max())
        assert int((pack["position_ids"] == 0).sum()) == len(pack["cu_seq_lens_q"]) - 1


@pytest.mark.parametrize("given", ["borders", "mask", "neither"])
def test_attention_in_half_precision_is_computed_wide_on_a_cpu(given: str) -> None:
    """Its output is the exact one, rounded once; the control: torch's own rounds on the way."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, 12, 16, generator=generator).bfloat16() for heads in (4, 2, 2)
    )
    starts = torch.tensor([0, 5, 12], dtype=torch.int32)
    blocks = torch.block_diag(torch.ones(5, 5), torch.ones(7, 7)).tril().bool()[None, None]
    causal = torch.ones(12, 12).tril().bool()[None, None]
    mask = {"borders": blocks, "mask": blocks, "neither": causal}[given]
    exact = torch.nn.functional.scaled_dot_product_attention(
        query.double(), key.double(), value.double(), mask, enable_gqa=True
    ).transpose(1, 2)
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 2, True  # type: ignore[assignment]
    options = {"cu_seq_lens_q": starts} if given == "borders" else {}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = packed_attention(
            module, query, key, value, mask if given == "mask" else None, **options
        )
    assert found.dtype == torch.bfloat16
    last_place = 2.0**-8 * exact.abs()
    assert ((found.double() - exact).abs() <= last_place).all()
    narrow = torch.nn.functional.scaled_dot_product_attention(
        query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1), mask
    ).transpose(1, 2)
    assert ((narrow.double() - exact).abs() > last_place).any()
