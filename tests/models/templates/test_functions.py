"""What a template makes of tools and calls: it is written as it is, or the row is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openweights.models.templates.comparison import TRIMMED
from openweights.models.templates.functions import UNWRITTEN_IDS, UNWRITTEN_KEYWORDS
from openweights.models.templates.messages import Message, plain_message
from openweights.models.templates.rendering import rendered_prompt, rendered_spans
from tests.chat_templates import QWEN_25
from tests.tiny_model import EOS, make_tokenizer

USER = {"role": "user", "content": "rain?"}
ARGUMENTS = {"place": "Oslo <1>", "days": 3, "exact": False, "units": {"wind": "m/s", "step": 0.5}}
SCHEMA = {
    "type": "object",
    "properties": {
        "place": {"type": "string", "description": "a town"},
        "units": {"type": "string", "enum": ["mm", "in"], "minLength": 2},
    },
    "required": ["place"],
}
TOOL = {
    "type": "function",
    "function": {"name": "rain", "description": "Says if it rains.", "parameters": SCHEMA},
}

# How templates write arguments: as JSON, as Python, key by key between tags, and sorted.
WRITINGS = {
    "json": "{{ a | tojson }}",
    "python": "{{ a }}",
    "tags": "{% for k, v in a.items() %}<p={{ k }}>{{ v if v is string else v | tojson }}</p>"
    "{% endfor %}",
    "sorted": "{% for k, v in a | dictsort %}{{ k }}: {{ v | tojson }}\n{% endfor %}",
}
LOSSES = {
    "the first value alone": (
        "{{ a.values() | list | first }}",
        "days: the chat template does not",
    ),
    "in capitals": ("{{ a | tojson | upper }}", r"\.days: "),
    "nothing that counts as false": (
        "{% for k, v in a.items() if v %}{{ k }}={{ v | tojson }}\n{% endfor %}",
        r"\.exact: the chat template does not write it as it is",
    ),
    "what counts as false as nothing": (
        "{% for k, v in a.items() %}{{ k }}={{ v | tojson if v else '' }}\n{% endfor %}",
        r"\.exact: the chat template does not write it as it is",
    ),
    "escaped": ("{{ a | string | e }}", r"\.place: "),
    "cut": ("{{ (a | tojson)[:40] }}", r"\.days: "),
    "no keys": ("{{ a.values() | list }}", r"\.days: "),
    "nothing": ("", ": the chat template does not write them"),
}
# How templates write tools: as JSON, and as a signature that has no word for the length of a text.
SIGNATURE = (
    "{% for t in tools or [] %}{{ t.function.name }}({% for n, s in "
    "t.function.parameters.properties.items() %}{{ n }}: {{ s.type }} {{ s.description or '' }} "
    "{{ s.enum | join('|') if s.enum else '' }}{% endfor %}) {{ t.function.description }}"
    "{% endfor %}"
)
TOOL_LOSSES = {
    "names alone": (
        "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}",
        r"tools\[0\]\.function\.description: the chat template does not write it as it is",
    ),
    "no parameters": (
        "{% for t in tools or [] %}{{ t.function.name + t.function.description }}{% endfor %}",
        r"tools\[0\]\.function\.parameters\.properties\.place",
    ),
    "one of two": ("{{ tools[0] | tojson if tools }}", r"tools\[1\]\.function\.name: "),
    "no choices": (SIGNATURE.replace("s.enum | join('|')", "'?'"), r"\.units\.enum\[0\]: "),
    "a word of each": (
        SIGNATURE.replace(
            "{{ t.function.description }}", "{{ t.function.description.split()[0] }}"
        ),
        r"\.function\.description: ",
    ),
    "nothing": ("", "tools: the chat template does not write them"),
}


def tokenizer_of(arguments: str = "{{ a | tojson }}", tools: str = "{{ tools | tojson }}") -> Any:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        tools + "{% for m in messages %}<|im_start|>{{ m.role + ' ' }}{{ m.content }}"
        "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}"
        f"{{% set a = c.function.arguments %}}{arguments}</call>{{% endfor %}}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
    )
    return tokenizer


def calling(*arguments: Any, **call: Any) -> list[Message]:
    calls = [{"function": {"name": "rain", "arguments": a}, **call} for a in arguments]
    return [USER, plain_message({"role": "assistant", "content": None, "tool_calls": calls})]


def learned(tokenizer: Any, messages: list[Message], **more: Any) -> tuple[str, frozenset[str]]:
    rendered = rendered_spans(tokenizer, messages, [1], [EOS], **more)
    [span] = rendered.spans
    return rendered.text[span.start : span.stop], rendered.notes


@pytest.mark.parametrize("writing", WRITINGS)
def test_arguments_are_written_as_they_are(writing: str) -> None:
    text, notes = learned(tokenizer_of(WRITINGS[writing]), calling(json.dumps(ARGUMENTS)))
    for said in ("place", "Oslo <1>", "days", "3", "wind", "m/s", "exact", "alse", "step", "0.5"):
        assert said in text
    assert not notes


@pytest.mark.parametrize("loss", LOSSES)
def test_arguments_that_are_lost_are_refused(loss: str) -> None:
    writing, words = LOSSES[loss]
    with pytest.raises(ValueError, match=rf"messages\[1\]\.tool_calls.*{words}"):
        learned(tokenizer_of(writing), calling(ARGUMENTS))
    only_first = f"{{% if loop.first %}}{{{{ a | tojson }}}}{{% else %}}{writing}{{% endif %}}"
    with pytest.raises(ValueError, match=r"messages\[1\]\.tool_calls\[1\]\.function\.arguments"):
        learned(tokenizer_of(only_first), calling({"first": 1}, ARGUMENTS))


@pytest.mark.parametrize("writing", WRITINGS)
def test_names_and_arguments_that_look_like_marks_are_texts(writing: str) -> None:
    like = {"Leaf000001Tree": "Leaf000000Tree", "Leaf000003Tree": 7_310_000_002}
    function = {**TOOL["function"], "name": "Leaf000002Tree", "description": "Leaf000000Tree"}
    tools = [{**TOOL, "function": function}]
    text, _ = learned(tokenizer_of(WRITINGS[writing]), calling(like), tools=tools)
    assert all(said in text for said in ("Leaf000001Tree", "Leaf000000Tree", "7310000002"))


_NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=6)
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.floats(allow_nan=False) | _NAMES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_NAMES, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60)
@given(st.dictionaries(_NAMES, _VALUES.filter(lambda value: value != float("inf")), max_size=3))
def test_any_arguments_come_back(arguments: dict[str, Any]) -> None:
    try:
        text, _ = learned(tokenizer_of(), calling(json.dumps(arguments)))
    except ValueError as error:
        assert "a control token" in str(error) or "Infinity" in json.dumps(arguments)
        return
    assert json.loads(text.removeprefix("<call>rain").removesuffix("</call>")) == arguments


@pytest.mark.parametrize("loss", TOOL_LOSSES)
def test_tools_that_are_lost_are_refused(loss: str) -> None:
    writing, words = TOOL_LOSSES[loss]
    tools = [TOOL, {**TOOL, "function": {**TOOL["function"], "name": "snow"}}]
    for render in (learned, rendered_prompt):
        with pytest.raises(ValueError, match=words):
            render(tokenizer_of(tools=writing), calling(ARGUMENTS), tools=tools)


def test_keywords_of_schemas_and_ids_are_told() -> None:
    tokenizer = tokenizer_of(tools=SIGNATURE)
    messages = calling({"place": "Oslo"}, id="call_1")
    _, notes = learned(tokenizer, messages, tools=[TOOL])
    assert notes == {UNWRITTEN_KEYWORDS.format(keys="'minLength'"), UNWRITTEN_IDS}
    _, notes = learned(tokenizer_of(), messages, tools=[TOOL])
    assert notes == {UNWRITTEN_IDS}
    blank = {**TOOL, "function": {**TOOL["function"], "description": "Says it.\n"}}
    trims = SIGNATURE.replace("function.description", "function.description | trim")
    assert TRIMMED in learned(tokenizer_of(tools=trims), messages, tools=[blank])[1]
    with pytest.raises(
        ValueError, match=r"arguments\.place: the chat template does not write it as"
    ):
        learned(
            tokenizer_of("{{ a.keys() | first }}={{ a.place | trim }}"), calling({"place": "O "})
        )
    tokenizer.chat_template = QWEN_25.replace(
        "'\\n<tool_call>", "'\\n' + call.id + '\\n<tool_call>"
    )
    text, notes = learned(tokenizer, messages, tools=[TOOL])
    assert text.startswith("call_1\n<tool_call>") and not notes


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"description": f"x{EOS}"}, "function.description"),
        ({"name": f"x{EOS}"}, "function.name"),
        ({"parameters": {"properties": {f"x{EOS}": {}}}}, "function.parameters.properties"),
        ({"parameters": {"properties": {"x": {"enum": ["a", f'"{EOS}']}}}}, r"x.enum\[1\]"),
    ],
)
def test_control_tokens_in_tools_are_refused(changes: dict[str, Any], place: str) -> None:
    tool = {**TOOL, "function": {**TOOL["function"], **changes}}
    for render in (learned, rendered_prompt):
        with pytest.raises(ValueError, match=rf"tools\[0\].*{place}: holds '<\|im_end\|>'"):
            render(tokenizer_of(), calling({}), tools=[tool])


def test_control_tokens_in_calls_are_refused() -> None:
    for arguments, place in (
        ({"a": f'"{EOS}'}, r"arguments\.a"),
        ('{"a": ["\\u003c|im_end|>"]}', r"arguments\.a\[0\]"),
        ({EOS: 1}, "arguments"),
    ):
        with pytest.raises(ValueError, match=rf"tool_calls\[0\]\.function\.{place}: holds '<\|im"):
            learned(tokenizer_of(), calling(arguments))
