"""Jobs, and what they have said, beside one another in a browser."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.dashboard.conftest import Served
from tests.dashboard.visitor import Visitor

pytestmark = pytest.mark.browser


@pytest.mark.parametrize("width", [1280, 400])
def test_losses_of_different_kinds_have_charts_of_their_own(
    served: Served, chromium: Any, run_job: Callable[..., Any], width: int
) -> None:
    """Under one name, in the same colours; and a grouping says what it is of."""
    losses = {"ftjob-a": "sft", "ftjob-b": "dpo", "ftjob-c": "dpo"}
    for at, (name, loss) in enumerate(losses.items()):
        rows = [{"step": s, "loss": 1.0 / s, "grad_norm": 2.0 + s} for s in (1, 2, 3)]
        run_job(name, rows, loss=loss, seed=at, learning_rate=1e-4)
    visitor = Visitor(chromium, served, width, "light")
    page = visitor.page
    visitor.open(f"/compare?jobs={','.join(losses)}", "section.panel .legendtext")
    page.locator("section.panel .legendtext >> nth=2").wait_for()
    charts = page.locator("section.panel")
    heads = [chart.locator("h2").inner_text() for chart in charts.all()]
    assert heads == ["loss (sft)", "loss (dpo)"]
    assert [chart.locator(".legendtext").count() for chart in charts.all()] == [1, 2]
    told = page.locator("table.last thead").inner_text().split()
    assert "(sft)" in told and "(dpo)" in told and "params.\nloss" not in told
    grouping = page.get_by_label("group by").locator("option").all_text_contents()
    assert "loss: sft, dpo" in grouping
    page.get_by_label("y", exact=True).select_option("grad_norm")
    page.locator(".chart.tall .legendtext >> nth=2").wait_for()
    assert charts.count() == 0
    assert visitor.faults() == [] and visitor.errors == []
    visitor.close()


@pytest.mark.parametrize("width", [1280, 400])
def test_each_step_can_be_chosen_whose_answers_were_logged(
    served: Served, chromium: Any, run_job: Callable[..., Any], width: int
) -> None:
    def said(step: int) -> dict[str, Any]:
        asked = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": f"q{step}"},
        ]
        row = {"prompt": f"system\nBe brief.\nuser\nq{step}", "messages": asked}
        return {"type": "completions", "step": step, "completions": [{**row, "completion": "a"}]}

    run_job("ftjob-a", [said(step) for step in range(4)], loss="sdft")
    visitor = Visitor(chromium, served, width, "light")
    page = visitor.page
    visitor.open("/samples?jobs=ftjob-a", "section.panel .part")
    prompts = page.locator("section.panel")
    assert [one.inner_text().split() for one in prompts.all()] == [
        ["system", "Be", "brief.", "user", f"q{step}", "step", str(step), "a"] for step in (0, 3)
    ]
    page.get_by_label("Step", exact=True).select_option("2")
    page.locator("section.panel", has_text="q2").wait_for()
    assert prompts.count() == 1
    page.get_by_label("Step", exact=True).select_option("all")
    page.locator("section.panel >> nth=3").wait_for()
    assert prompts.count() == 4 and page.locator("section.panel", has_text="–").count() == 0
    assert visitor.faults() == [] and visitor.errors == []
    visitor.close()


def test_fields_of_a_form_stand_in_lines(served: Served, chromium: Any) -> None:
    """All of one height, each row's at one height of the page, whatever is said below them."""
    visitor = Visitor(chromium, served, 1280, "light")
    page = visitor.page
    visitor.open("/new", ".fields input")
    places = page.locator(".fields >> nth=0").locator("input, select")
    boxes = [place.bounding_box() for place in places.all()]
    assert len({round(box["height"]) for box in boxes if box}) == 1
    assert len({round(box["y"]) for box in boxes if box}) == -(-len(boxes) // 4), "four beside"
    assert "`" not in page.locator("form").inner_text()
    visitor.open("/jobs", "table")
    bar = page.locator(".bar >> nth=0").locator("> input, > select, > button")
    assert len({round(box["height"]) for one in bar.all() if (box := one.bounding_box())}) == 1
    visitor.close()
