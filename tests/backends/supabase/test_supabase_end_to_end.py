"""A fine-tuning job from a member's client through a Supabase project to a worker and back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from openweights import OpenWeights
from tests.supabase_double.team import Team
from tests.waiting import HANGS_S

ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"What is {i} and {i}?"},
            {"role": "assistant", "content": f"That is {2 * i}."},
        ]
    }
    for i in range(4)
]


def start_worker(team: Team, home: Path, log: Path) -> subprocess.Popen[bytes]:
    """`ow worker --once` with a worker's key, as in a pod."""
    settings = team.settings(home, team.key("worker"))
    env = settings.child_env() | {"HF_HUB_OFFLINE": "1"}
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "openweights.cli", "worker", "--once"],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )


@pytest.mark.usefixtures("warm_jobs")
def test_sdft_from_client_to_worker_and_back(team: Team, home: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    from safetensors.torch import load_file

    from tests.tiny_model import make_tiny_model

    model = make_tiny_model(tmp_path / "tiny")
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    with closing(OpenWeights(settings=team.settings(home, team.key("member")))) as ow:
        file = ow.files.upload(data, purpose="conversations")["id"]
        job = ow.fine_tuning.create(
            model=str(model),
            training_file=file,
            loss="sdft",
            max_steps=2,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=2,
            sdft_max_new_tokens=6,
            sdft_gate="off",  # no demonstration helps a random model
            save_steps=1,
            requires_vram_gb=0,
        )
        log = tmp_path / "worker.log"
        with start_worker(team, tmp_path / "pod", log) as worker:
            assert worker.wait(timeout=HANGS_S) == 0, log.read_text()
        job.refresh()
        assert job.status == "completed", f"{log.read_text()}\n{job.runs[-1].logs()}"
        steps = [e.data["step"] for e in ow.events.list(job_id=job.id) if "loss" in e.data]
        assert steps == [1, 2]
        written = job.download(tmp_path / "results")
        adapter = next(path for path in written if path.name == "adapter_model.safetensors")
        assert load_file(adapter)
        assert team.admin_key not in job.runs[-1].logs() and "ow_" not in log.read_text()
        # Nothing of the member's machine was used: the files came and went through the project.
        assert not home.exists() or not os.listdir(home)
        # Checkpoints are gone, what is named by the job is there.
        purposes = {record["purpose"] for record in ow.files.list(limit=None)}
        assert purposes == {"conversations", "source", "result"}
