"""The bound on rounding holds whatever the order of a sum, and what is wrong lies outside of it."""

from __future__ import annotations

import ast
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.rounding import assert_equal_in_float64, assert_sums_equal, rounding, terms_of


@settings(max_examples=25)
@given(count=st.integers(2, 500), seed=st.integers(0, 2**31), chunk=st.integers(1, 64))
def test_sums_in_any_order_are_within_the_bound(count: int, seed: int, chunk: int) -> None:
    torch.manual_seed(seed)
    terms = torch.randn(count) * torch.rand(count).mul(8).exp()
    exact, size = math.fsum(terms.tolist()), float(terms.double().abs().sum())
    one_by_one = torch.tensor(0.0)
    for term in terms:
        one_by_one = one_by_one + term
    in_chunks = torch.stack([part.flip(0).sum() for part in terms.split(chunk)]).sum()
    for found in (one_by_one, in_chunks, terms.sum(), terms.sort().values.sum()):
        assert_sums_equal(found, exact, count, size=size)
    # The control: without its largest term it is another sum.
    with pytest.raises(AssertionError, match="differs by"):
        assert_sums_equal(terms.sum() - terms.abs().max(), exact, count, size=size)


def test_what_is_compared_has_the_same_shape_names_and_numbers() -> None:
    for found, expected in (
        ([1.0, 2.0], [1.0, 2.0, 3.0]),
        ({"a": 1.0}, {"b": 1.0}),
        (torch.ones(2), torch.ones(1)),
        ([torch.ones(2)], [torch.ones(2), torch.ones(2)]),
        (math.nan, 1.0),
        (1.0, math.nan),
        ({"a": torch.ones(3), "b": torch.tensor([math.nan])}, {"a": torch.ones(3), "b": [1.0]}),
    ):
        for compare in (lambda *two: assert_sums_equal(*two, 100), assert_equal_in_float64):
            with pytest.raises((AssertionError, ValueError)):
                compare(found, expected)


def adapted(tiny: Path) -> Any:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj", "lm_head"])
    model = get_peft_model(base, lora)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def loss_and_gradients(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return {"loss": loss} | {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def test_a_models_gradients_are_within_the_bound_and_wrong_ones_are_not(tiny: Path) -> None:
    model = adapted(tiny)
    ids = torch.randint(4, 280, (3, 40), generator=torch.Generator().manual_seed(1))
    terms = terms_of(model, ids.numel())
    assert rounding(terms) < 3e-4
    found = loss_and_gradients(model, ids)
    wrong = loss_and_gradients(model, torch.cat([ids[:, :-1], ids[:, :1]], 1))
    exact = loss_and_gradients(model.double(), ids)
    assert_sums_equal(found, exact, terms)
    # With one other token in each row, the loss and every gradient are outside.
    for name, expected in exact.items():
        with pytest.raises(AssertionError, match="differs by"):
            assert_sums_equal(wrong[name], expected, terms)


TESTS = Path(__file__).parent


def loose_comparisons(source: str) -> list[str]:
    """Comparisons of tensors within a tolerance that says nothing of what was summed."""
    wrong = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func).rpartition(".")[2]
        unbounded = name == "approx" and not {k.arg for k in node.keywords} & {"rel", "abs"}
        if name in ("allclose", "assert_close", "isclose") or unbounded:
            wrong.append(f"{node.lineno}: {ast.unparse(node)}")
    return wrong


def test_tensors_are_compared_within_rounding_alone() -> None:
    found = {}
    for path in TESTS.rglob("test_*.py"):
        source = path.read_text(encoding="utf-8")
        if re.search(r"^(import|from) torch\b", source, re.M) and (w := loose_comparisons(source)):
            found[path.name] = w
    assert found == {}
    assert len(loose_comparisons("torch.allclose(a, b); assert c == approx(d)")) == 2
    assert loose_comparisons("assert_sums_equal(a, b, 9); assert c == approx(d, rel=1e-9)") == []


def test_such_tests_are_marked_numeric(request: pytest.FixtureRequest) -> None:
    assert request.node.get_closest_marker("numeric") is not None
