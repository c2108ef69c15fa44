"""Nobody gets in without token or key, and no other page acts through a browser that is in."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.routing import Route

from openweights import OpenWeights
from openweights.dashboard.access import Sessions
from openweights.dashboard.app import create_app
from openweights.types import EventDraft, JobSpec, WorkerSpec
from tests.dashboard.conftest import API_KEY, COOKIE, PAGE, Served, serving
from tests.supabase_double.team import Team

OPEN_TO_ALL = {"/", "/login", "/logout", "/static/plotly.min.js"}


def test_no_endpoint_answers_without_token_or_key(served: Served, ow: OpenWeights) -> None:
    """Each of them, by every method, whoever made up a cookie or a key."""
    app = create_app(Sessions(ow, API_KEY, lambda token: None), None, COOKIE)
    routes = [route for route in app.routes if isinstance(route, Route)]
    guarded = [route for route in routes if route.path not in OPEN_TO_ALL]
    assert len(guarded) > 40, "the control"
    assert all(route.path.startswith(("/api/", "/v1/")) for route in guarded)
    made_up = {**PAGE, "authorization": "Bearer sk-made-up"}
    with httpx.Client(base_url=served.url) as client:
        answers = {
            (route.path, method, len(headers)): client.request(
                method, re.sub(r"\{[^}]*\}", "1", route.path), headers=headers
            ).status_code
            for route in guarded
            for method in route.methods or ()
            for headers in (PAGE, made_up, {**made_up, "cookie": f"{COOKIE}=made-up"})
        }
    assert {one: status for one, status in answers.items() if status != 401} == {}


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


@pytest.fixture
def other_key(team: Team) -> str:
    """An admin's key of another organization in the same project."""
    created = team.execute("select openweights.create_organization('Other', 'b@other.example')")
    return created[0][0]["key"]


def test_two_organizations_see_nothing_of_each_other(
    team: Team, other_key: str, tmp_path: Path
) -> None:
    """Each request acts with its caller's own key, which the store checks."""
    mine = OpenWeights(settings=team.settings(tmp_path))
    stored = mine.files.create(b"text", "result")["id"]
    mine.backend.register_worker(WorkerSpec(id="worker"))
    mine.backend.submit_job(JobSpec(id="ftjob-mine", type="fine-tuning", script="true", params={}))
    claim = mine.backend.claim_job("worker")
    assert claim is not None
    draft = EventDraft("1", {"type": "samples", "step": 1, "tag": "mine"}, datetime.now(UTC))
    mine.backend.append_events(claim.run.id, [draft])
    mine.backend.append_log(claim.run.id, 0, b"secret")
    with serving(mine) as served:
        answers = {
            key: httpx.get(
                f"{served.url}/v1/files/{stored}", headers={"authorization": f"Bearer {key}"}
            ).status_code
            for key in (team.admin_key, other_key, "ow_unknown", API_KEY)
        }
        seen = {
            key: _all_of(served.url, key, stored, claim.run.id)
            for key in answers
            if key[:3] == "ow_"
        }
    mine.close()
    assert list(answers.values()) == [200, 404, 401, 401]
    assert set(seen[team.admin_key].values()) == {200}, "the control"
    nothing = {
        "/api/files": "[]",
        "/api/jobs": '"rows":[]',
        "/api/cluster": '"workers":[]',
        "/api/compare?jobs=ftjob-mine": '"jobs":[]',  # as of a job that was deleted
    }
    assert seen[other_key] == {path: nothing.get(path, 404) for path in seen[other_key]}


def _all_of(url: str, key: str, file: str, run: int) -> dict[str, int | str]:
    """What a browser with the key gets of each address about the other's records: the status, or
    a text that says that there is nothing.
    """
    paths = [
        *("/api/files", "/api/jobs", "/api/cluster", f"/api/files/{file}/content"),
        *(f"/api/files/{file}/rows", f"/api/runs/{run}/log", f"/api/runs/{run}/log/search?text=s"),
        *("/api/jobs/ftjob-mine", "/api/jobs/ftjob-mine/answers", "/api/series?jobs=ftjob-mine"),
        "/api/compare?jobs=ftjob-mine",
    ]
    with httpx.Client(base_url=url, headers=PAGE) as browser:
        browser.post("/login", json={"key": key})
        found = {path: browser.get(path) for path in paths}
    return {path: _nothing(answer) or answer.status_code for path, answer in found.items()}


def _nothing(answer: httpx.Response) -> str | None:
    signs = ('"rows":[]', '"workers":[]', '"jobs":[]')
    return "[]" if answer.text == "[]" else next((s for s in signs if s in answer.text), None)


def test_a_server_of_a_project_reads_no_files_of_its_machine(team: Team, tmp_path: Path) -> None:
    """Who has a key of the project has none of the machine: not even its files' names."""
    secret = tmp_path / "secret.jsonl"
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    secret.write_text(json.dumps(row) + "\n")
    bodies = [
        {"kind": "fine_tuning", "params": {"model": "org/m", "training_file": str(secret)}},
        {"kind": "fine_tuning", "params": {"model": str(tmp_path), "training_file": "x"}},
        {
            "kind": "fine_tuning",
            "params": {
                "model": "org/m",
                "training_file": "x",
                "loss": "grpo",
                "grpo_reward_function": {f"{secret}:f": 1.0},
            },
        },
        {"kind": "logprob", "params": {"model": "org/m", "dataset": str(secret)}},
        {"kind": "inference", "params": {"model": "org/m", "input_file_id": str(secret)}},
    ]
    mine = OpenWeights(settings=team.settings(tmp_path))
    with serving(mine) as served, httpx.Client(base_url=served.url, headers=PAGE) as browser:
        browser.post("/login", json={"key": team.admin_key})
        for body in bodies:
            for path in ("/api/jobs", "/api/jobs/check"):
                assert "of the machine" in browser.post(path, json=body).text, body
        asked = {"model": "org/m", "training_file": str(secret)}
        headers = {"authorization": f"Bearer {team.admin_key}"}
        refused = httpx.post(f"{served.url}/v1/fine_tuning/jobs", json=asked, headers=headers)
        assert refused.status_code == 400 and "of the machine" in refused.text
        stored = mine.files.create(json.dumps(row).encode(), "conversations")["id"]
        read = browser.get(f"/api/files/{stored}/rows", params={"model": str(tmp_path)})
        assert read.status_code == 400
        # A command runs in an empty folder, not in the server's.
        made = browser.post("/api/jobs", json={"kind": "exec", "params": {"command": "ls"}})
        assert mine.jobs.retrieve(made.json()["id"]).params["mounted_files"] == {}
    assert [file["purpose"] for file in mine.files.list()].count("conversations") == 1
    mine.close()
