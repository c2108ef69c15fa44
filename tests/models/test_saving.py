"""Saving an adapter asks nobody about its base, and warns of nothing."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from peft import PeftModel

from openweights.jobs.unsloth.validate import training_config
from openweights.models.load import load_model
from tests.tiny_model import make_tiny_model


def test_a_checkpoint_of_a_named_model_warns_of_nothing(home: Path, tmp_path: Path) -> None:
    """Its name is one of the hub, which cannot be asked here."""
    make_tiny_model(home / "models" / "org" / "tiny")
    config = training_config(
        {"model": "org/tiny", "training_file": "conversations:file-1", "loss": "sft"}
    )
    model, _ = load_model(config, "transformers")
    assert isinstance(model, PeftModel)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(str(tmp_path / "checkpoint"))
    assert (tmp_path / "checkpoint" / "adapter_model.safetensors").is_file()
    # The control: as peft saves it by itself.
    with pytest.warns(UserWarning) as told:
        PeftModel.save_pretrained(model, str(tmp_path / "control"))
    assert any("Could not find a config file in org/tiny" in str(one.message) for one in told)
