"""`is_peft=False`: all weights are trained, and the result is a whole model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from openweights.errors import ConfigError
from openweights.jobs.unsloth.training import train
from openweights.jobs.unsloth.validate import training_config
from openweights.models.load import load_model
from openweights.models.weights import WeightCopy
from tests.jobs.unsloth.test_sdft import ROWS, load
from tests.jobs.unsloth.test_teacher import averages_of

SDFT = {"loss": "sdft", "sdft_gate": "off", "sdft_max_new_tokens": 6}


def run(model: Path, folder: Path, **changes: Any) -> Any:
    """A job in the current folder."""
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    params = {
        "model": str(model),
        "training_file": str(data),
        "is_peft": False,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-3,
        "warmup_steps": 0,
        "max_seq_length": 256,
    }
    return train({**params, **changes})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("own", [{"loss": "sft"}, SDFT], ids=["sft", "sdft"])
def test_a_whole_model_is_trained_left_and_trained_on(
    own: dict[str, Any], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = run(tiny, tmp_path, **own)
    result = tmp_path / "uploads" / "model"
    assert not (tmp_path / "uploads" / "adapter").exists()
    before, after = weights(tiny), weights(result)
    assert all(not torch.equal(before[name], after[name]) for name in before), "all of it moved"
    assert before.keys() == after.keys()
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(after[name], parameter), "what was trained is what is left"
    assert AutoTokenizer.from_pretrained(result).chat_template
    card = (result / "README.md").read_text()
    assert "all weights of it" in card and "library_name: transformers" in card
    # It is a model like any other: a LoRA goes on from it.
    again = tmp_path / "again"
    again.mkdir()
    monkeypatch.chdir(again)
    run(result, again, loss="sft", is_peft=True)
    assert (again / "uploads" / "adapter" / "adapter_config.json").is_file()


def test_a_resumed_run_ends_as_the_whole_one(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = []
    for name, parts in (("whole", (4,)), ("parts", (2, 4))):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        for steps in parts:
            trainer = run(
                tiny, tmp_path, **SDFT, max_steps=steps, save_steps=2, keep_checkpoints=2,
                lr_scheduler_type="constant",
            )  # fmt: skip
        ends.append({"teacher": averages_of(trainer.teacher), **weights(Path("uploads/model"))})
    whole, parts = ends
    for name, average in whole.pop("teacher").items():
        assert torch.equal(average, parts["teacher"][name]), name
    for name in whole:
        assert torch.equal(whole[name], parts[name]), name


def test_an_adapter_is_not_trained_as_a_whole(tiny: Path, tmp_path: Path) -> None:
    load(tiny).save_pretrained(tmp_path / "adapter")
    data = tmp_path / "rows.jsonl"
    data.touch()
    settings = training_config(
        {"model": str(tiny), "training_file": str(data), "loss": "sft", "is_peft": False}
    )
    with pytest.raises(ConfigError, match="is_peft: False trains all weights of a whole model"):
        load_model(settings, adapter=tmp_path / "adapter")


def test_a_copy_acts_alike_by_storage_and_tensor_by_tensor(tiny: Path) -> None:
    """The second is for a copy on the host of a model on a GPU."""
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    copy = WeightCopy(model)
    kept = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    own = [p.detach().clone() for p in model.parameters()]
    places = [p.data_ptr() for p in model.parameters()]
    for exchange in (copy._by_storage, copy._by_copy):
        with exchange():
            assert all(map(torch.equal, model.parameters(), kept))
            moved = [p.data_ptr() for p in model.parameters()] != places
            assert moved == (exchange == copy._by_storage)
        assert all(map(torch.equal, model.parameters(), own))
        assert [p.data_ptr() for p in model.parameters()] == places
