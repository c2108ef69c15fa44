"""Norms and gated MLPs in few passes: formulas in float64, and against transformers' on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers import Qwen2Config, Qwen2ForCausalLM

from openweights.models.fused.layers import Gated, GatedLoraLinear, RMSNorm, fuse_layers
from openweights.models.fused.lora_linear import LoraLinear, fuse_lora
from tests.rounding import assert_equal_in_float64


def doubles(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def gradients(output: Tensor, weight: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return [output, *torch.autograd.grad((output * weight).sum(), inputs)]


def test_norm_in_float64() -> None:
    torch.manual_seed(0)
    x, weight = doubles(2, 5, 7), torch.randn(7, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: RMSNorm.apply(x, weight, 1e-6), (x,))
    expected = weight * x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    assert_equal_in_float64(RMSNorm.apply(x, weight, 1e-6), expected)


def test_gate_in_float64() -> None:
    torch.manual_seed(0)
    gate, up = doubles(2, 3, 5), doubles(2, 3, 5)
    assert torch.autograd.gradcheck(Gated.apply, (gate, up))
    assert_equal_in_float64(Gated.apply(gate, up), silu(gate) * up)


def test_gate_and_adapter_in_float64() -> None:
    """As the layer of the product, with gradients for both branches and for the adapter."""
    torch.manual_seed(0)
    gate, up, a, b = doubles(2, 3, 5), doubles(2, 3, 5), doubles(2, 5), doubles(4, 2)
    weight, bias = (torch.randn(*shape, dtype=torch.float64) for shape in ((4, 5), (4,)))
    outer = torch.randn(2, 3, 4, dtype=torch.float64)
    got = GatedLoraLinear.apply(gate, up, weight, None, bias, a, b, 0.7)
    expected = LoraLinear.apply(silu(gate) * up, weight, None, bias, a, b, 0.7)
    inputs = [gate, up, a, b]
    pairs = zip(gradients(got, outer, inputs), gradients(expected, outer, inputs), strict=True)
    for ours, theirs in pairs:
        assert_equal_in_float64(ours, theirs)
        assert theirs.abs().sum() > 0, "the control: nothing is zero anyway"


def small_model(seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=300, hidden_size=96, intermediate_size=160, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, **changes,
    )  # fmt: skip
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(Qwen2ForCausalLM(config).to(torch.bfloat16), lora)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter, dtype=torch.float32) * 0.1
    return model


def loss_and_gradients(model: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    model.zero_grad()
    with torch.autocast(ids.device.type, torch.bfloat16):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return loss.detach(), torch.cat(grads)


def test_a_model_on_a_cpu_computes_as_before() -> None:
    model, ids = small_model(), torch.arange(40).view(2, 20)
    expected = loss_and_gradients(model, ids)
    assert fuse_layers(model) == 5 + 2, "two norms of each layer and the last, two MLPs"
    for ours, theirs in zip(loss_and_gradients(model, ids), expected, strict=True):
        assert torch.equal(ours, theirs)
    assert fuse_layers(small_model(hidden_act="gelu")) == 5, "another gate is left alone"


@pytest.mark.gpu
def test_a_model_on_a_gpu_is_as_near_to_float64_as_before() -> None:
    """Over several models, because the error of one is a matter of luck."""
    before, after = (sum(errors) for errors in zip(*map(gradient_errors, range(10)), strict=True))
    assert after < 1.4 * before < 0.6, (before, after)


def gradient_errors(seed: int) -> tuple[float, float]:
    """Relative errors of a model's gradient as transformers and peft compute it, and as here."""
    model = small_model(seed).cuda()
    ids = torch.randint(0, 300, (4, 50), device="cuda")
    _, plain = loss_and_gradients(model, ids)
    fuse_lora(model)
    assert fuse_layers(model) == 5 + 2
    loss, fused = loss_and_gradients(model, ids)
    assert not torch.equal(plain, fused), "the control: it is another computation"
    exact = small_model(seed)
    exact.load_state_dict(model.state_dict())
    exact = exact.double()
    exact_loss = exact(input_ids=ids.cpu(), labels=ids.cpu(), use_cache=False).loss
    exact_loss.backward()
    assert abs(float(loss) - float(exact_loss)) < 0.01
    wanted = torch.cat([p.grad.flatten() for p in exact.parameters() if p.grad is not None])
    first, second = (float((g.cpu() - wanted).norm() / wanted.norm()) for g in (plain, fused))
    return first, second


def losses(fused: bool, device: str, steps: int = 30, lr: float = 1e-3) -> Tensor:
    """Of training a model on one batch."""
    model = small_model().to(device)
    if fused:
        fuse_lora(model)
        fuse_layers(model)
    ids = torch.randint(0, 300, (8, 40), generator=torch.Generator().manual_seed(1)).to(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    found = []
    for _ in range(steps):
        loss, _ = loss_and_gradients(model, ids)
        optimizer.step()
        found.append(loss)
    return torch.stack(found).cpu()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_thirty_losses_are_those_of_the_plain_path(device: str) -> None:
    plain, fused = losses(False, device), losses(True, device)
    assert float(plain[0] - plain[-1]) > 0.25, "the control: it learns"
    assert float((plain - fused).abs().max()) < 0.02 * float(plain[0] - plain[-1])
