"""SFT on a tiny model: exact accumulation, packing that changes nothing, settings that reach the
adapter.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from openweights.errors import ConfigError, ConfigurationError
from openweights.jobs.unsloth import sft
from openweights.jobs.unsloth.data import sft_examples
from openweights.jobs.unsloth.trainer_args import trainer_args
from openweights.jobs.unsloth.validate import TrainingConfig, training_config
from openweights.models.load import load_model, resolve_engine
from openweights.models.packing import keeps_rows_apart
from openweights.models.tokens import Collator, eos_token_ids
from tests.jobs.unsloth.malformed_configs import GOOD
from tests.rounding import assert_sums_equal, terms_of
from tests.tiny_model import PAD

ROWS = [
    {
        "messages": [
            {"role": "user", "content": "Count to " + "x" * i},
            {"role": "assistant", "content": "one, two, " + "three " * (i % 5) + "done"},
        ]
    }
    for i in range(8)
]


def config(tiny: Path, out: Path, **changes: Any) -> TrainingConfig:
    small = {
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "max_steps": 3,
        "lr_scheduler_type": "constant",
    }
    files = {"model": str(tiny), "output_dir": str(out), "packing": False}
    return training_config({**GOOD, **small, **files, **changes})


def trained(settings: TrainingConfig, rows: list[dict[str, Any]] = ROWS) -> tuple[list[float], Any]:
    """Losses by step and the final adapter."""
    model, tokenizer = load_model(settings)
    trainer = sft.sft_train(settings, model, tokenizer, rows, None)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    adapter = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    return losses, adapter


@torch.no_grad()
def plain_losses(settings: TrainingConfig) -> tuple[list[tuple[float, int]], int]:
    """Of each row the summed cross-entropy in float64, and of how many tokens; and how many terms
    go into a float32 loss over all of them.
    """
    model, tokenizer = load_model(settings)
    model = model.double()
    losses, tokens = [], 0
    for example in sft_examples(settings, tokenizer, ROWS, ends=eos_token_ids(model, tokenizer)):
        logits = model(torch.tensor([example["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(example["labels"][1:])
        total = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        losses.append((float(total), int((labels != -100).sum())))
        tokens += len(example["input_ids"])
    return losses, terms_of(model, tokens)


def test_accumulation_and_packing_equal_one_big_batch(tiny: Path, tmp_path: Path) -> None:
    # Plain gradient descent: Adam divides rounding by itself where a gradient is next to nothing.
    sgd = {"optim": "sgd", "learning_rate": 0.5}
    big = {**sgd, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    small = {**sgd, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    losses, adapter = trained(config(tiny, tmp_path, **big))
    rows, terms = plain_losses(config(tiny, tmp_path))
    assert len(losses) == 3 and losses[2] < losses[0]
    assert_sums_equal(losses[0], sum(t for t, _ in rows) / sum(n for _, n in rows), terms)
    for variant in (small, {**big, "packing": True}, {**small, "packing": True}):
        other_losses, other = trained(config(tiny, tmp_path, **variant))
        assert_sums_equal([other_losses, other], [losses, adapter], 3 * terms, about=str(variant))
    # Control: the mean of the rows' means is another number, as the rows differ in length.
    with pytest.raises(AssertionError, match="differs by"):
        assert_sums_equal(sum(t / n for t, n in rows) / len(rows), losses[0], 3 * terms)


def test_loss_is_that_of_a_plain_forward(tiny: Path, tmp_path: Path) -> None:
    settings = config(tiny, tmp_path, per_device_train_batch_size=8, gradient_accumulation_steps=1)
    rows, terms = plain_losses(settings)
    expected = sum(total for total, _ in rows) / sum(count for _, count in rows)
    assert_sums_equal(trained(settings)[0][0], expected, terms)


def test_a_weighted_test_loss_is_that_of_the_whole_set(tiny: Path, tmp_path: Path) -> None:
    block = {"type": "text", "text": "hello there", "weight": -0.5}
    tests = [*ROWS[:4], {"messages": [ROWS[0]["messages"][0], {"role": "assistant"}]}]
    tests[-1]["messages"][1] |= {"content": [block]}
    losses = []
    for size in (2, 5):
        settings = config(tiny, tmp_path / "out", eval_batch_size=size, max_steps=1)
        model, tokenizer = load_model(settings)
        trainer = sft.sft_train(settings, model, tokenizer, ROWS, tests)
        losses.append(trainer.evaluate()["eval_loss"])
    assert_sums_equal(losses[0], losses[1], terms_of(model, 5 * 40))


def test_packing_is_refused_to_a_model_that_mixes_rows(tiny: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(config(tiny, tmp_path))
    examples = sft_examples(config(tiny, tmp_path), tokenizer, ROWS)
    assert keeps_rows_apart(model, examples)

    class Mixing(torch.nn.Module):
        """The same model, except that it ignores where rows begin."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
            return self.inner(input_ids=input_ids, use_cache=False)

    assert not keeps_rows_apart(Mixing(), examples)  # type: ignore[arg-type]


@pytest.mark.parametrize("shifts", [False, True])
def test_packing_is_refused_for_what_is_more_than_rounding(
    tiny: Path, tmp_path: Path, shifts: bool
) -> None:
    model, tokenizer = load_model(config(tiny, tmp_path))
    examples = sft_examples(config(tiny, tmp_path), tokenizer, ROWS)

    def coarse(_: Any, __: Any, given: dict[str, Any], output: Any) -> Any:
        """Errors of some hundredths, others for each number of tokens; as a control, larger ones
        where rows are packed.
        """
        noise = torch.Generator().manual_seed(given["input_ids"].numel())
        size = 1.0 if shifts and "cu_seq_lens_q" in given else 0.1  # of logits up to about 7
        output.logits = output.logits + size * torch.randn(output.logits.shape[-1], generator=noise)
        return output

    model.register_forward_hook(coarse, with_kwargs=True)
    assert keeps_rows_apart(model, examples) is not shifts


def test_padding_and_row_order_change_no_row(tiny: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(config(tiny, tmp_path))
    rows = sft_examples(config(tiny, tmp_path), tokenizer, ROWS)
    collate = Collator(int(tokenizer.pad_token_id))  # type: ignore[arg-type]
    with torch.no_grad():
        together = model(**{k: v for k, v in collate(rows).items() if k != "labels"}).logits
        alone = model(torch.tensor([rows[1]["input_ids"]])).logits[0]
    assert_sums_equal(together[1, : len(alone)], alone, terms_of(model, together.shape[1]))


def test_adapter_is_as_configured(tiny: Path, tmp_path: Path) -> None:
    def adapter_of(**changes: Any) -> Any:
        return load_model(config(tiny, tmp_path, **changes))[0]

    model = adapter_of(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["q_proj", "down_proj"])
    lora = model.peft_config["default"]
    assert (lora.r, lora.lora_alpha, lora.lora_dropout, lora.use_rslora) == (4, 8, 0.1, True)
    names = {
        n.split(".lora_")[0].rsplit(".", 1)[1]
        for n, p in model.named_parameters()
        if p.requires_grad
    }
    assert names == {"q_proj", "down_proj"}
    first, again, other = adapter_of(), adapter_of(), adapter_of(seed=1)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    assert torch.equal(first.get_parameter(key), again.get_parameter(key))
    assert not torch.equal(first.get_parameter(key), other.get_parameter(key))
    assert first.get_parameter(key).dtype == torch.float32
    assert adapter_of(lora_bias="all").peft_config["default"].bias == "all"


def test_tokens_and_template(tiny: Path, tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
    model, tokenizer = load_model(config(tiny, tmp_path, chat_template=template))
    assert tokenizer.pad_token == PAD and tokenizer.padding_side == "right"
    assert eos_token_ids(model, tokenizer) == [2, 0] == model.generation_config.eos_token_id
    assert tokenizer.chat_template == template


def test_what_cannot_work_is_one_line(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    for change, error, words in [
        ({"model": str(tmp_path / "none")}, ConfigError, "model: there is no folder"),
        ({"model": str(tmp_path / "empty")}, ConfigError, "model: .* cannot be loaded"),
        ({"model": str(tmp_path / "broken")}, ConfigError, "model: .* cannot be loaded"),
        ({"target_modules": ["c_attn"]}, ConfigError, "target_modules: .* it has down_proj"),
    ]:
        with pytest.raises(error, match=words) as caught:
            load_model(config(tiny, tmp_path, **change))
        assert "\n" not in str(caught.value)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigurationError, match="no CUDA GPU is visible; use engine='auto'"):
            resolve_engine(config(tiny, tmp_path, engine="unsloth"))
        with pytest.raises(ConfigError, match="load_in_4bit: needs a CUDA GPU"):
            resolve_engine(config(tiny, tmp_path, load_in_4bit=True))
    assert resolve_engine(config(tiny, tmp_path)) == "transformers", "what auto takes, everywhere"


def test_trainer_arguments(tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        args = trainer_args(config(tiny, tmp_path, optim="adamw_8bit", max_steps=None, epochs=2))
    assert (args.max_steps, args.num_train_epochs, args.eval_strategy) == (-1, 2, "no")
    assert args.report_to == [] and args.disable_tqdm and not args.save_only_model
    if not torch.cuda.is_available():
        assert args.optim == "adamw_torch" and args.use_cpu and not args.gradient_checkpointing
        assert "adamw_torch is used instead" in caplog.text
    assert trainer_args(config(tiny, tmp_path, optim="adam")).weight_decay == 0
    steps = {"test_file": GOOD["training_file"], "test_file_eval_strategy": "steps"}
    args = trainer_args(config(tiny, tmp_path, **steps, test_file_eval_steps=7), save_steps=11)
    assert (args.eval_strategy, args.eval_steps, args.save_steps) == ("steps", 7, 11)
