"""What is measured while SDFT trains: the gate again, the distance to the base, and agreement along
the completion. None of it changes what is trained.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from openweights.client.watching.metrics import metric_rows
from openweights.client.watching.panels import metric_panels
from openweights.jobs.unsloth.config.demonstrations import SHOWINGS
from openweights.jobs.unsloth.distillation.following import EVERYDAY_PROMPTS, DistanceToBase
from openweights.jobs.unsloth.sdft import SDFTTrainer, _range_name, sdft_train
from openweights.types import EventRecord
from tests.jobs.unsloth.distillation.test_gate import ROWS
from tests.jobs.unsloth.test_sdft import config, load
from tests.tiny_model import make_tiny_model, make_tokenizer

Events = list[dict[str, Any]]


def trained(tmp_path: Path, **changes: Any) -> tuple[SDFTTrainer, Events]:
    folder = tmp_path / "model"
    if not folder.exists():
        make_tiny_model(folder)
    events: Events = []
    made = config(
        tmp_path,
        **{
            "sdft_gate": "warn",
            "sdft_gate_rows": 4,
            "sdft_gate_steps": 2,
            "max_steps": 3,
            "learning_rate": 3e-2,
            **changes,
        },
    )
    trainer = sdft_train(made, load(folder), make_tokenizer(), ROWS, None, log_event=events.append)
    return trainer, events


def of_type(events: Events, kind: str) -> Events:
    return [event for event in events if event.get("type") == kind]


def teacher_answers(event: dict[str, Any]) -> list[str]:
    name = event["placement"] if event["repeats"] == 1 else f"turns_{event['repeats']}"
    return [example[name] for example in event["examples"]]


def test_the_gate_is_asked_again_and_at_the_end(tmp_path: Path) -> None:
    """A frozen teacher answers to the end as it did; the student does not."""
    _, events = trained(tmp_path, sdft_ema_alpha=0.0)
    gates = of_type(events, "teacher_gate")
    assert [gate["step"] for gate in gates] == [0, 2, 3]
    first, _, last = gates
    assert teacher_answers(last) == teacher_answers(first)
    assert [e["prompt"] for e in last["examples"]] == [e["prompt"] for e in first["examples"]]
    assert [e["student"] for e in last["examples"]] != [e["student"] for e in first["examples"]]
    assert {"student", "teacher", "same_format", "passed"} < last.keys()


def test_what_is_measured_says_how_much_there_is(tmp_path: Path) -> None:
    _, events = trained(tmp_path)
    stages = [(e["doing"], e.get("step"), e.get("part")) for e in of_type(events, "stage")]
    readers = 1 + len(SHOWINGS)
    assert stages[:3] == [
        ("teacher gate", None, f"0/{4 * readers} answers"),
        ("preparing the rows", None, None),
        ("answering everyday prompts as the base", None, "0/12 answers"),
    ]
    gates = [stage for stage in stages[3:] if stage[0] == "teacher gate"]
    assert gates == [("teacher gate", step, "0/8 answers") for step in (2, 3)]


def test_the_teacher_answers_with_its_own_weights(tmp_path: Path) -> None:
    """The control: one that is the student at every step does not answer as at first."""
    _, events = trained(tmp_path, sdft_ema_alpha=1.0)
    first, _, last = of_type(events, "teacher_gate")
    assert teacher_answers(last) != teacher_answers(first)


def test_a_reward_that_fails_later_costs_its_measurement_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, calls = tmp_path / "mine.py", tmp_path / "calls"
    file.write_text(
        "def once(completions):\n"
        f"    with open({str(calls)!r}, 'a+') as file:\n"
        "        file.write('x'); file.seek(0)\n"
        "        late = len(file.read()) > 2\n"
        "    return [None if late else 0.5 for _ in completions]\n"
    )
    changes = {"sdft_gate_reward": f"{file}:once", "sdft_demo_placement": "template"}
    trainer, events = trained(tmp_path, **changes)
    assert trainer.state.global_step == 3
    assert [gate["step"] for gate in of_type(events, "teacher_gate")] == [0]
    assert "no teacher gate at step 2: sdft_gate_reward: once could score none" in caplog.text


def test_following_changes_nothing_of_the_training(tmp_path: Path) -> None:
    often, rarely = (trained(tmp_path, sdft_gate_steps=steps)[0] for steps in (1, 1000))
    for (name, one), other in zip(
        often.model.named_parameters(), rarely.model.parameters(), strict=True
    ):
        assert torch.equal(one, other), name


def test_distance_to_base_equals_the_definition(tmp_path: Path) -> None:
    """The base's own greedy answers, scored by plain forwards in float64."""
    trainer, events = trained(tmp_path)
    everyday = [event for event in events if event.get("tag") == "everyday"]
    assert [event["step"] for event in everyday] == [0, 2, 3]
    assert abs(everyday[0]["kl_to_base"]) < 1e-6 < everyday[-1]["kl_to_base"]
    batch = DistanceToBase(trainer.engine, make_tokenizer(), events.append, 1)._batch
    assert len(batch["labels"]) == len(EVERYDAY_PROMPTS)
    model: Any = trainer.model.double().eval()
    kl = [
        value
        for row in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True)
        for value in plain_kl(model, *row)
    ]
    # The measurement is in float32, of logits below 10.
    assert everyday[-1]["kl_to_base"] == pytest.approx(sum(kl) / len(kl), abs=1e-4)
    assert sum(kl) / len(kl) > 1e-2


@torch.no_grad()
def plain_kl(model: Any, ids: Tensor, labels: Tensor, mask: Tensor) -> list[float]:
    """KL(base || model) of each label of a row."""
    length = int(mask.sum())
    ids, scored = ids[None, :length], labels[1:length] != -100
    own = model(input_ids=ids).logits[0, :-1][scored].log_softmax(-1)
    with model.disable_adapter():
        base = model(input_ids=ids).logits[0, :-1][scored].log_softmax(-1)
    return (base.exp() * (base - own)).sum(-1).tolist()


def range_of(place: int) -> str:
    if place < 2:
        return str(place)
    start = next(2**power for power in range(1, 9) if place < 2 ** (power + 1))
    return f"{start}-{2 * start - 1}"


@settings(max_examples=50)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 20)), min_size=1, max_size=6), st.data()
)
def test_agreement_is_counted_by_place(rows: list[tuple[int, int]], data: st.DataObject) -> None:
    """Rows of a prompt and a completion each; places count from 0 in the completion."""
    skipped = data.draw(st.integers(0, 2))
    width = max(prompt + completion for prompt, completion in rows)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    expected: dict[str, list[float]] = {}
    flat: list[float] = []
    for row, (prompt, completion) in enumerate(rows):
        for place in range(completion):
            mask[row, prompt + place] = True
            agreed = float(data.draw(st.booleans()))
            flat.append(agreed)
            at = place + skipped
            expected.setdefault(range_of(at), []).append(agreed)
    holder: Any = SDFTTrainer.__new__(SDFTTrainer)
    holder._by_place, holder.skip_tokens = None, skipped
    holder._add_places(mask, None, torch.tensor(flat))
    agreed, tokens = holder._by_place.tolist()
    counted = {_range_name(p): (agreed[p], n) for p, n in enumerate(tokens) if n}
    assert counted == {name: (sum(own), len(own)) for name, own in expected.items()}


def test_all_of_it_is_in_the_table_and_the_picture(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def letters(completions): return [sum(map(ord, c)) for c in completions]\n")
    _, events = trained(tmp_path, max_steps=10, sdft_gate_reward=f"{file}:letters")
    [agreement] = of_type(events, "agreement")
    assert agreement["step"] == 10 and 0 <= agreement["0"] <= 1 and "4-7" in agreement
    records = [
        EventRecord(id=n, run_id=1, data=data, created_at=datetime.now(UTC))
        for n, data in enumerate(events)
    ]
    panels = metric_panels(metric_rows(records))
    assert {line.label for line in panels["teacher gate"]} >= {"student", "teacher"}
    assert [line.label for line in panels["kl_to_base"]] == ["everyday"]
