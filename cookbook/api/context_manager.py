"""Serves a model for as long as a block lasts, and asks it with OpenAI's own client.

python cookbook/api/context_manager.py [--model NAME|FOLDER|ftjob-…]
"""

from __future__ import annotations

import asyncio
from typing import Any

from cookbook.models import Choice, as_command, choose
from openweights import OpenWeights

QUESTIONS = ("What is the capital of France?", "Name a colour.", "Is the sun a star?")


def params(chosen: Choice) -> dict[str, Any]:
    """What `api.deploy` is told."""
    return {"model": chosen.model, "max_model_len": 1024, "requires_vram_gb": chosen.vram_gb}


def messages(question: str) -> Any:
    """A conversation of one question."""
    return [{"role": "user", "content": question}]


def stream(ow: OpenWeights, chosen: Choice) -> None:
    """One answer, as it comes."""
    with ow.api.deploy(**params(chosen)) as client:
        chunks = client.chat.completions.create(
            model=chosen.model, messages=messages(QUESTIONS[0]), max_tokens=30, stream=True
        )
        for chunk in chunks:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        print()


async def many_at_once(ow: OpenWeights, chosen: Choice) -> None:
    """Several answers side by side, no more at a time than the server has rows for."""
    api = ow.api.deploy(**params(chosen))
    async with api as client:

        async def ask(question: str) -> str:
            async with api.sem:
                answer = await client.chat.completions.create(
                    model=chosen.model, messages=messages(question), max_tokens=30, temperature=0
                )
            return str(answer.choices[0].message.content)

        answers = await asyncio.gather(*map(ask, QUESTIONS))
    for question, answer in zip(QUESTIONS, answers, strict=True):
        print(f"{question} -> {' '.join(answer.split())}")


def main() -> None:
    """Both ways to use a deployment; it has ended when the block has."""
    ow = OpenWeights()
    chosen = choose(ow, __doc__)
    stream(ow, chosen)
    asyncio.run(many_at_once(ow, chosen))


if __name__ == "__main__":
    as_command(main)
