"""What jobs of somebody's own may log, and what is left of a job when its files are gone: the page
shows the rest of it, and of every other job.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from openweights.events import Evaluation
from openweights.types import JobSpec
from tests.dashboard.conftest import Served
from tests.dashboard.visitor import Visitor

GONE = "result:file-000000000000"
NOT_EVEN = "x" * 400
# Events of our own types with other content than ours.
ODD: list[dict[str, Any]] = [
    {"type": "completions", "step": 1, "completions": ["text", {"prompt": None, "rewards": 3}]},
    {"type": "completions", "step": 1, "completions": [{"prompt": [{"role": "user"}, 3]}]},
    {"type": "completions", "step": 2, "completions": None},
    {"type": "completions", "step": "x", "completions": {"a": 1}},
    {"type": "samples", "step": 1, "tag": "gone", "file": GONE},
    {"type": "samples", "step": None, "tag": {"a": 1}, "file": 7},
    {"type": "logprobs", "step": 3, "tag": "nofile"},
    {"type": "logprob_block", "step": 1, "tag": "t", "logprobs": None},
    {"type": "teacher_gate"},
    {"type": "teacher_gate", "student": "NaN", "teacher": "Infinity", "examples": None},
    {"type": "teacher_gate", "step": 5, "examples": ["x", None, {"prompt": [1]}], "rows": {}},
    {"type": "multiple_choice", "step": 1, "accuracy": "NaN"},
    {"type": None, "step": 1, "loss": 1},
    {"type": 5, "step": 2, "loss": 2},
    {"type": ["x"], "step": 3, "loss": 3},
    {"type": "stage", "doing": None},
    {"type": "started", "max_steps": "NaN", "from_step": None},
    {"step": 3, "loss": 2.0, "max_steps": -4, "total": 0},
    {"path": "a/../../b", "file": GONE},
    {"path": None, "file": 7},
    {"path": NOT_EVEN, "file": GONE},
]
# Names that objects of JavaScript have by themselves, and others that no one would choose.
NAMES = ["__proto__", "constructor", "toString", "a[b[c]]", "[x]", "", "עברית", "m" * 300]


@pytest.fixture
def strange(served: Served, run_job: Callable[..., Any]) -> list[str]:
    """Jobs of every kind and status, most of them odd; all their ids."""
    events = [{"step": n, "loss": 1.0 / n, **{name: 2.0 * n for name in NAMES}} for n in (1, 2, 3)]
    run_job("ftjob-names", events, meta={"__proto__": 1, "k" * 80: "v" * 300, "list": [1, {}]})
    run_job("ftjob-long", [{"step": 1, "loss": 1.5}], model="org/" + "long-name-" * 40)
    numbers = {"inf": "Infinity", "nan": "NaN", "int": 2**60}
    events = [{"step": n, "loss": "NaN" if n % 2 else n, "big": 1e300 * n} for n in (1, 2, 3, 4)]
    run_job("ftjob-" + "suffix-" * 15, [{"step": 1, "loss": 1.5}], meta={"turned\u202e": "\u202e"})
    run_job("ftjob-numbers", [event | numbers for event in events])
    run_job("ftjob-steps", [{"step": n, "loss": n / 7} for n in (-5, 0, 10**12, 10**15)])
    run_job("ftjob-odd", ODD, training_file=GONE)
    run_job("ftjob-many", [{"step": n, **{f"m{k}": k * n for k in range(60)}} for n in (1, 2)])
    error = "CUDA out of memory\n" + "frame\n" * 300 + NOT_EVEN * 8
    run_job("ftjob-failed", [], status="failed", error=error, log="x\x1b[31m\x00\n")
    run_job("ftjob-silent", [])
    run_job("evaljob-odd", [{"type": "evaluation"}, {"type": "evaluation", "score": "x"}], models=3)
    score = {"score": 0.5, "low": 0.4, "high": 0.6, "problems": 9}
    asked = Evaluation(model="ftjob-long", task="__proto__", **score)
    run_job("evaljob-good", [asked.data()], models=["ftjob-long"])
    backend = served.ow.backend
    bare: dict[str, dict[str, Any]] = {"custom-none": {}, "custom-null": {"validated_params": None}}
    for job_id, params in bare.items():
        backend.submit_job(JobSpec(job_id, "custom", "true", params))
    backend.submit_job(JobSpec("custom-after", "custom", "true", {}, after=("custom-none",)))
    return [job.id for job in served.ow.jobs.list(limit=None)]


def test_every_question_about_them_is_answered(
    served: Served, strange: list[str], browser: httpx.Client
) -> None:
    paths = [f"/api/{name}" for name in ("jobs", "cluster", "files", "compare", "series", "scores")]
    for job in strange:
        paths += [f"/api/jobs/{job}{part}" for part in ("", "/files", "/gates")]
        paths += [f"/api/{name}?jobs={job}" for name in ("compare", "series", "scores")]
        for part in ("answers", "tokens"):
            steps = browser.get(f"/api/jobs/{job}/{part}").json()
            paths += [f"/api/jobs/{job}/{part}/{step['event']}" for step in steps]
    together = ",".join(strange)
    paths += [f"/api/{name}?jobs={together}" for name in ("compare", "series", "scores")]
    refused = [(path, answer.text) for path in paths if (answer := browser.get(path)).is_error]
    assert refused == []


def test_one_odd_evaluation_hides_no_other(browser: httpx.Client, strange: list[str]) -> None:
    (score,) = browser.get("/api/scores?jobs=ftjob-long").json()
    assert score["task"] == "__proto__" and score["evaluation"] == "evaljob-good"


def test_metrics_of_odd_events(served: Served, strange: list[str]) -> None:
    rows = served.ow.jobs.retrieve("ftjob-odd").metrics(as_dataframe=False)
    assert {"5/loss", "['x']/loss", "loss"} <= {name for row in rows for name in row}


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 800])
def test_every_view_shows_them(
    served: Served, chromium: Any, strange: list[str], width: int
) -> None:
    visitor = Visitor(chromium, served, width, "light")
    views = [("/jobs", "tr[data-row=ftjob-steps]"), ("/cluster", "h1 >> text=Cluster")]
    views += [(f"/job/{job}", "text=Make it again") for job in strange]
    views += [(f"/compare?jobs={','.join(strange)}", "table.last tr")]
    views += [(f"/compare?jobs={','.join(strange)}&all=1&y=__proto__", "table.last tr")]
    views += [("/samples?jobs=ftjob-odd", "h2 >> text=Log-probabilities of nofile")]
    for view, until in views:
        visitor.open(view, until)
        visitor.page.wait_for_timeout(250)
        assert visitor.faults() == [], view
        assert visitor.page.locator("#notice .problem, h1 >> text=did not work").count() == 0, view
    visitor.open("/jobs", "tr[data-row=ftjob-failed]")
    tall = "[...document.querySelectorAll('tr')].map((row) => row.offsetHeight)"
    assert max(visitor.page.evaluate(tall)) < 100
    assert visitor.errors == []
    visitor.close()


@pytest.mark.browser
def test_an_empty_store_has_every_view(served: Served, chromium: Any) -> None:
    visitor = Visitor(chromium, served, 800, "dark")
    for title in ("Jobs", "Compare", "Samples", "Data", "New job", "Chat", "Cluster"):
        view = f"/{title.lower().removesuffix(' job')}"
        visitor.open(view, f"h1 >> text={title}")
        assert visitor.faults() == [], view
    assert visitor.errors == []
    visitor.close()
