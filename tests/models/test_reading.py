"""What a tokenizer reads otherwise than it is written is refused by line where it is learned."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from openweights.errors import DatasetError
from openweights.jobs.unsloth.config.first_look import check_rendering
from openweights.jobs.unsloth.preference.data import preference_examples
from openweights.models.reading import token_ids, tokenised, tokens_of
from tests.learned_rows import config, learned, row, said, tokenizer_with, user
from tests.tiny_model import CHATML, EOS

WITHOUT_SYSTEM = CHATML.partition("{% endif %}")[2]
NO_ACCENTS = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
SPECIAL = ["<unk>", "<|im_end|>", "<|im_start|>"]


def normalised(*steps: Any) -> Any:
    tokenizer = tokenizer_with(CHATML)
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(list(steps))
    return tokenizer


def fast(tokenizer: Tokenizer) -> Any:
    tokenizer.add_special_tokens(SPECIAL)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, unk_token="<unk>", pad_token="<unk>"
    )
    wrapped.chat_template = WITHOUT_SYSTEM
    return wrapped


def ids_of(*tokens: str) -> dict[str, int]:
    return {token: number for number, token in enumerate(dict.fromkeys([*SPECIAL, *tokens]))}


def word_level() -> Any:
    vocabulary = ids_of("user", "assistant", "hello", "world")
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return fast(tokenizer)


def without_unknown() -> Any:
    letters = "abcdefghijklmnopqrstuvwxyz \n"
    tokenizer = Tokenizer(models.BPE(ids_of(*letters), []))
    tokenizer.decoder = decoders.Fuse()
    return fast(tokenizer)


def like_llama_2() -> Any:
    """Spaces are characters, one is written before each stretch, and bytes are a last resort."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = ids_of(*bytes_, "▁", *"abcdefghijklmnopqrstuvwxyz")
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, fuse_unk=True))
    spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(spaces)  # type: ignore[assignment]
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])  # type: ignore[assignment]
    return fast(tokenizer)


@pytest.mark.parametrize(
    ("step", "lost", "kept", "words"),
    [
        (normalizers.NFC(), "cafe\u0301", "café", r"'e\\u0301' as '\\xe9'"),
        (normalizers.NFKC(), "\ufb01 x", "fi x", r"'\\ufb01' as 'fi'"),
        (NO_ACCENTS, "café", "cafe", "'é' as 'e"),
        (normalizers.Strip(), "  a  ", "  a", "nothing of '  '"),
        (normalizers.Replace("``", '"'), "``a", '"a', "'``a' as '\"a"),
    ],
)
def test_another_form_is_refused_by_line(step: Any, lost: str, kept: str, words: str) -> None:
    tokenizer = normalised(step)
    assert learned(tokenizer, row(user("q"), said(kept))) == [kept + EOS]
    with pytest.raises(DatasetError, match=f"training_file:1: the tokenizer reads {words}"):
        learned(tokenizer, row(user("q"), said(lost)))
    with pytest.raises(DatasetError, match="training_file:1: the tokenizer reads"):
        learned(tokenizer, {"text": lost})
    pair = {"prompt": [user("q")], "chosen": [said(kept)], "rejected": [said(lost)]}
    dpo = config(loss="dpo", training_file="preference:file-0123456789ab")
    with pytest.raises(DatasetError, match="training_file:1: the tokenizer reads"):
        preference_examples(dpo, tokenizer, [pair], ends=[2])
    # It is found before a job is queued, where the tokenizer is at hand.
    ref, *_ = config().datasets()
    with pytest.raises(DatasetError, match="training_file:2: the tokenizer reads"):
        rows = [(1, row(user("q"), said(kept))), (2, row(user("q"), said(lost)))]
        check_rendering(rows, config(), tokenizer, ref)


def test_a_question_in_another_form_is_told(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = normalised(normalizers.NFC())
    with caplog.at_level(logging.WARNING):
        assert learned(tokenizer, row(user("cafe\u0301"), said("b"))) == [f"b{EOS}"]
    assert "reads some of what is not learned otherwise" in caplog.text
    with pytest.raises(DatasetError, match="the tokenizer reads"):
        learned(tokenizer, row(user("cafe\u0301"), said("b")), train_on="all")


def test_what_a_tokenizer_does_to_every_text_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        small = normalised(normalizers.Lowercase())
        assert learned(small, row(user("Q"), said("Hello World"))) == [f"hello world{EOS}"]
        assert "reads capital letters as small ones" in caplog.text
        caplog.clear()
        [found] = learned(word_level(), row(user("hello"), said("hello\n world")))
        assert found.split() == ["hello", "world", EOS]
        assert "takes all white space for the same" in caplog.text
    with pytest.raises(DatasetError, match="the tokenizer reads 'é' as 'e"):
        learned(normalised(normalizers.Lowercase(), NO_ACCENTS), row(user("q"), said("É")))


@pytest.mark.parametrize(
    ("make", "answer", "words"),
    [
        (word_level, "hello 你好 world", "'你好world' as '<unk>"),
        (without_unknown, "price €5", "nothing of '€5'"),
        (without_unknown, "你好", "nothing of '你好'"),
    ],
)
def test_what_the_vocabulary_lacks_is_refused(make: Any, answer: str, words: str) -> None:
    tokenizer = make()
    with pytest.raises(DatasetError) as caught:
        learned(tokenizer, row(user("hello"), said(answer)))
    assert words in str(caught.value)
    [found] = learned(tokenizer, row(user("hello"), said("hello world")))
    assert "".join(found.split()) == "helloworld" + EOS


def test_half_a_character_is_no_text() -> None:
    tokenizer = tokenizer_with(CHATML)
    for example in (row(user("q"), said("a", name="\ud800")), {"text": "a\ud800"}):
        with pytest.raises(DatasetError, match="training_file:1: .*half a surrogate pair"):
            learned(tokenizer, example)
    with pytest.raises(ValueError, match="half a surrogate pair"):
        token_ids(tokenizer, "\ud800")


_text = st.text(
    st.one_of(st.sampled_from(" \n\tabAB.é\u0301\u200b\ufb01"), st.characters(codec="utf-8")),
    min_size=1,
    max_size=12,
).filter(str.strip)
_NORMALISERS = {
    "nfc": normalised(normalizers.NFC()),
    "nfkc": normalised(normalizers.NFKC()),
    "accents": normalised(NO_ACCENTS),
    "strip": normalised(normalizers.Strip()),
    "none": tokenizer_with(CHATML),
}


@settings(max_examples=150)
@given(_text, st.sampled_from(sorted(_NORMALISERS)))
def test_the_answer_is_learned_or_refused(answer: str, name: str) -> None:
    try:
        found = learned(_NORMALISERS[name], row(user("q"), said(answer)))
    except DatasetError as error:
        assert str(error).startswith("training_file:1: the tokenizer reads ")
        assert name != "none"
        return
    assert found == [answer + EOS]


@settings(max_examples=60)
@given(_text, _text)
def test_spaces_that_a_tokenizer_adds_refuse_nothing(question: str, answer: str) -> None:
    [found] = learned(like_llama_2(), row(user(question), said(answer)))
    assert "".join(found.split()) == "".join(f"{answer}{EOS}".split())


# ---- white space ---------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapped", [False, True])
def test_white_space_is_learned_though_offsets_leave_it_out(wrapped: bool) -> None:
    """As `ByteLevel`'s own defaults do, alone or as one of several steps."""
    trimming = processors.ByteLevel(trim_offsets=True)
    tokenizer = tokenizer_with(CHATML)
    tokenizer.backend_tokenizer.post_processor = (
        processors.Sequence([trimming]) if wrapped else trimming
    )
    code = "def f():\n    return a    b \n"
    assert learned(tokenizer, row(user("q"), said(code))) == [code + EOS]
    blocks = [{"text": "x ", "weight": 0}, {"text": "  y \n", "weight": 1}, {"text": " z"}]
    assert learned(tokenizer, row(user("q"), said(blocks))) == [f"  y \n z{EOS}"]


def with_words(place: str) -> Any:
    """A tokenizer that puts a space before a text, as a normaliser or as a step before, whose
    tokens may have several characters.
    """
    words = ["▁", "▁▁", "\n", "\n\n", "H", "▁H", "Hi", "▁Hi"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    merges = [("▁", "▁"), ("\n", "\n"), ("H", "i"), ("▁", "H"), ("▁", "Hi")]
    vocabulary = ids_of(*bytes_, "i", *words)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True))
    if place == "normaliser":
        spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(spaces)  # type: ignore[assignment]
    else:
        step = pre_tokenizers.Metaspace(prepend_scheme=place, split=False)  # type: ignore[arg-type]
        tokenizer.pre_tokenizer = step  # type: ignore[assignment]
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])  # type: ignore[assignment]
    return fast(tokenizer)


_PLACES = {place: with_words(place) for place in ("first", "always", "never", "normaliser")}
_pieces = st.lists(
    st.sampled_from(["Hi", " ", "  ", "\n", "\n\n", "é", "H"]), min_size=1, max_size=5
)


@settings(max_examples=200)
@given(st.sampled_from(sorted(_PLACES)), st.lists(_pieces, min_size=1, max_size=4))
def test_a_part_gets_no_space_that_the_text_has_not(place: str, parts: list[list[str]]) -> None:
    """Its tokens say the text, but for the space before all of it, and none lies across a cut."""
    texts = ["".join(part) for part in parts]
    cuts = [len("".join(texts[:index])) for index in range(1, len(texts))]
    ids, offsets = tokens_of("".join(texts), cuts, _PLACES[place])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    said = decoders.Sequence(steps).decode(_PLACES[place].convert_ids_to_tokens(ids))  # type: ignore[arg-type]
    assert said in ("".join(texts), " " + "".join(texts))
    assert not any(start < cut < stop for start, stop in offsets for cut in cuts)


def test_a_thousand_answers_are_cut() -> None:
    text, count = "Hi  Hi", 1200
    ids, offsets = tokens_of(text * count, range(1, count * len(text)), _PLACES["first"])
    assert len(ids) == offsets[-1][1] == count * len(text)


_KINDS = {
    **{place: with_words(place) for place in _PLACES},
    "like_llama_2": like_llama_2(),
    "words": word_level(),
    "bytes": tokenizer_with(CHATML),
    "no accents": normalised(NO_ACCENTS),
}


class OfItsOwn(PreTrainedTokenizerFast):
    """One that does more with a text than the library."""

    def _encode_plus(self, text: str, **asked: Any) -> Any:  # type: ignore[override]
        return super()._encode_plus(text.upper(), **asked)


@settings(max_examples=200)
@given(
    st.sampled_from(sorted(_KINDS)),
    st.text(st.sampled_from("aHi \n\u0301éß日🙂<|im_end|>"), max_size=40),
    st.booleans(),
    st.booleans(),
)
def test_a_text_is_read_as_by_transformers(
    kind: str, text: str, special: bool, whole: bool
) -> None:
    """Whatever was asked of the tokenizer before."""
    tokenizer = _KINDS[kind]
    tokenizer.split_special_tokens = whole
    asked = {"return_offsets_mapping": True, "return_special_tokens_mask": True}
    expected = tokenizer(text, add_special_tokens=special, **asked)
    tokenizer([text, "aa"], max_length=1, truncation=True, padding="max_length")
    tokenizer.backend_tokenizer.encode_special_tokens = not whole
    found = tokenised(tokenizer, text, add_special_tokens=special)
    assert found.ids == expected["input_ids"] and found.offsets == expected["offset_mapping"]
    assert found.special_tokens_mask == expected["special_tokens_mask"]


def test_a_tokenizer_that_does_more_is_asked_itself() -> None:
    own = OfItsOwn(tokenizer_object=tokenizer_with(CHATML).backend_tokenizer)
    assert token_ids(own, "hello") == token_ids(own, "HELLO") != token_ids(_KINDS["bytes"], "hello")


def test_a_text_of_any_length_is_no_matter_for_transformers(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tokenizer = tokenizer_with(CHATML)
    long = "a" * (tokenizer.model_max_length + 1)
    assert len(token_ids(tokenizer, long)) == len(long)
    assert "Token indices" not in caplog.text
    tokenizer(long)  # the control
    assert "Token indices" in caplog.text
