"""docs/measures.md says what each measure means that a run logs, and of no others."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from openweights.client.watching.metrics import is_known, metric_rows, series
from openweights.jobs.unsloth.training import train
from openweights.types import EventRecord
from tests.tiny_model import make_tiny_model

PAGE = (Path(__file__).parents[3] / "docs/measures.md").read_text(encoding="utf-8")
TALKS = [
    {
        "messages": [
            {"role": "user", "content": f"What is {n}?"},
            {"role": "assistant", "content": [{"type": "text", "text": f"It is {n}.", "tag": "t"}]},
        ]
    }
    for n in range(8)
]
PAIRS = [
    {
        "prompt": [{"role": "user", "content": f"{n}?"}],
        "chosen": [{"role": "assistant", "content": "Yes."}],
        "rejected": [{"role": "assistant", "content": "No, no."}],
    }
    for n in range(8)
]
CHOICES = [{"question": f"{n}?", "choices": ["yes", "no"], "answer": 0} for n in range(3)]
# With names of one's own, or of two datasets with blocks of one tag.
ELSEWHERE = {"<type>/<name>", "logprob_block/mean of <dataset>"}


def listed() -> list[str]:
    """The names in the first column of every table."""
    cells = re.findall(r"^\| (`.*?) \|", PAGE, re.M)
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


def pattern(name: str) -> re.Pattern[str]:
    """A listed name as it is logged, with any tag."""
    exact = "".join(
        r"[\w.-]+" if part.startswith("<") else re.escape(part)
        for part in re.split(r"(<[^>]+>)", name)
    )
    return re.compile(rf"(?:eval_)?{exact}(?:\[.*\])?")


def file(folder: Path, name: str, rows: list[dict[str, Any]]) -> str:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def params(loss: str, model: Path, folder: Path) -> dict[str, Any]:
    talks = file(folder, "talks", TALKS)
    pairs = file(folder, "pairs", PAIRS)
    own: dict[str, dict[str, Any]] = {
        "sft": {
            "logp_callback_datasets": {"followed": talks},
            "mcq_callbacks": [{"dataset": file(folder, "choices", CHOICES)}],
        },
        "sdft": {
            "sdft_max_new_tokens": 6,
            "sdft_gate": "warn",
            "sdft_gate_rows": 2,
            "sdft_gate_steps": 2,
            "sdft_gate_reward": "rouge_l",
        },
        "grpo": {
            "grpo_reward_function": {"rouge_l": 1.0, "caps_spanish": 0.1},
            "grpo_num_generations": 2,
            "grpo_max_completion_length": 6,
            "beta": 0.1,
        },
    }
    data = pairs if loss in ("dpo", "orpo") else talks
    return {
        "model": str(model),
        "training_file": data,
        "test_file": None if loss == "grpo" else data,
        "loss": loss,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "max_seq_length": 256,
        **own.get(loss, {}),
    }


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Of each loss the names of what a run has measured."""
    folder = tmp_path_factory.mktemp("measures")
    model = make_tiny_model(folder / "tiny")
    found: dict[str, set[str]] = {}
    for loss in ("sft", "sdft", "grpo", "dpo", "orpo"):
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setenv("OPENWEIGHTS_HOME", str(folder / "home"))
            (folder / loss).mkdir()
            monkeypatch.chdir(folder / loss)
            train(params(loss, model, folder))
        lines = (folder / loss / "uploads/events.jsonl").read_text().splitlines()
        now = datetime.now(UTC)
        events = [EventRecord(at, 1, json.loads(line), now) for at, line in enumerate(lines)]
        found[loss] = set(series(metric_rows(events)))
    return found


def test_what_a_run_logs_is_listed(logged: dict[str, set[str]]) -> None:
    known = [pattern(name) for name in listed() if name not in ELSEWHERE]
    assert {
        loss: unknown
        for loss, names in logged.items()
        if (
            unknown := [name for name in sorted(names) if not any(k.fullmatch(name) for k in known)]
        )
    } == {}


def test_what_is_listed_is_logged(logged: dict[str, set[str]]) -> None:
    names = set[str]().union(*logged.values())
    idle = [one for one in listed() if not any(pattern(one).fullmatch(name) for name in names)]
    assert {*idle, "<type>/<name>"} == ELSEWHERE


def test_a_name_that_a_parameter_could_have_is_known() -> None:
    """So that a parameter's column is never called as a measure's."""
    plain = [name for name in listed() if "/" not in name]
    examples = [re.sub(r"<[^>]+>", "loss", name) for name in plain]
    assert len(examples) > 20 and [name for name in examples if not is_known(name)] == []
    assert not is_known("seed") and not is_known("max_steps")


def test_the_names_of_issues_are_found() -> None:
    known = [pattern(name) for name in listed()]
    for name in ("teacher_drift", "agreement/2-3", "kl_to_base[everyday]", "eval_loss"):
        assert any(one.fullmatch(name) for one in known)
    assert not any(one.fullmatch("no measure") for one in known)
