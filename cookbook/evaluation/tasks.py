"""Tasks for inspect-ai, which `inspect_eval.py` takes along."""

from __future__ import annotations

from inspect_ai import Task, task  # pyright: ignore[reportMissingImports]
from inspect_ai.dataset import Sample  # pyright: ignore[reportMissingImports]
from inspect_ai.scorer import includes  # pyright: ignore[reportMissingImports]
from inspect_ai.solver import generate, system_message  # pyright: ignore[reportMissingImports]

CAPITALS = {"France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Norway": "Oslo"}


@task
def capitals() -> Task:
    """Whether an answer names the capital."""
    questions = [
        Sample(input=f"What is the capital of {country}?", target=city)
        for country, city in CAPITALS.items()
    ]
    solver = [system_message("Answer in one sentence."), generate(max_tokens=40, temperature=0)]
    return Task(dataset=questions, solver=solver, scorer=includes())
