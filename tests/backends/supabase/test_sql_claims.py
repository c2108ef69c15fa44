"""Which job a worker gets, what that costs the database, and what it may cost its owner."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from tests.backends.supabase.sql_calls import Caller, become, job, sign_up
from tests.backends.supabase.sql_world import event

_LEASE = "update public.runs set lease_expires_at = now() - interval '1 s'"


@pytest.fixture
def admin(project: str) -> Iterator[Caller]:
    caller = Caller(project, sign_up(project))
    yield caller
    caller.close()


def _class_of(error: pytest.ExceptionInfo[psycopg.Error]) -> str | None:
    return error.value.diag.message_detail


# ---- what fits ----------------------------------------------------------------------------------

_POD: dict[str, Any] = {
    "docker_image": "image:1",
    "hardware_type": "1x H100S",
    "vram_gb": 80,
    "cloud_type": "SECURE",
}


def _asks(cloud_type: str) -> dict[str, Any]:
    return {"params": {"cloud_type": cloud_type}}


@pytest.mark.parametrize(
    ("wanted", "worker", "fits"),
    [
        ({}, {}, True),
        ({"docker_image": "image:1"}, {}, True),
        ({"docker_image": "image:2"}, {}, False),
        ({"docker_image": "image:2"}, {"docker_image": "dev"}, True),
        ({"docker_image": "image:2"}, {"docker_image": ""}, True),
        ({"requires_vram_gb": 80}, {}, True),
        ({"requires_vram_gb": 81}, {}, False),
        ({"allowed_hardware": ["2x H100S", "1x H100S"]}, {}, True),
        ({"allowed_hardware": ["2x H100S"]}, {}, False),
        (_asks("SECURE"), {"cloud_type": "COMMUNITY"}, False),
        ({}, {"cloud_type": "COMMUNITY"}, False),
        (_asks("COMMUNITY"), {"cloud_type": "COMMUNITY"}, True),
        (_asks("COMMUNITY"), {}, False),
        (_asks("ALL"), {}, True),
        (_asks("ALL"), {"cloud_type": "COMMUNITY"}, True),
        (_asks("COMMUNITY"), {"cloud_type": None}, True),
    ],
)
def test_a_worker_gets_what_fits_it(
    admin: Caller, wanted: dict[str, Any], worker: dict[str, Any], fits: bool
) -> None:
    # One that fits nobody waits in front of it.
    admin.rpc("submit_job", spec=job("first", allowed_hardware=["9x NONE"], priority=9))
    admin.rpc("submit_job", spec=job("second", **wanted))
    admin.rpc("register_worker", worker=_POD | {"id": "w"} | worker)
    claim = admin.rpc("claim_job", worker_id="w")
    assert (claim is not None and claim["job"]["id"] == "second") == fits


# ---- what it costs the database -----------------------------------------------------------------

_HISTORY = """
    insert into public.jobs (organization_id, id, type, script, params, status, attempts,
        submitted_by_key)
    select organization_id, 'old-' || n, 'custom', '', '{}', 'completed', 1, id
    from public.api_keys, generate_series(1, 20000) n;
    insert into public.runs (organization_id, job_id, worker_id, attempt, status)
    select organization_id, id, 'w' || seq % 7, 1, 'completed' from public.jobs
    where status = 'completed';
    analyze;
"""
_EXPLAIN = """
    load 'auto_explain';
    set client_min_messages = log;
    set auto_explain.log_level = notice;
    set auto_explain.log_min_duration = 0;
    set auto_explain.log_nested_statements = on;
    set auto_explain.log_analyze = on;
    set auto_explain.log_buffers = on;
"""


def _plans_of_a_claim(project: str, key: str | None, worker: str) -> list[str]:
    """The plans of all statements inside `claim_job`, as they were executed."""
    plans: list[str] = []
    with psycopg.connect(project) as db:
        for _ in range(8):  # by now the functions keep their plans
            with db.transaction(force_rollback=True):
                become(db, key)
                db.execute("select public.claim_job(%s)", (worker,))
        db.execute(_EXPLAIN)
        db.commit()
        db.add_notice_handler(lambda notice: plans.append(notice.message_primary or ""))
        become(db, key)
        row = db.execute("select public.claim_job(%s)", (worker,)).fetchone()
        assert row is not None and row[0] is not None
        db.rollback()
    return plans


def _pages(plans: list[str]) -> int:
    """Pages that the statements have looked at: the first number in a plan is its sum."""
    found = [re.search(r"Buffers: shared hit=(\d+)(?: read=(\d+))?", plan) for plan in plans]
    return sum(int(match[1]) + int(match[2] or 0) for match in found if match)


def test_a_claim_costs_the_same_with_a_long_history(admin: Caller, project: str) -> None:
    for index in range(3):
        admin.rpc("submit_job", spec=job(f"job-{index}"))
    admin.rpc("register_worker", worker={"id": "w1"})
    before = _pages(_plans_of_a_claim(project, admin.key, "w1"))
    with psycopg.connect(project) as db:
        db.execute(_HISTORY.encode())
    plans = _plans_of_a_claim(project, admin.key, "w1")
    assert _pages(plans) < 1.5 * before + 20
    picks = [plan for plan in plans if "skip locked" in plan and "fits(j, w)" in plan]
    assert len(picks) == 1
    assert "Index Scan using jobs_pending on jobs" in picks[0]
    assert "Sort" not in picks[0], "not all that waits is sorted"
    for plan in plans:
        assert not re.search(r"Seq Scan on (jobs|runs|events)", plan), plan


def test_the_measure_of_cost_is_real(admin: Caller, project: str) -> None:
    """The control: without its index, a claim reads the history."""
    admin.rpc("submit_job", spec=job("job"))
    admin.rpc("register_worker", worker={"id": "w1"})
    with psycopg.connect(project) as db:
        db.execute(_HISTORY.encode())
        db.execute("drop index public.jobs_pending, public.jobs_of_status")
    assert _pages(_plans_of_a_claim(project, admin.key, "w1")) > 200


def test_a_claim_asks_once_for_all_that_is_held_back(admin: Caller, project: str) -> None:
    """However many jobs wait before the one that may run, for another or for one of their label."""
    admin.rpc("submit_job", spec=job("first", label="full"))
    for worker in ("holder", "w1"):
        admin.rpc("register_worker", worker={"id": worker})
    admin.rpc("claim_job", worker_id="holder")
    admin.rpc("submit_job", spec=job("free", priority=-1))
    statements: list[int] = []
    for count in (5, 50):
        for index in range(count):
            admin.rpc("submit_job", spec=job(f"after-{index}", after=["first"]))
            admin.rpc("submit_job", spec=job(f"label-{index}", label="full", max_running=1))
        statements.append(len(_plans_of_a_claim(project, admin.key, "w1")))
    assert statements[0] == statements[1]
    with psycopg.connect(project) as db:
        asked: list[str] = []
        db.execute(_EXPLAIN)
        db.add_notice_handler(lambda notice: asked.append(notice.message_primary or ""))
        db.execute(
            "select openweights.has_room(organization_id, label, max_running) from jobs "
            "where max_running is not null"
        )
    assert len(asked) > 50, "the control asks for each of them"


# ---- what it may cost its owner -----------------------------------------------------------------


@pytest.fixture
def payer(admin: Caller) -> Iterator[tuple[Caller, str]]:
    """A member with a budget of 1 USD, and a pod at 6 USD an hour."""
    member = admin.rpc("add_member", email="m@example.org", role="member")["id"]
    made = admin.rpc("create_key", name="m", role="member", member_id=member, budget_usd=1)
    admin.rpc("create_worker", worker={"id": "pod"}, price_usd_per_hour=6)
    admin.rpc("set_worker_pod", worker_id="pod", pod_id="p")
    admin.rpc("register_worker", worker={"id": "pod"})
    caller = Caller(admin.url, made["key"])
    yield caller, made["id"]
    caller.close()


def _pass_minutes(project: str, minutes: int) -> None:
    with psycopg.connect(project) as db:
        for table in ("runs set created_at = created_at", "workers set started_at = started_at"):
            db.execute(f"update public.{table} - %s * interval '1 minute'".encode(), (minutes,))


def test_a_budget_ends_what_its_key_has_running_and_waiting(
    admin: Caller, payer: tuple[Caller, str], project: str
) -> None:
    member, key_id = payer
    for name in ("a", "b"):
        member.rpc("submit_job", spec=job(name))
    run = admin.rpc("claim_job", worker_id="pod")["run"]
    _pass_minutes(project, 5)
    assert admin.rpc("heartbeat", worker_id="pod", run_id=run["id"]) == "continue"
    pending = admin.rpc("pending_jobs")
    assert [(row["job"]["id"], row["owner"]) for row in pending] == [("b", key_id)]
    assert 0.4 < pending[0]["usd_left"] < 0.5
    _pass_minutes(project, 6)
    assert admin.rpc("heartbeat", worker_id="pod", run_id=run["id"]) == "timeout"
    admin.rpc("finish_run", run_id=run["id"], attempt=1, status="failed", error="timeout")
    assert admin.rpc("claim_job", worker_id="pod") is None
    for name, parameters in (
        ("submit_job", {"spec": job("c")}),
        ("restart_job", {"job_id": "a"}),
    ):
        with pytest.raises(psycopg.Error, match="budget of 1 USD") as caught:
            member.rpc(name, **parameters)
        assert (caught.value.sqlstate, _class_of(caught)) == ("PT402", "budget")
    admin.rpc("set_budget", key_id=key_id, usd=2)
    assert admin.rpc("claim_job", worker_id="pod")["job"]["id"] == "b"


def test_a_job_has_a_limit_of_its_own_over_all_its_runs(
    admin: Caller, payer: tuple[Caller, str], project: str
) -> None:
    admin.rpc("submit_job", spec=job("a", max_cost_usd=1.5))
    run = admin.rpc("claim_job", worker_id="pod")["run"]
    _pass_minutes(project, 10)
    assert admin.rpc("heartbeat", worker_id="pod", run_id=run["id"]) == "continue"
    admin.rpc("release_run", run_id=run["id"], attempt=1, reason="x")
    [row] = admin.rpc("pending_jobs")
    assert 0.4 < row["usd_left"] < 0.5
    run = admin.rpc("claim_job", worker_id="pod")["run"]
    with psycopg.connect(project) as db:
        db.execute(
            "update public.runs set created_at = created_at - interval '6 minutes' where id = %s",
            (run["id"],),
        )
    assert admin.rpc("heartbeat", worker_id="pod", run_id=run["id"]) == "timeout"


def test_costs_are_reported_and_a_lease_won_back_is_not_paid_twice(
    admin: Caller, payer: tuple[Caller, str], project: str
) -> None:
    member, key_id = payer
    member.rpc("submit_job", spec=job("a"))
    run = admin.rpc("claim_job", worker_id="pod")["run"]
    _pass_minutes(project, 5)
    admin.query("select 1")
    admin.rpc("register_worker", worker={"id": "other"})
    with psycopg.connect(project) as db:
        db.execute(_LEASE)
    admin.rpc("set_budget", key_id=key_id, usd=None)
    # The other worker's claim reaps the run, and takes another job.
    admin.rpc("submit_job", spec=job("urgent", priority=1))
    assert admin.rpc("claim_job", worker_id="other")["job"]["id"] == "urgent"
    assert admin.rpc("heartbeat", worker_id="pod", run_id=run["id"]) == "continue"
    admin.rpc("finish_run", run_id=run["id"], attempt=1, status="completed")
    _pass_minutes(project, 5)
    admin.rpc("end_worker_pod", worker_id="pod")
    report = admin.rpc("cost_report")
    [spent] = [row for row in report["keys"] if row["id"] == key_id]
    assert spent["spent_usd"] == pytest.approx(0.5, abs=0.02)
    assert [row["job_id"] for row in report["jobs"]] == ["a"]
    assert report["total_usd"] == pytest.approx(1.0, abs=0.02)
    assert report["overhead_usd"] == pytest.approx(report["total_usd"] - report["direct_usd"])
    # Confirmed to be gone: it costs nothing any more, and does not come back.
    _pass_minutes(project, 0)
    assert admin.rpc("cost_report")["total_usd"] == report["total_usd"]
    with pytest.raises(psycopg.Error, match="has ended") as caught:
        admin.rpc("register_worker", worker={"id": "pod"})
    assert _class_of(caught) == "invalid_state"


def test_a_pod_does_not_say_itself_what_it_is(admin: Caller) -> None:
    row = {"id": "pod", "cloud_type": "COMMUNITY", "hardware_type": "1x A100"}
    for price in (3, 2):  # the next offer is tried
        admin.rpc("create_worker", worker=row, price_usd_per_hour=price, provider="runpod")
    admin.rpc("set_worker_pod", worker_id="pod", pod_id="p1")
    with pytest.raises(psycopg.Error, match="starting with pod p1") as caught:
        admin.rpc("create_worker", worker=row)
    assert _class_of(caught) == "invalid_state"
    said = {"id": "pod", "cloud_type": "SECURE", "pod_id": "p2", "hardware_type": "1x A100"}
    found = admin.rpc("register_worker", worker=said)
    assert (found["cloud_type"], found["pod_id"], found["status"]) == ("COMMUNITY", "p1", "active")
    assert (found["price_usd_per_hour"], found["provider"]) == (2, "runpod")
    admin.rpc("set_worker_status", worker_id="pod", status="shutdown")
    assert admin.rpc("register_worker", worker=said)["status"] == "shutdown"


def test_a_pod_keeps_the_hardware_that_jobs_name_and_costs_unheard_of(
    admin: Caller, project: str
) -> None:
    row = {"id": "pod", "cloud_type": "SECURE", "hardware_type": "2x A100S", "gpu_count": 2}
    admin.rpc("create_worker", worker=row, price_usd_per_hour=3, provider="runpod")
    with psycopg.connect(project) as db:
        db.execute("update workers set created_at = created_at - interval '20 minutes'")
    # It registers; that its pod was started was answered to nobody.
    said = {"id": "pod", "pod_id": "p1", "gpu_count": 2, "hardware_type": "2x A100-SXM-80GB"}
    assert admin.rpc("register_worker", worker=said)["hardware_type"] == "2x A100S"
    assert admin.rpc("cost_report")["total_usd"] == pytest.approx(1.0, abs=0.02)
    half = said | {"gpu_count": 1, "hardware_type": "1x A100S"}
    assert admin.rpc("register_worker", worker=half)["hardware_type"] == "1x A100S"
    own = {"id": "own", "gpu_count": 1, "hardware_type": "1x A40"}
    for hardware in ("1x A40", "1x L40"):
        changed = admin.rpc("register_worker", worker=own | {"hardware_type": hardware})
        assert (changed["hardware_type"], changed["started_at"]) == (hardware, None)


def test_jobs_share_what_their_pods_cost_beside(admin: Caller, project: str) -> None:
    # Booted for an hour, ran a for two hours and b for one, was idle for one; another ran nothing.
    for job_id in ("a", "b"):
        admin.rpc("submit_job", spec=job(job_id))
    with psycopg.connect(project) as db:
        (organization,) = db.execute("select id from organizations").fetchone() or ()
        db.execute(
            "insert into workers (organization_id, id, status, provider, price_usd_per_hour, "
            "started_at, ended_at) select %s, id, 'terminated', 'runpod', price, "
            "now() - interval '5 h', now() from (values ('w', 2), ('idle', 1), ('free', null)) "
            "as v (id, price)",
            (organization,),
        )
        for job_id, began, hours in (("a", 4, 2), ("b", 2, 1)):
            db.execute(
                "insert into runs (organization_id, job_id, worker_id, attempt, status, "
                "created_at, ended_at, price_usd_per_hour) values (%s, %s, 'w', 1, 'completed', "
                "now() - make_interval(hours => %s), now() - make_interval(hours => %s), 2)",
                (organization, job_id, began, began - hours),
            )
    report = admin.rpc("cost_report")
    shares = {
        row["job_id"]: (row["runs"], row["direct_usd"], row["overhead_usd"], row["usd"])
        for row in report["jobs"]
    }
    assert shares == {"a": (1, 4, 2, 6), "b": (1, 2, 2, 4)}
    assert (report["total_usd"], report["unpriced_workers"]) == (15, 1)
    [member] = report["members"]
    assert (member["jobs"], member["usd"]) == (2, 10)


def test_events_keep_the_latest_values_up_to_date(admin: Caller) -> None:
    run = admin.rpc("start_script_run", spec=job("s"))["run"]["id"]
    batch = [event(f"k{i}", step=i, **{f"x{i % 3}": i}) for i in range(10)]
    assert admin.rpc("append_events", run_id=run, events=batch[:6]) == 6
    # What is sent again does not count as later.
    assert admin.rpc("append_events", run_id=run, events=batch[8:] + batch[:2]) == 2
    assert admin.rpc("latest_values", run_id=run) == {"step": 9, "x0": 9, "x1": 4, "x2": 8}
    assert admin.rpc("append_events", run_id=run, events=[event("n", step=None)]) == 1
    assert admin.rpc("latest_values", run_id=run)["step"] is None
    for bad in ([{"key": "a"}], [event("a") | {"data": 1}], [event("a") | {"key": None}]):
        with pytest.raises(psycopg.Error) as caught:
            admin.rpc("append_events", run_id=run, events=bad)
        assert _class_of(caught) == "invalid_input"
