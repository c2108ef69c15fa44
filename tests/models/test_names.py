"""What a model is called, and where that is on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from openweights import ConfigError
from openweights.models.names import location_here, model_location

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
    # What is stored in a job is the id: its worker may be on another machine.
    assert model_location(name) == name
    assert location_here("other/SmolLM2-135M-Instruct") == "other/SmolLM2-135M-Instruct"


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no folder"):
        location_here(str(tmp_path / "none"))
