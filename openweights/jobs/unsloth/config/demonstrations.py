"""What student and teacher of self-distillation read.

The student sees the prompt x, the teacher x and a demonstration c (trl calls it privileged
context). Pure functions over messages, without torch: the client checks rows with them before a job
is submitted, the trainer renders what they return.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from openweights.client.messages import prompt_and_answer
from openweights.models.templates.messages import Message

Placement = Literal["template", "turns"]


@dataclass(frozen=True, slots=True)
class Showing:
    """Where the teacher reads the demonstration.

    Attributes:
        placement: "template" in the last user turn, "turns" as earlier turns.
        repeats: How often it is shown as turns.
    """

    placement: Placement = "template"
    repeats: int = 1

    @property
    def name(self) -> str:
        """Names it in events, such as "turns_2"."""
        return self.placement if self.repeats == 1 else f"{self.placement}_{self.repeats}"


# What sdft_demo_placement="auto" chooses from; of equals the first.
SHOWINGS = (Showing("template"), Showing("turns"), Showing("turns", 2))


def showings(placement: Literal["auto"] | Placement, repeats: int) -> tuple[Showing, ...]:
    """What a config leaves to choose from."""
    return SHOWINGS if placement == "auto" else (Showing(placement, repeats),)


# The two fields of a template. All other text stays as it is, braces too, as in JSON or LaTeX.
_FIELD = re.compile(r"\{(demonstration|prompt)\}")

# After the paper's template (section 3): the prompt, the demonstration as an example of an answer,
# and the request for an answer of one's own with the thinking that leads to it.
DEMONSTRATION_TEMPLATE = """{prompt}

One good response to the above, as an example:
{demonstration}

Now respond to it yourself, in your own words and with your own thinking process."""


def split_row(row: Mapping[str, Any]) -> tuple[list[Message], str]:
    """The prompt's messages and the demonstration of a `conversations` row.

    The demonstration is the row's `demonstration`, else its last assistant message. A final
    assistant message is never part of the prompt.

    Raises:
        ValueError: The row has no messages, no demonstration, or a prompt that does not end with a
            user turn.
    """
    messages, answer = prompt_and_answer(row)
    demonstration = row.get("demonstration") or answer
    if not demonstration:
        raise ValueError(
            "demonstration: is missing, and the last message is not from the assistant; add an "
            "answer as last message or in 'demonstration'"
        )
    if not messages or messages[-1]["role"] != "user":
        raise ValueError(
            "messages: the turn before the answer must be from the user, so that the student has a "
            "prompt to answer"
        )
    return messages, demonstration


def split_right(row: Mapping[str, Any]) -> tuple[list[Message], str]:
    """The prompt's messages and the right answer of a row for SDFT: its `gold_response`, else its
    last assistant message; where it has neither, its demonstration.

    Raises:
        ValueError: As `split_row`.
    """
    prompt, demonstration = split_row(row)
    return prompt, row.get("gold_response") or prompt_and_answer(row)[1] or demonstration


def teacher_messages(
    prompt: Sequence[Message],
    demonstration: str,
    *,
    template: str | None = None,
    showing: Showing = SHOWINGS[0],
) -> list[Message]:
    """What the teacher reads: `prompt` with the demonstration in it; system turn and history stay.

    Args:
        prompt: Messages that end with a user turn.
        template: Holds `{demonstration}` and may hold `{prompt}`, else the last user turn is put
            before it; becomes the last user turn. Other braces are text. None for the built-in one.
        showing: As turns, the last user turn and the demonstration as its answer stand before the
            last user turn instead. Small models need that to learn from it in context.
    """
    *history, question = prompt
    if showing.placement == "turns":
        shown: list[Message] = [question, {"role": "assistant", "content": demonstration}]
        return [*history, *shown * showing.repeats, question]
    text = template or DEMONSTRATION_TEMPLATE
    if "prompt" not in template_fields(text):
        text = "{prompt}\n\n" + text
    values = {"prompt": question["content"], "demonstration": demonstration}
    filled = _FIELD.sub(lambda field: values[field[1]], text)
    return [*history, {**question, "content": filled}]


def demonstration_turns(prompt: Sequence[Message], repeats: int) -> set[int]:
    """Where the demonstrations are in the teacher's messages when they are placed as turns."""
    return {len(prompt) + 2 * number for number in range(repeats)}


def template_fields(template: str) -> set[str]:
    """Those of `demonstration` and `prompt` that the template fills in."""
    return set(_FIELD.findall(template))
