"""A page of another origin, in a browser that is let in: it can neither act nor read."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.dashboard.conftest import Served
from tests.dashboard.visitor import Visitor

pytestmark = pytest.mark.browser

# Every way by which a page reaches another server; each says what it could read.
ATTACK = (Path(__file__).parent / "attack.html").read_text()


@pytest.fixture
def elsewhere(served: Served) -> Iterator[int]:
    """The port of a server with the attacking page."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.end_headers()
            self.wfile.write(ATTACK.replace("TARGET", served.url).encode())

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Page)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_port
    server.shutdown()
    server.server_close()
    thread.join()


# To browsers another port of this machine is the same site, so our cookie goes along: only the
# server tells the origins apart. Another name is another site.
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_page_of_another_origin_cannot_act_or_read(
    served: Served, chromium: Any, run_job: Any, elsewhere: int, host: str
) -> None:
    run_job("ftjob-1", [{"step": 1, "loss": 1.0}], status=None)
    visitor = Visitor(chromium, served, 1280, "light")
    visitor.open("/jobs", "tr[data-row=ftjob-1]")
    page = visitor.page.context.new_page()
    page.goto(f"http://{host}:{elsewhere}/")
    while (results := page.evaluate("window.results")) is None:
        page.wait_for_timeout(100)
    assert {name for name, read in results.items() if read not in ("", "blocked")} == set()
    assert served.ow.jobs.retrieve("ftjob-1").status == "in_progress"
    # The control: the same browser's own page may.
    row = visitor.page.locator("tr[data-row=ftjob-1]")
    row.get_by_role("button", name="Cancel").click()
    visitor.page.get_by_role("button", name="Cancel the job").click()
    row.locator("text=canceled").wait_for()
    cookies = json.dumps(page.context.cookies())
    assert '"sameSite": "Strict"' in cookies and '"httpOnly": true' in cookies
    visitor.close()
