"""What is followed while a model trains, with every loss, without a trace in the training."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from openweights.errors import ConfigurationError, DatasetError
from openweights.jobs.unsloth.training import hold_out, train
from tests.rounding import assert_sums_equal, rounding, terms_of

TALK = [
    {
        "messages": [
            {"role": "user", "content": f"What is {i}?"},
            {"role": "assistant", "content": f"That is {i}."},
        ]
    }
    for i in range(6)
]
PAIRS = [
    {
        "prompt": row["messages"][:1],
        "chosen": row["messages"][1:],
        "rejected": [{"role": "assistant", "content": "No."}],
    }
    for row in TALK
]
TAGGED = [
    {
        "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": [{"text": "Bye", "tag": "greeting"}]},
        ]
    }
]
ASKED = [{"question": "What is 1?", "choices": ["1", "nothing"], "answer": 0}]
OWN: dict[str, dict[str, Any]] = {
    "sft": {"holdout_fraction": 0.3},
    "sdft": {"sdft_max_new_tokens": 8, "max_seq_length": 256, "sdft_gate": "off"},
    "dpo": {"holdout_fraction": 0.3, "beta": 0.3},
    "orpo": {"holdout_fraction": 0.3, "beta": 0.3},
    "grpo": {
        "grpo_reward_function": "caps_spanish",
        "grpo_num_generations": 2,
        "grpo_max_completion_length": 8,
    },
}


def write(path: Path, rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def params(tiny: Path, folder: Path, loss: str) -> dict[str, Any]:
    rows = PAIRS if loss in ("dpo", "orpo") else TALK
    return {
        "model": str(tiny),
        "training_file": write(folder / "train.jsonl", rows),
        "loss": loss,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "lora_dropout": 0.1,
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        **OWN[loss],
    }


def tracking(folder: Path) -> dict[str, Any]:
    talk = write(folder / "talk.jsonl", TALK[:2])
    return {
        "logp_callback_datasets": {"talk": talk, "a/b": write(folder / "tagged.jsonl", TAGGED)},
        "eval_every_n_steps": 2,
        "kl_to_base_steps": 2,
        "sampling_callbacks": [{"dataset": talk, "eval_steps": "log", "max_tokens": 4}],
        "mcq_callbacks": [{"dataset": write(folder / "asked.jsonl", ASKED), "eval_steps": 3}],
        "report_to": ["tensorboard"],
    }


def run(folder: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    folder.mkdir()
    monkeypatch.chdir(folder)
    trainer = train(config)
    lines = Path("uploads/events.jsonl").read_text().splitlines()
    return trainer, [json.loads(line) for line in lines]


def rows_at(event: dict[str, Any]) -> list[dict[str, Any]]:
    assert event["path"].endswith(Path(event["file"]).name)
    return [json.loads(line) for line in Path(event["file"]).read_text().splitlines()]


def of(events: list[dict[str, Any]], kind: str, tag: str) -> list[dict[str, Any]]:
    return [e for e in events if e.get("type") == kind and e.get("tag") == tag]


def check_log_probs(events: list[dict[str, Any]]) -> None:
    talk = of(events, "logprobs", "talk")
    assert [e["step"] for e in talk] == [0, 2, 3]
    assert set(talk[0]) == {"type", "talk", "step", "tag", "path", "file"}
    values = [
        value
        for row in rows_at(talk[2])
        for value, answer in zip(row["logprobs"], row["is_answer"], strict=True)
        if answer
    ]
    assert talk[2]["talk"] == pytest.approx(-sum(values) / len(values), rel=1e-6)
    assert [e["step"] for e in of(events, "logprobs_blockwise", "a/b")] == [0, 2, 3]
    blocks = of(events, "logprob_block", "greeting")
    assert [(e["source"], e["step"]) for e in blocks] == [("a/b", step) for step in (0, 2, 3)]
    assert all(len(e["logprobs"]) > 0 for e in blocks)


def check_record(events: list[dict[str, Any]], loss: str) -> None:
    (record,) = [e["record"] for e in events if e.get("type") == "reproducibility"]
    kept = json.loads(Path("uploads/reproducibility.json").read_text())
    assert kept == {**record, "steps": 3}
    assert kept["config"]["loss"] == loss and kept["seed"] == 3407 and kept["devices"] == 1
    assert {"python", "torch", "trl", "peft"} <= set(kept["versions"]) and kept["device"]
    for field in ("training_file", "logp_callback_datasets['a/b']", "mcq_callbacks[0].dataset"):
        content = Path(kept["data"][field]["file"]).read_bytes()
        assert kept["data"][field]["sha256"] == hashlib.sha256(content).hexdigest()


def check_adapter(tiny: Path, model: Any) -> None:
    """It moved, and plain peft makes the same of it."""
    ids = torch.tensor([[20, 30, 40, 50]])
    base = AutoModelForCausalLM.from_pretrained(tiny)
    with torch.no_grad():
        before, own = base(ids).logits, model.eval()(ids).logits
        after = PeftModel.from_pretrained(base, "uploads/adapter")(ids).logits
    assert_sums_equal(after, own, terms_of(model, ids.numel()))
    assert float((before - own).abs().max()) > 1e-3


@pytest.mark.parametrize("loss", OWN)
def test_with_every_loss(
    loss: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = params(tiny, tmp_path, loss)
    trainer, events = run(tmp_path / "tracked", {**plain, **tracking(tmp_path)}, monkeypatch)
    losses = [e["loss"] for e in events if "loss" in e]
    assert len(losses) == 3 and all(map(math.isfinite, losses))
    check_log_probs(events)
    assert [e["step"] for e in of(events, "samples", "samples")] == [0, 1, 2, 3]
    everyday = [e for e in events if e.get("tag") == "everyday"]
    assert [e["step"] for e in everyday] == [0, 2, 3]
    assert abs(everyday[0]["kl_to_base"]) < 1e-6 < everyday[2]["kl_to_base"]
    asked = of(events, "multiple_choice", "multiple_choice")
    assert [e["step"] for e in asked] == [0, 3] and asked[0]["questions"] == 1
    assert asked[0]["probability"] == rows_at(asked[0])[0]["probabilities"][0]
    check_record(events, loss)
    board = EventAccumulator("uploads/tensorboard").Reload()
    assert [event.value for event in board.Scalars("train/loss")] == pytest.approx(
        losses, rel=rounding(1)
    )
    check_adapter(tiny, trainer.model)
    _, alone = run(tmp_path / "alone", plain, monkeypatch)
    assert [e["loss"] for e in alone if "loss" in e] == losses, "measuring leaves no trace"


def test_a_package_that_is_not_there_is_told_before_training(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert importlib.util.find_spec("wandb") is None, "the test is about its absence"
    plain = params(tiny, tmp_path, "sft")
    with pytest.raises(ConfigurationError, match="report_to: the package wandb is not installed"):
        run(tmp_path / "run", {**plain, "report_to": ["wandb"], "model": "/none"}, monkeypatch)


def test_held_out_rows_are_those_of_the_seed() -> None:
    rows = [{"n": n} for n in range(20)]
    train_rows, held = hold_out(rows, 0.25, 7)
    assert len(held) == 5 and sorted(r["n"] for r in train_rows + held) == list(range(20))
    assert [r["n"] for r in held] == sorted(r["n"] for r in held)
    assert hold_out(rows, 0.25, 7) == (train_rows, held) != hold_out(rows, 0.25, 8)
    assert len(hold_out(rows[:2], 0.01, 0)[1]) == 1, "at least one"
    with pytest.raises(DatasetError, match="leaves none to train on"):
        hold_out(rows[:1], 0.5, 0)
