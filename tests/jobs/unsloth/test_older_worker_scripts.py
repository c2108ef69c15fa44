"""Scripts for the worker that were written for the older runner: their imports and the names in
events, through a job on the embedded store.
"""

from __future__ import annotations

import json
import sys
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
from tests.tiny_model import make_tiny_model

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


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


def test_a_trainer_of_ones_own(tiny: Path, home: Path, tmp_path: Path) -> None:
    script = tmp_path / "own.py"
    script.write_text(SCRIPT)
    ow = OpenWeights()
    OwnTrainer.mount = {str(script): "own.py"}
    file = ow.files.upload(ROWS, "conversations")["id"]
    job = OwnTrainer(ow).create(model=str(tiny), training_file=file)
    assert job.wait(timeout=120).status == "completed", job.logs()
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
