"""As a new user would, with only the page: which of six runs kept most of HumanEval, and why one
failed.
"""

from __future__ import annotations

from typing import Any

import pytest

from openweights.client.runs import Run
from openweights.events import Evaluation
from tests.dashboard.conftest import Served
from tests.dashboard.visitor import Visitor

pytestmark = pytest.mark.browser

# Learning rate and loss, and where HumanEval and the new skill ended; None for the one that failed.
RUNS = [
    ("sft", 1e-5, (0.28, 0.41)),
    ("sft", 1e-4, (0.11, 0.66)),
    ("sft", 5e-4, None),
    ("sdft", 1e-5, (0.30, 0.38)),
    ("sdft", 1e-4, (0.29, 0.61)),
    ("sdft", 5e-4, (0.21, 0.68)),
]
ERROR = "CUDA out of memory; lower per_device_train_batch_size, or set gradient_checkpointing"
START = (0.305, 0.05)


@pytest.fixture
def study(served: Served, run_job: Any) -> list[str]:
    """Six runs that have logged through the SDK, as a trainer does, and an evaluation of them."""
    names: list[str] = []
    for number, (loss, rate, ends) in enumerate(RUNS):
        name = f"ftjob-{number}{loss}"
        claim = run_job(
            name, [], status=None, loss=loss, learning_rate=rate, meta={"study": "code"}
        )
        run = Run(served.ow, claim.run.id)
        for step in range(0, 41 if ends else 7):
            run.log({"step": step, "loss": 2.0 / (1 + step * rate * 1e4)})
            if step % 20 == 0 and ends:
                score = START[1] + (ends[1] - START[1]) * step / 40
                run.log({"step": step, "tag": "skill", "pass_rate": round(score, 4)})
        run.close()
        backend = served.ow.backend
        if ends is None:
            backend.append_log(claim.run.id, 0, b"step 6\n" * 50 + f"{ERROR}\n".encode())
        status, error = ("failed", ERROR) if ends is None else ("completed", None)
        backend.finish_run(claim.run.id, claim.run.attempt, status, error=error)
        names.append(name)
    run_job(
        "evaljob-study",
        [_score("org/model", START[0], None)]
        + [
            _score(name, ends[0], ends[0] - START[0])
            for name, (_, _, ends) in zip(names, RUNS, strict=True)
            if ends is not None
        ],
        models=["org/model", *names],
    )
    return names


def _score(model: str, score: float, change: float | None) -> dict[str, Any]:
    """What `ow.evaluate` logs of a model."""
    difference = None if change is None else (change, change - 0.05, change + 0.05)
    interval = {"low": score - 0.05, "high": score + 0.05}
    event = Evaluation(
        model=model, task="humaneval", score=score, problems=164, difference=difference, **interval
    )
    return event.data()


def test_the_page_answers_a_studys_questions(
    served: Served, chromium: Any, study: list[str]
) -> None:
    visitor = Visitor(chromium, served, 1280, "light")
    page = visitor.page
    # The table says why one failed, before anything is clicked.
    visitor.open("/jobs", "svg.spark")
    failed = page.locator("tr", has=page.locator(".status.failed"))
    assert failed.count() == 1 and failed.locator("td[data-column=last]").inner_text() == ERROR
    # All of the study, ticked and compared.
    page.get_by_label("Tag", exact=True).fill("study=code")
    page.locator("text=1 to 6 of 6").wait_for()
    for box in page.get_by_role("checkbox", name="choose ftjob").all():
        box.check()
    page.keyboard.press("c")
    page.locator("h2 >> text=Where they ended").wait_for()
    # Which kept most: the table, sorted by what it is about.
    page.locator("table.last thead").get_by_role("button", name="humaneval").click()
    page.locator("th[aria-sort=descending]").wait_for()
    rows = page.locator("table.last tbody tr")
    assert rows.first.get_attribute("data-row") == "ftjob-3sdft"
    assert (
        "0.3 −0.005" in " ".join(rows.first.inner_text().split())
        and "0.3000" not in rows.first.inner_text()
    )
    assert rows.last.get_attribute("data-row") == "ftjob-2sft", "what was not measured comes last"
    assert ERROR in rows.last.inner_text()
    # The frontier: what was kept against what was learned.
    page.get_by_label("x of last values").select_option("pass_rate[skill]")
    page.get_by_label("y of last values").select_option("humaneval")
    page.locator("[aria-label='last values of two measures'] .point").nth(4).wait_for()
    assert "sx=pass_rate%5Bskill%5D" in page.url
    visitor.photograph("/compare")
    # The best one's own page has its scores, with the evaluation that found them.
    page.locator("table.last a", has_text="ftjob-3sdft").click()
    page.locator("a", has_text="evaljob-study").wait_for()
    visitor.photograph("/job/ftjob-3sdft")
    page.go_back()
    page.locator("table.last").wait_for()
    # The failed job's own page says it, too, and its log has the place.
    page.locator("table.last a", has_text="ftjob-2sft").click()
    page.locator("dd .problem", has_text="CUDA out of memory").wait_for()
    page.locator(".log", has_text="CUDA out of memory").wait_for()
    assert visitor.errors == []
    visitor.close()
