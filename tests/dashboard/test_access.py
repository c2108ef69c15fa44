"""Nobody gets in without token or key, and no other page acts through a browser that is in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.routing import Route

from openweights import OpenWeights
from openweights.dashboard.access import Sessions
from openweights.dashboard.app import create_app
from tests.dashboard.conftest import API_KEY, COOKIE, PAGE, Served, serving
from tests.supabase_double.team import Team

GUARDED = [
    "/api/state",
    "/api/jobs",
    "/api/jobs/stream",
    "/api/jobs/x",
    "/api/series?jobs=x",
    "/api/runs/1/log",
    "/api/files",
    "/api/files/x/content",
    "/api/kinds",
    "/api/workers",
]


@pytest.mark.parametrize("path", GUARDED)
def test_the_api_needs_a_session(served: Served, path: str) -> None:
    for cookies in ({}, {COOKIE: "made-up"}):
        response = httpx.get(served.url + path, cookies=cookies, headers=PAGE)
        assert response.status_code == 401, path


def test_every_route_is_guarded(ow: OpenWeights) -> None:
    """A route that is added later is below `/api` or `/v1`, which the gate guards as a whole."""
    app = create_app(Sessions(ow, API_KEY, lambda token: None), None, COOKIE)
    paths = [route.path for route in app.routes if isinstance(route, Route)]
    open_to_all = {"/", "/login", "/logout", "/static/plotly.min.js"}
    assert {p for p in paths if not p.startswith(("/api/", "/v1/"))} == open_to_all


def test_a_token_lets_one_browser_in(served: Served) -> None:
    first = served.tokens[-1]
    browser = served.browser()
    assert browser.get("/api/state").json()["store"] == "this machine"
    again = httpx.get(f"{served.url}/?token={first}")
    assert COOKIE not in again.cookies
    assert served.tokens[-1] != first
    assert httpx.get(f"{served.url}/?token=wrong").cookies.get(COOKIE) is None


def test_the_cookie_is_the_browsers_alone_and_the_address_has_no_secret(served: Served) -> None:
    response = httpx.get(f"{served.url}/?token={served.tokens[-1]}")
    cookie = response.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie
    assert response.headers["location"] == "/"
    assert response.headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"x-openweights": "page", "origin": "https://elsewhere.example"},
        {"x-openweights": "page", "sec-fetch-site": "cross-site"},
        {"x-openweights": "other"},
    ],
)
def test_another_origins_page_cannot_act(
    served: Served, run_job: Any, headers: dict[str, str]
) -> None:
    run_job("ftjob-1", [], status=None)
    browser = served.browser()
    cookies = dict(browser.cookies)
    response = httpx.post(f"{served.url}/api/jobs/ftjob-1/cancel", headers=headers, cookies=cookies)
    assert response.status_code == 403
    assert served.ow.jobs.retrieve("ftjob-1").status == "in_progress"
    # The control: our own page may.
    own = {"origin": served.url, "sec-fetch-site": "same-origin"}
    assert browser.post("/api/jobs/ftjob-1/cancel", headers=own).status_code == 200
    assert served.ow.jobs.retrieve("ftjob-1").status == "canceled"


@pytest.fixture
def bound(ow: OpenWeights) -> Iterator[httpx.Client]:
    from starlette.testclient import TestClient

    sessions = Sessions(ow, API_KEY, lambda token: None)
    app = create_app(sessions, frozenset({"127.0.0.1:8500"}), COOKIE)
    with TestClient(app, base_url="http://127.0.0.1:8500") as client:
        yield client


def test_a_name_that_is_made_to_point_here_opens_nothing(bound: httpx.Client) -> None:
    assert bound.get("/").status_code == 200
    for host in ("evil.example", "evil.example:8500", ""):
        assert bound.get("/", headers={"host": host}).status_code == 421


def test_login_with_a_key(served: Served) -> None:
    with httpx.Client(base_url=served.url, headers=PAGE) as client:
        assert client.post("/login", json={"key": "wrong"}).status_code == 401
        assert client.get("/api/state").status_code == 401
        assert client.post("/login", json={"key": API_KEY}).status_code == 200
        assert client.get("/api/state").status_code == 200
        client.post("/logout")
        assert client.get("/api/state").status_code == 401


@pytest.mark.parametrize("authorization", [None, "Bearer wrong", "Basic x", "Bearer"])
def test_programs_need_the_key(served: Served, authorization: str | None) -> None:
    headers = {} if authorization is None else {"authorization": authorization}
    response = httpx.get(f"{served.url}/v1/files", headers=headers)
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"


def test_what_is_served_runs_no_foreign_code(served: Served) -> None:
    policy = httpx.get(served.url).headers["content-security-policy"]
    assert "script-src 'self';" in policy and "unsafe-eval" not in policy


@pytest.mark.parametrize(
    "path", ["/static/../app.py", "/static/%2e%2e/app.py", "/static/..%2fapp.py", "//etc/passwd"]
)
def test_paths_do_not_leave_the_pages_folder(served: Served, path: str) -> None:
    response = httpx.get(served.url + path)
    assert response.status_code in (401, 404) and "import" not in response.text


def test_two_organizations_see_nothing_of_each_other(team: Team, tmp_path: Path) -> None:
    """Each request acts with its caller's own key, which the store checks."""
    created = team.execute("select openweights.create_organization('Other', 'b@other.example')")
    other_key = created[0][0]["key"]
    mine = OpenWeights(settings=team.settings(tmp_path))
    stored = mine.files.create(b"text", "result")["id"]
    with serving(mine) as served:
        answers = {
            key: httpx.get(
                f"{served.url}/v1/files/{stored}", headers={"authorization": f"Bearer {key}"}
            ).status_code
            for key in (team.admin_key, other_key, "ow_unknown", API_KEY)
        }
        with httpx.Client(base_url=served.url, headers=PAGE) as browser:
            assert browser.post("/login", json={"key": other_key}).status_code == 200
            assert browser.get("/api/files").json() == []
            assert browser.get(f"/api/files/{stored}/content").status_code == 404
    mine.close()
    assert list(answers.values()) == [200, 404, 401, 401]
