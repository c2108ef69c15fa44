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
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from openweights.backends.base import Backend
from openweights.client.jobs import Job
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
# The end of a training: the adapter is there, and the model with it merged into it is pushed.
PUSH = """
import sys
from pathlib import Path
from types import SimpleNamespace
from openweights.models.hub import push_result
from openweights.settings import Settings
config = SimpleNamespace(
    model=sys.argv[1], finetuned_model_id="lab/pushed", model_naming_extra_parameters=None,
    is_peft=True, merge_before_push=True, push_to_private=True,
)
named = {"job_id": "ftjob-1", "token": "hf_of_the_test", "org": "lab"}
print(push_result(config, Path("adapter"), scratch=Settings.from_env().scratch, **named))
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


def trained(folder: Path) -> tuple[str, dict[str, bytes]]:
    """A model, and the files of an adapter for it."""
    tiny = make_tiny_model(folder / "tiny")
    lora = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    model: Any = AutoModelForCausalLM.from_pretrained(tiny)
    get_peft_model(model, lora).save_pretrained(str(folder / "adapter"))
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder / "adapter")
    files = {f"adapter/{file.name}": file.read_bytes() for file in (folder / "adapter").iterdir()}
    return str(tiny), files


@pytest.mark.long
def test_a_push_is_whole_and_leaves_no_model_behind(
    jobs: Jobs, backend: Backend, start_worker: StartWorker, home: Path, tmp_path: Path
) -> None:
    model, files = trained(tmp_path)
    system = tmp_path / "of the system"
    system.mkdir()
    with serve_pushes() as hub:
        env = {"HF_ENDPOINT": hub.endpoint, "TMPDIR": str(system)}
        job = jobs.submit(f"python push.py {model}", {**files, "push.py": PUSH.encode()})
        process = start_worker(**env)
        wait_until(hub.arrived.is_set)
        assert [*home.rglob("model.safetensors")], "the control"
        kill(process)
        hub.may_answer.set()
        start_worker(**env)
        assert jobs.wait_for_end(job) == "completed", jobs.log(job).decode()
        first, second = hub.commits
    check_runs(backend, job.id)
    assert first == second and "model.safetensors" in first
    assert jobs.log(job).endswith(b"lab/pushed\n")
    assert not [*system.rglob("*.safetensors")]
    wait_until(lambda: not [*home.rglob("model.safetensors")])


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
