"""The jobs that `job.sample` makes for itself."""

from __future__ import annotations

from pathlib import Path

from openweights.client.serving.sampling import LABEL, PROMPTS, submit
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
