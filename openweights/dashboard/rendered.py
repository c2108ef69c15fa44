"""Rows of a dataset as a fine-tuning job reads them: rendered by the chat template, with what is
learned of them, counted in tokens.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, BinaryIO, cast

from openweights.client import OpenWeights
from openweights.errors import InvalidInputError
from openweights.jobs.pinning import adapter_base
from openweights.jobs.unsloth.config.fields import DatasetRef
from openweights.jobs.unsloth.config.first_look import check_rendering, known_ends
from openweights.jobs.unsloth.config.grpo_fields import split_gold
from openweights.jobs.unsloth.config.rendering import (
    LearnedText,
    answer_texts,
    row_text,
    sdft_texts,
)
from openweights.jobs.unsloth.config.rows import PREFERENCE_LOSSES, check_rows, numbered_rows
from openweights.jobs.unsloth.validate import TrainingConfig, training_config
from openweights.models.at_hand import tokenizer_at_hand
from openweights.models.names import is_path
from openweights.models.templates.options import set_template
from openweights.models.templates.rendering import rendered_prompt
from openweights.types import FileRecord

# A page asks for rows and for their summary at once, and transformers, which names its parts when
# they are asked for, cannot be imported by two threads at a time.
_loading = threading.Lock()

Row = Mapping[str, Any]
# A text of a row, and what each of its stretches weighs; None where it is read only.
Text = tuple[str, list[tuple[str, float | None]]]


@dataclass(frozen=True, slots=True)
class Reader:
    """How a job reads the rows of a file.

    Attributes:
        config: The job's; the file is its training file.
    """

    config: TrainingConfig
    tokenizer: Any
    ends: Sequence[str]

    def texts(self, row: Row) -> list[Text]:
        """What becomes of a row: a text with its title, or several.

        Raises:
            ValueError: The row would be refused.
        """
        ref = self.config.datasets()[0]
        check_rows([(1, dict(row))], self.config, DatasetRef("row", None, ref.file, ref.purpose))
        if "text" in row:
            return [("text", [(str(row["text"]), 1.0)])]
        if self.config.loss in PREFERENCE_LOSSES:
            chosen, rejected = answer_texts(row, self.tokenizer, self.ends)
            return [("chosen", stretches(chosen)), ("rejected", stretches(rejected, -1.0))]
        if self.config.loss == "grpo":
            prompt, tools = split_gold(row)[0], row.get("tools")
            text = rendered_prompt(self.tokenizer, prompt, tools=tools).text
            return [("prompt, which the model answers", [(text, None)])]
        if self.config.loss == "sdft":
            student, teacher, _ = sdft_texts(row, self.config, self.tokenizer)
            return [
                ("prompt of the student, whose own answer is learned", [(student.text, None)]),
                ("prompt of the teacher, who scores it", [(teacher.text, None)]),
            ]
        train_on = self.config.train_on
        return [("", stretches(row_text(row, self.tokenizer, train_on=train_on, ends=self.ends)))]

    def tokens(self, texts: Sequence[Text]) -> int:
        """How many tokens the texts have together."""
        whole = ["".join(piece for piece, _ in text) for _, text in texts]
        return sum(len(ids) for ids in self.tokenizer(whole, add_special_tokens=False)["input_ids"])

    def check(self, content: BinaryIO) -> None:
        """See that the job can use every row of the file; raises DatasetError."""
        check_rows(numbered_rows(content), self.config, self.config.datasets()[0])

    def check_rendering(self, content: BinaryIO, most: int) -> None:
        """See of the first rows that they are rendered as they say; raises DatasetError."""
        ref = self.config.datasets()[0]
        check_rendering(numbered_rows(content), self.config, self.tokenizer, ref, most)


def reader_of(ow: OpenWeights, file: FileRecord, given: Mapping[str, str]) -> Reader | None:
    """As a `job` reads the file, or a `model` with a `loss`; None when neither is named.

    Raises:
        InvalidInputError: The model's tokenizer is not on this machine, or the model is a folder of
            the machine that serves others.
    """
    if given.get("job"):
        job = ow.jobs.retrieve(given["job"])
        params = {**job.params["validated_params"], "training_file": file.id}
    elif given.get("model"):
        loss = given.get("loss") or ("dpo" if file.purpose == "preference" else "sft")
        params = {"model": given["model"], "training_file": file.id, "loss": loss}
    else:
        return None
    config = training_config(params)
    base = adapter_base(ow, config.model, ask_hub=False)
    if ow.settings.is_remote and is_path(base):
        raise InvalidInputError("model: folders of the machine that serves the page are not read")
    options = json.dumps(config.template_options)
    tokenizer = _tokenizer(base, config.chat_template, options)
    if tokenizer is None:
        raise InvalidInputError(
            f"model: the tokenizer of {base} is not on this machine; rows are shown as they are"
        )
    return Reader(config, tokenizer, known_ends(tokenizer))


def _tokenizer(base: str, chat_template: str, options: str) -> Any | None:
    with _loading:
        return _loaded(base, chat_template, options)


@lru_cache(maxsize=8)
def _loaded(base: str, chat_template: str, options: str) -> Any | None:
    tokenizer = tokenizer_at_hand(base)
    if tokenizer is not None:
        set_template(tokenizer, chat_template, cast("dict[str, Any]", json.loads(options)))
    return tokenizer


def stretches(learned: LearnedText, sign: float = 1.0) -> list[tuple[str, float | None]]:
    """The text in stretches of one weight."""
    return list(_stretches(learned, sign))


def _stretches(learned: LearnedText, sign: float) -> Iterator[tuple[str, float | None]]:
    text, at = learned.rendered.text, 0
    for start, stop, weight in learned.pieces:
        if start > at:
            yield text[at:start], None
        if stop > start:
            yield text[start:stop], sign * weight if weight else None
        at = max(at, stop)
    if at < len(text):
        yield text[at:], None
