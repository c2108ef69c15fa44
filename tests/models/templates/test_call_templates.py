"""Calls and what functions return, in the manner of well-known model families: small templates of
our own, and those of an installed trl where there is one.
"""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken

from openweights.errors import DatasetError
from openweights.jobs.unsloth.config.first_look import check_rendering
from openweights.jobs.unsloth.data import sft_examples
from openweights.models.templates.rendering import rendered_prompt
from openweights.models.tokens import eos_token_ids
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
{%- if not (ns.calls and m.role == 'assistant') %}{{- '<|im_start|>' + m.role + '\\n' }}
{%- endif %}
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

# Thinking has a key of its own and is kept of a last answer; a call ends with a token of its own,
# and the function's name stands over what it returned.
GPT_OSS = """{%- set ns = namespace(called='') %}
{%- for m in messages %}
{%- if m.role == 'tool' %}{{- '<|im_start|>' + ns.called + '\\n' }}
{{- (m.content | tojson) + '<|im_end|>' }}
{%- else %}
{%- if m.thinking and loop.last %}
{{- '<|im_start|>assistant<think>' + m.thinking + '<end>' }}{%- endif %}
{{- '<|im_start|>' + m.role }}
{%- if 'tool_calls' in m %}{%- set call = m.tool_calls[0].function %}
{%- set ns.called = call.name %}
{{- ' to=' + call.name + '\\n' + (call.arguments | tojson) + '<|call|>' }}
{%- else %}{{- '\\n' + m.content + '<|im_end|>' }}{%- endif %}
{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant' }}{%- endif %}"""

# Arguments are a text.
DEEPSEEK_3 = """{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content }}
{%- for c in m.tool_calls or [] %}
{{- '<call>' + c.function.name + '\\n' + c.function.arguments + '</call>' }}{%- endfor %}
{{- '<|im_end|>' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

# The header of what follows ends an answer: of a question, or of what functions return.
GLM_4 = """{%- for m in messages %}
{{- '<|observation|>' if m.role == 'tool' else '<|' + m.role + '|>' }}{{- '\\n' + m.content }}
{%- for c in m.tool_calls or [] %}{{- '<call>' + c.function.name }}
{%- for k, v in c.function.arguments.items() %}
{{- '<key>' + k + '</key>' + (v | string) }}{%- endfor %}{{- '</call>' }}{%- endfor %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}"""
GLM_4_TOKENS = (
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
    "<call>",
    "</call>",
    "<key>",
    "</key>",
)

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


def test_a_result_in_the_turn_of_the_model_is_read() -> None:
    tokenizer = family(GEMMA_4, "<result>")
    example = row(user("q"), calling(), returned("5"), said("dry"), user("r"), said("wet"))
    call = '<call>weather{"city": "Oslo", "days": 3}</call><result>'
    assert learned(tokenizer, example) == [call, "dry" + EOS, "wet" + EOS]


def test_a_call_ends_with_its_own_token_where_the_template_writes_one() -> None:
    tokenizer = family(GPT_OSS, "<|call|>")
    assert "<|call|>" in tokenizer.convert_ids_to_tokens(eos_token_ids(None, tokenizer))
    call = ' to=weather\n{"city": "Oslo", "days": 3}<|call|>'
    example = row(user("q"), calling(), returned(), said("dry"))
    assert learned(tokenizer, example) == [call, "dry" + EOS]
    check_rendering([(1, example)], config(), tokenizer, config().datasets()[0])
    assert learned(tokenizer, row(user("q"), calling())) == [call]


def test_functions_that_are_called_one_after_the_other() -> None:
    tokenizer = family(GPT_OSS, "<|call|>", "<end>")
    call = ' to=weather\n{"city": "Oslo", "days": 3}<|call|>'
    twice = (calling(), returned(), calling(), returned("5"))
    example = row(user("q"), *twice, said("dry"))
    assert learned(tokenizer, example) == [call, call, "dry" + EOS]
    assert learned(tokenizer, row(user("q"), *twice[:3])) == [call, call]


@pytest.mark.parametrize("arguments", [ARGUMENTS, {}])
def test_two_calls_in_one_answer_where_the_template_writes_one(arguments: Row) -> None:
    tokenizer = family(GPT_OSS, "<|call|>", "<end>")
    example = row(user("q"), calling(None, ARGUMENTS, arguments), returned())
    told = r"messages\[1\]\.tool_calls: the chat template writes the first call of an answer alone"
    with pytest.raises(DatasetError, match=told):
        learned(tokenizer, example)


# An answer has a token behind it before the one that ends the turn.
COHERE_2 = """{%- for m in messages %}{{- '<|im_start|>' + m.role }}
{%- if m.role == 'assistant' %}{{- '<|start|>' + m.content + '<|end|>' }}
{%- else %}{{- '\\n' + m.content }}{%- endif %}{{- '<|im_end|>' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant<|start|>' }}{%- endif %}"""


def test_an_answer_with_two_end_tokens_is_learned_with_both() -> None:
    tokenizer = family(COHERE_2, "<|start|>", "<|end|>")
    ends = tokenizer.convert_ids_to_tokens(eos_token_ids(None, tokenizer))
    assert ends == [EOS, "<|end|>"], "a completion ends with the first that comes"
    example = row(user("q"), said("dry"), user("r"), said("wet"))
    found = [f"{answer}<|end|>{EOS}" for answer in ("dry", "wet")]
    assert learned(tokenizer, example) == found
    assert learned(tokenizer, example, train_on="last") == found[1:]
    check_rendering([(1, example)], config(), tokenizer, config().datasets()[0])


def test_thinking_stands_under_the_key_that_the_template_reads() -> None:
    tokenizer = family(GPT_OSS, "<|call|>", "<end>")
    example = row(user("q"), said("dry", reasoning_content="T"))
    assert learned(tokenizer, example) == ["<think>T<end><|im_start|>assistant\ndry" + EOS]


@pytest.mark.parametrize("arguments", ["c.function.arguments", "c.function.arguments | string"])
def test_arguments_are_a_text_where_the_template_takes_no_object(arguments: str) -> None:
    tokenizer = family(DEEPSEEK_3.replace("c.function.arguments", arguments))
    given = {"city": 'Os"lo', "far": False, "days": None}
    [call, answer] = learned(
        tokenizer, row(user("q"), calling("See", given), returned(), said("dry"))
    )
    assert call == f"See<call>weather\n{json.dumps(given)}</call>{EOS}"
    assert answer == "dry" + EOS


def test_what_a_header_ends_is_closed_with_the_one_that_follows() -> None:
    tokenizer = family(GLM_4, *GLM_4_TOKENS)
    call = "<call>weather<key>city</key>Oslo<key>days</key>3</call><|observation|>"
    whole = row(user("q"), calling(), returned("5"), said("dry"))
    assert learned(tokenizer, whole) == [call, "dry<|user|>"]
    assert learned(tokenizer, row(user("q"), calling())) == [call]
    two = learned(tokenizer, row(user("q"), calling(None, ARGUMENTS, ARGUMENTS)))
    assert two == [2 * call.removesuffix("<|observation|>") + "<|observation|>"]


def test_whose_result_it_is_need_not_be_written_again() -> None:
    tokenizer = family(LLAMA_31)
    example = row(user("q"), calling(), returned() | {"name": "weather"}, said("dry"))
    assert learned(tokenizer, example)[1] == "dry" + EOS
    example["messages"][2]["name"] = "traffic"
    with pytest.raises(DatasetError, match=r"messages\[2\]\.name: the chat template does not"):
        learned(tokenizer, example)


def test_a_template_that_is_no_jinja_is_what_is_to_be_corrected() -> None:
    with pytest.raises(
        DatasetError, match=r"the chat template is no Jinja \(line 1: .*; correct it"
    ):
        learned(family("{% for %}"), row(user("q"), said("a")))
    with pytest.raises(ValueError, match="the chat template is no Jinja"):
        rendered_prompt(family("{% for %}"), [user("q")])


INSTALLED = ("llama3_1", "llama3_2", "gptoss", "deepseekv3", "glm4moe", "gemma4", "qwen3")


@pytest.mark.parametrize("name", INSTALLED)
def test_templates_of_an_installed_trl_train_calls(name: str) -> None:
    found = find_spec("trl")
    file = Path(found.origin or "").parent / "chat_templates" / f"{name}.jinja" if found else None
    if file is None or not file.is_file():
        pytest.skip("no trl with this template is installed")
    template = file.read_text(encoding="utf-8")
    tokens = re.findall(r"<\|?[a-z_]+\|?>|<｜[^｜'\"]+｜>|</[a-z_]+>", template)
    tokenizer = family(template, *dict.fromkeys(tokens), "<｜end▁of▁sentence｜>")
    tokenizer.eos_token = "<｜end▁of▁sentence｜>" if name == "deepseekv3" else EOS
    example = row(user("q"), calling(), returned("5 deg"), said("dry"))
    call, answer = learned(tokenizer, example)
    assert "weather" in call and "Oslo" in call and "5 deg" not in call
    assert answer.startswith("dry") and answer != "dry"


@pytest.mark.parametrize("order", ["dictsort", "dictsort(true)", "items"])
def test_a_template_may_sort_arguments_with_or_without_capitals(order: str) -> None:
    pairs = f"{{% for k, v in call.arguments | {order} %}}{{{{ k ~ '=' ~ v ~ ';' }}}}{{% endfor %}}"
    template = LLAMA_31.replace("{{- (call.arguments | tojson) + '}", pairs + "{{- '}")
    given = {"b": 1, "Az": 2, "aB": 3, "Ba": 4}
    [call] = learned(family(template), row(user("q"), calling(None, given)))
    assert sorted(re.findall(r"(\w+=\d);", call)) == ["Az=2", "Ba=4", "aB=3", "b=1"]


def test_a_prompt_that_differs_is_told_beside_what_is_written(
    caplog: pytest.LogCaptureFixture,
) -> None:
    template = LLAMA_31.replace(
        "if add_generation_prompt %}{{- '<|im_start|>assistant\\n'",
        "if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n'",
    ).replace(
        "'\\n' + m.content",
        "'\\n' + ('<think></think>' if m.role == 'assistant' else '') + m.content",
    )
    with caplog.at_level("INFO"):
        learned(family(template), row(user("q"), said("a")))
    told = r"ends with '<think>\n', where the chat template writes '<think></think>' before"
    assert told in caplog.text


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
