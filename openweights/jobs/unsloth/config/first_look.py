"""The look at a file's first rows before anything is paid for, where the tokenizer is at hand: what
the chat template writes of them, and what the limits on their length leave. No torch here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from openweights import progress
from openweights.client.messages import Problems
from openweights.errors import ConfigError, DatasetError
from openweights.jobs.unsloth.config.demonstrations import Showing, showings
from openweights.jobs.unsloth.config.encoding import ENOUGH_TEXT, EncodedRows, text_size
from openweights.jobs.unsloth.config.examples import reader_of
from openweights.jobs.unsloth.config.fields import DatasetRef, TrainingFields
from openweights.jobs.unsloth.config.rows import NumberedRow
from openweights.models.templates.ends import end_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHECKED_ROWS = 64
MOST_ROWS = 512  # where of the first ones nothing is left


@dataclass(frozen=True, slots=True)
class FirstRows:
    """The beginning of a file that a job reads.

    Attributes:
        is_all: Whether it has no further rows.
    """

    ref: DatasetRef
    rows: list[NumberedRow]
    is_all: bool


def beginning(ref: DatasetRef, rows: Iterable[NumberedRow]) -> FirstRows:
    """As much of a file as may be looked at before a job is submitted."""
    first = list(islice(rows, MOST_ROWS + 1))
    return FirstRows(ref, first[:MOST_ROWS], len(first) <= MOST_ROWS)


def first_rows(rows: Iterable[NumberedRow]) -> list[NumberedRow]:
    """Those of a file that are looked at before a job is submitted."""
    first, text = list[NumberedRow](), 0
    for line, row in islice(rows, CHECKED_ROWS):
        first.append((line, row))
        text += text_size(row)
        if text >= ENOUGH_TEXT:
            break
    return first


def check_files(
    tokenizer: PreTrainedTokenizerBase,
    files: Iterable[FirstRows],
    config: TrainingFields,
    positions: int | None = None,
) -> list[str]:
    """See that something is left of the first rows of each file; for `at_hand.look_at_hand`.

    Args:
        positions: That the model was made for, where that is known.

    Returns:
        Warnings: what is lost of them.

    Raises:
        ConfigError: The tokenizer has no chat template.
        DatasetError: Rows cannot be used, or nothing is left of any.
    """
    warnings: list[str] = []
    for file in files:
        read, lengths = _read(file, config, tokenizer)
        is_part = not file.is_all or read.given < len(file.rows)
        read.refuse_if_empty(first=is_part)
        warnings += [*read.warnings(first=is_part), *_beyond(read, lengths, is_part, positions)]
    return warnings


def _read(
    file: FirstRows, config: TrainingFields, tokenizer: PreTrainedTokenizerBase
) -> tuple[EncodedRows[Any], list[int]]:
    """The rows, and the lengths of those that can be used; with demonstrations where most of them
    fit, if that is left to be found.
    """
    ref, ends = file.ref, known_ends(tokenizer)
    places: Sequence[Showing | None] = [None]
    if config.loss == "sdft" and config.sdft_gate != "off" and ref.field == "training_file":
        places = showings(config.sdft_demo_placement, config.sdft_demo_repeats)
    found: EncodedRows[Any] | None = None
    for place in places:
        reader = reader_of(ref, config, tokenizer, ends, place)
        read = EncodedRows[Any](ref.name, reader)
        lengths = [reader.length(row) for _, row in read.encoded(file.rows, CHECKED_ROWS)]
        if lengths:
            return read, lengths
        found = found or read
    assert found is not None
    return found, []


def _beyond(
    read: EncodedRows[Any], lengths: Sequence[int], is_part: bool, positions: int | None
) -> Iterator[str]:
    """What the positions that the model was made for do not leave room for.

    Raises:
        DatasetError: A prompt cannot be answered.
    """
    if positions is None:
        return
    beyond = sum(length > positions for length in lengths)
    if read.reader.answer is None:
        if beyond:
            yield (
                f"{read.name}: {beyond:,} {read.of(is_part)} have more tokens than the {positions} "
                "positions that the model was made for; shorten them"
            )
        return
    field, most = read.reader.answer
    if (longest := max(lengths)) >= positions:
        raise DatasetError(
            f"{read.name}: prompts have up to {longest} tokens, and the {positions} positions that "
            "the model was made for leave no room for an answer; shorten them"
            + (f", or set max_seq_length to {positions}" if read.reader.limit is not None else "")
        )
    if cut := sum(length + most > positions for length in lengths):
        cut_of = f"of {cut:,} {read.of(is_part)}"
        yield (
            f"{read.name}: the prompts {cut_of} leave fewer tokens than "
            f"{field}={most} of the {positions} positions that the model was made for, where their "
            f"answers are cut; lower it to {positions - longest}, or shorten them"
        )


def check_rendering(
    rows: Iterable[NumberedRow],
    config: TrainingFields,
    tokenizer: PreTrainedTokenizerBase,
    ref: DatasetRef,
    most: int = CHECKED_ROWS,
) -> None:
    """See on the first `most` rows of a file that the chat template writes what they say.

    Raises:
        ConfigError: The tokenizer has no chat template.
        DatasetError: It does not; a line for each row.
    """
    reader = reader_of(ref, config, tokenizer, known_ends(tokenizer))
    for _ in EncodedRows[Any](ref.name, reader).encoded(islice(rows, most)):
        pass


def check_each(
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[NumberedRow],
    render: Callable[[dict[str, Any], PreTrainedTokenizerBase], object],
    name: str,
) -> None:
    """See that each row can be rendered; for `at_hand.look_at_hand`.

    Args:
        render: Raises what is wrong with a row.
        name: What the rows are called in messages.

    Raises:
        ConfigError: None can be.
        DatasetError: Some cannot; a line for each.
    """
    problems, count = Problems(name), 0
    for line, row in rows:
        count += 1
        progress.advanced()
        try:
            render(dict(row), tokenizer)
        except ConfigError:
            raise
        except ValueError as error:
            problems.add_error(line, error)
    problems.raise_if_any(rows=count)


def known_ends(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Texts of the tokens that end a turn, as far as tokenizer, template and the model's folder
    tell.
    """
    return [str(tokenizer.convert_ids_to_tokens(end)) for end in end_ids(tokenizer)]
