"""The page in headless Chromium: every view opened, read and clicked, at two widths and in both
colour schemes, without an error in the console; labels, contrast, and markup that stays text.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.dashboard.conftest import Served

pytestmark = pytest.mark.browser
playwright = pytest.importorskip("playwright.sync_api")

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
MARKUP = [
    "<script>window.hit=1</script>",
    "<img src=x onerror='window.hit=1'>",
    "<svg onload=window.hit=1>",
    '"><script>window.hit=1</script>',
    "'><img src=x onerror=window.hit=1>",
    "<iframe srcdoc='<script>parent.hit=1</script>'>",
    "<a href='javascript:window.hit=1'>x</a>",
    "<body onload=window.hit=1>",
    "<details open ontoggle=window.hit=1>",
    "<video><source onerror=window.hit=1>",
    "<input autofocus onfocus=window.hit=1>",
    "<math><mtext></mtext><script>window.hit=1</script></math>",
    "</textarea><script>window.hit=1</script>",
    "</title><script>window.hit=1</script>",
    "<style>@import 'javascript:window.hit=1'</style>",
    "<base href='//evil.example/'>",
    "<meta http-equiv=refresh content='0;url=javascript:window.hit=1'>",
    "<object data='javascript:window.hit=1'>",
    "<embed src='javascript:window.hit=1'>",
    "<form action='javascript:window.hit=1'><button>x</button></form>",
    "<b>plotly</b><br>",
    '<a href="data:text/html,<script>opener.hit=1</script>">x</a>',
    "${window.hit=1}",
    "{{constructor.constructor('window.hit=1')()}}",
    "javascript:window.hit=1",
    '<img src=1 href=1 onerror="javascript:window.hit=1"></img>',
    "<audio src=1 onerror=window.hit=1>",
    "<marquee onstart=window.hit=1>",
    "<keygen autofocus onfocus=window.hit=1>",
    "<isindex type=image src=1 onerror=window.hit=1>",
    "&lt;script&gt;window.hit=1&lt;/script&gt;",
    "<scr<script>ipt>window.hit=1</scr</script>ipt>",
    "<SCRIPT>window.hit=1</SCRIPT>",
    "<img/src='x'/onerror=window.hit=1>",
    "<table background='javascript:window.hit=1'>",
    "<link rel=stylesheet href='javascript:window.hit=1'>",
    "<div style='background:url(javascript:window.hit=1)'>",
    "<svg><animate onbegin=window.hit=1 attributeName=x>",
    "\u0000<script>window.hit=1</script>",
    "<!--<script>window.hit=1</script>-->",
]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("there is no Chromium; install one, or name it with CHROMIUM")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


class Visitor:
    """A browser's window that keeps what its console said.

    Pictures of what it saw go into the folder that `OW_TEST_SCREENSHOTS` names.
    """

    def __init__(self, chromium: Any, served: Served, width: int, scheme: str) -> None:
        size = {"width": width, "height": 900}
        self._name = f"{width}-{scheme}"
        self._context = chromium.new_context(viewport=size, color_scheme=scheme)
        self.page = self._context.new_page()
        self.errors: list[str] = []
        self._url = served.url
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(f"{served.url}/?token={served.tokens[-1]}")

    def _console(self, message: Any) -> None:
        if message.type == "error":
            self.errors.append(message.text)

    def open(self, view: str, until: str) -> None:
        """Go to a view and wait for an element or text of it."""
        self.page.goto(f"{self._url}/#{view}")
        self.page.locator(until).first.wait_for(timeout=20_000)
        folder = os.environ.get("OW_TEST_SCREENSHOTS")
        if folder:
            self.page.wait_for_timeout(700)
            name = re.sub(r"\W+", "-", view.partition("?")[0]).strip("-")
            path = Path(folder) / f"{name}-{self._name}.png"
            self.page.screenshot(path=path, full_page=True)

    def close(self) -> None:
        self._context.close()


@pytest.fixture(params=[(1280, "light"), (400, "dark")], ids=["wide", "narrow"])
def visitor(request: Any, chromium: Any, served: Served) -> Iterator[Visitor]:
    window = Visitor(chromium, served, *request.param)
    yield window
    window.close()


@pytest.fixture
def jobs(served: Served, run_job: Any) -> list[str]:
    names = [f"ftjob-{number}" for number in range(4)]
    for number, name in enumerate(names):
        events = [{"step": step, "loss": 2.0 / (step + number + 1)} for step in range(1, 31)]
        events += [{"step": step, "tag": "eval", "loss": 2.2 / step} for step in (10, 20, 30)]
        said = [{"prompt": "hello", "completion": f"answer {step}"} for step in (1, 2)]
        events += [
            {"type": "completions", "step": step, "completions": [row]}
            for step, row in zip((1, 30), said, strict=True)
        ]
        failed = number == 3
        run_job(
            name,
            events,
            log="line\n" * 300,
            status="failed" if failed else "completed",
            error="CUDA out of memory" if failed else None,
            learning_rate=1e-4 * (1 + number // 2),
            seed=number % 2,
        )
    return names


def test_every_view(served: Served, visitor: Visitor, jobs: list[str]) -> None:
    rows = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}]
    content = "".join(json.dumps(row) + "\n" for row in rows * 30).encode()
    file = served.ow.files.create(content, "conversations")["id"]
    both = ",".join(jobs)
    for view, until in (
        ("/jobs", "svg.spark"),
        (f"/job/{jobs[0]}", ".js-plotly-plot .legend"),
        (f"/job/{jobs[3]}", "text=CUDA out of memory"),
        (f"/compare?jobs={both}&group=learning_rate&sx=loss&sy=eval_loss", ".js-plotly-plot"),
        (f"/samples?jobs={jobs[0]}", "ins"),
        ("/data", f"text={file}"),
        (f"/data/{file}", ".part.learned"),
        (f"/new?from={jobs[0]}", "text=Submit"),
        ("/cluster", "td >> text=worker"),
        (f"/chat?a={jobs[0]}", "text=Send"),
    ):
        visitor.open(view, until)
        assert _faults(visitor.page) == [], view
    assert visitor.errors == []


def _faults(page: Any) -> list[str]:
    """Controls without a name, text without contrast, and content wider than the window."""
    return page.evaluate(
        """() => {
          const faults = [];
          for (const one of document.querySelectorAll("input, select, textarea, button, a")) {
            const name = one.getAttribute("aria-label") || one.textContent.trim() || one.placeholder
              || [...(one.labels || [])].map((label) => label.textContent.trim()).join("");
            if (!name) faults.push("no name: " + one.outerHTML.slice(0, 80));
          }
          const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
          const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
            .map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
            .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
          const ground = (one) => {
            for (let at = one; at; at = at.parentElement) {
              const [r, g, b, a = 1] = parts(getComputedStyle(at).backgroundColor);
              if (a === 1) return [r, g, b];
            }
            return [255, 255, 255];
          };
          for (const one of document.querySelectorAll("#view *, header *")) {
            const own = [...one.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
            const exempt = one.closest("svg, :disabled, .token, option");
            if (!own || exempt || !one.offsetParent) continue;
            const [a, b] = [light(parts(getComputedStyle(one).color)), light(ground(one))].sort();
            const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
            const place = one.outerHTML.slice(0, 80);
            if (ratio < 4.5) faults.push("contrast " + ratio.toFixed(2) + ": " + place);
          }
          const wide = document.documentElement.scrollWidth;
          if (wide > innerWidth + 1) faults.push("wider than the window");
          return faults;
        }"""
    )


def test_the_check_of_faults_finds_them(visitor: Visitor, jobs: list[str]) -> None:
    """The control of `_faults`."""
    visitor.open("/jobs", "svg.spark")
    visitor.page.evaluate(
        """() => {
          const view = document.getElementById("view");
          const pale = document.createElement("p");
          pale.textContent = "pale";
          pale.style.cssText = "color:#888;background:#999;width:3000px";
          view.append(pale, document.createElement("input"));
        }"""
    )
    found = " ".join(_faults(visitor.page))
    assert "no name" in found and "contrast" in found and "wider" in found


def test_markup_stays_text(served: Served, visitor: Visitor, run_job: Any) -> None:
    """In names, parameters, logs, answers and datasets."""
    said = [{"prompt": text, "completion": text, "rewards": {text: 1.0}} for text in MARKUP]
    events: list[dict[str, Any]] = [{"type": "completions", "step": 1, "completions": said}]
    events += [{"step": step, text: 1.0 * step} for text in MARKUP for step in (1, 2)]
    meta = {text: text for text in MARKUP}
    claim = run_job(
        "ftjob-x",
        events,
        log="\n".join(MARKUP),
        model=MARKUP[0],
        meta=meta,
        status="failed",
        error=MARKUP[1],
    )
    row = {"messages": [{"role": text, "content": text} for text in MARKUP], "other": MARKUP}
    file = served.ow.files.create(json.dumps(row).encode(), "result")["id"]
    for view, until in (
        ("/jobs", "text=ftjob-x"),
        (f"/job/{claim.job.id}", ".js-plotly-plot"),
        (f"/compare?jobs={claim.job.id}", ".js-plotly-plot"),
        (f"/samples?jobs={claim.job.id}", ".answer"),
        (f"/data/{file}", ".part"),
        ("/new?from=ftjob-x", "text=Submit"),
    ):
        visitor.open(view, until)
        visitor.page.wait_for_timeout(300)
        assert visitor.page.evaluate("window.hit") is None, view
        foreign = "iframe, object, embed, base, #view script, #view img[src=x], marquee"
        assert visitor.page.locator(foreign).count() == 0
    assert not [error for error in visitor.errors if "Content Security Policy" not in error]


def test_a_job_is_made_watched_and_canceled(
    served: Served, chromium: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    file = served.ow.files.create(json.dumps(row).encode(), "conversations")["id"]
    visitor = Visitor(chromium, served, 1280, "light")
    page = visitor.page
    visitor.open("/new", "text=Submit")
    page.fill("input[name=training_file]", file)
    page.get_by_role("button", name="Check").click()
    page.locator("pre.problem >> text=model").wait_for()
    page.fill("input[name=model]", "org/model")
    page.select_option("select[name=loss]", "sdft")
    page.locator("summary", has_text="Where it runs").click()
    page.fill("input[name='control:allowed_hardware']", "8x H200")
    page.get_by_role("button", name="Submit").click()
    page.locator("h1 >> text=ftjob-").wait_for()
    (job,) = served.ow.jobs.list()
    assert job.params["validated_params"]["loss"] == "sdft"
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("button", name="Cancel the job").click()
    page.locator(".status.canceled").wait_for()
    assert job.refresh().status == "canceled"
    visitor.close()


def test_the_table_is_live_and_has_keys(
    served: Served, chromium: Any, jobs: list[str], run_job: Any
) -> None:
    visitor = Visitor(chromium, served, 1280, "light")
    page = visitor.page
    visitor.open("/jobs", "svg.spark")
    run_job("ftjob-new", [{"step": 1, "loss": 1.0}], status=None)
    page.locator("tr[data-row=ftjob-new] >> text=in progress").wait_for()
    served.ow.jobs.cancel("ftjob-new")
    page.locator("tr[data-row=ftjob-new] >> text=canceled").wait_for()
    page.keyboard.press("/")
    page.keyboard.type("ftjob-1")
    page.locator("text=1 to 1 of 1").wait_for()
    assert "text=ftjob-1" in page.url
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    page.locator("h1 >> text=ftjob-1").wait_for()
    visitor.close()
