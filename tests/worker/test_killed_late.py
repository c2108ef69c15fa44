"""A worker is killed when its job has nearly ended: while it pushes a model, and while it scores
the answers of an evaluation. The next attempt does what is left, and nothing is there twice.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from openweights.backends.base import Backend
from openweights.client.jobs import Job
from openweights.client.results import result_files
from openweights.client.watching.scores import best_scores
from openweights.events import Part
from openweights.settings import Settings
from openweights.worker.process import kill_strays
from tests.client.conftest import QuietClient
from tests.models.hub_double import serve_pushes
from tests.tiny_model import make_tiny_model
from tests.waiting import wait_until
from tests.worker.harness import Jobs

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a store notices deaths there")

StartWorker = Callable[..., subprocess.Popen[bytes]]
FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights"}
PUSH = """
from pathlib import Path
from types import SimpleNamespace
from openweights.models.hub import push_result
folder = Path("uploads/adapter")
folder.mkdir(parents=True)
for name, content in FILES.items():
    (folder / name).write_bytes(content)
config = SimpleNamespace(
    model="org/model", finetuned_model_id="lab/pushed", model_naming_extra_parameters=None,
    is_peft=True, merge_before_push=False, push_to_private=True,
)
print(push_result(config, folder, job_id="ftjob-1", token="hf_of_the_test", org="lab"))
"""
SCORE = """
import pathlib, time
def score(completions, prompts, **_):
    mark = pathlib.Path(MARK)
    if not mark.exists():
        mark.touch()
        time.sleep(600)
    return [len(completion) % 7 / 7 for completion in completions]
"""


@pytest.fixture
def settings(home: Path) -> Iterator[Settings]:
    # The lease is longer than the test: what helps is that the store notices a death at once.
    yield Settings(
        home=home, lease_s=120.0, heartbeat_s=0.1, cancel_grace_s=1.0, try_functions=False
    )
    kill_strays(f"OPENWEIGHTS_HOME={home}")


def kill(process: subprocess.Popen[bytes]) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def check_runs(backend: Backend, job_id: str) -> None:
    lost, whole = backend.list_runs(job_id=job_id)
    assert lost.error == f"worker {lost.worker_id} is gone" and not lost.is_given_back
    assert (lost.status, whole.status) == ("failed", "completed")


def test_a_push_is_whole_or_not_there(
    jobs: Jobs, backend: Backend, start_worker: StartWorker
) -> None:
    with serve_pushes() as hub:
        script = f"FILES = {FILES}\n{PUSH}".encode()
        job = jobs.submit("python push.py", {"push.py": script})
        process = start_worker(HF_ENDPOINT=hub.endpoint)
        wait_until(hub.arrived.is_set)
        kill(process)
        hub.may_answer.set()
        start_worker(HF_ENDPOINT=hub.endpoint)
        assert jobs.wait_for_end(job) == "completed", jobs.log(job).decode()
        assert hub.commits == [FILES, FILES], "what the first has pushed is what the second has"
    check_runs(backend, job.id)
    assert jobs.log(job).endswith(b"lab/pushed\n")
    paths = [file["path"] for file in result_files(backend.list_events(job_id=job.id))]
    assert sorted(paths) == [f"adapter/{name}" for name in FILES]


def answers_of(job: Job, folder: Path) -> list[Any]:
    """What was asked, answered and scored, as the job's file has it."""
    job.download(folder)
    lines = (folder / "evaluation" / "score.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [[row[name] for name in ("id", "completion", "score")] for row in rows]


@pytest.mark.usefixtures("warm_jobs")
def test_an_evaluation_goes_on_with_the_answers_that_it_has(
    settings: Settings,
    backend: Backend,
    start_worker: StartWorker,
    tmp_path: Path,
) -> None:
    mark, suite, prompts = (tmp_path / name for name in ("mark", "own.py", "rows.jsonl"))
    suite.write_text(SCORE.replace("MARK", repr(str(mark))))
    rows = [{"messages": [{"role": "user", "content": f"Hello {n}"}]} for n in range(3)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked: dict[str, Any] = {
        "models": [str(make_tiny_model(tmp_path / "tiny"))],
        "suite": [f"{suite}:score"],
        "prompts": str(prompts),
        "samples": 2,
        "temperature": 1.0,
        "max_tokens": 8,
    }
    ow = QuietClient(settings=settings)
    job = ow.evaluate.create(**asked)
    process = start_worker()
    # The answers are on their way to the store while they are scored.
    wait_until(lambda: mark.exists() and any(backend.list_events(job_id=job.id, type=Part.type)))
    kill(process)
    start_worker()
    wait_until(lambda: job.refresh().status in ("completed", "failed"))
    check_runs(backend, job.id)
    assert "3 answers, 3 of them given already" in job.runs[-1].logs()
    whole = ow.evaluate.create(**asked, job_id_suffix="whole")
    wait_until(lambda: whole.refresh().status in ("completed", "failed"))
    assert len(backend.list_runs(job_id=whole.id)) == 1, "the control was asked once"
    answers = answers_of(job, tmp_path / "killed")
    assert len(answers) == 6 and answers == answers_of(whole, tmp_path / "whole")
    scores = [best_scores(backend, one.refresh().record) for one in (job, whole)]
    assert scores[0] == scores[1] and scores[0]
    assert len(job.events(type="evaluation")) == len(whole.events(type="evaluation")) == 1
