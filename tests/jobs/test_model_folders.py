"""A job that names a model's folder is of what lay there when it was submitted."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from openweights import OpenWeights
from openweights.errors import ConfigError, JobFailedError
from openweights.jobs.model_source import fetch_model
from openweights.models.checkpoint import READ_BYTES, folder_state, folder_states
from tests.tiny_model import make_tiny_model
from tests.waiting import HANGS_S

TALK = {
    "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello you"}]
}
ASKED = {"question": "What is it?", "choices": ["the moon", "a"], "answer": "a"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_tiny_model(tmp_path / "model", seed=0)


@pytest.fixture
def ow(home: Path, monkeypatch: pytest.MonkeyPatch) -> OpenWeights:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return OpenWeights()


def _file(ow: OpenWeights, row: Any, purpose: str) -> str:
    return str(ow.files.create((json.dumps(row) + "\n").encode(), purpose)["id"])


def _saved_anew(model: Path, *, seed: int) -> None:
    shutil.rmtree(model)
    make_tiny_model(model, seed=seed)


def test_other_weights_of_the_same_name_are_another_job(ow: OpenWeights, model: Path) -> None:
    talk = _file(ow, TALK, "conversations")
    asked = _file(ow, ASKED, "multiple_choice")
    kinds: dict[str, dict[str, Any]] = {
        "fine_tuning": {"training_file": talk, "loss": "sft"},
        "weighted_sft": {"training_file": talk},
        "logprob": {"dataset": talk},
        "multiple_choice": {"dataset": asked},
        "inference": {"input_file_id": talk},
        "evaluate": {"suite": ["gsm8k"]},
        "mmlu_pro": {},
        "inspect_ai": {"eval_name": "inspect_evals/gsm8k"},
        "api": {},
    }
    ids = [_ids(ow, kinds, str(model))]
    for seed in (0, 1):
        _saved_anew(model, seed=seed)
        ids.append(_ids(ow, kinds, str(model)))
    first, same, other = ids
    assert first == same
    assert not [name for name in kinds if first[name] == other[name]]


def _ids(ow: OpenWeights, kinds: dict[str, dict[str, Any]], folder: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, given in kinds.items():
        kind = getattr(ow, name)
        named = {"models": [folder]} if name == "evaluate" else {"model": folder}
        found[name] = kind.compute_id(kind.validate({**given, **named}))
    return found


def test_a_folder_is_read_once_for_a_job(ow: OpenWeights, model: Path) -> None:
    """It is the same for the job's id and for what the job is checked against when it runs."""
    part = model / "other.safetensors"
    part.write_bytes(b"nobody else reads it")
    reads: list[str] = []

    def note(event: str, args: tuple[object, ...]) -> None:
        if event == "open" and str(args[0]) == str(part):
            reads.append(event)

    sys.addaudithook(note)
    talk = _file(ow, TALK, "conversations")
    spec = ow.logprob.prepare(model=str(model), dataset=talk)
    assert len(reads) == 1
    folder_state(model)
    assert len(reads) == 2, "the control"
    assert spec.params["model_folders"] == folder_states([str(model)])


def test_what_counts_of_a_folder(tmp_path: Path) -> None:
    folder, base = tmp_path / "adapter", tmp_path / "base"
    for made in (folder, base):
        made.mkdir()
    large = folder / "adapter_model.safetensors"
    with large.open("wb") as file:
        file.truncate(READ_BYTES + 1)
    config = {"base_model_name_or_path": str(base), "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (base / "model.safetensors").write_bytes(b"weights")
    first = folder_states([str(folder), "org/name", "./model", "ftjob-0123456789ab"])
    assert list(first) == [str(folder), str(base)]
    (folder / "README.md").write_text("of no weight")
    os.utime(base / "model.safetensors", (1, 1))
    assert folder_states([str(folder)]) == first
    (base / "model.safetensors").write_bytes(b"Weights")
    assert folder_states([str(folder)])[str(base)] != first[str(base)]
    os.utime(large, (1, 1))
    assert folder_state(folder) != first[str(folder)]
    assert folder_state(tmp_path / "none") == ""
    # An adapter that names itself as its base has no end of bases.
    (folder / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(folder)})
    )
    assert list(folder_states([str(folder)])) == [str(folder)]


@pytest.mark.usefixtures("warm_jobs")
def test_a_job_does_not_run_with_other_weights(
    ow: OpenWeights, model: Path, tmp_path: Path
) -> None:
    given = {"loss": "sft", "max_steps": 1, "learning_rate": 1e-2, "requires_vram_gb": 0}
    file = _file(ow, TALK, "conversations")
    trained = ow.fine_tuning.create(model=str(model), training_file=file, **given)
    assert trained.wait(timeout=HANGS_S).status == "completed", "".join(trained.logs())
    assert fetch_model(ow, trained.id, tmp_path / "fetched").base == str(model)
    ow.backend.set_paused(True)
    later = ow.fine_tuning.create(model=str(model), training_file=file, seed=1, **given)
    _saved_anew(model, seed=1)
    ow.backend.set_paused(False)
    with pytest.raises(JobFailedError, match=f"what lies in {model} has changed since {later.id}"):
        later.wait(timeout=HANGS_S)
    # Nor is the adapter of then put on the weights of now.
    with pytest.raises(ConfigError, match=f"{model} has changed since {trained.id} was submitted"):
        fetch_model(ow, trained.id, tmp_path / "fetched")
    assert ow.fine_tuning.create(model=str(model), training_file=file, **given).id != trained.id
