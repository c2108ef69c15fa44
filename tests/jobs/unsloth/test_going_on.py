"""Training that goes on from an adapter: it begins at what the first job left, compares with it,
and leaves a result that is complete by itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from openweights import OpenWeights
from openweights.errors import ConfigError
from openweights.jobs.unsloth.training import train
from openweights.jobs.unsloth.validate import training_config
from openweights.models.hub import merge
from openweights.models.load import load_trained
from openweights.models.smollm2 import get_model
from tests.jobs.unsloth.lost_runs import LoseAt, Lost

SHAPE = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


TALKS = [
    {"messages": [user(f"What is {i}?"), assistant(f"It is {i}, of course.")]} for i in range(8)
]
PAIRS = [
    {"prompt": [user(f"{i}?")], "chosen": [assistant("Yes.")], "rejected": [assistant("No, no.")]}
    for i in range(8)
]
LOSSES: dict[str, dict[str, Any]] = {
    "sft": {},
    "sdft": {"sdft_gate": "off", "sdft_max_new_tokens": 6, "sdft_demo_placement": "template"},
    "dpo": {},
    "orpo": {},
    "grpo": {
        "grpo_max_completion_length": 6,
        "grpo_num_generations": 2,
        "beta": 0.2,
    },
}


def params(model: str, folder: Path, loss: str, **changes: Any) -> dict[str, Any]:
    rows = PAIRS if loss in ("dpo", "orpo") else TALKS
    data = folder / f"{loss}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    reward = folder / "reward.py"
    reward.write_text("def score(completions):\n    return [len(set(c)) for c in completions]\n")
    if loss == "grpo":
        changes["grpo_reward_function"] = f"{reward}:score"
    return {
        "model": model,
        "training_file": str(data),
        "loss": loss,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": 2e-2,
        "warmup_steps": 0,
        "max_seq_length": 256,
        "max_steps": 3,
        **LOSSES[loss],
        **changes,
    }


def run(config: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Train in a folder of its own; returns the adapter."""
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    train(config)
    return folder / "uploads" / "adapter"


@pytest.fixture(scope="module")
def first(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter of a first job."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("first")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("OPENWEIGHTS_HOME", str(folder / "home"))
        return run(params(str(tiny), folder, "sft", **SHAPE), folder / "run", monkeypatch)


def events(adapter: Path) -> list[dict[str, Any]]:
    lines = (adapter.parent / "events.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def at_first_step(adapter: Path) -> dict[str, Any]:
    return next(event for event in events(adapter) if "loss" in event)


def weights(adapter: Path) -> dict[str, Tensor]:
    return load_file(adapter / "adapter_model.safetensors")


def merged(adapter: Path, folder: Path) -> str:
    """The base with the adapter merged into it, in float32."""
    base, tokenizer = load_trained(str(adapter))
    base.merge_and_unload().save_pretrained(folder)  # type: ignore[operator]
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("loss", LOSSES)
def test_begins_where_the_first_job_ended(
    loss: str, first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a fresh adapter on the merged model does, whose reference is that model, too."""
    whole = merged(first, tmp_path / "merged")
    config = params(str(first), tmp_path, loss, **SHAPE, max_steps=2)
    result = run(config, tmp_path / "on", monkeypatch)
    fresh = run({**config, "model": whole}, tmp_path / "fresh", monkeypatch)
    ours, theirs = at_first_step(result), at_first_step(fresh)
    # float32 through two layers: merged or beside one another, products are summed in other orders.
    assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
    for name in ("rewards/margins", "kl", "divergence", "logps/chosen"):
        assert ours.get(name) == pytest.approx(theirs.get(name), abs=1e-3), name
    base = run({**config, "model": str(model_of(first))}, tmp_path / "base", monkeypatch)
    assert abs(at_first_step(base)["loss"] - ours["loss"]) > 1e-3 or loss in ("dpo", "grpo")
    # The result is one adapter on the base model, and it holds what the first had learned.
    assert weights(result).keys() == weights(first).keys()
    assert all(not torch.equal(a, weights(first)[n]) for n, a in weights(result).items())
    [moved] = [e for e in events(result) if e.get("type") == "adapter_moved"]
    distance = sum(((a - weights(first)[n]) ** 2).sum() for n, a in weights(result).items()) ** 0.5
    assert moved["weight_difference_norm"] == pytest.approx(float(distance), rel=1e-4)


def model_of(adapter: Path) -> Path:
    return Path(
        json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    )


def test_another_shape_is_refused(
    tiny: Path, first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for change, words in (
        ({"r": 16}, "r: is 16, but the adapter .* has 4; give r=4 to go on from it"),
        ({"lora_alpha": 4}, "lora_alpha: is 4, but the adapter"),
        ({"use_rslora": False}, "use_rslora: is False, but"),
        ({"target_modules": ["q_proj"]}, r"target_modules: is \['q_proj'\], but the adapter"),
        ({"engine": "unsloth"}, "engine"),
    ):
        with pytest.raises((ConfigError, RuntimeError), match=words):
            train(params(str(first), tmp_path, "sft", **{**SHAPE, **change}))
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')
    with pytest.raises(ConfigError, match="is no LoRA adapter that names its base"):
        train(params(str(broken), tmp_path, "sft"))


@pytest.mark.usefixtures("warm_jobs")
def test_by_job_and_checkpoint(
    tiny: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the worker: two jobs in a row, and one from a checkpoint that the first has kept."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    ow = OpenWeights()
    steps = {"max_steps": 5, "save_steps": 1, "keep_checkpoints": 2, "packing": False}
    one = ow.fine_tuning.create(**params(str(tiny), tmp_path, "sft", **SHAPE, **steps))
    # The shape is that of the first job, which need not be said again, nor that it comes first.
    two = ow.fine_tuning.create(**params(one.id, tmp_path, "dpo", max_steps=1))
    assert (two.after, two.status) == ((one.id,), "pending")
    assert one.wait(timeout=240).status == "completed", "".join(one.logs())
    kept = ow.files.list("checkpoint")
    assert len(kept) == 2, "the last two but for that of the last step, which is the result"
    with pytest.raises(ConfigError, match="has no checkpoint-2; kept: checkpoint-3, checkpoint-4"):
        ow.fine_tuning.create(**params(f"{one.id}/checkpoint-2", tmp_path, "sft"))
    with pytest.raises(ConfigError, match="the store has no job ftjob-000000000000"):
        ow.fine_tuning.create(**params("ftjob-000000000000", tmp_path, "sft"))
    three = ow.fine_tuning.create(
        **params(f"{one.id}/checkpoint-4", tmp_path, "sft", max_steps=1, packing=False)
    )
    assert two.wait(timeout=240).status == "completed", "".join(two.logs())
    assert three.wait(timeout=240).status == "completed", "".join(three.logs())
    assert two.params["validated_params"]["r"] == 4
    margins = [e.data["rewards/margins"] for e in two.events() if "rewards/margins" in e.data]
    assert margins == [pytest.approx(0, abs=1e-5)], "its reference is the first job's model"
    losses = {e.data["step"]: e.data["loss"] for e in one.events() if "loss" in e.data}
    again = [e.data["loss"] for e in three.events() if "loss" in e.data]
    assert min(losses.values()) - 0.5 < again[0] < losses[1] - 0.05
    two.download(tmp_path / "two")
    two_config = training_config(two.params["validated_params"])
    model = AutoModelForCausalLM.from_pretrained(tiny)
    PeftModel.from_pretrained(model, str(tmp_path / "two" / "adapter"))
    assert merge(two_config, tmp_path / "two" / "adapter", tmp_path / "whole").is_dir()


# ---- chains of jobs


@pytest.fixture(params=["tiny", pytest.param("smollm2", marks=pytest.mark.slow)])
def base(request: pytest.FixtureRequest, tiny: Path, tmp_path: Path) -> tuple[Path, float]:
    """A model in float32, so that merging rounds nothing away, and a rate to train it with."""
    if request.param == "tiny":
        return tiny, 2e-2
    smollm2, folder = get_model(tmp_path / "models"), tmp_path / "smollm2"
    AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(smollm2).save_pretrained(folder)
    return folder, 1e-3


@pytest.mark.usefixtures("warm_jobs")
def test_a_chain_by_job_id(
    base: tuple[Path, float], home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SFT, then SFT, SDFT or GRPO: each begins where the first ended, and one that is lost in the
    middle and taken up again ends where it would have ended.
    """
    model, rate = base
    shape = {**SHAPE, "learning_rate": rate}
    one = OpenWeights().fine_tuning.create(**params(str(model), tmp_path, "sft", **shape))
    assert one.wait(timeout=600).status == "completed", "".join(one.logs())
    one.download(tmp_path / "one")
    whole = merged(tmp_path / "one" / "adapter", tmp_path / "merged")
    for loss in ("sft", "sdft", "grpo"):
        on = params(one.id, tmp_path, loss, learning_rate=rate, save_steps=1, lora_dropout=0.0)
        result = run(on, tmp_path / loss / "whole", monkeypatch)
        fresh_config = {**on, **shape, "model": whole, "max_steps": 1}
        fresh = run(fresh_config, tmp_path / loss / "fresh", monkeypatch)
        ours, theirs = at_first_step(result), at_first_step(fresh)
        for name in ("loss", "divergence", "entropy", "kl", "reward"):
            assert ours.get(name) == pytest.approx(theirs.get(name), abs=1e-3), (loss, name)
        part = tmp_path / loss / "part"
        part.mkdir()
        monkeypatch.chdir(part)
        with pytest.raises(Lost):
            train(on, extra_callbacks=[LoseAt(2)])
        train(on)
        resumed = weights(part / "uploads" / "adapter")
        assert all(torch.equal(resumed[n], value) for n, value in weights(result).items()), loss
        assert any(not torch.equal(value, weights(fresh)[n]) for n, value in resumed.items())
