"""A browser's window on the page."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.dashboard.conftest import Served

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


FAULTS = """() => {
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
          // Of WCAG 2.2, AA: targets of 24 pixels (2.5.8), headings in order (1.3.1); ids once.
  for (const one of document.querySelectorAll("button, select, input:not([type=checkbox])")) {
    const { width, height } = one.getBoundingClientRect();
    const place = one.outerHTML.slice(0, 80);
    if (height && Math.min(width, height) < 23.5) faults.push("small: " + place);
  }
  const levels = [...document.querySelectorAll("h1, h2, h3, h4")].map((h) => +h.tagName[1]);
  const isJump = levels.some((level, at) => level > (levels[at - 1] || 0) + 1);
  const first = levels.filter((level) => level === 1).length;
  if (isJump || first !== 1) faults.push("headings " + levels);
  for (const one of document.querySelectorAll("td, th, dt, dd, h1, h2, h3, .clip")) {
    // A box of several lines may hide what does not fit; what stands out covers its neighbours.
    const hides = getComputedStyle(one).overflowX !== "visible" || one.closest("svg, .scroll dd");
    const place = one.outerHTML.slice(0, 80);
    if (!hides && one.scrollWidth > one.clientWidth + 1) faults.push("stands out: " + place);
  }
  const ids = [...document.querySelectorAll("[id]")].map(({ id }) => id);
  faults.push(...ids.filter((id, at) => ids.indexOf(id) < at).map((id) => "id " + id));
  if (!document.documentElement.lang || !document.title) faults.push("no language");
  const wide = document.documentElement.scrollWidth;
          if (wide > innerWidth + 1) faults.push("wider than the window");
          return faults;
        }
"""


class Visitor:
    """A browser's window that keeps what its console said.

    Pictures of what it saw go into the folder that `OW_TEST_SCREENSHOTS` names.
    """

    def __init__(self, chromium: Any, served: Served, width: int, scheme: str) -> None:
        size = {"width": width, "height": 900}
        self._name = f"{width}-{scheme}"
        self._chromium = chromium
        self._context = chromium.new_context(viewport=size, color_scheme=scheme)
        # Bounds what never comes: on a machine that does much else a view takes long.
        self._context.set_default_timeout(60_000)
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
        self.page.locator(until).first.wait_for()
        self.photograph(view)

    def photograph(self, view: str) -> None:
        """Keep a picture of the page as it is now, where pictures are wanted."""
        folder = os.environ.get("OW_TEST_SCREENSHOTS")
        if folder:
            self.page.wait_for_timeout(700)
            test = os.environ["PYTEST_CURRENT_TEST"].rpartition("::")[2].partition("[")[0]
            name = re.sub(r"\W+", "-", f"{test} {view.partition('?')[0]}").strip("-")
            path = Path(folder) / f"{name}-{self._name}.png"
            self.page.screenshot(path=path, full_page=True)

    def faults(self) -> list[str]:
        """Controls without a name, text without contrast, and content wider than the window."""
        return self.page.evaluate(FAULTS)

    @contextmanager
    def timed(self) -> Iterator[list[float]]:
        """Of each task of the page's main thread how long it kept the processor, in seconds, once
        the block is left: a page that is at a task draws nothing and answers nobody. How long it
        waits for the processor of a busy machine does not count.
        """
        tasks: list[float] = []
        categories = ["toplevel", "disabled-by-default-devtools.timeline"]
        self._chromium.start_tracing(page=self.page, categories=categories)
        yield tasks
        # The task of the last command counts once it has ended: this runs in a later one.
        self.page.evaluate("() => new Promise((done) => { setTimeout(done); })")
        events = json.loads(self._chromium.stop_tracing())["traceEvents"]
        named = (event for event in events if event.get("name") == "thread_name")
        main = {(e["pid"], e["tid"]) for e in named if e["args"]["name"] == "CrRendererMain"}
        own = (event for event in events if (event["pid"], event["tid"]) in main)
        tasks += [event.get("tdur", 0) / 1e6 for event in own if event["name"] == "RunTask"]

    def close(self) -> None:
        self._context.close()
