"""Jobs beside one another in a browser."""

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
