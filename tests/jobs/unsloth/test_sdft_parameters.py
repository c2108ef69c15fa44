"""Whole SDFT runs in which other parameters are trained than float32 adapters alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, TrainerCallback, set_seed

from openweights.jobs.unsloth.sdft import SDFTTrainer
from openweights.models.packing import use_packed_attention
from tests.jobs.unsloth.test_sdft import EchoEngine, make_trainer, scoring_batch, slow_loss
from tests.jobs.unsloth.test_teacher import averages_of
from tests.rounding import assert_sums_equal, terms_of

RATE, STEPS = 0.25, 3


def bf16_adapters(base: Any) -> Any:
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"])
    use_packed_attention(base)  # as jobs do; torch's own in bfloat16 is not for every processor
    return get_peft_model(base.to(torch.bfloat16), lora, autocast_adapter_dtype=False)


def trained_head(base: Any) -> Any:
    lora = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], modules_to_save=["lm_head"])
    return get_peft_model(base, lora)


def every_weight(base: Any) -> Any:
    return base


KINDS = {"bf16 adapters": bf16_adapters, "modules_to_save": trained_head, "full": every_weight}


class Weights(TrainerCallback):
    """The student after every step, and the teacher as it answered to that."""

    def __init__(self) -> None:
        self.student: list[dict[str, Tensor]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.student:
            self._keep(kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._keep(kwargs["model"])

    def _keep(self, model: nn.Module) -> None:
        named = model.named_parameters()
        self.student.append({n: p.detach().clone() for n, p in named if p.requires_grad})


def trained(kind: str, tiny: Path, tmp_path: Path) -> tuple[SDFTTrainer, Weights]:
    set_seed(1)
    model = KINDS[kind](AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32))
    weights = Weights()
    changes: dict[str, Any] = {"engine": EchoEngine(), "callbacks": [weights], "ema_alpha": RATE}
    trainer = make_trainer(model, tiny, tmp_path, max_steps=STEPS, **changes)
    trainer.train()
    return trainer, weights


@pytest.mark.parametrize("kind", KINDS)
def test_the_teacher_is_the_average_of_what_was_trained(
    kind: str, tiny: Path, tmp_path: Path
) -> None:
    trainer, weights = trained(kind, tiny, tmp_path)
    first, last = weights.student[0], weights.student[-1]
    assert all(not torch.equal(first[name], last[name]) for name in first), "everything moved"
    for name, average in averages_of(trainer.teacher).items():
        assert average.dtype == torch.float32
        expected = first[name].double()
        for after in weights.student[1:]:
            expected = expected + RATE * (after[name].double() - expected)
        assert_sums_equal(average, expected, 3 * len(weights.student))
    assert len(averages_of(trainer.teacher)) == len(first)


@pytest.mark.parametrize("kind", ["modules_to_save", "full"])
def test_the_loss_equals_its_definition(kind: str, tiny: Path, tmp_path: Path) -> None:
    """With a head that is trained, whose gradient counts, too."""
    trainer, _ = trained(kind, tiny, tmp_path)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    batch = scoring_batch(trainer, range(4))
    head = trainer.model.get_output_embeddings().weight
    expected = slow_loss(trainer, batch, "reverse_kl", None)
    (wanted,) = torch.autograd.grad(expected, [head])
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=4)
    (got,) = torch.autograd.grad(loss, [head])
    terms = terms_of(trainer.model, int(batch["teacher_attention_mask"].sum()))
    assert_sums_equal([loss, got], [expected, wanted], terms)
