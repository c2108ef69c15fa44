"""Datasets that must be refused at upload, each with the line and the field that its message must
name.

`NaN`, half surrogates and bytes that are no text cannot be written with `json.dumps`, so the
contents are raw bytes.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Malformed:
    """A bad file.

    Attributes:
        line, field: What the first line of the error must name.
        says: Words of the problem or the remedy.
        errors: How many problems there are in all.
    """

    name: str
    content: bytes
    line: int
    field: str
    says: str
    purpose: str = "conversations"
    errors: int = 1


def message(role: Any = "user", content: Any = "hello") -> dict[str, Any]:
    return {"role": role, "content": content}


ANSWER = message("assistant", "hi")
GOOD = {"messages": [message(), ANSWER]}
PAIR = {"prompt": [message()], "chosen": [ANSWER], "rejected": [message("assistant", "no")]}


def lines(*rows: Any) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def second(row: Any) -> bytes:
    """A good row, and then this one."""
    return lines(GOOD, row)


def content(value: Any) -> bytes:
    return second({"messages": [message(content=value), ANSWER]})


ASKED = {"question": "What is it?", "choices": ["a", "b"], "answer": 1}


def asked(**changes: Any) -> bytes:
    return lines(ASKED, {**ASKED, **changes})


def pair(**changes: Any) -> bytes:
    return lines(PAIR, {**PAIR, **changes})


TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
TOLD = {"role": "tool", "content": "wet"}
CALLED = "messages[1].tool_calls[0]"
ARGUMENTS = f"{CALLED}.function.arguments"
SCHEMA = "tools[0].function"


def calls(**changes: Any) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": "weather", "arguments": "{}"}, **changes}
    return {"messages": [message(), {"role": "assistant", "content": None, "tool_calls": [call]}]}


def called(**changes: Any) -> bytes:
    return second(calls(function={"name": "weather", "arguments": "{}", **changes}))


def calling(arguments: Any) -> bytes:
    return called(arguments=arguments)


def tool(**changes: Any) -> bytes:
    return second({**GOOD, "tools": [{**TOOL, "function": {**TOOL["function"], **changes}}]})


def reading(**changes: Any) -> bytes:
    """A pair whose chosen answer repeats a prompt that reads otherwise."""
    asked = message(content="    What is\nit? ")
    return pair(prompt=[asked], chosen=[{**asked, **changes}, ANSWER])


WITHOUT_CHOSEN = {key: value for key, value in PAIR.items() if key != "chosen"}
ROW = json.dumps(GOOD).encode()
NAN_WEIGHT = b'{"messages": [{"role": "user", "content": [{"text": "a", "weight": NaN}]}]}\n'
DUPLICATE = b'{"messages": [{"role": "assistant", "content": "a", "content": "b"}]}\n'

FILES = [
    # the file as a whole
    Malformed("empty", b"", 1, "file", "holds no rows"),
    Malformed("only blank lines", b"\n  \n\r\n", 1, "file", "holds no rows"),
    Malformed("png", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\n" * 9, 1, "file", "is binary"),
    Malformed("utf-16 without mark", ROW.decode().encode("utf-16-le"), 1, "file", "is binary"),
    Malformed("utf-16", ROW.decode().encode("utf-16"), 1, "file", "save it as UTF-8"),
    Malformed("gzip", gzip.compress(ROW), 1, "file", "unpack it first"),
    Malformed("zip", b"PK\x03\x04" + b"x" * 50, 1, "file", "unpack it first"),
    Malformed("parquet", b"PAR1" + b"\x15" * 50, 1, "file", "convert it"),
    Malformed("json array", json.dumps([GOOD], indent=1).encode(), 1, "file", "a JSON array"),
    Malformed("pretty", json.dumps(GOOD, indent=1).encode(), 1, "file", "one line"),
    Malformed("array on a line", lines([GOOD]), 1, "row", "is a list, not an object"),
    Malformed("cr line ends", ROW + b"\r" + ROW, 1, "row", "CR line ends"),
    # lines that are no JSON
    Malformed("latin-1", ROW + b'\n{"text": "caf\xe9"}', 2, "row", "0xe9 at position 14"),
    Malformed("truncated", ROW + b"\n" + ROW[:-6], 2, "row", "does not end"),
    Malformed("cut at a brace", ROW + b"\n" + ROW[:-1], 2, "row", "Expecting"),
    Malformed("csv", b"id,said\n1,hi\n'a',b\n\"c\",d\n", 1, "row", "with all 4 rows"),
    Malformed("single quotes", ROW + b"\n" + str(GOOD).encode(), 2, "row", "single quotes"),
    Malformed("python true", ROW + b'\n{"text": True}', 2, "row", "Python's literal"),
    Malformed("python none", ROW + b'\n{"text": None}', 2, "row", "Python's literal"),
    Malformed("two on a line", ROW + b"\n" + ROW + ROW, 2, "row", "more than one JSON value"),
    Malformed("trailing comma", ROW + b'\n{"text": "a",}', 2, "row", "not JSON"),
    Malformed("comma between rows", ROW + b",\n" + ROW, 1, "row", "remove the commas between"),
    Malformed("1e999", b'{"text": "a", "n": 1e999}', 1, "n", "larger than a float can hold"),
    Malformed("line break in a string", b'{"text": "a\nb"}', 1, "row", "does not end"),
    Malformed("nan", ROW + b'\n{"text": "a", "score": NaN}', 2, "score", "is NaN or Infinity"),
    Malformed("infinity", ROW + b'\n{"a": {"b": [1, -Infinity]}}', 2, "a.b[1]", "not JSON"),
    Malformed("deep nan", b'{"a": ' + b"[" * 900 + b"NaN" + b"]" * 900 + b"}\n", 1, "row", "NaN"),
    Malformed("no tools", lines({**GOOD, "tools": []}), 1, "tools", "is an empty list"),
    Malformed("nan weight", NAN_WEIGHT, 1, "messages[0].content[0].weight", "use a number"),
    Malformed("duplicate key", ROW + b"\n" + DUPLICATE, 2, "content", "appears twice"),
    Malformed("duplicate column", b'{"text": "a", "text": "b"}', 1, "text", "keep one"),
    Malformed("huge integer", b'{"text": "a", "n": ' + b"9" * 5000 + b"}", 1, "row", "shorten"),
    Malformed("too deep", ROW + b"\n" + b"[" * 200_000, 2, "row", "nested too deeply"),
    Malformed("nul bytes", ROW + b"\n" + b"\0" * 20, 2, "row", "not JSON"),
    # rows
    Malformed("null row", second(None), 2, "row", "is null, not an object"),
    Malformed("string row", second("hello"), 2, "row", "is a string"),
    Malformed("number row", second(3), 2, "row", "is the number 3"),
    Malformed("empty row", second({}), 2, "messages", "is missing"),
    Malformed("unknown columns", second({"q": "a", "b": "c"}), 2, "messages", "has 'q', 'b'"),
    Malformed("sharegpt", second({"conversations": []}), 2, "messages", "rename 'conversations'"),
    Malformed("capitals", second({"Messages": []}), 2, "messages", "rename 'Messages'"),
    Malformed("prompts", second({"prompt": "a", "completion": "b"}), 2, "messages", "role 'user'"),
    Malformed("pairs", second(PAIR), 2, "messages", "purpose 'preference'"),
    Malformed("both", second({**GOOD, "text": "a"}), 2, "text", "keep one of the two"),
    Malformed(
        "options of a row",
        second({**GOOD, "chat_template_kwargs": {"enable_thinking": False}}),
        2,
        "chat_template_kwargs",
        "give the job template_options",
    ),
    Malformed(
        "options of a request",
        lines(PAIR, {**PAIR, "parallel_tool_calls": False}),
        2,
        "parallel_tool_calls",
        "remove it",
        "preference",
    ),
    Malformed(
        "system column", second({**GOOD, "system": "Be brief."}), 2, "system", "role 'system'"
    ),
    Malformed(
        "train_on column", second({**GOOD, "train_on": "last"}), 2, "train_on", "give the job"
    ),
    Malformed(
        "text and tools", second({"text": "a", "tools": [TOOL]}), 2, "tools", "beside 'text'"
    ),
    # calls and tools
    Malformed("arguments a list", calling("[1]"), 2, ARGUMENTS, "are no JSON object"),
    Malformed("arguments null", calling("null"), 2, ARGUMENTS, "are no JSON object"),
    Malformed("arguments too deep", calling("[" * 5000), 2, ARGUMENTS, "nested too deeply"),
    Malformed("an object, too deep", calling('{"a":' * 101 + "1" + "}" * 101), 2, ARGUMENTS, "dee"),
    Malformed("a key twice", calling('{"a": {"b": 1, "b": 2}}'), 2, f"{ARGUMENTS}.b", "twice"),
    Malformed("nan argument", calling('{"a": [NaN]}'), 2, f"{ARGUMENTS}.a[0]", "is NaN or"),
    Malformed("endless argument", calling('{"a": 1e999}'), 2, f"{ARGUMENTS}.a", "larger than a"),
    Malformed("1e2", calling('{"a": 1e2}'), 2, f"{ARGUMENTS}.a", "writes as 100.0; write that"),
    Malformed("1.10", calling('{"a": [1, 1.10]}'), 2, f"{ARGUMENTS}.a[1]", "writes as 1.1;"),
    Malformed("-0", calling('{"a": -0}'), 2, f"{ARGUMENTS}.a", "writes as -0.0"),
    Malformed(
        "too precise", calling('{"a": 0.1000000000000000055}'), 2, f"{ARGUMENTS}.a", "as 0.1;"
    ),
    Malformed(
        "1.50 in an object",
        calling({"a": 1.5}).replace(b"1.5", b"1.50"),
        2,
        f"{ARGUMENTS}.a",
        "writes as 1.5;",
    ),
    Malformed(
        "half a surrogate in an argument",
        calling('{"a": "\\ud800"}'),
        2,
        f"{ARGUMENTS}.a",
        "surrogate",
    ),
    Malformed("half a surrogate in a key", calling({"\ud800": 1}), 2, ARGUMENTS, "surrogate"),
    Malformed("call without a name", called(name=" "), 2, CALLED, "is no call of a function"),
    Malformed("call with a key", called(strict=True), 2, f"{CALLED}.function.strict", "remove it"),
    Malformed("custom call", second(calls(type="custom")), 2, CALLED, "is no call of a function"),
    Malformed("call with an index", second(calls(index=0)), 2, f"{CALLED}.index", "remove it"),
    Malformed("call id a number", second(calls(id=3)), 2, f"{CALLED}.id", "is the number 3"),
    Malformed(
        "answer to no call",
        second({"messages": [*calls(id="c1")["messages"], {**TOLD, "tool_call_id": "c2"}]}),
        2,
        "messages[2].tool_call_id",
        "'c2' is the id of no call",
    ),
    Malformed("tool without a name", tool(name=" "), 2, "tools[0]", "is no function"),
    Malformed("description a list", tool(description=["a"]), 2, f"{SCHEMA}.description", "string"),
    Malformed("parameters a number", tool(parameters=5), 2, f"{SCHEMA}.parameters", "JSON schema"),
    Malformed(
        "half a surrogate in a tool",
        tool(description="\ud800"),
        2,
        f"{SCHEMA}.description",
        "surrogate",
    ),
    Malformed(
        "2.50 in a tool",
        tool(parameters={"minimum": 2.5}).replace(b"2.5", b"2.50"),
        2,
        f"{SCHEMA}.parameters.minimum",
        "writes as 2.5;",
    ),
    Malformed("text null", second({"text": None}), 2, "text", "is null"),
    Malformed("text empty", second({"text": " \n"}), 2, "text", "is empty"),
    Malformed("text a list", second({"text": ["a"]}), 2, "text", "is a list"),
    Malformed("half a surrogate", second({"text": "a\ud83d"}), 2, "text", "surrogate"),
    Malformed(
        "demonstration null",
        second({**GOOD, "demonstration": None}),
        2,
        "demonstration",
        "leave it out",
    ),
    Malformed(
        "demonstration empty", second({**GOOD, "demonstration": ""}), 2, "demonstration", "is empty"
    ),
    Malformed(
        "demonstration a dict",
        second({**GOOD, "demonstration": ANSWER}),
        2,
        "demonstration",
        "is an object",
    ),
    # messages
    Malformed("messages null", second({"messages": None}), 2, "messages", "is null"),
    Malformed("messages a string", second({"messages": "hello"}), 2, "messages", "is a string"),
    Malformed("messages a dict", second({"messages": ANSWER}), 2, "messages", "is an object"),
    Malformed("messages empty", second({"messages": []}), 2, "messages", "is empty"),
    Malformed(
        "message a string", second({"messages": ["a", ANSWER]}), 2, "messages[0]", "is a string"
    ),
    Malformed("message null", second({"messages": [message(), None]}), 2, "messages[1]", "is null"),
    Malformed(
        "no role", second({"messages": [{"content": "a"}, ANSWER]}), 2, "messages[0].role", "add it"
    ),
    Malformed(
        "no content",
        second({"messages": [{"role": "user"}, ANSWER]}),
        2,
        "messages[0].content",
        "add it",
    ),
    Malformed(
        "from and value",
        second({"messages": [{"from": "human", "value": "a"}]}),
        2,
        "messages[0].content",
        "rename 'value'",
        errors=2,
    ),
    Malformed(
        "human",
        second({"messages": [message("human"), ANSWER]}),
        2,
        "messages[0].role",
        "write 'user'",
    ),
    Malformed(
        "gpt",
        second({"messages": [message(), message("gpt")]}),
        2,
        "messages[1].role",
        "write 'assistant'",
    ),
    Malformed(
        "capital role",
        second({"messages": [message("User"), ANSWER]}),
        2,
        "messages[0].role",
        "write 'user'",
    ),
    Malformed(
        "tool",
        second({"messages": [message("narrator"), ANSWER]}),
        2,
        "messages[0].role",
        "use 'system'",
    ),
    Malformed(
        "role a number",
        second({"messages": [message(1), ANSWER]}),
        2,
        "messages[0].role",
        "number 1",
    ),
    Malformed(
        "role null", second({"messages": [message(None), ANSWER]}), 2, "messages[0].role", "is null"
    ),
    Malformed(
        "ends with the system",
        second({"messages": [message(), message("system")]}),
        2,
        "messages",
        "the last is of role 'system', so there is nothing to answer",
    ),
    # contents
    Malformed("content null", content(None), 2, "messages[0].content", "is null"),
    Malformed("content empty", content(""), 2, "messages[0].content", "is empty"),
    Malformed("content blank", content(" \t\n"), 2, "messages[0].content", "is empty"),
    Malformed("content a number", content(7), 2, "messages[0].content", "is the number 7"),
    Malformed("content true", content(True), 2, "messages[0].content", "is true"),
    Malformed("content a dict", content({"text": "a"}), 2, "messages[0].content", "is an object"),
    Malformed("no blocks", content([]), 2, "messages[0].content", "is empty"),
    Malformed(
        "blank blocks", content([{"text": ""}, {"text": " "}]), 2, "messages[0].content", "is empty"
    ),
    Malformed("block a string", content(["a"]), 2, "messages[0].content[0]", "is a string"),
    Malformed(
        "block without text",
        content([{"weight": 1}]),
        2,
        "messages[0].content[0].text",
        "is missing",
    ),
    Malformed(
        "block text null", content([{"text": None}]), 2, "messages[0].content[0].text", "is null"
    ),
    Malformed(
        "image", content([{"type": "image_url"}]), 2, "messages[0].content[0].type", "only 'text'"
    ),
    Malformed(
        "weight a string",
        content([{"text": "a"}, {"text": "b", "weight": "1"}]),
        2,
        "messages[0].content[1].weight",
        "is a string",
    ),
    Malformed(
        "weight true",
        content([{"text": "a", "weight": True}]),
        2,
        "messages[0].content[0].weight",
        "is true",
    ),
    Malformed(
        "weight 1e999",
        content([{"text": "a", "weight": 0}]).replace(b": 0}", b": 1e999}"),
        2,
        "messages[0].content[0].weight",
        "finite number",
    ),
    Malformed(
        "weight 1e39, infinite in 32 bits",
        content([{"text": "a", "weight": 1e39}]),
        2,
        "messages[0].content[0].weight",
        "32-bit sums",
    ),
    Malformed(
        "weight an empty list",
        second({"messages": [message(), {**ANSWER, "weight": []}]}),
        2,
        "messages[1].weight",
        "is a list",
    ),
    Malformed(
        "name an empty list",
        second({"messages": [{**message(), "name": []}, ANSWER]}),
        2,
        "messages[0].name",
        "is a list",
    ),
    Malformed(
        "half a character as a key",
        second({"messages": [{**message(), "\ud800": 1}, ANSWER]}),
        2,
        "messages[0].\\ud800",
        "is no key",
    ),
    Malformed(
        "tag a number",
        content([{"text": "a", "tag": 1}]),
        2,
        "messages[0].content[0].tag",
        "make it a string",
    ),
    Malformed(
        "surrogate in a block",
        content([{"text": "\udc00"}]),
        2,
        "messages[0].content[0].text",
        "surrogate",
    ),
    # pairs
    Malformed(
        "conversation",
        lines(GOOD),
        1,
        "prompt and chosen and rejected",
        "are missing; upload conversations with purpose 'conversations'",
        "preference",
    ),
    Malformed(
        "content called text",
        lines({"messages": [{"role": "user", "text": "a"}]}),
        1,
        "messages[0].content",
        "is missing; rename 'text' to 'content'",
    ),
    Malformed(
        "role called speaker",
        lines({"messages": [{"speaker": "user", "content": "a"}]}),
        1,
        "messages[0].role",
        "is missing; rename 'speaker' to 'role'",
    ),
    Malformed(
        "text beside content",
        lines({"messages": [{"role": "user", "content": "a", "text": "b"}]}),
        1,
        "messages[0].text",
        "is no key that anything reads; remove it",
    ),
    Malformed("no chosen", lines(PAIR, WITHOUT_CHOSEN), 2, "chosen", "is missing", "preference"),
    Malformed("chosen a string", pair(chosen="yes"), 2, "chosen", "is a string", "preference"),
    Malformed("chosen empty", pair(chosen=[]), 2, "chosen", "is empty", "preference"),
    Malformed(
        "chosen by the user",
        pair(chosen=[message(content="what?")]),
        2,
        "chosen[0].role",
        "end it with 'assistant'",
        "preference",
    ),
    Malformed("prompt a string", pair(prompt="hello"), 2, "prompt", "make it a list", "preference"),
    Malformed("rejected null", pair(rejected=None), 2, "rejected", "is null", "preference"),
    Malformed(
        "rejected content",
        pair(rejected=[message("assistant", "")]),
        2,
        "rejected[0].content",
        "is empty",
        "preference",
    ),
    Malformed(
        "no preference",
        pair(rejected=PAIR["chosen"]),
        2,
        "rejected",
        "equals 'chosen'",
        "preference",
    ),
    Malformed(
        "prompt again, trimmed",
        reading(content="What is\nit?"),
        2,
        "chosen",
        "read twice",
        "preference",
    ),
    Malformed(
        "prompt again behind a system text",
        pair(chosen=[message("system", "Be brief."), message(), ANSWER]),
        2,
        "chosen",
        "read twice",
        "preference",
    ),
    Malformed(
        "ids alone differ",
        pair(chosen=calls(id="a")["messages"][1:], rejected=calls(id="b")["messages"][1:]),
        2,
        "rejected",
        "equals 'chosen'",
        "preference",
    ),
    Malformed("nothing", b"\n", 1, "file", "holds no rows", "preference"),
    # questions
    Malformed("no question", asked(question=" "), 2, "question", "is missing", "multiple_choice"),
    Malformed("one choice", asked(choices=["a"]), 2, "choices", "two or more", "multiple_choice"),
    Malformed("twice", asked(choices=["a", "a"]), 2, "choices", "twice", "multiple_choice"),
    Malformed("no text", asked(choices=["a", 2]), 2, "choices", "list of two", "multiple_choice"),
    Malformed("other answer", asked(answer="c"), 2, "answer", "from 0 to 1", "multiple_choice"),
    Malformed("position", asked(answer=2), 2, "answer", "from 0 to 1", "multiple_choice"),
    Malformed("yes", asked(answer=True), 2, "answer", "neither one", "multiple_choice"),
]
