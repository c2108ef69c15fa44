"""The fused LoRA layer against peft's own, in float64 and under autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from openweights.models.fused.lora_linear import LoraLinear, fuse_lora
from tests.rounding import assert_equal_in_float64, assert_sums_equal

TERMS = 7 + 3 + 7 + 5 + 3 + 5  # of the two layers of `adapted`: inputs, rank, outputs


def adapted(
    dtype: torch.dtype, *, bias: bool = False, rank: int = 3, **options: Any
) -> tuple[nn.Module, Linear]:
    """Two linear layers with adapters that are not zero, and the first of the adapted layers."""
    base = nn.Sequential(nn.Linear(7, 5, bias=bias), nn.Tanh(), nn.Linear(5, 4, bias=bias))
    lora = LoraConfig(r=rank, lora_alpha=5, target_modules=["0", "2"], **options)
    model = get_peft_model(base.to(dtype), lora, autocast_adapter_dtype=dtype != torch.float64)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    layer = model.base_model.model[0]
    assert isinstance(layer, Linear)
    return model, layer


def gradients(model: nn.Module, x: Tensor, weight: Tensor) -> list[Tensor]:
    """Output, gradient of the input, and gradients of the adapters of sum(weight * model(x))."""
    x = x.clone().requires_grad_()
    trained = [p for p in model.parameters() if p.requires_grad]
    out = model(x)
    return [out, *torch.autograd.grad((out * weight).sum(), [x, *trained])]


@settings(max_examples=20)
@given(seed=st.integers(0, 2**31), rank=st.integers(1, 6), bias=st.booleans())
def test_equals_peft_in_float64(seed: int, rank: int, bias: bool) -> None:
    torch.manual_seed(seed)
    model, _ = adapted(torch.float64, bias=bias, rank=rank)
    x, weight = torch.randn(2, 3, 7).double(), torch.randn(2, 3, 4).double()
    expected = gradients(model, x, weight)
    assert fuse_lora(model) == 2
    for got, want in zip(gradients(model, x, weight), expected, strict=True):
        assert_equal_in_float64(got, want)
    assert all(g.abs().sum() > 0 for g in expected), "the control: nothing is zero anyway"


def test_gradcheck() -> None:
    torch.manual_seed(0)
    x, weight, a, b = (torch.randn(*s).double() for s in ((4, 6), (5, 6), (2, 6), (5, 2)))
    inputs = (x.requires_grad_(), weight, None, None, a.requires_grad_(), b.requires_grad_(), 0.7)
    assert torch.autograd.gradcheck(LoraLinear.apply, inputs)


def test_under_autocast_as_peft_to_rounding() -> None:
    """bf16 base, float32 adapters: what training on a GPU looks like."""
    torch.manual_seed(0)
    model, layer = adapted(torch.bfloat16)
    assert layer.lora_A["default"].weight.dtype == torch.float32
    x, weight = torch.randn(64, 7, dtype=torch.bfloat16), torch.randn(64, 4)
    with torch.autocast("cpu", torch.bfloat16):
        expected = gradients(model, x, weight)
        fuse_lora(model)
        got = gradients(model, x, weight)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == theirs.dtype
        error = (ours.float() - theirs.float()).norm() / theirs.float().norm()
        assert error < 2**-6, "a few roundings to 8 bits"


def fused_calls(model: nn.Module, x: Tensor) -> bool:
    """Whether the output comes from our function."""
    out = model(x)
    return out.grad_fn is not None and type(out.grad_fn).__name__ == "LoraLinearBackward"


def test_the_rest_computes_as_peft_does() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 7)
    model, _ = adapted(torch.float32)
    fuse_lora(model)
    assert fused_calls(model, x), "the control"
    plain = model.base_model.model[2].base_layer(
        torch.tanh(model.base_model.model[0].base_layer(x))
    )
    with model.disable_adapter():  # type: ignore[operator]
        assert_sums_equal(model(x), plain, TERMS)
    fused = model(x)
    model.merge_adapter()  # type: ignore[operator]
    assert not fused_calls(model, x)
    assert_sums_equal(model(x), fused, TERMS)
    with pytest.raises(AssertionError, match="differs by"):  # the control: the adapter counts
        assert_sums_equal(plain, fused, TERMS)


@pytest.mark.parametrize("options", [{"lora_dropout": 0.5}, {"use_dora": True}])
def test_dropout_and_dora_are_left_to_peft(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, _ = adapted(torch.float32, **options)
    x = torch.randn(3, 7)
    model.eval()
    expected = model(x)
    fuse_lora(model)
    assert_sums_equal(model(x), expected, TERMS)
    assert not fused_calls(model.train(), x)


def test_without_autocast_wider_adapters_compute_in_their_own_type() -> None:
    torch.manual_seed(0)
    model, _ = adapted(torch.bfloat16)
    x = torch.randn(3, 7, dtype=torch.bfloat16)
    expected = model(x)
    fuse_lora(model)
    assert torch.equal(model(x), expected)
    assert not fused_calls(model, x)


@pytest.mark.parametrize("bias", [False, True])
def test_a_base_in_4_bit_as_peft_to_rounding(bias: bool) -> None:
    """The rows are not as many as bitsandbytes has a product of its own for."""
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    packed = bnb.nn.Linear4bit(
        64, 128, bias, torch.bfloat16, compress_statistics=True, quant_type="nf4"
    )
    dense = nn.Linear(64, 128, bias, dtype=torch.bfloat16)
    packed.load_state_dict(dense.state_dict())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lora = LoraConfig(r=3, lora_alpha=5, target_modules=["0"])
    base: Any = nn.Sequential(packed).to(device)
    base.is_loaded_in_4bit = True  # as transformers says
    model = get_peft_model(base, lora).to(device)
    nn.init.normal_(model.base_model.model[0].lora_B["default"].weight)
    x = torch.randn(48, 64, dtype=torch.bfloat16, device=device)
    weight = torch.randn(48, 128, device=device)
    with torch.autocast(device, torch.bfloat16):
        expected = gradients(model, x, weight)
        assert not fused_calls(model, x), "the control"
        assert fuse_lora(model) == 1
        assert fused_calls(model, x)
        got = gradients(model, x, weight)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == theirs.dtype
        error = (ours.float() - theirs.float()).norm() / theirs.float().norm()
        assert error < 2**-6, "a few roundings to 8 bits"
