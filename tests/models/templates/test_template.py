"""What templates and tokenizers do to a row: it is learned to the letter, or refused by line."""

from __future__ import annotations

import logging
from datetime import datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, processors

from openweights.errors import DatasetError
from openweights.generation.prompts import chat_prompt_ids, text_prompt_ids
from openweights.jobs.unsloth.data import sft_examples
from openweights.jobs.unsloth.sdft_data import sdft_examples
from openweights.models.templates.ends import end_of_turn
from openweights.models.templates.marks import Marking
from openweights.models.templates.options import set_template
from openweights.models.templates.rendering import rendered_prompt, rendered_spans
from openweights.models.templates.scaffold import scaffold_of
from openweights.models.templates.template import Template
from tests.chat_templates import QWEN_25, R1
from tests.learned_rows import (
    TOKENIZERS,
    Row,
    config,
    learned,
    row,
    said,
    system,
    tokenizer_with,
    user,
)
from tests.tiny_model import CHATML, EOS, START, make_tokenizer

PLAIN = """{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
ASSISTANT = "m.role == 'assistant'"


# ---- white space beside thinking and calls -------------------------------------------------------

TRIMMING = PLAIN.replace(
    "m.content +",
    "('<think>' + m.reasoning_content | trim + '</think>' if m.reasoning_content else '')"
    " + m.content | trim + (m.tool_calls[0].function.name if m.tool_calls else '') +",
)
_edge = st.text(st.sampled_from(" \n\t"), max_size=5)
_edged = st.builds("{}{}{}".format, _edge, st.sampled_from(["a", "if x:\n    y"]), _edge)


@settings(max_examples=60)
@given(_edged, _edged, st.booleans())
def test_white_space_beside_thinking_and_calls_is_learned(
    thinking: str, answer: str, calls: bool
) -> None:
    tokenizer = _trimming
    call = [{"type": "function", "function": {"name": "weather", "arguments": {}}}]
    more = {"tool_calls": call} if calls else {}
    example = row(user("q"), said(answer, reasoning_content=thinking, **more))
    name = "weather" if calls else ""
    assert learned(tokenizer, example) == [f"<think>{thinking}</think>{answer}{name}{EOS}"]
    if calls:
        return
    # Line breaks that the template writes itself are not doubled, and none of the row's is lost.
    [found] = learned(TOKENIZERS["qwen-3"], example)
    before, _, behind = found.partition("</think>")
    assert before.startswith("<think>\n") and thinking in before
    assert behind.startswith("\n\n") and behind.endswith(answer + EOS)
    if thinking == thinking.strip():
        assert before == f"<think>\n{thinking}\n"
    if answer == answer.strip():
        assert behind == f"\n\n{answer}{EOS}"


_trimming = tokenizer_with(TRIMMING)


@pytest.mark.parametrize("turns", [1, 2])
@pytest.mark.parametrize("train_on", ["last", "responses", "all"])
def test_a_name_that_the_template_does_not_write_is_refused(turns: int, train_on: str) -> None:
    """Also of a single answer, and where another template does write it."""
    turn = user("q"), said("a", name="Ann")
    with pytest.raises(DatasetError, match="name"):
        learned(tokenizer_with(PLAIN), row(*turn * turns), train_on=train_on)
    named = PLAIN.replace("m.role +", "m.role + (' ' + m.name if m.name else '') +")
    assert learned(tokenizer_with(named), row(*turn * turns))[-1] == f"a{EOS}"


@pytest.mark.parametrize(
    "name", ["qwen-2.5", "llama-3", "qwen-3", "thinking-only", "mistral", "gemma-3"]
)
@pytest.mark.parametrize(
    "answer",
    [
        "</think>\n\nA",
        "\n</think>\n\nA",
        "<think></think>A",
        "  <think>\n</think>A",
        "  <think>\nT</think>A",
    ],
)
def test_thinking_that_is_empty_or_was_opened_before_is_learned_once(
    name: str, answer: str
) -> None:
    """An answer may begin with the closing tag, as behind a prompt that ends with `<think>`."""
    [example] = sft_examples(config(), TOKENIZERS[name], [row(user("q"), said(answer))])
    text = TOKENIZERS[name].decode(example["input_ids"])
    assert learned(TOKENIZERS[name], row(user("q"), said(answer))) == [answer + EOS]
    assert text.count("</think>") == 1 and text.count("<think>") <= 1
    assert text.partition(answer)[0].endswith((">", "\n", " ")), "nothing of the header is lost"


@pytest.mark.parametrize(
    "answer", ["<think>\n\n</think>\n\nA", "<think></think>\nA", "</think>\n\nA"]
)
def test_empty_thinking_that_the_template_cuts_off_is_learned_behind_its_prompt(
    answer: str,
) -> None:
    """R1's template cuts off what stands before the closing tag, and the white space behind it
    would be left.
    """
    opening, asking = TOKENIZERS["r1"], tokenizer_with(R1.replace("\\n<think>\\n", "\\n"))
    for tokenizer in (opening, asking):
        example = row(user("q"), said(answer))
        assert learned(tokenizer, example) == [answer + EOS]
        [encoded] = sft_examples(config(), tokenizer, [example])
        prompt = rendered_prompt(tokenizer, [user("q")]).text
        text = tokenizer.decode(encoded["input_ids"])
        begun = prompt.removesuffix("<think>\n") if answer.startswith("<think>") else prompt
        assert text.strip() == begun + answer + EOS
    # An answer that is not the last has no prompt of its own.
    twice = row(user("q"), said(answer), user("r"), said("B"))
    with pytest.raises(DatasetError, match=r"messages\[1\]: the chat template drops the thinking"):
        learned(opening, twice)
    assert learned(opening, twice, train_on="last") == [f"B{EOS}"]


@pytest.mark.parametrize("closing", ["", " ", "\\n"])
@pytest.mark.parametrize("trim", ["", " | trim"])
@pytest.mark.parametrize(
    "answer", ["<think>\nT\n</think>", "<think>\nT\n</think>\n\n", "T</think>\n"]
)
def test_an_answer_that_ends_with_a_closing_tag_ends_as_others_do(
    answer: str, trim: str, closing: str
) -> None:
    template = PLAIN.replace(
        "m.content +", f"(m.content{trim}) + ('{closing}' if {ASSISTANT} else '') +"
    )
    ended = closing.replace("\\n", "\n") + EOS
    example = row(user("q"), said(answer), user("r"), said("B"))
    assert learned(tokenizer_with(template), example) == [answer + ended, f"B{ended}"]


@pytest.mark.parametrize(
    ("begun", "field"),
    [
        ({"reasoning_content": "t"}, "reasoning_content"),
        ({"name": "Ann"}, "name"),
        ({"tool_calls": [{"function": {"name": "f", "arguments": {}}}]}, "tool_calls"),
        ({"content": f"x{EOS}y"}, "content"),
    ],
)
def test_an_answer_that_is_continued_is_a_text(begun: dict[str, Any], field: str) -> None:
    tokenizer = tokenizer_with(PLAIN)
    with pytest.raises(ValueError, match=rf"messages\[1\].{field}: "):
        chat_prompt_ids(tokenizer, [user("q"), {**said("x"), **begun}])
    ids = chat_prompt_ids(tokenizer, [user("q"), said("<think>\nx")])
    assert tokenizer.decode(ids).endswith("assistant\n<think>\nx")


def test_a_text_that_is_continued_begins_once_and_does_not_end() -> None:
    tokenizer = make_tokenizer()
    tokenizer.bos_token = "<|endoftext|>"
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    ends = [(tokenizer.bos_token, begin), (tokenizer.eos_token, end)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{tokenizer.bos_token} $A {tokenizer.eos_token}", special_tokens=ends
    )
    for text in ("Once", f"{tokenizer.bos_token}Once"):
        assert tokenizer.decode(text_prompt_ids(tokenizer, text)) == f"{tokenizer.bos_token}Once"
    ended = f"Once{tokenizer.eos_token}"
    assert text_prompt_ids(tokenizer, ended)[-1] == end, "what the text itself ends with stays"


@pytest.mark.parametrize("placement", ["template", "turns"])
def test_a_control_token_of_a_demonstration_is_named_where_the_row_has_it(placement: str) -> None:
    example = {"messages": [user("q")], "demonstration": f"x{EOS}y"}
    settings = config(loss="sdft", sdft_demo_placement=placement, sdft_gate="off")
    with pytest.raises(DatasetError, match=r":1: demonstration: holds '<\|im_end\|>'"):
        sdft_examples(settings, tokenizer_with(PLAIN), [example])


# ---- ends ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("closing", ["</R>", "\\n", " [END]", "\\n\\n### End\\n", " "])
def test_what_stands_before_the_end_token_is_learned_with_it(closing: str) -> None:
    template = PLAIN.replace("m.content +", f"m.content + ('{closing}' if {ASSISTANT} else '') +")
    tokenizer = tokenizer_with(template)
    ended = closing.replace("\\n", "\n") + EOS
    two = row(user("a"), said("b"), user("c"), said("d"))
    assert learned(tokenizer, two) == [f"b{ended}", f"d{ended}"]
    assert learned(tokenizer, two, train_on="last") == [f"d{ended}"]
    assert end_of_turn(tokenizer) == EOS


def test_the_next_turn_is_not_taken_for_an_end() -> None:
    """The control: what the template writes behind an answer is no end of it by itself."""
    footers = PLAIN.replace("'<|im_end|>\\n'", "'\\n###\\n'")
    tokenizer = tokenizer_with(footers)
    assert end_of_turn(tokenizer) is None
    assert learned(tokenizer, row(user("a"), said("b"))) == [f"b{EOS}"], "closed by its own end"
    assert end_of_turn(TOKENIZERS["open-ended"]) == START


# ---- the vocabulary's own tokens -----------------------------------------------------------------


def words_of(*tokens: str, template: str = PLAIN, special: bool = False, **habits: bool) -> Any:
    """A tokenizer with further tokens."""
    tokenizer = make_tokenizer()
    added: list[Any] = [AddedToken(token, normalized=False, **habits) for token in tokens]
    tokenizer.add_tokens(added, special_tokens=special)
    set_template(tokenizer, template, {})
    return tokenizer


TURNS = """{%- for m in messages %}{{- '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}
{%- endfor %}{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}"""


@pytest.mark.parametrize("habits", [{}, {"rstrip": True}, {"lstrip": True}])
def test_tokens_that_take_in_white_space(
    habits: dict[str, bool], caplog: pytest.LogCaptureFixture
) -> None:
    names = ("<|user|>", "<|assistant|>", "<|end|>")
    tokenizer = words_of(*names, template=TURNS, special=True, **habits)
    example = row(user(" q \n"), said("    return 1\n\n"), user("x"), said("  y  "))
    with caplog.at_level(logging.WARNING):
        found = learned(tokenizer, example)
    assert found == ["    return 1\n\n<|end|>", "  y  <|end|>"]
    assert ("trims white space" in caplog.text) is bool(habits)
    # A prompt is the same tokens in training and when the model is asked.
    [encoded] = sft_examples(config(), tokenizer, [row(user(" q \n"), said("b"))])
    prompt = rendered_prompt(tokenizer, [user(" q \n")]).text
    asked = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert encoded["input_ids"][: len(asked)] == asked
    raw = tokenizer.apply_chat_template([user(" q \n")], tokenize=False, add_generation_prompt=True)
    assert tokenizer(raw, add_special_tokens=False)["input_ids"] == asked
    # A prefilled answer begins as the learned one does.
    [encoded] = sft_examples(config(), tokenizer, [row(user("q"), said("  y"))])
    begun = chat_prompt_ids(tokenizer, [user("q")], prefill="  y")
    assert encoded["input_ids"][: len(begun)] == begun
    assert tokenizer.decode(begun).endswith("  y")
    indented = row(user("    if x:\n        y"), said("b"))
    if "rstrip" in habits:
        with pytest.raises(DatasetError, match=r"training_file:1: messages\[0\]: .*indentation"):
            learned(tokenizer, indented)
    else:
        assert learned(tokenizer, indented) == ["b<|end|>"]


def test_words_of_the_vocabulary_in_a_text() -> None:
    """One that begins or ends a turn would act as that; any other is a word."""
    names = ("<|user|>", "<|assistant|>", "<|end|>", "<|system|>", "<|tool|>", "<word>")
    tokenizer = words_of(*names, template=TURNS)
    for name in names[:-1]:
        for messages in ([user(f"x{name}OBEY"), said("b")], [user("x"), said(f"b {name} c")]):
            with pytest.raises(DatasetError, match=r"\.content: holds '<\|.*a control token"):
                learned(tokenizer, row(*messages))
    assert learned(tokenizer, row(user("a<word>"), said("b<word> c"))) == ["b<word> c<|end|>"]
    # Tags around what a tool says are written by hand, too.
    tags = words_of("<tool_response>", template=QWEN_25)
    assert learned(tags, row(user("<tool_response>"), said("b"))) == [f"b{EOS}"]


# ---- roles ---------------------------------------------------------------------------------------


def with_roles(expression: str) -> Any:
    return tokenizer_with(PLAIN.replace("m.role", f"({expression})"))


OTHERS = [{"role": role, "content": "T"} for role in ("system", "developer", "tool")]
TALK = [user("a"), said("b")]


@pytest.mark.parametrize("other", OTHERS, ids=lambda message: message["role"])
@pytest.mark.parametrize("lost", ["user", "assistant"])
@pytest.mark.parametrize("place", [0, 2])
def test_what_is_written_as_another_role_is_refused(other: Row, lost: str, place: int) -> None:
    kept = "assistant" if lost == "user" else "user"
    tokenizer = with_roles(f"m.role if m.role == '{kept}' else '{lost}'")
    messages = [*TALK[:place], other, user("c"), said("d")]
    words = rf"training_file:1: messages\[{place}\]: .* what '{other['role']}' says as if '{lost}'"
    for changes in ({}, {"train_on": "last"}, {"train_on": "all"}):
        with pytest.raises(DatasetError, match=words):
            learned(tokenizer, row(*messages), **changes)
    assert learned(tokenizer, row(*TALK)) == [f"b{EOS}"]
    assert learned(with_roles("m.role"), row(*messages))[-1] == f"d{EOS}"


def test_users_and_assistants_are_not_mixed_up() -> None:
    everyone = with_roles("'assistant'")
    with pytest.raises(DatasetError, match=r"\[0\]: .* what 'user' says as if 'assistant'"):
        learned(everyone, row(*TALK))
    nobody = with_roles("'user'")
    with pytest.raises(DatasetError, match=r"\[1\]: .* what 'assistant' says as if 'user'"):
        learned(nobody, row(*TALK, *TALK))
    # A template may know turns by their place, or no roles at all.
    by_place = with_roles("'user' if loop.index0 % 2 == 0 else 'assistant'")
    assert learned(by_place, row(*TALK, *TALK)) == [f"b{EOS}"] * 2
    none = tokenizer_with("{% for m in messages %}{{ m.content + '<|im_end|>' }}{% endfor %}")
    assert learned(none, row(system("s"), *TALK)) == [f"b{EOS}"]


# ---- marks ---------------------------------------------------------------------------------------

_mark = st.builds(
    "{}-{}-{}-KRAM".format,
    st.sampled_from(["MARK", "MARK1", "MARK2", "mark", "XMARK"]),
    st.integers(0, 9),
    st.sampled_from(["TEXT", "THOUGHT", "NAME", "CALL"]),
)
_text = st.one_of(_mark, st.builds("{} {}".format, _mark, _mark), st.just("a"))


@settings(max_examples=40)
@given(_text, _text, _text, _text, st.sampled_from(["qwen-2.5", "qwen-3", "llama-3"]))
def test_texts_that_look_like_marks(a: str, b: str, c: str, d: str, template: str) -> None:
    tokenizer = TOKENIZERS[template]
    assert learned(tokenizer, row(system(a), user(b), said(c))) == [c + EOS]
    [example] = sdft_examples(
        config(loss="sdft", sdft_demo_placement="turns", max_seq_length=4096),
        tokenizer,
        [row(system(d), user(a), said(b), user(c), said(d))],
    )
    teacher = tokenizer.decode(example.teacher_prompt_ids)
    places = [teacher.index(text) for text in (a, b, c, d)]
    assert all(place >= 0 for place in places)
    assert teacher.count("-KRAM") == sum(t.count("-KRAM") for t in (a, b, d, d, c, c))


def test_marks_in_tools_calls_and_the_template_itself() -> None:
    mark = Marking().written(0, "TEXT")
    call = {"type": "function", "function": {"name": "w", "arguments": {"x": mark}}}
    tool = {"type": "function", "function": {"name": mark, "parameters": {"type": "object"}}}
    [found] = learned(
        TOKENIZERS["qwen-2.5"], row(user("q"), said("a", tool_calls=[call]), tools=[tool])
    )
    assert mark in found
    tokenizer = tokenizer_with(mark + PLAIN)
    assert learned(tokenizer, row(user("q"), said(mark))) == [mark + EOS]


def test_no_mark_reaches_a_user(caplog: pytest.LogCaptureFixture) -> None:
    refusing = tokenizer_with("{{ raise_exception('not this: ' + messages[0].content) }}")
    with pytest.raises(DatasetError, match="the chat template refuses it") as caught:
        learned(refusing, row(*TALK))
    assert "KRAM" not in str(caught.value)
    with caplog.at_level(logging.WARNING):
        learned(TOKENIZERS["qwen-3"], row(user("q"), said("a"), said("b")))
    assert "the prompt that is sampled from ends with" in caplog.text
    assert "KRAM" not in caplog.text


# ---- templates that fail, and that tell the time -------------------------------------------------


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", r"\(roles must alternate\)"),
        ("{{ messages.foo.bar }}", r"\('list object' has no attribute 'foo'\)"),
        ("{{ 1 // 0 }}", "ZeroDivisionError: integer division"),
        ("{{ '{x}'.format() }}", "KeyError: 'x'"),
        ("{{ 2.0 ** 5000 }}", "OverflowError: "),
        ("{{ 'a'.index('b') }}", "ValueError: substring not found"),
        ("{{ 'a' + 1 }}", "TypeError: "),
        ("{%- macro f(x) %}{{ f(x) }}{%- endmacro %}{{ f(1) }}", "RecursionError: "),
    ],
)
def test_whatever_a_template_raises_is_a_refusal(part: str, words: str) -> None:
    tokenizer = tokenizer_with(part + PLAIN)
    refused = f"training_file:1: the chat template refuses it .*{words}"
    with pytest.raises(DatasetError, match=refused):
        learned(tokenizer, row(*TALK))
    with pytest.raises(ValueError, match="the chat template refuses it"):
        rendered_prompt(tokenizer, TALK[:1])


@pytest.mark.parametrize("told", ["strftime_now('%H:%M:%S.%f')", "strftime_now(f)"])
def test_a_row_is_rendered_at_one_moment(told: str) -> None:
    tokenizer = tokenizer_with("{%- set f = '%S.%f' %}{{- " + told + " }}" + PLAIN)
    for _ in range(20):
        assert learned(tokenizer, row(*TALK, *TALK)) == [f"b{EOS}"] * 2
    early, late = datetime(2020, 1, 2, 3, 4, 5, 6), datetime(2021, 1, 2)
    texts = [rendered_spans(tokenizer, TALK, [1], [EOS], now=now).text for now in (early, late)]
    assert "05.000006" in texts[0] and texts[0] != texts[1]
    assert rendered_prompt(tokenizer, TALK[:1], now=early).text in texts[0]


def test_rows_of_a_day_share_a_scaffold_where_the_template_tells_no_more() -> None:
    tokenizer = tokenizer_with("{{- strftime_now('%d %b %Y') }}" + CHATML)
    day = [datetime(2020, 1, 2, hour) for hour in (3, 4)]
    shapes = [
        scaffold_of(Template(tokenizer, None, {}, now), TALK, prompt=False, verbatim=()).shape
        for now in (*day, datetime(2020, 1, 3))
    ]
    assert shapes[0] == shapes[1] != shapes[2]
