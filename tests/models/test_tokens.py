"""Tokenizers and weights that do not quite belong together: right, or one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from openweights.errors import ConfigError, DatasetError
from openweights.jobs.unsloth.config.first_look import check_rendering
from openweights.jobs.unsloth.data import sft_examples
from openweights.jobs.unsloth.validate import training_config
from openweights.models.at_hand import tokenizer_at_hand
from openweights.models.load import load_model, load_trained
from openweights.models.templates.rendering import prompt_token_ids
from openweights.models.tokens import Collator, eos_token_ids
from tests.jobs.unsloth.malformed_configs import GOOD
from tests.tiny_model import CHATML, EOS, PAD, SECOND_EOS, make_tiny_model, make_tokenizer

TALK = {
    "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "an answer"}]
}


def change(file: Path, **values: Any) -> None:
    given = json.loads(file.read_text())
    file.write_text(json.dumps({**given, **values}))


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return make_tiny_model(tmp_path / "tiny")


@pytest.mark.parametrize("pad", [None, EOS, SECOND_EOS, "<new pad>"])
def test_a_pad_token_is_one_that_ends_nothing_and_has_weights(tiny: Path, pad: str | None) -> None:
    tokenizer = make_tokenizer()
    if pad is None:
        tokenizer.pad_token = None
    else:
        tokenizer.add_special_tokens({"pad_token": pad})
    tokenizer.save_pretrained(tiny)
    config = training_config({**GOOD, "model": str(tiny)})
    model, tokenizer = load_model(config)
    assert tokenizer.pad_token == PAD
    assert model.config.pad_token_id == tokenizer.pad_token_id  # type: ignore[union-attr]
    # The end of each answer is learned, and padding is not.
    longer = {"messages": [TALK["messages"][0], {"role": "assistant", "content": "a" * 40}]}
    rows = sft_examples(config, tokenizer, [TALK, longer], ends=eos_token_ids(model, tokenizer))
    batch = Collator(int(tokenizer.pad_token_id))(rows)  # type: ignore[arg-type]
    assert batch["labels"].eq(int(tokenizer.eos_token_id)).sum(-1).tolist() == [1, 1]  # type: ignore[arg-type]
    assert not batch["labels"].eq(int(tokenizer.pad_token_id)).any()  # type: ignore[arg-type]
    assert model(batch["input_ids"].to(model.device)).logits.isfinite().all()


def test_a_vocabulary_without_any_pad_pads_with_the_end(tiny: Path) -> None:
    """What is padded is told by length, so that the end itself is learned all the same."""
    names = {PAD: "<|a|>", SECOND_EOS: "<|b|>"}
    text = (tiny / "tokenizer.json").read_text()
    for old, new in names.items():
        text = text.replace(json.dumps(old), json.dumps(new))
    (tiny / "tokenizer.json").write_text(text)
    change(tiny / "tokenizer_config.json", pad_token=None)
    _, tokenizer = load_trained(str(tiny))
    assert tokenizer.pad_token == tokenizer.eos_token == EOS
    rows = sft_examples(training_config(GOOD), tokenizer, [TALK])
    longer = [*rows, {name: [*values, *values] for name, values in rows[0].items()}]
    batch = Collator(int(tokenizer.pad_token_id))(longer)  # type: ignore[arg-type]
    assert batch["labels"].eq(int(tokenizer.eos_token_id)).sum(-1).tolist() == [1, 2]  # type: ignore[arg-type]


def test_tokens_beyond_the_embedding_matrix(tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["answer"])
    tokenizer.save_pretrained(tiny)
    model, tokenizer = load_trained(str(tiny))
    assert "the model's weights lack 1 tokens of its tokenizer" in caplog.text
    assert model(torch.tensor([[5, 6]], device=model.device)).logits.isfinite().all(), (
        "other rows are no matter"
    )
    beyond = "tokenizer writes '{}' with the id 284, and the model's weights have 284 tokens"
    with pytest.raises(DatasetError, match="training_file:1: the " + beyond.format("answer")):
        sft_examples(training_config(GOOD), tokenizer, [TALK])
    with pytest.raises(ValueError, match=beyond.format("answer")):
        prompt_token_ids(tokenizer, TALK["messages"][1:])
    with pytest.raises(ConfigError, match=beyond.format("answer")):
        model(torch.tensor([[5, 284]], device=model.device))
    # Before a job is paid for it is known, too, where the model is on this machine.
    at_hand = tokenizer_at_hand(str(tiny))
    config = training_config(GOOD)
    known = {"messages": [TALK["messages"][0], {"role": "assistant", "content": "a word"}]}
    check_rendering([(1, known)], config, at_hand, config.datasets()[0])
    for row in (TALK, {"text": "an answer"}):
        with pytest.raises(DatasetError, match="training_file:2: the " + beyond.format("answer")):
            check_rendering([(1, known), (2, row)], config, at_hand, config.datasets()[0])
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<turn>"])
    tokenizer.chat_template = CHATML.replace(EOS, "<turn>")
    tokenizer.save_pretrained(tiny)
    with pytest.raises(ConfigError, match=beyond.format("<turn>")):
        load_trained(str(tiny))


def test_ends_and_pads_of_no_vocabulary(tiny: Path) -> None:
    change(tiny / "generation_config.json", eos_token_id=[2, 9999])
    model, tokenizer = load_trained(str(tiny))
    assert eos_token_ids(model, tokenizer) == [2]
    change(tiny / "config.json", pad_token_id=5000)
    with pytest.raises(ConfigError, match="cannot be loaded: Padding_idx must be within") as caught:
        load_trained(str(tiny))
    assert "\n" not in str(caught.value)
