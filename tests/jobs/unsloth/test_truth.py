"""What a row says is what is learned, or the row is refused: never a third thing."""

from __future__ import annotations

import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from openweights.errors import ConfigError, DatasetError
from openweights.jobs.unsloth.config.first_look import check_rendering
from openweights.jobs.unsloth.data import sft_examples
from openweights.jobs.unsloth.preference.data import preference_examples
from openweights.jobs.unsloth.sdft_data import sdft_examples
from openweights.jobs.unsloth.validate import training_config
from openweights.models.templates.rendering import prompt_token_ids
from openweights.models.tokens import IGNORED, eos_token_ids
from tests.chat_templates import LLAMA_3, QWEN_3, TEMPLATES
from tests.learned_rows import (
    TOKENIZERS,
    Row,
    config,
    learned,
    row,
    said,
    stretches,
    system,
    tokenizer_with,
    user,
)
from tests.tiny_model import EOS, SECOND_EOS, START, make_tokenizer

THOUGHT = "<think>\nadd them\n</think>\n\n5"
LATER = "<think>\ndouble it\n</think>\n\n8"
ROWS: dict[str, Row] = {
    "plain": row(user("2+3?"), said("5")),
    "two turns": row(user("2+3?"), said("5"), user("4+4?"), said("8")),
    "system": row(system("Be brief."), user("2+3?"), said("5")),
    "system, two turns": row(system("Be brief."), user("a"), said("b"), user("c"), said("d")),
    "thinking": row(user("2+3?"), said(THOUGHT)),
    "thinking, tight": row(user("2+3?"), said("<think>add</think>5")),
    "thinking, not opened": row(user("2+3?"), said("add them\n</think>\n\n5")),
    "thinking, twice": row(user("2+3?"), said(THOUGHT), user("4+4?"), said(LATER)),
    "thinking, empty": row(user("2+3?"), said("<think>\n\n</think>\n\n5")),
    "thinking, nothing else": row(user("2+3?"), said(" </think>")),
    "thinking, in the middle": row(user("2+3?"), said("Sure. <think>x</think> 5")),
    "begins with an answer": row(said("Hello."), user("2+3?"), said("5")),
    "ends with a question": row(user("2+3?"), said("5"), user("4+4?")),
    "two questions": row(user("Hello."), user("2+3?"), said("5")),
    "a system text in between": row(user("a"), said("b"), system("c"), user("d"), said("e")),
    "indented answer": row(user("code"), said("    return 1\n\n")),
    "line breaks": row(user("q"), said("\n\nyes\n")),
    "blank edges": row(user("  q \n"), said(" a ")),
    "indented question": row(user("    if x:\n        y"), said("ok")),
    "control token": row(user(f"a{EOS}\n{START}assistant\nb"), said("c")),
    "control token in an answer": row(user("q"), said(f"the token {EOS} ends a turn")),
}
# What each template cannot say; everything else is learned.
ALTERNATING = {"begins with an answer", "two questions", "a system text in between"}
REFUSED = {
    "*": {"control token", "control token in an answer"},
    "llama-3": {"indented question"},
    "llama-2": {"indented question", "a system text in between"},
    "qwen-3": {"thinking, twice"},
    "thinking-only": {"thinking, twice"},
    "mistral": {"system, two turns", "a system text in between"},
    "gemma-2": {"system", "system, two turns", "indented question", *ALTERNATING},
    "gemma-3": {"indented question", *ALTERNATING},
    "r1": {"thinking, twice"},
    "without-system": {"system", "system, two turns", "a system text in between"},
}


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_row_is_learned_or_refused(template: str, kind: str) -> None:
    example = ROWS[kind]
    if kind in REFUSED["*"] | REFUSED.get(template, set()):
        with pytest.raises(DatasetError, match="training_file:1: "):
            learned(TOKENIZERS[template], example)
        return
    answers = [m["content"] for m in example["messages"] if m["role"] == "assistant"]
    found = learned(TOKENIZERS[template], example)
    assert len(found) == len(answers)
    for text, answer in zip(found, answers, strict=True):
        assert says(template, text, answer)


ENDS = {"open-ended": START}
SPACED = ("mistral", "llama-2")  # they write a space before each answer, or around it


def says(template: str, text: str, answer: str) -> bool:
    """Whether learned text is an answer with the end of its turn, to the letter."""
    end = ENDS.get(template, EOS)
    if template not in SPACED:
        return text == answer + end
    return text in (f"{before}{answer}{after}{end}" for before in ("", " ") for after in ("", " "))


def test_the_last_answer_alone() -> None:
    for template, kind, answer in (
        ("qwen-3", "thinking, twice", LATER),
        ("r1", "thinking, twice", LATER),
        ("mistral", "system, two turns", "d"),
        ("llama-3", "two turns", "8"),
    ):
        found = learned(TOKENIZERS[template], ROWS[kind], train_on="last")
        assert [text.removeprefix(" ") for text in found] == [answer + EOS], template
    # What it is learned after is what the model is asked with.
    for template, kind in (("mistral", "system, two turns"), ("r1", "thinking")):
        tokenizer, example = TOKENIZERS[template], ROWS[kind]
        [encoded] = sft_examples(config(train_on="last"), tokenizer, [example])
        prompt = prompt_token_ids(tokenizer, example["messages"][:-1])
        assert encoded["input_ids"][: len(prompt)] == prompt


def test_everything_is_learned() -> None:
    [found] = learned(TOKENIZERS["llama-3"], ROWS["two turns"], train_on="all")
    assert "2+3?" in found and found.endswith(f"8{EOS}")
    with pytest.raises(DatasetError, match="the chat template drops the thinking of an answer"):
        learned(TOKENIZERS["r1"], ROWS["thinking, twice"], train_on_responses_only=False)
    assert config(train_on_responses_only=False).train_on == "all"
    assert config(train_on="all").train_on_responses_only is False
    with pytest.raises(ConfigError, match="train_on_responses_only: is True beside train_on='all'"):
        config(train_on="all", train_on_responses_only=True)


def test_a_weight_of_a_message() -> None:
    example = row(user("a"), said("BAD", weight=0), user("b"), said("GOOD", weight=1))
    assert learned(TOKENIZERS["llama-3"], example) == [f"GOOD{EOS}"]
    unlearned = row(user("a"), said("GOOD", weight=1), user("b"), said("BAD", weight=0))
    [encoded] = sft_examples(config(train_on="last"), TOKENIZERS["llama-3"], [unlearned])
    assert set(encoded["labels"]) == {IGNORED}, "the last answer alone, which is not learned"
    assert f"BAD{EOS}" not in learned(TOKENIZERS["llama-3"], example, train_on="all")[0]
    [encoded] = sft_examples(
        config(),
        TOKENIZERS["llama-3"],
        [row(user("a"), said("b", weight=0.5))],
        with_weights=True,
    )
    assert {weight for weight in encoded["weights"] if weight} == {0.5}
    # An answer that is read only may lose its thinking.
    example["messages"][1]["content"] = THOUGHT
    assert learned(TOKENIZERS["qwen-3"], example) == [f"GOOD{EOS}"]


# ---- keys of messages ----------------------------------------------------------------------------

CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"place": "Oslo"}'}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALLING = row(
    user("rain?"),
    {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", **CALL}]},
    {"role": "tool", "tool_call_id": "c1", "content": "wet"},
    said("Yes."),
    tools=[TOOL],
)


def test_calls_are_learned_where_the_template_writes_them() -> None:
    found = learned(TOKENIZERS["qwen-2.5"], CALLING)
    call = '<tool_call>\n{"name": "weather", "arguments": {"place": "Oslo"}}\n</tool_call>'
    assert found == [f"{call}{EOS}", f"Yes.{EOS}"]
    with_text = row(user("rain?"), said("Let me look.", tool_calls=[CALL]))
    assert learned(TOKENIZERS["qwen-2.5"], with_text) == [f"Let me look.\n{call}{EOS}"]


@pytest.mark.parametrize(
    ("template", "example", "words"),
    [
        (
            "qwen-3",
            row(user("a"), said("b"), tools=[TOOL]),
            "tools: the chat template does not",
        ),
        ("qwen-3", row(user("a"), said("b", tool_calls=[CALL])), r"\[1\].tool_calls: the chat tem"),
        # It writes the call and drops the words before it.
        ("llama-3", row(user("a"), said("b", tool_calls=[CALL])), r"\[1\]: the .* drops what"),
        ("llama-3", row(user("a", name="Ann"), said("b")), r"\[0\].name: the chat template does"),
        ("llama-3", row(user("a"), said("b", reasoning_content="c")), r"\[1\].reasoning_content: "),
        ("gemma-3", row({"role": "developer", "content": "x"}, user("a"), said("b")), "alternate"),
        ("mistral", row(user("a"), said("b", notes="c")), r"\[1\].notes: is no key that anything"),
        ("mistral", row(user("a"), said("b", weight="heavy")), r"\[1\].weight: is a string"),
        ("mistral", row(user("a"), said("b", weight=10**400)), r"\[1\].weight: is the number 10"),
        ("mistral", row(user("a"), said("", weight=1)), r"\[1\].content: is empty"),
    ],
)
def test_keys_that_would_be_lost_are_refused(template: str, example: Row, words: str) -> None:
    with pytest.raises(DatasetError, match=f"training_file:1: .*{words}"):
        learned(TOKENIZERS[template], example)


def test_keys_that_the_template_writes_are_used() -> None:
    reasoned = row(user("2+3?"), said("5", reasoning_content="add them"))
    assert learned(TOKENIZERS["qwen-3"], reasoned) == [THOUGHT + EOS]
    developer = row({"role": "developer", "content": "Be brief."}, user("a"), said("b"))
    [encoded] = sft_examples(config(), TOKENIZERS["llama-3"], [developer])
    assert "developer\n\nBe brief." in TOKENIZERS["llama-3"].decode(encoded["input_ids"])
    nulls = row(user("a", name=None), said("b", tool_calls=None, refusal=None, audio=None))
    assert learned(TOKENIZERS["llama-3"], nulls) == [f"b{EOS}"]


# ---- said once -----------------------------------------------------------------------------------


def test_a_loss_in_every_row_is_said_once() -> None:
    rows = [row(system(f"{n}"), user("a"), said("b")) for n in range(30)]
    with pytest.raises(DatasetError) as caught:
        sft_examples(config(), TOKENIZERS["without-system"], rows)
    assert str(caught.value).startswith(
        "training_file: every row: messages[0]: the chat template drops the sys"
    )
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(DatasetError, match=r"every row: messages\[0\]: the chat template drops"):
        numbered = list(enumerate(rows, start=1))
        ref, *_ = config().datasets()
        check_rendering(numbered, config(), TOKENIZERS["without-system"], ref)
    some = [*rows[:2], row(user("a"), said("b"))]
    with pytest.raises(DatasetError) as caught:
        sft_examples(config(), TOKENIZERS["without-system"], some)
    assert [line[:17] for line in str(caught.value).splitlines()] == [
        "training_file:1: ",
        "training_file:2: ",
    ]


def test_what_is_trimmed_or_written_besides_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        learned(TOKENIZERS["llama-3"], ROWS["blank edges"])
        assert "trims white space" in caplog.text and "(1 of 1 rows)" in caplog.text
        caplog.clear()
        learned(TOKENIZERS["llama-3"], ROWS["indented answer"])
        assert caplog.text == ""
        learned(TOKENIZERS["qwen-3"], ROWS["plain"])
        assert r"before an answer the chat template writes '<think>\n\n</think>" in caplog.text
        learned(TOKENIZERS["r1"], ROWS["plain"])
        assert r"the prompt that is sampled from ends with '<think>\n'" in caplog.text


# ---- options, ends, begin tokens -----------------------------------------------------------------


def test_options_hold_wherever_the_tokenizer_renders(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tokenizer_with(QWEN_3, enable_thinking=False)
    with caplog.at_level(logging.WARNING):
        [encoded] = sft_examples(config(), tokenizer, [ROWS["plain"]])
    assert caplog.text == "", "the answer follows the very prompt that is sampled from"
    prompt = prompt_token_ids(tokenizer, [user("2+3?")])
    assert tokenizer.decode(prompt).endswith("assistant\n<think>\n\n</think>\n\n")
    assert encoded["input_ids"][: len(prompt)] == prompt
    asked = {"tokenize": False, "add_generation_prompt": True}
    plain = tokenizer.apply_chat_template([user("2+3?")], **asked)
    assert plain == tokenizer.decode(prompt)
    # Who asks for something else gets it.
    other = tokenizer.apply_chat_template([user("2+3?")], enable_thinking=True, **asked)
    assert other.endswith("assistant\n")


def test_options_of_any_kind() -> None:
    template = "{{ a | tojson }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    value = {"x": [1, 2.5, None, True, 'é"\\ \n%}'], "y": "🐎"}
    tokenizer = tokenizer_with(template, a=value)
    text = tokenizer.apply_chat_template([user("!")], tokenize=False)
    plain = make_tokenizer()
    plain.chat_template = template
    assert text == plain.apply_chat_template([user("!")], tokenize=False, a=value)
    with pytest.raises(ConfigError, match="template_options: the chat template reads no 'thoughts"):
        tokenizer_with(QWEN_3, thoughts=False)
    with pytest.raises(ConfigError, match="template_options: 'tools' is no option"):
        config(template_options={"tools": []})
    with pytest.raises(ConfigError, match="grpo_enable_thinking: says another thing"):
        config(
            loss="grpo",
            grpo_enable_thinking=True,
            template_options={"enable_thinking": False},
        )
    grpo = config(loss="grpo", grpo_enable_thinking=False)
    assert grpo.template_options == {"enable_thinking": False}
    assert training_config(grpo.model_dump()) == grpo


def test_what_ends_a_turn_ends_a_completion() -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = SECOND_EOS
    ends = eos_token_ids(None, tokenizer)
    assert tokenizer.convert_ids_to_tokens(ends) == [SECOND_EOS, EOS]
    [encoded] = sft_examples(config(), tokenizer, [ROWS["two turns"]])
    assert stretches(encoded["input_ids"], encoded["labels"], tokenizer) == [f"5{EOS}", f"8{EOS}"]
    # A template that leaves the last turn open is asked for one in the middle.
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% if not loop.last %}<|im_start|>{% endif %}"
        "{% endfor %}"
    )
    assert tokenizer.convert_ids_to_tokens(eos_token_ids(None, tokenizer)) == [SECOND_EOS, START]
    tokenizer.chat_template = None
    assert tokenizer.convert_ids_to_tokens(eos_token_ids(None, tokenizer)) == [SECOND_EOS]


def test_an_answer_is_closed_once_by_what_ends_a_turn(caplog: pytest.LogCaptureFixture) -> None:
    # The tokenizer's own end is another than the template's, which leaves the last turn open.
    tokenizer = make_tokenizer()
    tokenizer.eos_token = SECOND_EOS
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content }}"
        "{% if not loop.last %}{{ '<|im_end|>' }}{% endif %}{% endfor %}"
    )
    ends = eos_token_ids(None, tokenizer)
    [encoded] = sft_examples(config(), tokenizer, [ROWS["two turns"]], ends=ends)
    assert stretches(encoded["input_ids"], encoded["labels"], tokenizer) == [f"5{EOS}", f"8{EOS}"]
    # Where it writes no end at all, the tokenizer's closes the last, and of the others it is told.
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}"
    with caplog.at_level(logging.WARNING):
        [encoded] = sft_examples(config(), tokenizer, [ROWS["two turns"]])
    found = stretches(encoded["input_ids"], encoded["labels"], tokenizer)
    assert found == ["5", f"8{SECOND_EOS}"]
    assert "so that its end is not learned; set train_on='last'" in caplog.text


def test_a_begin_token_is_not_doubled() -> None:
    tokenizer = make_tokenizer()
    tokenizer.bos_token = START
    begin = (START, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A", special_tokens=[begin]
    )
    tokenizer.chat_template = "{{ bos_token }}" + LLAMA_3
    examples = sft_examples(
        config(), tokenizer, [{"text": "Once"}, {"text": f"{START}Once"}, ROWS["plain"]]
    )
    assert examples[0] == examples[1]
    assert [e["input_ids"][:2].count(begin[1]) for e in examples] == [1, 1, 2], "and a header"
    with pytest.raises(DatasetError, match=r"\[0\].content: holds '<\|im_start\|>', a control"):
        learned(tokenizer, row(user(f"{START}Once"), said("b")))


# ---- other losses --------------------------------------------------------------------------------


def test_pairs_say_what_they_say() -> None:
    pair = {"prompt": [user("2+3?")], "chosen": [said(THOUGHT)], "rejected": [said("6")]}
    tokenizer = TOKENIZERS["qwen-3"]
    settings = config(loss="dpo", training_file="preference:file-0123456789ab")
    [encoded] = preference_examples(settings, tokenizer, [pair], ends=[2])
    sides = [
        stretches(encoded[f"{side}_input_ids"], encoded[f"{side}_labels"], tokenizer)
        for side in ("chosen", "rejected")
    ]
    assert sides == [[THOUGHT + EOS], [f"6{EOS}"]]
    for wrong, words in (
        ({"chosen": [user("2+3?"), said("5")]}, "chosen: begins with the prompt"),
        (
            {"prompt": [system("a"), user("b")], "chosen": [user("b"), said("c")]},
            "chosen: begins with the prompt's end",
        ),
        ({"rejected": [said([{"text": THOUGHT}])]}, "rejected: equals 'chosen'"),  # type: ignore[arg-type]
        ({"rejected": [said(" ")]}, r"rejected\[0\].content: is empty"),
        ({"rejected": [said(f"6{EOS}")]}, r"rejected\[0\].content: holds '<\|im_end\|>'"),
        ({"chosen": [said("a", weight=0)]}, r"chosen\[0\]: has a weight, which dpo"),
    ):
        with pytest.raises(DatasetError, match=f"training_file:1: {words}"):
            preference_examples(settings, tokenizer, [{**pair, **wrong}], ends=[2])


@pytest.mark.parametrize("template", ["qwen-3", "r1", "llama-3"])
@pytest.mark.parametrize("placement", ["turns", "template"])
def test_the_teacher_reads_what_the_gate_scores(template: str, placement: str) -> None:
    tokenizer = TOKENIZERS[template]
    settings = config(loss="sdft", sdft_demo_placement=placement)
    [example] = sdft_examples(settings, tokenizer, [ROWS["thinking"]])
    assert tokenizer.decode(example.demonstration_ids) == THOUGHT
    assert THOUGHT in tokenizer.decode(example.teacher_prompt_ids)
    asked = row(user("a"), said("b", weight=0), user("2+3?"), said(THOUGHT))
    assert len(sdft_examples(settings, tokenizer, [asked])) == 1
    for wrong in ({"reasoning_content": "x"}, {"tool_calls": [CALL]}):
        with pytest.raises(DatasetError, match="training_file:1: .*this loss compares texts"):
            sdft_examples(settings, tokenizer, [row(user("a"), said("b", **wrong))])


# ---- any conversation ----------------------------------------------------------------------------

_words = st.text(st.sampled_from("ab \n\t.é<>/"), min_size=1, max_size=8)
_text = st.one_of(
    _words,
    st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=8),
    st.builds("{}{}".format, _words, st.sampled_from(["<think>", "</think>", "[INST]", EOS])),
    st.builds("MARK-{}-TEXT-KRAM".format, st.integers(0, 3)),
).filter(str.strip)
_others = st.sampled_from(["system", "developer", "tool"])
_thought = st.builds("<think>\n{}\n</think>\n\n{}".format, _text, _text)
_answer = st.builds(
    lambda text, more: said(text, **more),
    st.one_of(_text, _thought),
    st.sampled_from([{}, {}, {"weight": 0}, {"weight": 1}]),
)


@st.composite
def conversations(draw: st.DrawFn) -> Row:
    messages = [system(draw(_text))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages += [user(draw(_text)), draw(_answer)]
        if draw(st.integers(0, 9)) == 0:
            messages += [{"role": draw(_others), "content": draw(_text)}]
    messages += [user(draw(_text))] if draw(st.integers(0, 4)) == 0 else []
    return row(*messages)


@settings(max_examples=400)
@given(st.sampled_from(sorted(TEMPLATES)), conversations(), st.sampled_from(["last", "responses"]))
def test_any_conversation(template: str, example: Row, train_on: str) -> None:
    tokenizer = TOKENIZERS[template]
    try:
        [encoded] = sft_examples(
            config(train_on=train_on, max_seq_length=4096), tokenizer, [example]
        )
    except DatasetError as error:
        assert str(error).startswith(("training_file:1: ", "training_file: nothing to learn"))
        return
    answers = [m for m in example["messages"] if m["role"] == "assistant"]
    if train_on == "last":
        answers = answers[-1:]
    expected = [m["content"] for m in answers if m.get("weight") != 0]
    found = stretches(encoded["input_ids"], encoded["labels"], tokenizer)
    assert len(found) == len(expected)
    for text, answer in zip(found, expected, strict=True):
        assert says(template, text, answer)
    # All that is said is read, up to white space at its ends, but for earlier thinking.
    whole = tokenizer.decode(encoded["input_ids"])
    for message in example["messages"]:
        if "</think>" not in message["content"]:
            assert message["content"].strip() in whole


def test_most_conversations_are_learned() -> None:
    """The control: refusing everything would not do."""
    kept = sum(
        kind not in REFUSED["*"] | REFUSED.get(template, set())
        for template in TEMPLATES
        for kind in ROWS
    )
    assert kept >= 180 and len(TEMPLATES) * len(ROWS) == 252
