"""The page without a mouse: where the focus is when what it stood on is drawn again or gone."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from openweights.client.watching import plot
from openweights.dashboard import app
from tests.dashboard.conftest import Served
from tests.dashboard.visitor import Visitor

FOCUSED = "document.activeElement"


def test_the_colours_are_those_of_figures() -> None:
    """But for black, which is the page's text."""
    script = (Path(app.__file__).parent / "static" / "charts.js").read_text()
    colours = re.search(r"COLOURS = \[(.*)\]", script)
    assert colours is not None
    assert re.findall(r"#\w{6}", colours[1]) == list(plot._COLORS[:-1])


@pytest.mark.browser
def test_the_focus_stays_on_what_is_drawn_again(
    served: Served, chromium: Any, run_job: Callable[..., Any]
) -> None:
    for number in range(3):
        run_job(f"ftjob-{number}", [{"step": 1, "loss": 1.0}])
    visitor = Visitor(chromium, served, 1280, "light")
    page = visitor.page
    visitor.open("/jobs", "tr[data-row=ftjob-2]")
    page.get_by_role("button", name="Status").press("Enter")
    page.locator("th[aria-sort] >> text=Status").wait_for()
    assert page.evaluate(f"{FOCUSED}.textContent").startswith("Status")
    page.locator("tr[data-row='ftjob-1'] input").focus()
    run_job("ftjob-new", [{"step": 1, "loss": 1.0}])
    page.locator("tr[data-row=ftjob-new]").wait_for()
    assert page.evaluate(f"{FOCUSED}.getAttribute('aria-label')") == "choose ftjob-1"
    visitor.close()


@pytest.mark.browser
def test_who_follows_a_link_stands_at_the_view_that_it_names(
    served: Served, chromium: Any, run_job: Callable[..., Any]
) -> None:
    run_job("ftjob-0", [{"step": 1, "loss": 1.0}])
    visitor = Visitor(chromium, served, 1280, "light")
    page = visitor.page
    visitor.open("/jobs", "tr[data-row=ftjob-0]")
    assert page.title() == "Jobs · openweights"
    page.locator("tr[data-row=ftjob-0] a").first.press("Enter")
    page.locator("h1 >> text=ftjob-0").wait_for()
    assert page.title() == "ftjob-0 · openweights"
    assert page.evaluate(f"{FOCUSED}.id") == "view"
    address = page.url
    page.locator(".skip").press("Enter")
    assert page.url == address and page.evaluate(f"{FOCUSED}.id") == "view"
    assert visitor.errors == []
    visitor.close()
