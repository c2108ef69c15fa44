"""What student and teacher read."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openweights.jobs.unsloth.config.demonstrations import Showing, split_row, teacher_messages
from openweights.jobs.unsloth.validate import training_config
from tests.jobs.unsloth.malformed_configs import SDFT

SYSTEM = {"role": "system", "content": "Be brief."}
QUESTION = {"role": "user", "content": "2 {x} days in hours?"}
ANSWER = {"role": "assistant", "content": "48 {prompt} hours"}


def test_last_answer_is_the_demonstration_unless_the_row_brings_one() -> None:
    prompt = [SYSTEM, QUESTION]
    assert split_row({"messages": [*prompt, ANSWER]}) == (prompt, ANSWER["content"])
    row = {"messages": [*prompt, ANSWER], "demonstration": "better"}
    assert split_row(row) == (prompt, "better")
    assert split_row({"messages": prompt, "demonstration": "shown"}) == (prompt, "shown")
    blocks = {"role": "user", "content": [{"type": "text", "text": "a"}, {"text": "b"}]}
    assert split_row({"messages": [blocks, ANSWER]})[0] == [{"role": "user", "content": "ab"}]


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"text": "plain"}, "messages: is missing"),
        ({"messages": [QUESTION]}, "'demonstration'"),
        ({"messages": [SYSTEM, ANSWER]}, "from the user"),
        ({"messages": [ANSWER]}, "from the user"),
        ({"messages": [QUESTION, ANSWER, ANSWER]}, "from the user"),
    ],
)
def test_rows_without_prompt_or_demonstration_are_refused(row: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        split_row(row)


def test_template_becomes_the_last_user_turn_and_history_stays() -> None:
    history = [SYSTEM, {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    shown = teacher_messages([*history, QUESTION], "48 {prompt} hours")
    assert shown[:-1] == history and shown[-1]["role"] == "user"
    text = shown[-1]["content"]
    assert text.index("2 {x} days") < text.index("48 {prompt} hours") < text.index("Now respond")


def test_own_template_with_and_without_the_prompt() -> None:
    with_prompt = teacher_messages([QUESTION], "A", template="<{demonstration}|{prompt}>")
    assert with_prompt[-1]["content"] == "<A|2 {x} days in hours?>"
    without = teacher_messages([QUESTION], "A", template="Hint: {demonstration}")
    assert without[-1]["content"] == "2 {x} days in hours?\n\nHint: A"


@pytest.mark.parametrize(
    "around",
    ['Reply as {"a": 1}. |', "a lone { and |", "a lone } and |", "{x}|{}", "{{|}}", "{0!r:>3}|"],
)
def test_a_template_that_is_accepted_is_filled_in(around: str) -> None:
    """Braces other than those of the two fields are text, for the check as for the worker."""
    before, after = around.split("|")
    template = f"{before}{{prompt}}{{demonstration}}{after}"
    assert training_config({**SDFT, "sdft_demo_template": template}).sdft_demo_template == template
    shown = teacher_messages([QUESTION], ANSWER["content"], template=template)
    assert shown[-1]["content"] == f"{before}2 {{x}} days in hours?48 {{prompt}} hours{after}"


@given(
    before=st.text('{}"prompt: !\\a0.[]', max_size=30),
    after=st.text('{}"demonstration: !\\a0.[]', max_size=30),
)
def test_any_text_around_the_field_stays(before: str, after: str) -> None:
    template = f"{before}{{demonstration}}{after}"
    config = training_config({**SDFT, "sdft_demo_template": template})
    [turn] = teacher_messages(
        [{"role": "user", "content": "Q"}], "A", template=config.sdft_demo_template
    )
    text = f"{before}A{after}".replace("{demonstration}", "A")
    has_prompt = "{prompt}" in template
    assert turn["content"] == (text.replace("{prompt}", "Q") if has_prompt else f"Q\n\n{text}")


def test_turns_put_the_demonstration_before_the_question() -> None:
    shown = teacher_messages([SYSTEM, QUESTION], "48", showing=Showing("turns", 2))
    answer = {"role": "assistant", "content": "48"}
    assert shown == [SYSTEM, QUESTION, answer, QUESTION, answer, QUESTION]


@given(prompt=st.text(), demonstration=st.text())
def test_any_text_arrives_unchanged(prompt: str, demonstration: str) -> None:
    """Braces, and text that looks like a field of the template, are only text."""
    [turn] = teacher_messages(
        [{"role": "user", "content": prompt}], demonstration, template="a{prompt}b{demonstration}c"
    )
    assert turn["content"] == f"a{prompt}b{demonstration}c"


def test_the_name_of_who_asks_is_read_by_both() -> None:
    asked = {**QUESTION, "name": "Bob"}
    for showing in (Showing("template"), Showing("turns")):
        assert teacher_messages([asked], "48", showing=showing)[-1]["name"] == "Bob"
