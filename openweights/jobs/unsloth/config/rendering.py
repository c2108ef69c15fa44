"""Rows as texts, with the pieces of them that are learned. Client-side: no torch here.

With `train_on="responses"` each assistant message is learned with the end token that closes its
turn, with "last" the last of them alone, with "all" everything. A message or a block of one may
have a weight, which then counts for each of its tokens, whoever says it; an answer of weight 0 is
read only. The end token of a turn has the weight of what stands before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, Literal

from openweights.client.questions import Question
from openweights.jobs.unsloth.config.demonstrations import (
    Showing,
    demonstration_turns,
    showings,
    split_row,
    teacher_messages,
)
from openweights.jobs.unsloth.config.fields import TrainingFields
from openweights.jobs.unsloth.config.rows import (
    Row,
    is_weighted,
    plain_messages,
    preference_messages,
    weights,
)
from openweights.models.reading import (
    Offsets,
    compare_read,
    is_begun,
    tokenised,
    tokens_of,
)
from openweights.models.templates.control_tokens import refuse_control_tokens
from openweights.models.templates.messages import Message, MessageError, assistant_messages
from openweights.models.templates.rendering import (
    MessageSpan,
    Rendered,
    rendered_prompt,
    rendered_spans,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TrainOn = Literal["last", "responses", "all"]
Piece = tuple[int, int, float]  # characters from, up to, and their weight

CHECKED_ROWS = 64


@dataclass(frozen=True, slots=True)
class LearnedText:
    """A rendered row.

    Attributes:
        pieces: What is learned of it; what is in none weighs 0.
    """

    rendered: Rendered
    pieces: list[Piece]


def row_text(
    row: Row, tokenizer: PreTrainedTokenizerBase, *, train_on: TrainOn, ends: Sequence[str]
) -> LearnedText:
    """A row of conversations as it is learned.

    Raises:
        ValueError: There is nothing to learn, or the row cannot be rendered as it says.
    """
    messages = plain_messages(row)
    own = [_own_weight(message) for message in row["messages"]]
    answers = assistant_messages(messages)
    answers = answers[-1:] if train_on == "last" else answers
    learned = {index for index in answers if own[index] != 0}
    has_weight = is_weighted if train_on == "all" else _counts
    weighted = {i for i, m in enumerate(row["messages"]) if has_weight({"messages": [m]})}
    if train_on == "last":
        weighted &= set(answers)
    # Of a row whose answers all weigh 0 nothing is learned, which is what it says.
    spanned = learned | weighted or set(answers)
    if train_on != "all" and not spanned:
        raise ValueError(
            "messages: no assistant message to learn from; add one, or set train_on='all'"
        )
    rendered = rendered_spans(tokenizer, messages, spanned, ends, tools=row.get("tools"))
    default = 1.0 if train_on == "all" else 0.0
    pieces: list[Piece] = []
    position = 0
    for span in rendered.spans:
        pieces += [(position, span.start, default)] if default else []
        weight = own[span.message]
        if weight is None:
            weight = max(default, float(span.message in learned))
        pieces += _weighted_pieces(span, row["messages"][span.message].get("content"), weight)
        position = span.end
    pieces += [(position, len(rendered.text), default)] if default else []
    return LearnedText(rendered, pieces)


def read_text(
    learned: LearnedText, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], Offsets, frozenset[str]]:
    """Tokens of a rendered row, the characters of each, and notes.

    Raises:
        ValueError: What is learned is not what the text says.
    """
    rendered = learned.rendered
    tokens = tokens_of(rendered.text, rendered.cuts, tokenizer)
    stretches = [(start, stop) for start, stop, weight in learned.pieces if weight]
    notes = compare_read(tokenizer, rendered.text, tokens, cuts=rendered.cuts, learned=stretches)
    return *tokens, rendered.notes | notes


def plain_text_ids(
    row: Row, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], frozenset[str]]:
    """Tokens of a `text` row, between the tokens that begin and end one, and notes.

    Raises:
        ValueError: There is no text, or it is not what would be learned.
    """
    text = row.get("text")
    if not isinstance(text, str) or not text:
        raise ValueError("messages: is missing, and so is 'text'; give one of them")
    begins = not is_begun(tokenizer, text)
    encoding = tokenised(tokenizer, text, add_special_tokens=begins)
    ids: list[int] = encoding.ids
    columns = (ids, encoding.offsets, encoding.special_tokens_mask)
    own = [(token, place) for token, place, added in zip(*columns, strict=True) if not added]
    tokens = [token for token, _ in own], [place for _, place in own]
    notes = compare_read(tokenizer, text, tokens, learned=[(0, len(text))])
    if ids[-1] != tokenizer.eos_token_id:
        ids.append(int(tokenizer.eos_token_id))  # type: ignore[arg-type]
    return ids, frozenset(notes)


def _counts(row: Row) -> bool:
    """Whether something in it has a weight that is not 0."""
    return any(weights(row))


def _own_weight(message: Mapping[str, Any]) -> float | None:
    weight = message.get("weight")
    return None if weight is None else float(weight)


def _weighted_pieces(span: MessageSpan, content: Any, default: float) -> list[Piece]:
    """A message block by block, and the end token that closes its turn."""
    if not isinstance(content, list):
        return [(span.start, span.end, default)]
    pieces: list[Piece] = []
    weight = default
    for (start, stop), block in zip(block_spans(span, content), content, strict=True):
        if start < stop:
            weight = float(default if block.get("weight") is None else block["weight"])
            pieces.append((start, stop, weight))
    return [*pieces, (span.stop, span.end, weight)]


def block_spans(span: MessageSpan, blocks: Sequence[Mapping[str, Any]]) -> list[tuple[int, int]]:
    """Where each block of a message is in the rendered text.

    Raises:
        MessageError: The template writes it in another notation, in which blocks are not found.
    """
    if len(blocks) == 1:
        return [(span.start, span.stop)]
    if span.trimmed < 0:
        raise MessageError(
            span.message,
            ".content: the chat template writes it as JSON, in which its blocks cannot be told "
            "apart; make it one text",
        )
    lengths = [len(block["text"]) for block in blocks]
    stops = list(accumulate(lengths, initial=span.start - span.trimmed))
    inside = [min(max(stop, span.start), span.stop) for stop in stops]
    return list(pairwise(inside))


def answer_texts(
    row: Row, tokenizer: PreTrainedTokenizerBase, ends: Sequence[str]
) -> tuple[LearnedText, LearnedText]:
    """The chosen and the rejected answer to a prompt; learned is what the assistant says in them.

    Raises:
        ValueError: They cannot be compared, or not be rendered as the row says.
    """
    prompt, *answers = preference_messages(row)
    now = datetime.now()  # the prompt of both says the same, also where it tells the time
    texts: list[LearnedText] = []
    for side, answer in zip(("chosen", "rejected"), answers, strict=True):
        messages = [*prompt, *answer]
        wanted = [index for index in assistant_messages(messages) if index >= len(prompt)]
        try:
            rendered = rendered_spans(
                tokenizer, messages, wanted, ends, tools=row.get("tools"), now=now
            )
        except MessageError as error:
            index, field = error.message, "prompt"
            if index >= len(prompt):
                index, field = index - len(prompt), side
            raise ValueError(f"{field}[{index}]{error.problem}") from None
        pieces = [(span.start, span.end, 1.0) for span in rendered.spans]
        texts.append(LearnedText(rendered, pieces))
    return texts[0], texts[1]


def sdft_texts(
    row: Row,
    config: TrainingFields,
    tokenizer: PreTrainedTokenizerBase,
    showing: Showing | None = None,
) -> tuple[Rendered, Rendered, str]:
    """What the student and the teacher continue, and the demonstration, which the teacher reads to
    the letter even where the template would cut it. It stands where `showing` or else the config
    says.

    Raises:
        ValueError: The row has none, or it cannot be rendered as it says.
    """
    prompt, demonstration = split_row(row)
    if row.get("demonstration"):
        _refuse_control_token(tokenizer, demonstration, "demonstration")
    showing = showing or showings(config.sdft_demo_placement, config.sdft_demo_repeats)[0]
    shown = teacher_messages(
        prompt, demonstration, template=config.sdft_demo_template, showing=showing
    )
    as_turns = showing.placement == "turns"
    turns = demonstration_turns(prompt, showing.repeats) if as_turns else ()
    asked: dict[str, Any] = {"tools": row.get("tools"), "now": datetime.now()}
    student = rendered_prompt(tokenizer, prompt, **asked)
    teacher = rendered_prompt(tokenizer, shown, verbatim=turns, **asked)
    return student, teacher, demonstration


def prompt_messages(row: Row) -> list[Message]:
    """A row's messages without a last answer."""
    messages = plain_messages(row)
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def prompt_text(row: Row, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """What the model continues to answer a row.

    Raises:
        ValueError: It cannot be rendered as the row says.
    """
    return rendered_prompt(tokenizer, prompt_messages(row), tools=row.get("tools"))


def question_text(question: Question, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """What the model continues to answer a question; its choices hold nothing but text.

    Raises:
        ValueError: It cannot be rendered as it says.
    """
    try:
        asked = rendered_prompt(tokenizer, [{"role": "user", "content": question.text}])
    except MessageError as error:
        raise ValueError(f"question{error.problem.removeprefix('.content')}") from None
    for index, choice in enumerate(question.choices):
        _refuse_control_token(tokenizer, choice, f"choices[{index}]")
    return asked


def _refuse_control_token(tokenizer: PreTrainedTokenizerBase, text: str, field: str) -> None:
    try:
        refuse_control_tokens(tokenizer, [{"content": text}])
    except MessageError as error:
        raise ValueError(f"{field}{error.problem.removeprefix('.content')}") from None
