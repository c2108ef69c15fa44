"""What a tokenizer makes of a text, and whether that is the text.

A tokenizer may read other characters than are written (one form of accents, no capital letters),
may have no token for some, or have tokens that the model's weights lack. What is learned is what it
reads, so tokens are decoded and compared with the text. No torch here.
"""

from __future__ import annotations

import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Offsets = list[tuple[int, int]]  # of each token, its first character and the one behind it

IGNORED = -100  # the label of a token that is read and not learned

NO_CAPITALS = "the tokenizer reads capital letters as small ones, so that none are learned"
NO_SPACE = "the tokenizer takes all white space for the same, so that none is learned as it stands"
READ_OTHERWISE = "the tokenizer reads some of what is not learned otherwise than it is written"

_KEEP_TO_THEMSELVES = ("\n", ".", "a", "0")  # one of them no text begins with
_SHOWN = 24  # characters of a text that is read as another
_start = itemgetter(0)  # of a token's place


# ---- tokens --------------------------------------------------------------------------------------


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a rendered text, in which the template wrote all that begin and end something.

    Raises:
        ValueError: The model's weights lack one.
    """
    ids: list[int] = tokenised(tokenizer, text, add_special_tokens=False).ids
    check_weights(tokenizer, ids)
    return ids


def is_begun(tokenizer: Any, text: str) -> bool:
    """Whether a text has the token that begins one, which would be doubled."""
    begin = tokenizer.bos_token
    return bool(begin) and text.startswith(str(begin))


class _Ids(NamedTuple):
    """What a tokenizer gives that is none of the tokenizers' library."""

    ids: list[int]


def tokenised(tokenizer: Any, text: str, *, add_special_tokens: bool) -> Any:
    """What the tokenizers' library gives for a text, however long: `ids`, `offsets` and
    `special_tokens_mask` of its tokens.

    Raises:
        ValueError: It is no text.
    """
    try:
        if _is_usual(type(tokenizer)):
            # Without transformers between them it takes half the time.
            return _backend(tokenizer).encode(text, add_special_tokens=add_special_tokens)
        # It would say that the text is longer than the model takes, which is told in our words.
        found = tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)
    except (TypeError, UnicodeEncodeError):
        raise ValueError(
            "holds half a surrogate pair, which no tokenizer reads; write the whole character"
        ) from None
    encodings = getattr(found, "encodings", None)
    return encodings[0] if encodings else _Ids(list(found["input_ids"]))


@lru_cache(maxsize=64)
def _is_usual(kind: type) -> bool:
    """Whether tokenizers of a class give a text to the tokenizers' library as it is."""
    from transformers import PreTrainedTokenizerFast as Usual

    steps = ("__call__", "_encode_plus")
    same = all(getattr(kind, step, None) is getattr(Usual, step) for step in steps)
    return same and not hasattr(kind, "_switch_to_input_mode")


def _backend(tokenizer: Any) -> Any:
    """The library's own tokenizer, as transformers sets it for a text that is not cut."""
    backend, whole = tokenizer.backend_tokenizer, tokenizer.split_special_tokens
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    if backend.encode_special_tokens != whole:
        backend.encode_special_tokens = whole
    return backend


def tokens_of(
    text: str, cuts: Collection[int], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], Offsets]:
    """Ids and characters of a text's tokens, none of which lies across a cut.

    A model that is asked for an answer starts with a new token there, so that a line break that the
    answer begins with never is half of a token.
    """
    ordered = sorted(cuts)
    ids: list[int] = []
    offsets: Offsets = []
    waiting = [(0, len(text))]
    while waiting:
        start, stop = waiting.pop()
        part, places = _part_tokens(tokenizer, text[start:stop], continues=start > 0)
        inside = ordered[bisect_right(ordered, start) : bisect_left(ordered, stop)]
        crossed = _crossed([cut - start for cut in inside], places)
        if crossed:
            borders = [start, *(start + cut for cut in crossed), stop]
            waiting += reversed([*pairwise(borders)])
        else:
            ids += part
            offsets += [(start + a, start + b) for a, b in places] if start else places
    return ids, offsets


def _crossed(cuts: Sequence[int], offsets: Offsets) -> list[int]:
    """Those of the cuts that lie within a token."""
    within = ((cut, bisect_right(offsets, cut, key=_start) - 1) for cut in cuts)
    return [cut for cut, at in within if at >= 0 and offsets[at][0] < cut < offsets[at][1]]


def _part_tokens(tokenizer: Any, text: str, *, continues: bool) -> tuple[list[int], Offsets]:
    """Tokens of a text, or of a part of one that has begun.

    Many tokenizers put a space before what they are given. A part does not get one: it is read
    behind a character that keeps to itself.
    """
    _count_white_space(tokenizer)
    if continues and _puts_a_space(tokenizer):
        for character in _KEEP_TO_THEMSELVES:
            ids, offsets = _with_places(tokenizer, character + text)
            first = bisect_left(offsets, 1, key=_start)
            if not first or offsets[first - 1][1] == 1:
                return ids[first:], [(start - 1, stop - 1) for start, stop in offsets[first:]]
    return _with_places(tokenizer, text)


def _with_places(tokenizer: Any, text: str) -> tuple[list[int], Offsets]:
    # The template wrote the special tokens that the model wants; more would double them.
    encoding = tokenised(tokenizer, text, add_special_tokens=False)
    return encoding.ids, encoding.offsets


@lru_cache(maxsize=16)
def _puts_a_space(tokenizer: Any) -> bool:
    """Whether a text is read as if a space stood before it."""
    alone, behind = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a", "\na")
    )
    return alone != behind[-len(alone) :]


def _count_white_space(tokenizer: Any) -> None:
    """Have the tokenizer say all characters of a token: some leave out white space, which is
    learned as all else.
    """
    processor = tokenizer.backend_tokenizer.post_processor
    for part in (processor, *(processor if hasattr(processor, "__getitem__") else ())):
        if getattr(part, "trim_offsets", False):
            part.trim_offsets = False


# ---- comparing -----------------------------------------------------------------------------------


def compare_read(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    tokens: tuple[Sequence[int], Offsets],
    *,
    cuts: Collection[int] = (),
    learned: Sequence[tuple[int, int]],
) -> set[str]:
    """See that tokens say what the text says, where it is learned.

    White space that a tokenizer reads besides, as many do before a word, is no matter.

    Args:
        tokens: Ids and offsets.
        cuts: Characters at which a token begins for sure.
        learned: Stretches of characters.

    Returns:
        Notes on what the tokenizer does to every text, and on what is read otherwise and not
        learned.

    Raises:
        ValueError: Something that is learned is read otherwise, or the weights lack a token.
    """
    ids, offsets = tokens
    check_weights(tokenizer, ids)
    if _decoded(tokenizer, ids) == text:
        return set()
    habits = _habits(tokenizer)
    notes = set(habits)
    borders = {stop for _, stop in offsets} & {stop for _, stop in learned} | {0, *cuts, len(text)}
    for start, stop in pairwise(sorted(borders)):
        first, behind = (bisect_left(offsets, at, key=_start) for at in (start, stop))
        inside = ids[first:behind]
        said, read = text[start:stop], _decoded(tokenizer, inside)
        problem = _difference(said, read, habits)
        if problem and any(a < stop and start < b for a, b in learned):
            raise ValueError(problem)
        if problem:
            notes.add(READ_OTHERWISE)
    return notes


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    # The library's own takes half the time, and tidies no spaces.
    return tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False)


@lru_cache(maxsize=16)
def _habits(tokenizer: Any) -> frozenset[str]:
    """What a tokenizer does to every text, as notes."""

    def same(first: str, second: str) -> bool:
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (first, second)]
        return ids[0] == ids[1]

    found = {NO_CAPITALS: same("Ab aB", "ab ab"), NO_SPACE: same("a\n  a", "a a")}
    return frozenset(note for note, is_so in found.items() if is_so)


def _difference(said: str, read: str, habits: Collection[str]) -> str | None:
    """What is read otherwise than it is said; None where nothing is, but for habits."""
    if NO_CAPITALS in habits:
        said, read = said.lower(), read.lower()
    if NO_SPACE in habits:
        said, read = ("".join(text.split()) for text in (said, read))
    at, left = 0, " " + read  # a decoder may cut a space off at the beginning
    for place, character in enumerate(left):
        if at < len(said) and character == said[at]:
            at += 1
        elif not character.isspace():
            return _told(said[at:], left[place:])
    return None if at == len(said) else _told(said[at:], "")


def _told(said: str, read: str) -> str:
    """The difference between two texts that differ from their beginning on."""
    here, there = _beginning(said), _beginning(read)
    alike = unicodedata.normalize("NFKC", here) == unicodedata.normalize("NFKC", there)
    show = ascii if alike else repr
    read_as = f"{show(here)} as {show(there)}" if there else f"nothing of {show(here)}"
    return (
        f"the tokenizer reads {read_as}, so that the row would not be learned as it stands; change "
        "that text, or choose a model that knows it"
    )


def _beginning(text: str) -> str:
    """The white space or the word with which a text begins."""
    word = text[: len(text) - len(text.lstrip())] or next(iter(text.split()), "")
    return word[:_SHOWN]


# ---- tokens without weights ----------------------------------------------------------------------

_WITHOUT_WEIGHTS: WeakKeyDictionary[Any, tuple[int, Mapping[int, str]]] = WeakKeyDictionary()


def without_weights(tokenizer: PreTrainedTokenizerBase, rows: int) -> Mapping[int, str]:
    """Tokens that an embedding matrix of so many rows lacks. From then on, what is tokenised for
    the model is refused where it holds one.
    """
    missing = {token: text for text, token in tokenizer.get_vocab().items() if token >= rows}
    _WITHOUT_WEIGHTS[tokenizer] = rows, missing
    return missing


def check_weights(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> None:
    """See that the weights have each token, as far as they are known.

    Raises:
        ValueError: They lack one.
    """
    rows, missing = _WITHOUT_WEIGHTS.get(tokenizer, (0, {}))
    found = next((i for i in ids if i in missing), None) if missing else None
    if found is not None:
        raise ValueError(
            f"the tokenizer writes {missing[found]!r} with the id {found}, and the model's weights "
            f"have {rows} tokens; choose a model whose tokenizer and weights belong together, or "
            "remove it"
        )
