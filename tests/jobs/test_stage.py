"""What a job says that it does: how far it is, and not too often."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from openweights import progress
from openweights.client.questions import Question
from openweights.generation.choose import generation_engine
from openweights.generation.params import GenerationRequest, SamplingParams
from openweights.jobs.stage import CountedStage, counted_stage
from openweights.jobs.unsloth.tracking.multiple_choice import ask, choices_in
from openweights.models.log_probs import all_log_probs
from tests.tiny_model import make_tiny_model


def test_it_is_told_at_once_and_then_when_time_has_passed() -> None:
    events: list[dict[str, Any]] = []
    now = 0.0
    told = CountedStage(
        events.append, "teacher gate", of=400, unit="answers", step=4, clock=lambda: now
    )
    for _ in range(400):  # one in half a second
        now += 0.5
        told.add(1)
    assert events[:2] == [
        {"type": "stage", "doing": "teacher gate", "step": 4, "part": part}
        for part in ("0/400 answers", "4/400 answers")
    ]
    # 2 s apart at first, then a tenth of the time that it takes, and never more than 10 s.
    done = [int(event["part"].partition("/")[0]) for event in events]
    gaps = [b - a for a, b in zip(done, done[1:], strict=False)]
    assert gaps[0] == 4 and max(gaps) == 20 and gaps == sorted(gaps) and len(events) < 40


def test_what_nobody_has_counted_is_told_without() -> None:
    events: list[dict[str, Any]] = []
    with counted_stage(events.append, "loading"):
        progress.advanced(3)
    assert events == [{"type": "stage", "doing": "loading"}]


def counted(act: Callable[[], object]) -> int:
    counts: list[int] = []
    with progress.counted_by(counts.append):
        act()
    progress.advanced(1)  # nobody counts any more
    return sum(counts)


@pytest.mark.parametrize("n", [1, 2])
def test_answers_rows_and_choices_are_counted_once(tmp_path: Path, n: int) -> None:
    folder = make_tiny_model(tmp_path)
    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    engine = generation_engine("transformers", model, tokenizer)
    params = SamplingParams(max_new_tokens=3, n=n)
    requests = [GenerationRequest([5, 6, 7], params) for _ in range(5)]
    assert counted(lambda: engine.generate(requests)) == 5 * n
    rows = [[5, 6, 7]] * 7
    assert counted(lambda: list(all_log_probs(model, rows, 0, batch_size=3))) == 7
    questions = [Question("Is it?", ("Yes", "No", "Maybe"), 0), Question("Why?", ("So", "No"), 1)]
    assert choices_in(questions) == 5
    assert counted(lambda: ask(model, tokenizer, questions, batch_size=2)) == 5
