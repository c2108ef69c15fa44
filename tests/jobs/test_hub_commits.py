"""A job keeps to the commit of a hub's repository that it found first, and so does its model."""

from __future__ import annotations

import json
import shlex
import sys
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from openweights import OpenWeights
from openweights.errors import JobFailedError
from openweights.models.hub import wanted_files
from openweights.models.hub_files import at_commit, base_in, split_commit
from openweights.models.names import parameters_in_billions
from tests.models.hub_double import serve_hub
from tests.tiny_model import make_tiny_model
from tests.waiting import HANGS_S
from tests.warm.stack import StackServer, WarmStack

NAME = "org/moving"
BEFORE, AFTER = "a" * 40, "b" * 40
ROW = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
TRAIN = """
import sys
from transformers import TrainerCallback
from openweights.jobs.unsloth.training import train

class Lost(TrainerCallback):
    def on_train_begin(self, args, state, control, **kwargs):
        self.loses = state.global_step == 0

    def on_step_begin(self, args, state, control, **kwargs):
        if self.loses and state.global_step == 2:
            raise SystemExit("lost")

config = {
    "model": sys.argv[1], "training_file": sys.argv[2], "loss": "sft", "max_steps": 4,
    "save_steps": 1, "learning_rate": 1e-2, "r": 4, "lora_alpha": 4,
}
train(config, extra_callbacks=[Lost()] if sys.argv[3] == "lost" else [])
"""
FETCH = """
import sys
from pathlib import Path
from openweights import OpenWeights
from openweights.jobs.model_source import fetch_model
for model in sys.argv[1:]:
    print("base", fetch_model(OpenWeights(), model, Path("model")).base)
"""


def _job(ow: OpenWeights, script: str, *arguments: str) -> Any:
    command = shlex.join([sys.executable, "-c", script, *arguments])
    return ow.exec.create(command=command, requires_vram_gb=0)


def _adapter(job: Any, target: Path) -> Path:
    job.download(target)
    return target / "adapter"


def _bases(ow: OpenWeights, *models: str) -> list[str]:
    """What a job that loads these models loads them from."""
    lines = "".join(_job(ow, FETCH, *models).wait(timeout=HANGS_S).logs()).splitlines()
    return [line.removeprefix("base ") for line in lines if line.startswith("base ")]


@pytest.mark.long
def test_attempts_and_the_model_keep_the_first_commit(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commits = {BEFORE: make_tiny_model(tmp_path / "before", seed=0)}
    moved = make_tiny_model(tmp_path / "after", seed=1)
    with serve_hub(NAME, commits) as endpoint, ExitStack() as opened:
        for name, value in (("HF_ENDPOINT", endpoint), ("HF_HOME", str(tmp_path / "hf"))):
            monkeypatch.setenv(name, value)
        # One of this hub, since where a hub is said to be is read when the stack is imported.
        server = opened.enter_context(closing(StackServer()))
        for name, value in WarmStack(server.path).env.items():
            monkeypatch.setenv(name, value)
        ow = OpenWeights()
        file = str(ow.files.create((json.dumps(ROW) + "\n").encode(), "conversations")["id"])
        whole = _job(ow, TRAIN, NAME, file, "whole").wait(timeout=HANGS_S)
        job = _job(ow, TRAIN, NAME, file, "lost")
        with pytest.raises(JobFailedError):
            job.wait(timeout=HANGS_S)
        commits[AFTER] = moved
        job.restart().wait(timeout=HANGS_S)
        other = _job(ow, TRAIN, NAME, file, "other").wait(timeout=HANGS_S)
        adapters = [_adapter(each, tmp_path / each.id) for each in (whole, job, other)]
        weights = [(folder / "adapter_model.safetensors").read_bytes() for folder in adapters]
        assert weights[0] == weights[1] != weights[2]
        said = [json.loads((folder / "adapter_config.json").read_bytes()) for folder in adapters]
        assert [config["revision"] for config in said] == [BEFORE, BEFORE, AFTER]
        assert {config["base_model_name_or_path"] for config in said} == {NAME}
        assert (
            f"`{NAME}`, as it was at commit `{BEFORE}`" in (adapters[1] / "README.md").read_text()
        )
        # What is made with the model later has the base that it was trained on.
        trained, named = f"{NAME}@{BEFORE}", f"{NAME}@{AFTER}"
        assert _bases(ow, str(adapters[1]), NAME) == [trained, trained]
        assert _bases(ow, NAME, str(adapters[1])) == [named, trained]


def test_what_a_model_is_loaded_from() -> None:
    config = ["config.json", "tokenizer.json", "additional_chat_templates/tool.jinja"]
    left = ["README.png", "original/consolidated.00.pth", "onnx/model.onnx", "model.gguf"]
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    older = ["pytorch_model.bin", "consolidated.safetensors"]
    assert set(wanted_files([*config, *left, *shards, *older])) == {*config, *shards}
    assert set(wanted_files([*config, *left, *older])) == {*config, older[0]}


def test_names_at_a_commit(tmp_path: Path) -> None:
    assert split_commit(at_commit(NAME, BEFORE)) == (NAME, BEFORE)
    assert split_commit(at_commit(NAME, None)) == (NAME, None)
    base = {"base_model_name_or_path": NAME}
    assert base_in({**base, "revision": BEFORE}) == f"{NAME}@{BEFORE}"
    assert base_in({**base, "revision": "main"}) == base_in(base) == NAME
    assert base_in({"base_model_name_or_path": str(tmp_path), "revision": AFTER}) == str(tmp_path)
    assert parameters_in_billions("gpt2@" + "7b" * 20) is None
