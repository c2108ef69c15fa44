"""Scripts for the worker that were written for the older runner: their imports and the names in
events, through a job on the embedded store.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic import BaseModel

from openweights import Jobs, OpenWeights
from openweights.errors import ConfigError
from openweights.jobs.unsloth.training import create_dataset, push_model
from openweights.jobs.unsloth.utils import load_jsonl, load_model_and_tokenizer
from openweights.jobs.unsloth.validate import training_config
from tests.jobs.unsloth.malformed_configs import GOOD
from tests.waiting import HANGS_S

ROWS = [
    {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}."}]}
    for n in range(4)
]
# A trainer of one's own, with the older runner's helpers.
SCRIPT = """
import sys
from openweights.jobs.unsloth.training import create_dataset
from openweights.jobs.unsloth.utils import client, load_jsonl, load_model_and_tokenizer

params = client.jobs.retrieve(sys.argv[1]).params["validated_params"]
rows = load_jsonl(params["training_file"])
dataset = create_dataset(rows, "sft")
model, tokenizer = load_model_and_tokenizer(params["model"])
client.run.log({"rows": len(dataset), "columns": dataset.column_names, "vocab": len(tokenizer)})
"""


class Params(BaseModel):
    model: str
    training_file: str


class OwnTrainer(Jobs):
    params: ClassVar[type[BaseModel]] = Params

    def get_entrypoint(self, validated_params: BaseModel) -> str:
        return f"{sys.executable} own.py {{job_id}}"


@pytest.mark.usefixtures("warm_jobs")
def test_a_trainer_of_ones_own(tiny: Path, home: Path, tmp_path: Path) -> None:
    script = tmp_path / "own.py"
    script.write_text(SCRIPT)
    ow = OpenWeights()
    OwnTrainer.mount = {str(script): "own.py"}
    file = ow.files.upload(ROWS, "conversations")["id"]
    job = OwnTrainer(ow).create(model=str(tiny), training_file=file)
    assert job.wait(timeout=HANGS_S).status == "completed", job.logs()
    [logged] = [e["data"] for e in job.events() if "rows" in e["data"]]
    assert (logged["rows"], logged["columns"], logged["vocab"]) == (4, ["messages"], 284)


def test_its_helpers_here(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({**row, "level": 1}) + "\n" for row in ROWS))
    loaded: list[dict[str, Any]] = load_jsonl(str(rows))
    assert create_dataset(loaded, "sft").column_names == ["messages"]
    assert set(create_dataset(loaded, "grpo").column_names) == {"messages", "level"}
    model, tokenizer = load_model_and_tokenizer(str(tiny))
    assert not model.training
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(ConfigError, match="push_model: HF_TOKEN is not set"):
        push_model(training_config({**GOOD, "model": str(tiny)}), "org/name", model, tokenizer)


@pytest.mark.slow
def test_three_losses_with_one_set_of_settings(tiny: Path, home: Path, tmp_path: Path) -> None:
    """As the scripts that compare SFT, SDFT and GRPO: one dict, poll loops, events as dicts."""
    ow = OpenWeights()
    file = ow.files.create((json.dumps(ROWS[0]) + "\n").encode() * 8, purpose="conversations")
    shared: dict[str, Any] = {
        **{"model": str(tiny), "training_file": file["id"], "max_seq_length": 256},
        **{"r": 8.0, "epochs": 1.0, "learning_rate": 1e-2, "max_steps": 2, "warmup_steps": 0},
        **{"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "beta": 0.0},
        **{"packing": True, "train_on_responses_only": True, "requires_vram_gb": "guess"},
    }
    own = {
        "sft": {},
        "sdft": {"sdft_max_new_tokens": 8, "sdft_gate": "off"},
        "grpo": {
            "grpo_num_generations": 2,
            "grpo_max_completion_length": 8,
            "grpo_reward_function": "ngram_match",
        },
    }
    jobs = {loss: ow.fine_tuning.create(loss=loss, **shared, **more) for loss, more in own.items()}
    seen: dict[str, set[str]] = {}
    for loss, job in jobs.items():
        while job.refresh().status not in ("completed", "failed", "canceled"):
            time.sleep(0.3)
        assert job["status"] == "completed", job.logs()
        steps = []
        for event in ow.events.list(run_id=job.runs[-1].id):
            data = event["data"] if isinstance(event, dict) else {}
            seen.setdefault(loss, set()).update(data)
            steps += [data["step"]] if data.get("loss") is not None else []
        assert steps == [1, 2]
        assert b"done: the adapter is in" in ow.files.content(job.runs[-1].log_file)
        assert ow.fine_tuning.retrieve(job.id).id == job.id
    assert {"rewards/ngram_match_reward/mean", "samples"} <= seen["grpo"]
    assert "samples" in seen["sdft"] and "rewards/ngram_match_reward/mean" not in seen["sft"]
    assert {job.id for job in ow.fine_tuning.list(limit=None)} == {job.id for job in jobs.values()}
