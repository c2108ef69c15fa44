"""`ow.inspect_ai`: what it refuses, and the package itself with a local file of tasks."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from openweights import OpenWeights
from openweights.errors import ConfigError, JobFailedError
from openweights.events import Inspected
from openweights.jobs.inspect_ai.run import PACKAGES, scores_of
from tests.client.conftest import QuietClient
from tests.tiny_model import make_tiny_model

TASKS = """
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import accuracy, scorer, stderr, Score, Target
from inspect_ai.solver import TaskState, generate


@scorer(metrics=[accuracy(), stderr()])
def has_more_than():
    async def score(state: TaskState, target: Target) -> Score:
        return Score(value=float(len(state.output.completion) > int(target.text)))

    return score


@task
def lengths(most: int = 6):
    targets = ["0" if n % 3 else "9999" for n in range(most)]
    questions = [Sample(input=f"Question {n}", target=t) for n, t in enumerate(targets)]
    return Task(dataset=questions, solver=generate(max_tokens=8), scorer=has_more_than())


@task
def broken():
    raise ValueError("no such thing")
"""


def test_what_it_refuses(home: Path, tmp_path: Path) -> None:
    client = QuietClient()
    tiny = str(make_tiny_model(tmp_path / "tiny"))
    tasks = tmp_path / "tasks.py"
    tasks.write_text(TASKS)
    good: dict[str, Any] = {"model": tiny, "eval_name": "inspect_evals/gsm8k"}
    for change, words in (
        ({"model": "a b"}, "model: 'a b' is neither"),
        ({"eval_name": "--version"}, "eval_name: is no evaluation"),
        ({"eval_name": f"{tasks}@length"}, "has no function 'length'"),
        ({"eval_name": f"{tmp_path}/none.py"}, "there is no file .*none.py"),
        ({"eval_name": f"{tmp_path}/none.py@lengths"}, "none.py: No such file"),
        ({"options": "--limit '3"}, "options: cannot be read"),
        ({"max_model_len": 0}, "max_model_len: must be at least 1"),
    ):
        with pytest.raises(ConfigError, match=words):
            client.inspect_ai.create(**{**good, **change})
    job = client.inspect_ai.create(**good)
    assert job.id.startswith("inspectjob-")
    assert client.inspect_ai.create(**good, options=" ").id == job.id, "as the older runner's"
    own = client.inspect_ai.create(**{**good, "eval_name": f"{tasks}@lengths"})
    stored = own.params["validated_params"]["eval_name"]
    assert stored.startswith("custom_job_file:file-") and stored.endswith("@lengths")
    client.close()


def test_what_jobs_install_is_what_pyproject_says() -> None:
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    assert list(PACKAGES) == project["optional-dependencies"]["inspect"]


def test_scores_of_a_log() -> None:
    metrics = {"accuracy": {"name": "accuracy", "value": 0.5}, "stderr": {"value": 0.1}}
    results = {"completed_samples": 4, "scores": [{"name": "match", "metrics": metrics}]}
    log = {"status": "success", "eval": {"task": "t"}, "results": results}
    values = {"accuracy": 0.5, "stderr": 0.1}
    assert list(scores_of(log)) == [Inspected(task="t", scorer="match", samples=4, values=values)]
    assert list(scores_of({"status": "error", "eval": {"task": "t"}})) == []


@pytest.mark.slow
def test_a_local_file_of_tasks(home: Path, tmp_path: Path) -> None:
    """Installs inspect-ai into the home, which takes a minute, and needs the package index."""
    client = OpenWeights()
    tiny = str(make_tiny_model(tmp_path / "tiny"))
    tasks = tmp_path / "tasks.py"
    tasks.write_text(TASKS)
    job = client.inspect_ai.create(
        model=tiny,
        eval_name=f"{tasks}@lengths",
        options="-T most=9 --limit 6",
        requires_vram_gb=0,
    )
    job.wait(timeout=900)
    [event] = [event.data for event in job.events(type="inspect")]
    assert (event["task"], event["scorer"], event["samples"]) == ("lengths", "has_more_than", 6)
    assert event["accuracy"] == pytest.approx(4 / 6) and event["stderr"] > 0
    job.download(tmp_path / "out")
    [log] = list((tmp_path / "out" / "inspect").glob("*.json"))
    told = json.loads(log.read_text())
    assert told["status"] == "success" and len(told["samples"]) == 6
    assert told["eval"]["model"] == f"openai-api/served/{tiny}"
    wrong = client.inspect_ai.create(model=tiny, eval_name=f"{tasks}@broken")
    with pytest.raises(JobFailedError, match="inspect eval ended with 1|no such thing"):
        wrong.wait(timeout=300)
    client.close()
