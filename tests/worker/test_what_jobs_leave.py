"""What is deleted when a job has completed is its own: equal content is one file in the store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from openweights.client.runs import Run
from openweights.events import Checkpoint, Part
from openweights.jobs.inference.parts import Parts
from openweights.jobs.unsloth.runtime.reporting import StoreReporter
from openweights.types import WorkerSpec
from openweights.worker.results import drop_checkpoints
from tests.client.conftest import QuietClient, append
from tests.client.kinds import Echo


@pytest.fixture
def ow(home: Path) -> Iterator[QuietClient]:
    client = QuietClient()
    yield client
    client.close()


@pytest.fixture
def runs(ow: QuietClient) -> list[Run]:
    """Of two jobs."""
    found: list[Run] = []
    for name in ("a", "b"):
        Echo(ow).create(text=name)
        ow.backend.register_worker(WorkerSpec(id=f"worker-{name}"))
        claim = ow.backend.claim_job(f"worker-{name}")
        assert claim is not None
        found.append(ow.runs.retrieve(claim.run.id))
    return found


def test_equal_parts_of_two_jobs(ow: QuietClient, runs: list[Run]) -> None:
    for run in runs:
        parts = Parts(ow, run)
        parts.add(3, {"text": "the same"})
        parts.save()
        run.flush()
    done, other = runs
    assert Parts(ow, done).results == Parts(ow, other).results == {3: {"text": "the same"}}
    drop_checkpoints(ow.backend, done.job_id)
    assert Parts(ow, done).results == {}
    assert Parts(ow, other).results == {3: {"text": "the same"}}


def test_a_part_of_an_older_client_is_read(ow: QuietClient, runs: list[Run]) -> None:
    part = ow.files.create(b'[0, {"text": "x"}]\n', "checkpoint")["id"]
    append(ow.backend, runs[0].id, Part(step=1, part=part).data())
    assert Parts(ow, runs[0]).results == {0: {"text": "x"}}


def test_equal_checkpoints_of_two_jobs(ow: QuietClient, runs: list[Run], tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    (folder / "weights").write_text("the same")
    for run in runs:
        StoreReporter(ow, run).save_checkpoint(folder, 1)
        run.flush()
    done, other = runs
    drop_checkpoints(ow.backend, done.job_id)
    assert ow.events.list(job_id=done.job_id, type=Checkpoint.type), "the control: it had one"
    assert StoreReporter(ow, done).newest_checkpoint(tmp_path / "done") is None
    kept = StoreReporter(ow, other).newest_checkpoint(tmp_path / "other")
    assert kept is not None and (kept / "weights").read_text() == "the same"
