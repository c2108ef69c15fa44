"""Tables and headings in windows of every width."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.dashboard.conftest import Served
from tests.dashboard.visitor import Visitor

pytestmark = pytest.mark.browser


@pytest.mark.parametrize("width", [1280, 768, 390])
def test_the_table_of_jobs_fits_the_window(
    served: Served, chromium: Any, run_job: Callable[..., Any], width: int
) -> None:
    """With the words that are usual, and nothing that counts is left out of a small one."""
    model = "HuggingFaceTB/SmolLM2-135M-Instruct"
    for n, status in enumerate(("completed", "failed", "canceled")):
        rows = [{"step": s, "loss": 1 / s} for s in (1, 2, 3)]
        run_job(f"ftjob-{n}c65d3aa10bf", rows, status=status, model=model, learning_rate=3e-4)
    run_job("inferencejob-159f1e73b19b", [], job_type="custom", model="ftjob-0c65d3aa10bf")
    visitor = Visitor(chromium, served, width, "light")
    page = visitor.page
    visitor.open("/jobs", "td[data-column=id]")
    page.locator(".scroll table td").first.wait_for()
    wide = "(() => { const t = document.querySelector('.scroll table');"
    wide += " return t.offsetWidth - t.parentElement.clientWidth; })()"
    assert page.evaluate(wide) <= 1
    nav = "(() => { const n = document.querySelector('nav');"
    nav += " return n.scrollWidth - n.clientWidth; })()"
    assert page.evaluate(nav) <= 0, "every entry of the menu is there"
    row = page.locator("tr[data-row=ftjob-0c65d3aa10bf]").inner_text()
    for told in ("completed", "sft", "SmolLM2-135M-Instruct", "loss 0.3333"):
        assert told in row
    broken = """() => [...document.querySelectorAll("tr[data-row=ftjob-0c65d3aa10bf] .clip")]
      .flatMap((one) => [...one.childNodes]).filter((node) => node.data === "HuggingFaceTB/")
      .map((node) => { const r = document.createRange(); r.selectNode(node);
        return r.getClientRects().length; }).filter((count) => count > 1)"""
    assert page.evaluate(broken) == [], "a word stands in one line"
    assert visitor.faults() == [] and visitor.errors == []
    visitor.close()


@pytest.mark.parametrize("width", [1280, 768, 390])
def test_headings_are_whole(
    served: Served, chromium: Any, run_job: Callable[..., Any], width: int
) -> None:
    for name, rate in (("ftjob-a", 1e-4), ("ftjob-b", 1e-3)):
        told = {"step": 1, "loss": 1.0, "learning_rate": 0.25, "reward_mean_of_everything": 1.0}
        run_job(name, [told], learning_rate=rate, per_device_train_batch_size=int(rate * 1e4))
    visitor = Visitor(chromium, served, width, "light")
    visitor.open("/compare?jobs=ftjob-a,ftjob-b&all=1", "table.last td")
    cut = """() => [...document.querySelectorAll("table.last thead .clip")]
      .filter((one) => one.scrollHeight > one.clientHeight + 1
        || one.scrollWidth > one.clientWidth + 1).map((one) => one.title)"""
    assert visitor.page.evaluate(cut) == []
    assert visitor.faults() == []
    visitor.close()


LONG = "an-organization-with-a-long-name/A-Model-With-A-Much-Longer-Name-70B-Instruct-preview"


@pytest.mark.parametrize("width", [1440, 768, 390])
def test_long_names_and_digits_leave_what_tells_jobs_apart(
    served: Served, chromium: Any, run_job: Callable[..., Any], width: int
) -> None:
    """In the table, beside one another, in the scores of an evaluation, and in the queue."""
    suffix = "seed-{}-of-the-sweep"
    ids = [f"ftjob-{n}c65d3aa10bf-{suffix.format(n)}" for n in (1, 3)]
    for n, name in zip((1, 3), ids, strict=True):
        told = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]
        run_job(name, told, model=LONG, learning_rate=n * 1e-4)
    own = {"low": 0.1, "high": 0.9, "problems": 4, "model": ids[0]}
    task = "an_own_task_with_a_very_long_name_of_its_function"
    scored = [{"type": "evaluation", "task": name, "score": 0.5} | own for name in (task, "gsm8k")]
    run_job("evaljob-159f1e73b19b", scored, job_type="inference", models=[ids[0]])
    visitor = Visitor(chromium, served, width, "dark")
    page = visitor.page
    visitor.open("/jobs", f"tr[data-row={ids[1]}]")
    row = page.locator(f"tr[data-row={ids[1]}]").inner_text()
    assert "A-Model-With" in row and "an-organization" not in row
    assert width < 1000 or "3e-4" in row.split()
    visitor.open(f"/compare?jobs={','.join(ids)}", "table.last td")
    links = page.locator("table.last th[scope=row] a")
    cut = "one => one.scrollWidth > one.clientWidth + 1 || one.scrollHeight > one.clientHeight + 1"
    assert [links.nth(n).evaluate(cut) for n in range(2)] == [False, False], "the id is whole"
    shown = page.locator("table.last").inner_text()
    assert "3e-4" in shown and "3.00000" not in shown
    visitor.open("/job/evaljob-159f1e73b19b", "h2:has-text('Scores')")
    score = page.locator("td.number", has_text="0.5").first.bounding_box()
    assert score is not None and score["x"] + score["width"] < width, "the score is in view"
    run_job("ftjob-5c65d3aa10bf", [], status=None)
    run_job("ftjob-7c65d3aa10bf", [], status="failed", model=LONG)
    assert visitor.faults() == [] and visitor.errors == []
    visitor.close()
