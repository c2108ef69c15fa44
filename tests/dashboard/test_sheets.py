"""What evaluations, inferences and questions with choices were answered, on a job's page."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.dashboard.conftest import Served
from tests.dashboard.visitor import Visitor

MODELS = ("org/base", "ftjob-a")


def _file(served: Served, rows: list[dict[str, Any]]) -> str:
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    return served.ow.files.create(content, "result")["id"]


def _answers(model: str, right: set[int], count: int = 4) -> list[dict[str, Any]]:
    """As `openweights/jobs/evaluate/run.py` writes them."""
    return [
        {
            "model": model,
            "id": n,
            "score": float(n in right),
            "note": None if n in right else "it says 7",
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": f"What is {n} + {n}?"},
            ],
            "completion": f"It is {2 * n}." if n in right else f"It is 7, says {model}.",
            "expected": str(2 * n),
        }
        for n in range(count)
    ]


@pytest.mark.parametrize("paths", [["gsm8k"], ["gsm8k-0", "gsm8k-1"]])
def test_the_answers_of_an_evaluation_stand_beside_one_another(
    served: Served, browser: httpx.Client, run_job: Callable[..., Any], paths: list[str]
) -> None:
    """Which stand in one file, or in one for each model, as earlier versions have it."""
    rows = [_answers(MODELS[0], {0, 1}), _answers(MODELS[1], {1, 2})]
    files = rows if len(paths) > 1 else [rows[0] + rows[1]]
    events = [
        {"path": f"evaluation/{path}.jsonl", "file": _file(served, own)}
        for path, own in zip(paths, files, strict=True)
    ]
    run_job("evaljob-1", events, job_type="custom")
    assert browser.get("/api/jobs/evaljob-1/sheets").json() == ["gsm8k"]

    def sheet(**given: Any) -> dict[str, Any]:
        return browser.get("/api/jobs/evaljob-1/sheets/gsm8k", params=given).json()

    whole = sheet()
    assert whole["columns"] == [{"name": m, "score": 0.5, "problems": 4} for m in MODELS]
    assert whole["counts"] == {"all": 4, "scores": 2, "wrong": 3, "texts": 3} and whole["marks"]
    first = whole["rows"][0]
    assert first["messages"][-1] == {"role": "user", "text": "What is 0 + 0?"}
    assert first["reference"] == "0"
    assert first["answers"][0] == [{"text": "It is 0.", "score": 1.0, "note": None}]
    assert first["answers"][1][0]["note"] == "it says 7"
    assert [row["line"] for row in sheet(only="scores")["rows"]] == [1, 3]
    assert [row["line"] for row in sheet(only="wrong", offset=1, limit=1)["rows"]] == [3]
    refused = browser.get("/api/jobs/evaljob-1/sheets/gsm8k", params={"only": "x"})
    assert refused.status_code == 400 and "'x'" in refused.json()["error"]
    assert browser.get("/api/jobs/evaljob-1/sheets/none").status_code == 404


def test_several_answers_to_a_problem_are_one_row(
    served: Served, browser: httpx.Client, run_job: Callable[..., Any]
) -> None:
    rows = [dict(row) for row in _answers("m", {1}, 2) for _ in range(3)]
    rows[0]["score"] = None
    event = {"path": "evaluation/a-b-0.jsonl", "file": _file(served, rows)}
    run_job("evaljob-1", [event], samples=3, job_type="custom")
    found = browser.get("/api/jobs/evaljob-1/sheets/a-b").json()
    assert [len(row["answers"][0]) for row in found["rows"]] == [3, 3]
    assert found["columns"] == [{"name": "m", "score": 0.5, "problems": 2}]


def test_an_inference_has_its_answers_without_scores(
    served: Served, browser: httpx.Client, run_job: Callable[..., Any]
) -> None:
    asked = [{"role": "user", "content": "Hi"}]
    rows = [{"messages": asked, "model": m, "completion": ["a", m]} for m in MODELS]
    event = {"path": "completions.jsonl", "file": _file(served, [*rows, {"broken": 1}])}
    run_job("inferencejob-1", [event], job_type="custom")
    found = browser.get("/api/jobs/inferencejob-1/sheets/completions").json()
    assert [column["name"] for column in found["columns"]] == list(MODELS)
    assert found["counts"] == {"all": 1, "scores": 0, "wrong": 0, "texts": 1}
    assert [len(own) for own in found["rows"][0]["answers"]] == [2, 2]


def test_questions_of_a_training_stand_by_its_steps(
    served: Served, browser: httpx.Client, run_job: Callable[..., Any]
) -> None:
    """So that one sees which were forgotten."""

    def row(shares: list[float]) -> dict[str, Any]:
        told = {"question": "2 + 2?", "choices": ["4", "5"], "answer": 0, "probabilities": shares}
        return {**told, "correct": shares[0] > shares[1]}

    files = [_file(served, [row(shares)]) for shares in ([0.75, 0.25], [0.25, 0.75])]
    events = [
        {"type": "multiple_choice", "tag": "sums/easy", "step": at, "file": file, "path": f"{at}"}
        for at, file in enumerate(files)
    ]
    run_job("ftjob-a", events)
    assert browser.get("/api/jobs/ftjob-a/sheets").json() == ["sums/easy"]
    found = browser.get("/api/jobs/ftjob-a/sheets/sums%2Feasy").json()
    assert [column["name"] for column in found["columns"]] == ["step 0", "step 1"]
    (problem,) = found["rows"]
    assert problem["reference"] == "4"
    assert [own[0] for own in problem["answers"]] == [
        {"text": "4", "score": 1.0, "note": "75%"},
        {"text": "5", "score": 0.0, "note": "75%"},
    ]


SUITE = ["mine.py:score", "rouge_l", "gsm8k", "mine.py:at_all"]


@pytest.fixture
def suite(served: Served, run_job: Callable[..., Any]) -> str:
    """An evaluation of several sorts, of which each has scored 1 and 0 alone."""
    rows = [*_answers(MODELS[0], {1}), *_answers(MODELS[1], {0, 1, 2})]
    tasks = [name.rpartition(":")[2] for name in SUITE]
    events: list[dict[str, Any]] = [
        {"path": f"evaluation/{task}.jsonl", "file": _file(served, rows)} for task in sorted(tasks)
    ]
    for task in tasks:
        for model, score in zip(MODELS, (0.25, 0.75), strict=True):
            figures = {"score": score, "low": 0.0, "high": 1.0, "problems": 4}
            events.append({"type": "evaluation", "task": task, "model": model, **figures})
    run_job("evaljob-1", events, job_type="custom", model=None, models=[*MODELS], suite=SUITE)
    return "evaljob-1"


def test_only_what_is_checked_is_called_right(browser: httpx.Client, suite: str) -> None:
    """A function of one's own, or a likeness, may give 1 to what is not the expected answer."""
    names = browser.get(f"/api/jobs/{suite}/sheets").json()
    assert names == ["score", "rouge_l", "gsm8k", "at_all"], "as the suite has them"
    marks = [browser.get(f"/api/jobs/{suite}/sheets/{name}").json()["marks"] for name in names]
    assert marks == [False, False, True, False]


def test_an_evaluation_says_in_the_table_whom_it_asked_and_what_came_out(
    browser: httpx.Client, suite: str
) -> None:
    page = browser.get("/api/jobs", params={"model": MODELS[1]}).json()
    (row,) = page["rows"]
    assert row["model"] == "2 models" and row["models"] == [*MODELS]
    assert page["models"] == sorted(MODELS)
    assert row["last"] == "score 0.75 · rouge_l 0.75 · gsm8k 0.75 · at_all 0.75, best of 2"
    assert browser.get("/api/jobs", params={"model": "org/other"}).json()["rows"] == []


@pytest.mark.browser
def test_the_page_tells_shares_from_means(served: Served, chromium: Any, suite: str) -> None:
    visitor = Visitor(chromium, served, 1280, "light")
    page = visitor.page
    visitor.open(f"/job/{suite}", "table.sheet tbody tr")
    heads = page.locator("table.sheet thead")
    assert "mean 0.25, 4 problems" in heads.inner_text()
    assert page.locator("table.sheet", has_text="right").count() == 0
    assert page.locator("table.sheet .role", has_text="expected").count() == 4
    page.get_by_label("Answers to").select_option("gsm8k")
    page.locator("table.sheet thead", has_text="3 of 4 right").wait_for()
    assert "1 of 4 right" in heads.inner_text()
    page.get_by_role("heading", name="Measures").wait_for()
    assert page.get_by_role("heading", name="Charts").count() == 0
    assert visitor.faults() == [] and visitor.errors == []
    visitor.close()


@pytest.mark.browser
@pytest.mark.parametrize(("width", "scheme"), [(1440, "light"), (768, "dark"), (390, "light")])
def test_answers_can_be_read_and_filtered(
    served: Served, chromium: Any, run_job: Callable[..., Any], width: int, scheme: str
) -> None:
    long = "word " * 900 + "x" * 300
    rows = [_answers(name, own, 45) for name, own in zip(MODELS, ({0, 1}, {1, 2}), strict=True)]
    rows[0][0]["completion"] = long
    events = [
        {"path": f"evaluation/gsm8k-{at}.jsonl", "file": _file(served, own)}
        for at, own in enumerate(rows)
    ]
    events.append({"path": "evaluation/x.jsonl", "file": _file(served, _answers("m", {0}))})
    run_job("evaljob-1", events, job_type="custom")
    visitor = Visitor(chromium, served, width, scheme)
    page = visitor.page
    visitor.open("/job/evaljob-1", "table.sheet tbody tr")
    table = page.locator("table.sheet tbody tr")
    assert table.count() == 20 and page.locator("text=1 to 20 of 45").count() == 1
    assert page.locator("table.sheet .completed", has_text="right").count() == 4
    assert visitor.faults() == []
    page.get_by_role("button", name="Later").first.click()
    page.locator("text=21 to 40 of 45").wait_for()
    page.get_by_label("Show", exact=True).select_option("scores")
    table.nth(2).wait_for(state="detached")
    assert table.count() == 2
    assert "only=scores" in page.url
    page.reload()
    table.nth(1).wait_for()
    assert table.count() == 2
    page.get_by_label("Answers to").select_option("x")
    page.locator("text=it says 7").first.wait_for()
    assert visitor.faults() == [] and visitor.errors == []
    visitor.close()
