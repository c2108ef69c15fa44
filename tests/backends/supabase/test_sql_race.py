"""Many processes claim straight from the database: no job twice, none lost; and a control that
shows the test would notice. Zombies are fenced, also when they act at the very same moment.
"""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

import psycopg
import pytest

from tests.backends import processes
from tests.backends.supabase import sql_processes
from tests.backends.supabase.sql_calls import Caller, become, job, sign_up
from tests.backends.supabase.sql_world import event
from tests.waiting import wait_until

_PROCESSES = 6
_JOBS = 600


def _race(project: str, claim_all: Any) -> Counter[str]:
    """How often each job was claimed by processes that start together."""
    key = sign_up(project)
    admin = Caller(project, key)
    for index in range(_JOBS):
        admin.rpc("submit_job", spec=job(f"job-{index}"))
    admin.close()
    answers = processes.start_all(claim_all, (project, key), _PROCESSES)  # type: ignore[arg-type]
    return Counter(job_id for claimed in answers for job_id in claimed)


def test_no_job_is_claimed_twice_and_none_is_lost(project: str) -> None:
    assert _race(project, sql_processes.claim_all) == {f"job-{i}": 1 for i in range(_JOBS)}
    with psycopg.connect(project) as db:
        jobs = "select distinct status, attempts, lost_attempts from public.jobs"
        assert db.execute(jobs).fetchall() == [("completed", 1, 0)]
        runs = "select count(*), count(distinct job_id), count(distinct worker_id) from public.runs"
        count, ids, workers = db.execute(runs).fetchall()[0]
        assert (count, ids) == (_JOBS, _JOBS)
        # How the work was shared depends on the machine, but several must have taken part.
        assert workers > 1


def test_the_race_is_real(project: str) -> None:
    claims = _race(project, sql_processes.claim_all_racily)
    assert set(claims) == {f"job-{i}" for i in range(_JOBS)}
    assert max(claims.values()) > 1


def _let_leases_expire(project: str) -> None:
    with psycopg.connect(project) as db:
        db.execute("update public.runs set lease_expires_at = now() - interval '1 s'")


def test_zombies_change_nothing(project: str) -> None:
    admin = Caller(project, sign_up(project))
    admin.rpc("submit_job", spec=job("j"))
    for worker in ("w1", "w2"):
        admin.rpc("register_worker", worker={"id": worker})
    old = admin.rpc("claim_job", worker_id="w1")["run"]
    _let_leases_expire(project)
    new = admin.rpc("claim_job", worker_id="w2")["run"]
    assert (new["job_id"], new["attempt"]) == ("j", 2)
    before = admin.query("select * from public.jobs, public.runs order by runs.id")
    for name, more in (
        ("finish_run", {"attempt": 1, "status": "completed"}),
        ("finish_run", {"attempt": 2, "status": "completed"}),
        ("release_run", {"attempt": 1, "reason": "x"}),
        ("append_events", {"events": [event("late", loss=1)]}),
    ):
        with pytest.raises(psycopg.Error) as caught:
            admin.rpc(name, run_id=old["id"], **more)
        assert (caught.value.sqlstate, caught.value.diag.message_detail) == ("PT409", "fenced")
    assert admin.rpc("heartbeat", worker_id="w1", run_id=old["id"]) == "fenced"
    assert admin.query("select * from public.jobs, public.runs order by runs.id") == before
    admin.close()


def test_what_a_zombie_and_its_successor_do_at_once_has_one_outcome(project: str) -> None:
    """The old worker finishes, beats or lets go while others claim its job: again and again."""
    key = sign_up(project)
    admin = Caller(project, key)
    workers = [f"w{i}" for i in range(4)]
    for worker in workers:
        admin.rpc("register_worker", worker={"id": worker})
    for index in range(15):
        name = f"job-{index}"
        admin.rpc("submit_job", spec=job(name, max_attempts=99))
        run = admin.rpc("claim_job", worker_id="w0")["run"]
        _let_leases_expire(project)
        finish = {"run_id": run["id"], "attempt": 1, "status": "completed"}
        verbs = [
            [("finish_run", finish)],
            [("heartbeat", {"worker_id": "w0", "run_id": run["id"]})],
            [("release_run", {"run_id": run["id"], "attempt": 1, "reason": "x"})],
        ][index % 3]
        calls = verbs + [("claim_job", {"worker_id": worker}) for worker in workers[1:]]
        _all_at_once(project, key, calls)
        rows = admin.query("select id, attempt, status from public.runs where job_id = %s", (name,))
        open_runs = [row for row in rows if row[2] == "in_progress"]
        [(status, attempts)] = admin.query(
            "select status, attempts from public.jobs where id = %s", (name,)
        )
        assert attempts == len(rows) == max(row[1] for row in rows)
        assert (status == "in_progress") == (len(open_runs) == 1)
        assert status in ("in_progress", "pending", "completed")
        _end(admin, name, open_runs)
    admin.close()


def _end_while_another_call_waits(project: str) -> psycopg.Error | None:
    """A run is let go of while its end is written, but not yet seen; answers what that raises."""
    key = sign_up(project)
    admin, other = Caller(project, key), Caller(project, key)
    admin.rpc("submit_job", spec=job("j"))
    admin.rpc("register_worker", worker={"id": "w"})
    run = admin.rpc("claim_job", worker_id="w")["run"]["id"]
    raised: list[psycopg.Error | None] = []

    def let_go() -> None:
        try:
            other.rpc("release_run", run_id=run, attempt=1, reason="x")
            raised.append(None)
        except psycopg.Error as error:
            raised.append(error)

    waiting = "select from pg_stat_activity where wait_event_type = 'Lock'"
    thread = threading.Thread(target=let_go, daemon=True)
    with psycopg.connect(project) as db, psycopg.connect(project, autocommit=True) as onlooker:
        become(db, key)
        db.execute("select public.finish_run(%s, 1, 'completed')", (run,))
        thread.start()
        wait_until(lambda: onlooker.execute(waiting).fetchall())
    thread.join()
    admin.close()
    other.close()
    return raised[0]


def test_who_waited_for_a_run_sees_how_it_ended(project: str) -> None:
    error = _end_while_another_call_waits(project)
    assert error is not None and error.diag.message_detail == "fenced"


def test_the_lock_on_the_run_is_what_shows_it(project: str) -> None:
    """The control: with the job's lock alone, the run looks as it did before the wait."""
    with psycopg.connect(project) as db:
        query = "select pg_get_functiondef('openweights.lock_run'::regproc)"
        [(text,)] = db.execute(query).fetchall()
        assert "no key update of j, r;" in text
        db.execute(text.replace("no key update of j, r;", "no key update of j;").encode())
    error = _end_while_another_call_waits(project)
    assert error is not None and error.sqlstate == "23514", "only the life cycle's trigger objects"


def _all_at_once(project: str, key: str, calls: list[tuple[str, dict[str, Any]]]) -> None:
    barrier = threading.Barrier(len(calls))
    unexpected: list[psycopg.Error] = []

    def make(name: str, parameters: dict[str, Any]) -> None:
        caller = Caller(project, key)
        barrier.wait()
        try:
            caller.rpc(name, **parameters)
        except psycopg.Error as error:
            if error.diag.message_detail != "fenced":
                unexpected.append(error)
        finally:
            caller.close()

    threads = [threading.Thread(target=make, args=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert unexpected == []


def _end(admin: Caller, name: str, open_runs: list[tuple[Any, ...]]) -> None:
    """Leave nothing that the next round could claim."""
    for run_id, attempt, _ in open_runs:
        admin.rpc("finish_run", run_id=run_id, attempt=attempt, status="completed")
    waiting = "select 1 from public.jobs where id = %s and status = 'pending'"
    if admin.query(waiting, (name,)):
        admin.rpc("cancel_job", job_id=name)
