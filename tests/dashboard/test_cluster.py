"""The page of a project's cluster: workers, the queue with reasons, costs, keys and members."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from openweights import OpenWeights
from openweights.dashboard.cluster import cluster_state, costs_by_day
from openweights.types import JobSpec, WorkerSpec
from tests.dashboard.conftest import PAGE, Served, serving
from tests.dashboard.visitor import Visitor
from tests.supabase_double.team import Team


@pytest.fixture
def project(team: Team, tmp_path: Path) -> Iterator[Served]:
    client = OpenWeights(settings=team.settings(tmp_path))
    with serving(client) as served:
        yield served
    client.close()


def _login(served: Served, key: str) -> httpx.Client:
    browser = httpx.Client(base_url=served.url, headers=PAGE)
    served.browsers.append(browser)
    assert browser.post("/login", json={"key": key}).status_code == 200
    return browser


def _spec(job_id: str, **needs: Any) -> JobSpec:
    return JobSpec(
        id=job_id,
        type="fine-tuning",
        script="true",
        model="org/model",
        params={"validated_params": {"model": "org/model"}, "cloud_type": "SECURE"},
        **needs,
    )


def test_workers_queue_and_costs(team: Team, project: Served) -> None:
    backend: Any = project.ow.backend
    worker = WorkerSpec(id="worker-1", hardware_type="1x H100S", vram_gb=80, cloud_type="SECURE")
    backend.create_worker(worker, provider="runpod", price_usd_per_hour=3.0)
    backend.set_worker_pod("worker-1", "pod-1", 3.0)
    backend.register_worker(worker)
    backend.submit_job(_spec("ftjob-runs"))
    assert backend.claim_job("worker-1").job.id == "ftjob-runs"
    backend.submit_job(_spec("ftjob-big", requires_vram_gb=9000))
    backend.submit_job(_spec("ftjob-next", requires_vram_gb=24, priority=1))
    team.execute(
        "update workers set started_at = started_at - interval '2 hours' where id = %s", "worker-1"
    )
    browser = _login(project, team.admin_key)
    state = browser.get("/api/cluster").json()
    (shown,) = state["workers"]
    assert (shown["pod"], shown["job"], shown["usd_per_hour"]) == ("pod-1", "ftjob-runs", 3.0)
    assert state["usd_per_hour"] == 3.0 and state["waiting"] == 2
    reasons = {job["id"]: job["reason"] for job in state["queue"]}
    assert list(reasons) == ["ftjob-next", "ftjob-big"]
    assert reasons["ftjob-big"].startswith("needs 9000 GiB") and "24 GB" in reasons["ftjob-next"]
    spent = browser.get("/api/costs").json()
    days = spent["days"]
    assert len(days) == 30 and sum(day["usd"] for day in days) == pytest.approx(6.0, abs=0.1)
    assert spent["members"][0]["email"] == "admin@lab.example" and spent["keys"]
    job = browser.get("/api/jobs/ftjob-runs").json()
    assert 0 <= job["usd"] < 0.1
    member = _login(project, team.key("member"))
    queue = member.get("/api/cluster").json()["queue"]
    assert [(job["id"], job["owner"]) for job in queue] == [("ftjob-next", ""), ("ftjob-big", "")]


def test_keys_and_members_are_an_admins(team: Team, project: Served) -> None:
    admin, member = _login(project, team.admin_key), _login(project, team.key("member"))
    assert set(member.get("/api/team").json()) == {"role", "organization"}
    asked = {"name": "laptop", "role": "member", "budget_usd": 5}
    assert member.post("/api/team/create-key", json=asked).status_code == 400
    made = admin.post("/api/team/create-key", json=asked).json()
    owner = _login(project, made["key"])
    bearer = {"authorization": f"Bearer {made['key']}"}
    assert httpx.get(f"{project.url}/v1/files", headers=bearer).status_code == 200
    keys = {key["id"]: key for key in admin.get("/api/team").json()["keys"]}
    assert keys[made["id"]]["budget_usd"] == 5 and made["key"] not in str(keys)
    admin.post("/api/team/set-budget", json={"id": made["id"], "budget_usd": None})
    admin.post("/api/team/revoke-key", json={"id": made["id"]})
    keys = {key["id"]: key for key in admin.get("/api/team").json()["keys"]}
    assert keys[made["id"]]["budget_usd"] is None and keys[made["id"]]["revoked"]
    for _ in range(2):
        assert httpx.get(f"{project.url}/v1/files", headers=bearer).status_code == 401
    assert owner.get("/api/jobs/x").status_code == owner.get("/api/state").status_code == 401
    admin.post("/api/team/add-member", json={"email": "b@lab.example", "role": "member"})
    found = {m["email"]: m["id"] for m in admin.get("/api/team").json()["members"]}
    admin.post("/api/team/remove-member", json={"id": found["b@lab.example"]})
    assert "b@lab.example" not in str(admin.get("/api/team").json()["members"])
    for verb, body in (
        ("create-key", {}),
        ("set-budget", {"id": "x", "budget_usd": True}),
        ("x", {}),
    ):
        assert admin.post(f"/api/team/{verb}", json=body).status_code in (400, 404)


def test_this_machine_has_a_queue_and_no_team(ow: OpenWeights) -> None:
    ow.backend.register_worker(WorkerSpec(id="worker"))
    for number in range(3):
        ow.backend.submit_job(_spec(f"ftjob-{number}"))
    ow.backend.claim_job("worker")
    state = cluster_state(ow.backend)
    assert state["workers"][0]["job"] == "ftjob-0" and state["usd_per_hour"] is None
    assert [(job["id"], job["reason"]) for job in state["queue"]] == [
        ("ftjob-1", "behind ftjob-0"),
        ("ftjob-2", "behind ftjob-0 and 1 more"),
    ]
    ow.jobs.pause()
    told = {job["reason"] for job in cluster_state(ow.backend)["queue"]}
    assert told == {"for the queue, which is paused: `ow resume`"}
    with serving(ow) as served:
        assert served.browser().get("/api/costs").status_code == 400


def test_a_pod_costs_on_the_days_on_which_it_ran() -> None:
    now = datetime(2026, 3, 3, 12, tzinfo=UTC)

    def pod(began: datetime | None, ended: datetime | None, usd: float | None) -> dict[str, Any]:
        moments = [None if at is None else at.isoformat() for at in (began, ended)]
        return {"started_at": moments[0], "ended_at": moments[1], "price_usd_per_hour": usd}

    hour = timedelta(hours=1)
    pods = [
        pod(now - 36 * hour, now - 10 * hour, 2.0),  # from the 2nd, 0 h, to the 3rd, 2 h
        pod(now - 1 * hour, None, 4.0),
        pod(now - 1000 * hour, now - 900 * hour, 8.0),
        pod(None, None, 1.0),
        pod(now - 1 * hour, None, None),
    ]
    days = costs_by_day(pods, now, days=3)
    assert [(day["day"], day["usd"]) for day in days] == [
        ("2026-03-01", 0.0),
        ("2026-03-02", 48.0),
        ("2026-03-03", 8.0),
    ]


@pytest.mark.browser
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (400, "dark")])
def test_the_page_of_a_cluster(
    team: Team, project: Served, chromium: Any, width: int, scheme: str
) -> None:
    """Logged in with an admin's key: read, and a key made, used up and revoked."""
    backend: Any = project.ow.backend
    worker = WorkerSpec(id="worker-1", hardware_type="1x H100S", vram_gb=80, cloud_type="SECURE")
    backend.create_worker(worker, provider="runpod", price_usd_per_hour=3.0)
    backend.set_worker_pod("worker-1", "pod-1", 3.0)
    backend.register_worker(worker)
    backend.submit_job(_spec("ftjob-runs"))
    backend.claim_job("worker-1")
    backend.submit_job(_spec("ftjob-big", requires_vram_gb=9000))
    team.execute("update workers set started_at = started_at - interval '40 hours'")
    visitor = Visitor(chromium, project, width, scheme)
    page = visitor.page
    page.get_by_role("button", name="Switch").wait_for()
    page.context.clear_cookies()
    page.goto(f"{project.url}/#/login")
    page.reload()
    page.get_by_label("Key").fill("ow_wrong")
    page.get_by_role("button", name="Enter").click()
    page.locator("#notice", has_text="does not know this key").wait_for()
    page.get_by_label("Key").fill(team.admin_key)
    page.get_by_role("button", name="Enter").click()
    page.locator("tr[data-row=ftjob-runs]").wait_for()
    visitor.open("/cluster", ".js-plotly-plot")
    for text in ("$3.00 an hour", "needs 9000 GiB", "pod-1", "admin@lab.example", "ftjob-runs"):
        page.locator(f"text={text}").first.wait_for()
    assert visitor.faults() == []
    form = page.get_by_role("form", name="New key")
    form.get_by_label("name").fill("<b>laptop</b>")
    form.get_by_label("budget in USD").fill("2.5")
    form.get_by_role("button", name="New key").click()
    key = page.locator("code.newkey").inner_text()
    bearer = {"authorization": f"Bearer {key}"}
    assert httpx.get(f"{project.url}/v1/files", headers=bearer).status_code == 200
    page.get_by_role("button", name="Revoke <b>laptop</b>").click()
    page.get_by_role("button", name="Revoke the key").click()
    page.locator("tr", has_text="laptop").locator("text=revoked").wait_for()
    assert httpx.get(f"{project.url}/v1/files", headers=bearer).status_code == 401
    form = page.get_by_role("form", name="New member")
    form.get_by_label("e-mail").fill("b@lab.example")
    form.get_by_role("button", name="New member").click()
    page.get_by_role("button", name="Remove b@lab.example").wait_for()
    visitor.photograph("/cluster-team")
    assert [one for one in visitor.errors if "401" not in one] == []
    visitor.close()
