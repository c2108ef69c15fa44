"""What a model is called, and where that is on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from openweights import ConfigError
from openweights.jobs.unsloth.validate import training_config
from openweights.models.names import (
    full_name,
    location_here,
    model_location,
    model_reference,
    name_of_folder,
)
from tests.jobs.unsloth.malformed_configs import FILE

DEMO = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.parametrize(
    ("name", "folder"), [(DEMO, "SmolLM2-135M-Instruct"), ("org/mine", "org/mine")]
)
def test_a_model_below_the_home_needs_no_hub(home: Path, name: str, folder: str) -> None:
    assert location_here(name) == name, "there is none yet"
    kept = home / "models" / folder
    kept.mkdir(parents=True)
    assert location_here(name) == name, "half of a download is no model"
    (kept / "config.json").write_text("{}")
    assert location_here(name) == str(kept)
    assert name_of_folder(kept) == (name if name == DEMO else str(kept))
    # What is stored in a job is the id: its worker may be on another machine.
    assert model_location(name) == name
    assert location_here("other/SmolLM2-135M-Instruct") == "other/SmolLM2-135M-Instruct"


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no folder"):
        location_here(str(tmp_path / "none"))


def test_a_folder_is_served_in_full_and_a_job_is_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    job = "ftjob-0123456789ab"
    for name in ("model", job):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("model")
    assert full_name("./model") == full_name("link") == str(tmp_path.resolve() / "model")
    assert full_name("org/repo") == "org/repo" and full_name("openai/gpt-4o") == "openai/gpt-4o"
    # Where the results of a job were downloaded to.
    assert model_reference(job).kind == "job" and full_name(f"{job}/checkpoint-2").startswith(job)
    assert model_reference(f"./{job}").kind == "folder"


@pytest.mark.parametrize("name", ["ftjob-0bff", "ftjob-doesnotexist", "apijob-ee9a91f4dc3a"])
def test_what_looks_like_a_job_and_is_none_is_no_model(name: str, tmp_path: Path) -> None:
    for model in (name, f"{name}/checkpoint-2"):
        with pytest.raises(ConfigError, match=f"model: '{name}' is no fine-tuning job; give the"):
            model_reference(model)
        with pytest.raises(ConfigError, match=f"model: '{name}' is no fine-tuning job; give the"):
            training_config({"model": model, "training_file": FILE, "loss": "sft"})
    for model in ("ftjob-0123456789ab", "ftjob-0123456789ab-second/checkpoint-2"):
        assert model_reference(model).kind == "job"


@pytest.mark.parametrize(
    "name", ["gpt2", "Qwen/Qwen3-4B", "a_b/c.d-e", "o" * 96 + "/" + "m" * 96, "org/name/part", "7b"]
)
def test_ids_that_the_hub_takes(name: str) -> None:
    assert model_reference(name).kind == "repository"


@pytest.mark.parametrize(
    "name",
    [
        *("a--b/c", "a/b.git", "a/-b", "a/b-", "a/b.", "-a", "a" * 97, "a/" + "b" * 97, "a/b c"),
        *("Qwén/Qwen3-4B", "模型", "a/b\n", "a//b", "a/..", "a/b/../c", ""),
    ],
)
def test_ids_that_the_hub_would_refuse(name: str) -> None:
    with pytest.raises(ConfigError, match="^model: .*(is neither a Hugging Face id|no folder)"):
        model_reference(name)
