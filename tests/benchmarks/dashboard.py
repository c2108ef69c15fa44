"""How fast the page is with a full store: `python -m tests.benchmarks.dashboard [--jobs 10000]
[--events 1000000]`.

Times are also given as multiples of an empty page's, loaded by the same browser in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from playwright.sync_api import Page, sync_playwright

from openweights import OpenWeights
from openweights.settings import Settings
from openweights.types import EventDraft, JobSpec, WorkerSpec
from tests.dashboard.conftest import serving
from tests.dashboard.visitor import FLAGS

RUNS = 20
STEPS = 2000
FOLLOW_S = 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--events", type=int, default=1_000_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        ow = OpenWeights(settings=Settings(home=Path(home), log_limit_mb=200))
        runs = fill(ow, options.jobs, options.events)
        with serving(ow) as served, sync_playwright() as driver:
            chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
            browser = driver.chromium.launch(executable_path=chromium, args=FLAGS)
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.goto(f"{served.url}/?token={served.tokens[-1]}")
            figures = measure(page, served.url, ow, runs, options.events)
            browser.close()
        ow.close()
    print(json.dumps({"jobs": options.jobs, "events": options.events, **figures}, indent=1))


def fill(ow: OpenWeights, jobs: int, events: int) -> list[str]:
    """`RUNS` jobs with curves, one with a long history, and others that wait; ids of the first."""
    backend = ow.backend
    backend.register_worker(WorkerSpec(id="worker"))
    runs = [f"ftjob-run{number:02}" for number in range(RUNS)]
    for job_id in [*runs, "ftjob-long"]:
        backend.submit_job(spec(job_id))
        claim = backend.claim_job("worker")
        assert claim is not None
        count = events if job_id == "ftjob-long" else STEPS
        for start in range(0, count, 5000):
            steps = range(start, min(start + 5000, count))
            backend.append_events(claim.run.id, [draft(step) for step in steps])
        if job_id != "ftjob-long":
            backend.finish_run(claim.run.id, claim.run.attempt, "completed")
    for number in range(jobs - len(runs) - 1):
        backend.submit_job(spec(f"ftjob-{number:06}"))
    return runs


def spec(job_id: str) -> JobSpec:
    params = {"model": "org/model", "loss": "sdft", "learning_rate": 1e-4, "meta": {"sweep": "a"}}
    return JobSpec(
        id=job_id,
        type="fine-tuning",
        script="true",
        params={"validated_params": params, "cloud_type": "SECURE"},
        model="org/model",
    )


def draft(step: int) -> EventDraft:
    return EventDraft(str(step), {"step": step, "loss": 1 / (step + 1)}, datetime.now(UTC))


def measure(page: Page, url: str, ow: OpenWeights, runs: list[str], events: int) -> dict[str, Any]:
    def timed(view: str, until: str) -> float:
        page.goto("about:blank")
        start = time.perf_counter()
        page.goto(f"{url}/#{view}")
        page.locator(until).first.wait_for(timeout=120_000)
        return time.perf_counter() - start

    page.goto("about:blank")
    empty = median(lambda: timed_empty(page, url))
    chart = ".js-plotly-plot .scatterlayer .trace"
    picture = f".chart.tall .preview path, {chart}"
    overlay = f"/compare?jobs={','.join(runs)}"
    figures = {
        "empty_page_s": empty,
        "jobs_first_s": timed("/jobs", "tr[data-row]"),
        "jobs_s": median(lambda: timed("/jobs", "tr[data-row]")),
        "overlay_first_picture_s": timed(overlay, picture),
        "overlay_picture_s": median(lambda: timed(overlay, picture)),
        "overlay_chart_s": median(lambda: timed(overlay, chart)),
        "overlay_from_table_s": median(lambda: from_table(page, url, overlay, chart)),
        "long_history_first_paint_s": timed("/job/ftjob-long", "h1 >> text=ftjob-long"),
        "long_history_first_chart_s": timed("/job/ftjob-long", chart),
    }
    start = time.perf_counter()
    page.locator("text=Reading a long history").wait_for(state="detached", timeout=300_000)
    figures["long_history_complete_s"] = time.perf_counter() - start
    figures |= followed(page, url, ow, events)
    ratios = {f"{k}_of_empty": v / empty for k, v in figures.items() if k.endswith("_s")}
    figures["load"] = os.getloadavg()[0]
    return {k: round(v, 3) for k, v in (figures | ratios).items()}


def from_table(page: Page, url: str, overlay: str, until: str) -> float:
    """As most people come to it: the charts' library was loaded while they looked at the table."""
    page.goto("about:blank")
    page.goto(f"{url}/#/jobs")
    while not page.evaluate("Boolean(window.Plotly)"):
        page.wait_for_timeout(50)
    start = time.perf_counter()
    page.goto(f"{url}/#{overlay}")
    page.locator(until).first.wait_for(timeout=120_000)
    return time.perf_counter() - start


def timed_empty(page: Page, url: str) -> float:
    page.goto("about:blank")
    start = time.perf_counter()
    page.goto(f"{url}/#/login")
    page.locator("h1 >> text=Log in").wait_for()
    return time.perf_counter() - start


def median(call: Callable[[], float], count: int = 5) -> float:
    return sorted(call() for _ in range(count))[count // 2]


def followed(page: Page, url: str, ow: OpenWeights, last: int) -> dict[str, float]:
    """What the page and the server hold before and after a minute of a log at 1 MB a second and ten
    measurements a second.

    Args:
        last: The last step that was logged.
    """
    job = ow.jobs.retrieve("ftjob-long")
    run = job.runs[-1]
    stop = threading.Event()

    def write() -> None:
        offset, step, piece = 0, last, b"a line of the log, as a trainer writes it\n" * 5000
        while not stop.wait(0.2):
            ow.backend.append_log(run.id, offset, piece)
            ow.backend.append_events(run.id, [draft(step + 1), draft(step + 2)])
            offset, step = offset + len(piece), step + 2

    writer = threading.Thread(target=write)
    writer.start()
    try:
        page.goto("about:blank")
        page.goto(f"{url}/#/job/ftjob-long")
        page.locator(".log").wait_for()
        page.wait_for_timeout(10_000)
        before = held(page)
        page.wait_for_timeout(FOLLOW_S * 1000)
        after = held(page)
    finally:
        stop.set()
        writer.join()
    return {f"{name}_before": before[name] for name in before} | {
        f"{name}_after": after[name] for name in after
    }


def held(page: Page) -> dict[str, float]:
    """The page's heap and elements, and the memory of this process, which serves it."""
    return {
        "heap_mb": heap(page),
        "elements": page.evaluate("document.querySelectorAll('*').length"),
        "server_mb": psutil.Process().memory_info().rss / 1e6,
    }


def heap(page: Page) -> float:
    session = page.context.new_cdp_session(page)
    session.send("HeapProfiler.collectGarbage")
    return float(session.send("Runtime.getHeapUsage")["usedSize"]) / 1e6


if __name__ == "__main__":
    main()
