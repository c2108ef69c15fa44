"""Every loss keeps as many activations as its budget allows, counted tensor by tensor."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from openweights.jobs.unsloth.grpo_ft import grpo_train
from openweights.jobs.unsloth.preference.trainer import preference_train
from openweights.jobs.unsloth.runtime.memory import RecomputationCallback
from openweights.jobs.unsloth.sdft import sdft_train
from openweights.jobs.unsloth.sft import sft_train
from openweights.jobs.unsloth.validate import TrainingConfig
from openweights.models.forward import base_model
from openweights.models.load import load_model
from tests.memory_meter import MemoryMeter
from tests.tiny_model import make_tokenizer

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the tensors of a CPU are counted; a model is put on the GPU"
)

LAYERS = 4
LOSSES: dict[str, dict[str, Any]] = {
    "sft": {},
    "dpo": {},
    "sdft": {"sdft_gate": "off", "sdft_demo_placement": "template", "sdft_max_new_tokens": 16},
    "grpo": {"grpo_max_completion_length": 8, "grpo_num_generations": 4},
}


class Counted:
    """A CPU's tensors in the place of a GPU's memory, of which there is as much as one asks for."""

    def __init__(self, tensors: MemoryMeter) -> None:
        self._tensors = tensors
        self.highest = 0

    def allocated(self) -> int:
        return self._tensors.now

    def peak(self) -> int:
        return self._tensors.peak

    def reset_peak(self) -> None:
        self.highest = max(self.highest, self._tensors.peak)
        self._tensors.peak = self._tensors.now

    def available(self) -> int:
        return 2**40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = make_tokenizer(320)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=192, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1_024,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "rows.jsonl").touch()
    return folder


def settings(loss: str, folder: Path, out: Path, budget: float | None = None) -> TrainingConfig:
    return TrainingConfig(
        model=str(folder), training_file=str(folder / "rows.jsonl"), loss=loss, max_steps=2,
        per_device_train_batch_size=8, gradient_accumulation_steps=1, max_seq_length=512,
        warmup_steps=0, optim="adamw_torch", output_dir=str(out), engine="transformers",
        memory_budget_gb=budget, **LOSSES[loss],
    )  # fmt: skip


def trained(
    loss: str, folder: Path, out: Path, budget: float | None = None
) -> tuple[Any, Counted, list[int]]:
    """The trainer after two steps, its memory, and the layers that kept activations each time.

    Args:
        budget: In GiB; None recomputes every layer.
    """
    config = settings(loss, folder, out, budget)
    model, tokenizer = load_model(config)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    kept: list[int] = []
    with MemoryMeter(model) as tensors:
        memory = Counted(tensors)
        fitting = [] if budget is None else [RecomputationCallback(budget, memory)]
        hooked = base_model(model).get_decoder().layers[-1]

        def note(*_: Any) -> None:
            if torch.is_grad_enabled():
                layers = base_model(model).get_decoder().layers
                kept.append(sum(not layer.gradient_checkpointing for layer in layers))

        handle = hooked.register_forward_pre_hook(note)
        trainer = run(config, model, tokenizer, fitting)
        handle.remove()
    memory.reset_peak()
    return trainer, memory, kept


def run(config: TrainingConfig, model: Any, tokenizer: Any, callbacks: list[Any]) -> Any:
    user = {"role": "user", "content": "Go"}
    answers = [{"role": "assistant", "content": "z" * (60 + 5 * i)} for i in range(24)]
    if config.loss == "dpo":
        worse = {"role": "assistant", "content": "y" * 60}
        pairs = [{"prompt": [user], "chosen": [a], "rejected": [worse]} for a in answers]
        return preference_train(config, model, tokenizer, pairs, None, callbacks=callbacks)
    rows = [{"messages": [user, answer]} for answer in answers]
    train: Any = {"sft": sft_train, "sdft": sdft_train}.get(config.loss)
    if config.loss == "grpo":
        given = {"fetch": lambda file, target: Path(file), "log_event": lambda event: None}
        train = partial(grpo_train, **given)
    return train(config, model, tokenizer, rows, None, callbacks=callbacks)


@pytest.mark.parametrize("loss", LOSSES)
def test_as_many_layers_keep_activations_as_the_budget_allows(
    loss: str, folder: Path, tmp_path: Path
) -> None:
    plain, lowest, none = trained(loss, folder, tmp_path)
    assert set(none) == {0}
    ample, highest, every = trained(loss, folder, tmp_path, 1.0)
    assert every[-1] == LAYERS, "after the first step, in which one is measured"
    assert highest.highest > 1.1 * lowest.highest, "the control: it does take memory"
    between = (lowest.highest + highest.highest) / 2
    middle, memory, some = trained(loss, folder, tmp_path, between / 0.88 / 2**30)
    assert 0 < some[-1] < LAYERS, some
    assert memory.highest <= between / 0.88, "with what is left free for gaps"
    for other in (ample, middle):
        pairs = zip(plain.model.parameters(), other.model.parameters(), strict=True)
        for ours, theirs in pairs:
            assert torch.equal(ours, theirs), "what is computed again is the same"
    found = ample.callback_handler.callbacks
    own = [one.budget_gb for one in found if isinstance(one, RecomputationCallback)]
    assert own == [1.0, 1.0], "the test's, and the one that reads the config"


@pytest.mark.parametrize("loss", LOSSES)
def test_adapters_over_a_quantised_base_stay_in_float32(
    loss: str, folder: Path, tmp_path: Path
) -> None:
    """trl rounds them to bfloat16 where a model says that it is quantised."""
    config = settings(loss, folder, tmp_path).model_copy(update={"max_steps": 1})
    model, tokenizer = load_model(config)
    base_model(model).is_loaded_in_8bit = True  # trl does the same; no bitsandbytes is needed
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    trainer = run(config, model, tokenizer, [FirstWeights()])
    after = [p for p in trainer.model.parameters() if p.requires_grad]
    assert {p.dtype for p in after} == {torch.float32}
    [first] = [c for c in trainer.callback_handler.callbacks if isinstance(c, FirstWeights)]
    assert all(map(torch.equal, first.values, before))
    assert not all(torch.equal(p.bfloat16().float(), p) for p in before), "the control: it would"


class FirstWeights(TrainerCallback):
    """What is trained, as it is when training begins."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trained = [p for p in kwargs["model"].parameters() if p.requires_grad]
        self.values = [p.detach().clone() for p in trained]
