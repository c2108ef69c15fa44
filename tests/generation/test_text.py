"""Texts come in whole characters and stop where they must, wherever the tokens' borders are."""

from __future__ import annotations

from functools import cache
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from openweights.generation.params import GenerationRequest, SamplingParams, joined
from openweights.generation.samples import Sample
from openweights.generation.text import Detokenizer, StopMatcher
from tests.tiny_model import make_tokenizer

EOS = 2


@cache
def tokenizer() -> Any:
    return make_tokenizer()


def encoded(text: str) -> list[int]:
    return tokenizer()(text, add_special_tokens=False)["input_ids"]


def decoded(ids: list[int]) -> str:
    return tokenizer().decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def cut(values: list[int], sizes: list[int]) -> list[list[int]]:
    """The values in chunks of these sizes, and the rest in one."""
    chunks = []
    for size in sizes:
        chunks.append(values[:size])
        values = values[size:]
    return [*chunks, values]


SIZES = st.lists(st.integers(0, 3), max_size=20)


@settings(max_examples=200)
@given(st.lists(st.integers(0, 280), max_size=30), SIZES)
def test_pieces_join_to_what_all_tokens_decode_to(ids: list[int], sizes: list[int]) -> None:
    """Any bytes, special tokens among them, valid or not."""
    detokenizer = Detokenizer(tokenizer(), skip_special_tokens=True)
    pieces = [detokenizer.push(chunk) for chunk in cut(ids, sizes)]
    assert "".join(pieces) + detokenizer.finish() == decoded(ids)


@settings(max_examples=100)
@given(st.text(max_size=20))
def test_no_piece_ends_within_a_character(text: str) -> None:
    detokenizer = Detokenizer(tokenizer(), skip_special_tokens=True)
    pieces = [detokenizer.push([token]) for token in encoded(text)]
    assert all("\ufffd" not in piece for piece in pieces if "\ufffd" not in text)
    assert "".join(pieces) + detokenizer.finish() == text


# ---- tokens of single bytes ----------------------------------------------------------------------

WORDS = ("a", "b", "\u2581", "\u2581a", "\u00e9")


@cache
def of_bytes() -> Any:
    """A tokenizer that writes what it has no token for as bytes, as those of Llama 2 do."""
    names = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    vocabulary = {name: number for number, name in enumerate(names)}
    model = models.BPE(vocab=vocabulary, merges=[("\u2581", "a")], byte_fallback=True)
    own = Tokenizer(model)
    own.normalizer = normalizers.Replace(" ", "\u2581")
    own.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>", eos_token="</s>")


def pieces_of(ids: list[int], sizes: list[int]) -> list[str]:
    detokenizer = Detokenizer(of_bytes(), skip_special_tokens=True)
    return [*(detokenizer.push(chunk) for chunk in cut(ids, sizes)), detokenizer.finish()]


@settings(max_examples=200)
@given(st.text("ab \n\u00e9\u20ac\u4e2d\U0001f600\u0301", max_size=12), SIZES)
def test_characters_of_several_byte_tokens_are_told_whole(text: str, sizes: list[int]) -> None:
    text = "a" + text
    pieces = pieces_of(of_bytes()(text, add_special_tokens=False)["input_ids"], sizes)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=200)
@given(st.lists(st.integers(0, 257 + len(WORDS)), max_size=12), SIZES)
def test_bytes_that_are_no_character_are_told_alike_however_they_come(
    ids: list[int], sizes: list[int]
) -> None:
    alone = pieces_of(ids, [1] * len(ids))
    assert "".join(pieces_of(ids, sizes)) == "".join(alone) == "".join(pieces_of(ids, []))


def test_what_was_told_stays_when_bytes_follow_that_are_no_character() -> None:
    euro, bad, a = [2 + byte for byte in "\u20ac".encode()], 2 + 0xFF, 258
    assert of_bytes().decode([*euro, bad, a]) == 4 * "\ufffd" + "a", "the control: its own decoder"
    assert pieces_of([*euro, bad, a], [1] * 5) == ["", "", "\u20ac", "", "\ufffda", "", ""]
    space = 2 + 0x20
    assert "".join(pieces_of([2 + 0x0A, space, a], [1] * 3)) == "\n a"


def first_stop(text: str, stops: list[str]) -> str | None:
    """Letter by letter: what stands before the first stop text that is complete."""
    for end in range(1, len(text) + 1):
        found = [s for s in stops if text[:end].endswith(s)]
        if found:
            return text[: end - max(map(len, found))]
    return None


STOPS = st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=1, max_size=3)


@settings(max_examples=500)
@given(st.text("ab\n", max_size=20), STOPS, SIZES)
def test_the_first_stop_text_is_found_however_the_text_is_cut(
    text: str, stops: list[str], sizes: list[int]
) -> None:
    matcher, told = StopMatcher(stops), ""
    for chunk in cut(list(map(ord, text)), sizes):
        told += matcher.push("".join(map(chr, chunk)))
        assert not any(stop in told for stop in stops), "nothing of a stop text is ever told"
        if matcher.stopped:
            break
    before = first_stop(text, stops)
    assert matcher.stopped == (before is not None)
    assert told + matcher.finish() == (text if before is None else before)


@settings(max_examples=200)
@given(
    st.text("the and on\nπ", max_size=20),
    st.lists(st.text("the and\nπ", min_size=1, max_size=3), max_size=2),
    SIZES,
)
def test_a_sample_is_the_same_however_its_tokens_come(
    text: str, stops: list[str], sizes: list[int]
) -> None:
    params = SamplingParams(max_new_tokens=100, stop=tuple(stops))
    request = GenerationRequest([5], params)
    ids = [*encoded(text), EOS, 7, 7]

    def run(chunks: list[list[int]]) -> Any:
        sample = Sample(request, 0, tokenizer(), (EOS,), 512)
        return joined([sample.push(c, [0.5] * len(c)) for c in chunks if not sample.is_finished])

    whole = run([ids])
    assert whole == run(cut(ids, sizes)) == run([[token] for token in ids])
    before = first_stop(text, stops) if stops else None
    assert whole.text == (text if before is None else before)
    assert whole.ended and len(whole.logprobs) == len(whole.token_ids) <= len(ids) - 2
    if before is None:
        assert whole.token_ids == ids[:-2], "the end token belongs to it"


def test_a_sample_ends_at_its_limit_and_tells_what_it_held_back() -> None:
    params = SamplingParams(max_new_tokens=3, stop=("the end",))
    sample = Sample(GenerationRequest([5], params), 0, tokenizer(), (EOS,), 512)
    whole = joined([sample.push([token]) for token in encoded("xythe")[:3]])
    assert (whole.text, whole.finish_reason) == ("xythe", "length")
    short = Sample(GenerationRequest([5] * 510, params), 0, tokenizer(), (EOS,), 512)
    assert short.push([9, 9, 9]).token_ids == [9, 9], "the context ends before the limit"


def test_nothing_ends_a_sample_that_is_too_short() -> None:
    params = SamplingParams(min_new_tokens=4, stop=("a",))
    sample = Sample(GenerationRequest([5], params), 0, tokenizer(), (EOS,), 512)
    a, b = encoded("a")[0], encoded("b")[0]
    deltas = [sample.push([token]) for token in (a, EOS, b, b, a, b)]
    assert [d.finish_reason for d in deltas[:4]] == [None] * 4
    assert sample.count == 5 and "".join(d.text for d in deltas) == "abb"
