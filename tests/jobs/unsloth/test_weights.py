"""Weighted SFT: which token has which weight, and that the loss is that of a slow float64 sum."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openweights.errors import DatasetError
from openweights.jobs.unsloth.config.fields import DatasetRef
from openweights.jobs.unsloth.config.first_look import check_rendering
from openweights.jobs.unsloth.data import sft_examples
from openweights.jobs.unsloth.sft import sft_train
from openweights.jobs.unsloth.validate import TrainingConfig, training_config
from openweights.models.load import load_model
from openweights.models.tokens import IGNORED
from tests.jobs.unsloth.malformed_configs import FILE, GOOD
from tests.rounding import assert_sums_equal, terms_of
from tests.tiny_model import EOS, make_tokenizer

TOKENIZER: Any = make_tokenizer()
QUESTION = {"role": "user", "content": "Hi"}


def block(text: str, weight: float | None = None) -> dict[str, Any]:
    return {"type": "text", "text": text} | ({} if weight is None else {"weight": weight})


def said(*blocks: dict[str, Any], role: str = "assistant") -> dict[str, Any]:
    return {"role": role, "content": list(blocks)}


def weighted_texts(*messages: Any, **changes: Any) -> list[tuple[float, str]]:
    """Stretches of equal weight, decoded; those of weight 0 left out."""
    settings = training_config({**GOOD, **changes})
    row = {"messages": list(messages)}
    [example] = sft_examples(settings, TOKENIZER, [row], with_weights=True)
    assert [label != IGNORED for label in example["labels"]] == [w != 0 for w in example["weights"]]
    found: list[tuple[float, list[int]]] = []
    for token, weight in zip(example["input_ids"], example["weights"], strict=True):
        if not found or found[-1][0] != weight:
            found.append((weight, []))
        found[-1][1].append(token)
    return [(weight, TOKENIZER.decode(ids)) for weight, ids in found if weight]


def test_weights_of_blocks() -> None:
    answer = said(block("good", 2.5), block("nil", 0), block("bad", -1), block("rest"))
    assert weighted_texts(QUESTION, answer) == [
        (2.5, "good"),
        (-1.0, "bad"),
        (1.0, f"rest{EOS}"),
    ]
    # The end token has the weight of what stands before it, an empty block none.
    assert weighted_texts(QUESTION, said(block("a"), block("b", 0.5), block("", 3))) == [
        (1.0, "a"),
        (0.5, f"b{EOS}"),
    ]
    # A weight counts whoever says it; without one, others are read only.
    mine = said(block("x", 0.25), block("y"), role="user")
    assert weighted_texts(mine, {"role": "assistant", "content": "z"}) == [
        (0.25, "x"),
        (1.0, f"z{EOS}"),
    ]


def test_weights_in_whole_conversations() -> None:
    mine, answer = said(block("mine", 0), role="user"), said(block("a", -2), block("b"))
    start, header, last = weighted_texts(mine, answer, train_on_responses_only=False)[0:3]
    assert start[0] == 1 and start[1].endswith("user\n"), "its scaffold is learned as before"
    assert header == (1.0, "\n<|im_start|>assistant\n") and last == (-2.0, "a")


@pytest.mark.parametrize("train_on", ["responses", "last"])
def test_a_row_of_which_nothing_is_to_be_learned_is_taken(train_on: str) -> None:
    ref = DatasetRef("logp_callback_datasets", "set", FILE, "conversations")
    for answer in ({"role": "assistant", "content": "nil", "weight": 0}, said(block("nil", 0))):
        assert weighted_texts(QUESTION, answer, train_on=train_on) == []
        row = {"messages": [QUESTION, answer]}
        check_rendering([(1, row)], training_config(GOOD), TOKENIZER, ref)
    with pytest.raises(DatasetError, match="no assistant message to learn from"):
        weighted_texts(QUESTION, train_on=train_on)


def test_a_key_with_null_counts_as_left_out() -> None:
    empty = {"type": None, "tag": None, "weight": None, "odd": None}
    assert weighted_texts(QUESTION, said({**empty, "text": "a"}, block("b"))) == [(1.0, f"ab{EOS}")]
    with pytest.raises(DatasetError, match="content.0..text: is null"):
        weighted_texts(QUESTION, said({**empty, "text": None}))


def test_a_trimmed_answer_keeps_its_text_and_weights() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}:{{ m['content'] | trim }}<|im_end|>{% endfor %}"
    )
    row = {"messages": [QUESTION, said(block("  \n a", 2), block("b ", -1))]}
    config = training_config(GOOD)
    [example] = sft_examples(config, tokenizer, [row], with_weights=True)
    assert tokenizer.decode(example["input_ids"]).endswith("assistant:  \n ab <|im_end|>")
    assert example["weights"][-4:] == [2, -1, -1, -1]


# ---- the loss


def row(*weights: float, plain: str = "") -> dict[str, Any]:
    blocks = [block(f"word{index} ", weight) for index, weight in enumerate(weights)]
    return {"messages": [QUESTION, said(*blocks, block(plain or "end"))]}


ROWS = [row(1, -0.5), row(0, 0.25, plain="a long tail of words"), row(), row(3), row(-1, 0), row(2)]


def config(tiny: Path, out: Path, **changes: Any) -> TrainingConfig:
    small = {"learning_rate": 1e-2, "warmup_steps": 0, "max_steps": 2, "packing": False}
    files = {"model": str(tiny), "output_dir": str(out), "lr_scheduler_type": "constant"}
    return training_config({**GOOD, **small, **files, **changes})


def trained(settings: TrainingConfig, rows: list[dict[str, Any]] = ROWS) -> tuple[list[float], Any]:
    model, tokenizer = load_model(settings)
    trainer = sft_train(settings, model, tokenizer, rows, rows[:2])
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    adapter = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    return losses, adapter


@torch.no_grad()
def slow_loss(settings: TrainingConfig, rows: list[dict[str, Any]]) -> tuple[float, float, int]:
    """sum(w * ce) / sum(|w|) in float64, row by row, from full logits.

    With it, what its terms' magnitudes add up to, sum(|w| * ce) / sum(|w|), and their number.
    """
    model, tokenizer = load_model(settings)
    model = model.double()
    total = magnitude = size = 0.0
    tokens = 0
    for example in sft_examples(settings, tokenizer, rows, with_weights=True):
        logits = model(torch.tensor([example["input_ids"]])).logits[0]
        for position in range(1, len(example["input_ids"])):
            p = logits[position - 1].softmax(-1)[example["input_ids"][position]]
            weight = example["weights"][position]
            total -= weight * float(p.log())
            magnitude -= abs(weight) * float(p.log())
            size += abs(weight)
        tokens += len(example["input_ids"])
    terms = terms_of(model, tokens)
    return (total / size, magnitude / size, terms) if size else (0.0, 0.0, terms)


# Plain gradient descent: Adam divides rounding by itself where a gradient is next to nothing.
SGD = {"optim": "sgd", "learning_rate": 0.5}
BIG = {**SGD, "per_device_train_batch_size": 6, "gradient_accumulation_steps": 1}


def test_loss_is_exact_however_a_step_is_split(tiny: Path, tmp_path: Path) -> None:
    losses, adapter = trained(config(tiny, tmp_path, **BIG))
    exact, size, terms = slow_loss(config(tiny, tmp_path), ROWS)
    assert_sums_equal(losses[0], exact, terms, size=size)
    for split in (
        {**SGD, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3},
        {**SGD, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},  # 4 and 2
        {**BIG, "packing": True},
    ):
        other_losses, other = trained(config(tiny, tmp_path, **split))
        assert_sums_equal(other_losses, losses, 2 * terms, size=size, about=str(split))
        assert_sums_equal(other, adapter, 2 * terms, about=str(split))
    # Control: the same rows without weights have another loss.
    plain = [
        {"messages": [QUESTION, said(*(block(b["text"]) for b in r["messages"][1]["content"]))]}
        for r in ROWS
    ]
    assert abs(trained(config(tiny, tmp_path, **BIG, max_steps=1), plain)[0][0] - losses[0]) > 0.1


def test_weights_of_one_are_ordinary_sft(tiny: Path, tmp_path: Path) -> None:
    ones = [row(1, 1), row(1)]
    plain = [
        {"messages": [QUESTION, {"role": "assistant", "content": text}]}
        for text in ("word0 word1 end", "word0 end")
    ]
    first, second = (trained(config(tiny, tmp_path, **BIG), rows) for rows in (ones, plain))
    terms = slow_loss(config(tiny, tmp_path), plain)[2]
    assert_sums_equal(first[0], second[0], 2 * terms)


def test_all_zero_has_no_loss_and_moves_nothing(tiny: Path, tmp_path: Path) -> None:
    nothing = [{"messages": [QUESTION, said(block("nothing at all", 0))]}] * 2
    settings = config(tiny, tmp_path, weight_decay=0.0, **BIG)
    before = {
        n: p.clone() for n, p in load_model(settings)[0].named_parameters() if p.requires_grad
    }
    losses, adapter = trained(settings, nothing)
    assert losses == [], "a mean of nothing is no 0"
    assert all(torch.equal(adapter[name], before[name]) for name in before)


def test_a_negative_weight_makes_a_block_less_likely(tiny: Path, tmp_path: Path) -> None:
    rows = [{"messages": [QUESTION, said(block("yes no", -1))]}]
    losses, _ = trained(config(tiny, tmp_path, max_steps=3), rows)
    assert losses[2] < losses[0] < 0, "the loss is minus the cross-entropy, and falls"


_weight = st.floats(-2, 2).map(lambda w: round(w, 2)) | st.just(0.0)


@settings(max_examples=6)
@given(st.lists(st.lists(_weight, max_size=3), min_size=1, max_size=4), st.integers(1, 3))
def test_any_weights(tiny: Path, weights: list[list[float]], batch: int) -> None:
    rows = [row(*own) for own in weights]
    options = config(
        tiny, tiny.parent / "out", max_steps=1,
        per_device_train_batch_size=batch, gradient_accumulation_steps=4,
    )  # fmt: skip
    exact, size, terms = slow_loss(options, rows)
    assert_sums_equal(trained(options, rows)[0][0], exact, terms, size=size)
