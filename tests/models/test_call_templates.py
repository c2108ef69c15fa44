"""Calls and what functions return, in the manner of well-known model families: small templates of
our own, and those of an installed trl where there is one.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import AddedToken

from openweights.errors import DatasetError
from openweights.jobs.unsloth.data import sft_examples
from tests.learned_rows import Row, config, learned, row, said, stretches, system, user
from tests.tiny_model import EOS, make_tokenizer

# Whether there are calls is asked before whose turn it is; what a function returned is JSON.
LLAMA_31 = """{%- for m in messages %}
{%- if not (m.role == 'tool' or 'tool_calls' in m) %}
{{- '<|im_start|>' + m.role + '\\n' + m.content | trim + '<|im_end|>' }}
{%- elif 'tool_calls' in m %}{%- set call = m.tool_calls[0].function %}
{{- '<|im_start|>assistant\\n{"name": "' + call.name + '", "parameters": ' }}
{{- (call.arguments | tojson) + '}<|im_end|>' }}
{%- else %}{{- '<|im_start|>ipython\\n' + (m.content | tojson) + '<|im_end|>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

# What functions return stands in the model's turn, behind its calls and before its text.
GEMMA_4 = """{%- set ns = namespace(calls=false) %}
{%- for m in messages %}{%- if m.role != 'tool' %}
{%- if not ns.calls %}{{- '<|im_start|>' + m.role + '\\n' }}{%- endif %}
{%- set ns.calls = false %}
{%- for c in m.tool_calls or [] %}{%- set ns.calls = true %}
{{- '<call>' + c.function.name + (c.function.arguments | tojson) + '</call>' }}{%- endfor %}
{%- if ns.calls %}{{- '<result>' }}{%- set scan = namespace(on=true) %}
{%- for k in range(loop.index0 + 1, messages | length) %}
{%- if messages[k].role == 'tool' and scan.on %}
{{- m.tool_calls[0].function.name + ': ' + messages[k].content + '</result>' }}
{%- else %}{%- set scan.on = false %}{%- endif %}{%- endfor %}{%- endif %}
{{- m.content }}{%- if not ns.calls %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- endif %}{%- endfor %}
{%- if add_generation_prompt and not ns.calls %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

# The system text stands in the last question.
SYSTEM_LAST = """{%- for m in messages if m.role != 'system' %}
{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'user' and loop.last or (loop.revindex0 == 1 and m.role == 'user') %}
{%- for s in messages if s.role == 'system' %}{{- s.content + '\\n\\n' }}{%- endfor %}{%- endif %}
{{- m.content + '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

ARGUMENTS = {"city": "Oslo", "days": 3}
RETURNED = json.dumps({"rain": 'no\n"maybe"', "wind": "5 m/s", "är": "<b>'"})


def calling(text: str | None = None, *arguments: object, **more: Any) -> Row:
    """An answer with calls, as OpenAI's format has it: arguments are a text of JSON."""
    functions = [
        {"name": "weather", "arguments": json.dumps(given)} for given in arguments or (ARGUMENTS,)
    ]
    calls = [
        {"id": f"call_{number}", "type": "function", "function": function}
        for number, function in enumerate(functions)
    ]
    return {"role": "assistant", "content": text, "tool_calls": calls, **more}


def returned(content: str = RETURNED, number: int = 0) -> Row:
    return {"role": "tool", "content": content, "tool_call_id": f"call_{number}"}


def family(template: str, *tokens: str) -> Any:
    """The test tokenizer with a template, and with tokens of its own."""
    tokenizer: Any = make_tokenizer()
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in tokens])
    tokenizer.chat_template = template
    return tokenizer


def read(tokenizer: Any, example: Row) -> str:
    [encoded] = sft_examples(config(), tokenizer, [example])
    return tokenizer.decode(encoded["input_ids"])


def test_calls_that_are_asked_for_before_the_role_are_learned() -> None:
    tokenizer = family(LLAMA_31)
    example = row(user("q"), calling(), returned(), said("dry"))
    call = '{"name": "weather", "parameters": {"city": "Oslo", "days": 3}}'
    assert learned(tokenizer, example) == [call + EOS, "dry" + EOS]
    assert learned(tokenizer, example, train_on="last") == ["dry" + EOS]


def test_what_a_function_returned_may_be_written_as_json() -> None:
    example = row(user("q"), calling(), returned(), said("dry"))
    escaped = family(LLAMA_31)
    assert json.dumps(RETURNED, ensure_ascii=False) in read(escaped, example)
    ascii_alone = family(LLAMA_31.replace("m.content | tojson", "m.content | tojson(true)"))
    assert json.dumps(RETURNED) in read(ascii_alone, example)
    assert RETURNED in read(family(LLAMA_31.replace("(m.content | tojson)", "m.content")), example)


def test_what_a_function_returned_is_not_written_otherwise() -> None:
    template = LLAMA_31.replace("m.content | tojson", "m.content | replace('5', '6') | tojson")
    with pytest.raises(DatasetError, match=r"messages\[2\]: the chat template rewrites messages"):
        read(family(template), row(user("q"), calling(), returned(), said("dry")))


def test_what_others_say_is_not_json_of_it() -> None:
    template = LLAMA_31.replace("m.content | trim", "(m.content | tojson)[1:-1]")
    with pytest.raises(DatasetError, match=r"messages\[0\]: the chat template rewrites messages"):
        read(family(template), row(user('"q"'), said("a")))


def test_blocks_of_what_is_written_as_json_are_not_told_apart() -> None:
    blocks = [{"type": "text", "text": text, "weight": 0.5} for text in ('"a"', "b")]
    messages = [user("q"), calling(), returned(), said("dry")]
    messages[2]["content"] = blocks
    with pytest.raises(DatasetError, match=r"\.content: the chat template writes it as JSON"):
        read(family(LLAMA_31), row(*messages))


def test_what_a_function_returned_is_not_learned_with_the_answer_around_it() -> None:
    tokenizer = family(GEMMA_4, "<result>")
    text_behind = row(user("q"), calling("See"), returned("5"), said("dry"))
    with pytest.raises(DatasetError, match=r"messages\[1\]: the chat template writes other mess"):
        read(tokenizer, text_behind)


def test_weights_hold_where_the_template_writes_messages_in_another_order() -> None:
    messages = [system("SYS"), user("first"), said("one"), user("second"), said("two")]
    weights = [0.5, 0.25, 0, None, None]
    weighted = [m | {"weight": w} for m, w in zip(messages, weights, strict=True) if w is not None]
    example = row(*weighted, *messages[3:])
    tokenizer = family(SYSTEM_LAST)
    [encoded] = sft_examples(config(), tokenizer, [example], with_weights=True)
    text = tokenizer.decode(encoded["input_ids"])
    assert [text.count(m["content"]) for m in messages] == [1] * 5
    assert stretches(encoded["input_ids"], encoded["labels"], tokenizer) == [
        "first" + EOS,
        "SYS",
        "two" + EOS,
    ]
