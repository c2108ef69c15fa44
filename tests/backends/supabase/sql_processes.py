"""What tests have other processes do with a project's database."""

from __future__ import annotations

from contextlib import closing
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from typing import Any

import psycopg

from tests.backends.supabase.sql_calls import Caller


def claim_all(where: Any, index: int, barrier: Barrier, answers: Queue[Any]) -> None:
    """Claim and complete jobs until none is left; answers the ids in the order of claiming."""
    url, key = where
    worker_id = f"worker-{index}"
    claimed: list[str] = []
    with closing(Caller(url, key)) as caller:
        caller.rpc("register_worker", worker={"id": worker_id})
        barrier.wait()
        while (claim := caller.rpc("claim_job", worker_id=worker_id)) is not None:
            claimed.append(claim["job"]["id"])
            run = claim["run"]
            caller.rpc("finish_run", run_id=run["id"], attempt=run["attempt"], status="completed")
    answers.put(claimed)


def claim_all_racily(where: Any, index: int, barrier: Barrier, answers: Queue[Any]) -> None:
    """The control: look for a job, then take it, with nothing in between that keeps others out."""
    claimed: list[str] = []
    pending = "select id from public.jobs where status = 'pending' order by created_at, seq limit 1"
    with psycopg.connect(where[0], autocommit=True) as db:
        barrier.wait()
        while (row := db.execute(pending).fetchone()) is not None:
            db.execute("update public.jobs set status = 'in_progress' where id = %s", row)
            claimed.append(row[0])
    answers.put(claimed)
