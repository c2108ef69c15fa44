"""Rows, and what is learned of them, decoded."""

from __future__ import annotations

from typing import Any

from openweights.jobs.unsloth.data import sft_examples
from openweights.jobs.unsloth.validate import TrainingConfig, training_config
from openweights.models.templates.options import set_template
from openweights.models.tokens import IGNORED
from tests.chat_templates import TEMPLATES
from tests.jobs.unsloth.malformed_configs import GOOD
from tests.tiny_model import make_tokenizer

Row = dict[str, Any]


def tokenizer_with(template: str, **options: Any) -> Any:
    tokenizer = make_tokenizer()
    set_template(tokenizer, template, options)
    return tokenizer


TOKENIZERS = {name: tokenizer_with(template) for name, template in TEMPLATES.items()}


def config(**changes: Any) -> TrainingConfig:
    return training_config({**GOOD, **changes})


def user(text: str, **more: Any) -> Row:
    return {"role": "user", "content": text, **more}


def said(text: str, **more: Any) -> Row:
    return {"role": "assistant", "content": text, **more}


def system(text: str) -> Row:
    return {"role": "system", "content": text}


def row(*messages: Row, **columns: Any) -> Row:
    return {"messages": list(messages), **columns}


def stretches(ids: list[int], labels: list[int], tokenizer: Any) -> list[str]:
    """The learned stretches of a row, decoded."""
    found: list[list[int]] = [[]]
    for token, label in zip(ids, labels, strict=True):
        if label == IGNORED:
            found.append([])
        else:
            found[-1].append(token)
    return [tokenizer.decode(part) for part in found if part]


def learned(tokenizer: Any, example: Row, **changes: Any) -> list[str]:
    settings = config(**changes)
    [encoded] = sft_examples(settings, tokenizer, [example])
    return stretches(encoded["input_ids"], encoded["labels"], tokenizer)
