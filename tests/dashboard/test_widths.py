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
