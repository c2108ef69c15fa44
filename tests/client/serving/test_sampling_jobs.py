"""The jobs that `job.sample` makes for itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from openweights import ConfigError
from openweights.client.serving.sampling import LABEL, PROMPTS, submit
from openweights.types import Claim
from tests.client.conftest import QuietClient
from tests.tiny_model import make_tiny_model


def test_they_are_labeled_and_no_others(ow: QuietClient, tmp_path: Path) -> None:
    tiny = str(make_tiny_model(tmp_path / "tiny"))
    first = submit(ow, [tiny], ["q"], {"max_tokens": 3})
    again = submit(ow, [tiny], ["q"], {"max_tokens": 3})
    assert first.id == again.id and first.id.endswith("-sample")
    assert ow.backend.get_job(first.id).label == LABEL
    file = first.params["validated_params"]["input_file_id"]
    assert ow.files.retrieve(file)["filename"] == PROMPTS
    own = ow.inference.create(model=tiny, input_file_id=file, max_tokens=3)
    assert own.id != first.id and ow.backend.get_job(own.id).label is None


def trained(ow: QuietClient, tmp_path: Path) -> Any:
    rows = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"messages": rows}) + "\n")
    tiny = str(make_tiny_model(tmp_path / "tiny"))
    return ow.fine_tuning.create(
        model=tiny, training_file=str(file), loss="sft", requires_vram_gb=0, load_in_4bit=False
    )


@pytest.mark.parametrize(
    ("params", "wrong"),
    [
        ({"temperature": -1}, "^temperature: "),
        ({"max_tokens": 0}, "^max_tokens: "),
        ({"max_tokns": 3}, "^max_tokns: "),
        ({"priority": "x"}, "^priority: "),
    ],
)
def test_parameters_are_checked_before_there_is_a_checkpoint(
    ow: QuietClient, tmp_path: Path, params: dict[str, Any], wrong: str
) -> None:
    with pytest.raises(ConfigError, match=wrong):
        trained(ow, tmp_path).sample(["q"], **params)


def test_what_to_do_about_a_job_without_a_checkpoint_is_what_helps(
    ow: QuietClient, claim: Callable[[], Claim], tmp_path: Path
) -> None:
    job = trained(ow, tmp_path)
    with pytest.raises(ConfigError, match="is pending .*; wait until it has completed"):
        job.sample(["q"])
    run = claim().run
    ow.backend.finish_run(run.id, run.attempt, "failed", error="exit code 1")
    with pytest.raises(ConfigError, match=f"is failed .*; restart it .`ow restart {job.id}`"):
        job.sample(["q"])
