"""Garbage is collected, or a job deleted, at the very moment at which another one needs it: whoever
comes second sees the first, and no job is left without what it names.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from tests.backends.supabase.sql_calls import Caller, become, job, sign_up, statement
from tests.backends.supabase.sql_world import event
from tests.waiting import wait_until

FILE = "conversations:file-0123456789ab"
DAY_S = 86_400.0
NAMING_FILE = job("new", params={"validated_params": {"training_file": FILE}})
NAMING_JOB = job("new", params={"validated_params": {"model": "ftjob-1/checkpoint-5"}})
COLLECT: tuple[str, dict[str, Any]] = ("collect_garbage", {"keep_s": DAY_S, "dry_run": False})
DELETE: tuple[str, dict[str, Any]] = ("delete_job", {"job_id": "ftjob-1"})
HELD = "perform openweights.hold_named(j);"


class World:
    """An organization with a file that nobody has named for days, and a job that has completed."""

    def __init__(self, url: str) -> None:
        self.url, self.key = url, sign_up(url)
        self.one, self.other = Caller(url, self.key), Caller(url, self.key)
        self.one.rpc("submit_job", spec=job("ftjob-1"))
        self.one.rpc("register_worker", worker={"id": "w"})
        run = self.one.rpc("claim_job", worker_id="w")["run"]["id"]
        self.one.rpc("finish_run", run_id=run, attempt=1, status="completed")
        with psycopg.connect(url) as db:
            db.execute(
                "insert into public.files (organization_id, id, purpose, filename, bytes, sha256, "
                "created_by_key, created_at, used_at) select organization_id, %s, 'conversations', "
                "'d', 1, repeat('0', 64), id, now() - interval '9 days', now() - interval '9 days' "
                "from public.api_keys",
                (FILE,),
            )

    def together(
        self, first: tuple[str, dict[str, Any]], second: tuple[str, dict[str, Any]]
    ) -> psycopg.Error | None:
        """`second` is called while `first` is done but not yet seen; what that raises."""
        raised: list[psycopg.Error | None] = []

        def call() -> None:
            try:
                self.other.rpc(second[0], **second[1])
                raised.append(None)
            except psycopg.Error as error:
                raised.append(error)

        with psycopg.connect(self.url) as db:
            become(db, self.key)
            text, values = statement(*first)
            db.execute(text.encode(), values)
            thread = threading.Thread(target=call, daemon=True)
            thread.start()
            wait_until(lambda: raised or self._has_waiting())
        thread.join()
        return raised[0]

    def _has_waiting(self) -> bool:
        with psycopg.connect(self.url) as db:
            query = "select 1 from pg_stat_activity where wait_event_type = 'Lock'"
            return bool(db.execute(query).fetchall())

    def left(self) -> tuple[set[str], set[str]]:
        """Files and jobs."""
        files = {row[0] for row in self.one.query("select id from public.files")}
        return files, {row[0] for row in self.one.query("select id from public.jobs")}

    def close(self) -> None:
        self.one.close()
        self.other.close()


def submit(spec: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    return "submit_job", {"spec": spec}


@pytest.fixture
def world(project: str) -> Iterator[World]:
    world = World(project)
    yield world
    world.close()


def test_what_is_about_to_be_named_stays(world: World) -> None:
    assert world.together(submit(NAMING_FILE), COLLECT) is None
    assert world.left() == ({FILE}, {"ftjob-1", "new"})


def test_a_job_that_is_about_to_be_named_stays(world: World) -> None:
    error = world.together(submit(NAMING_JOB), DELETE)
    assert error is not None and "named by job new" in str(error)
    assert world.left()[1] == {"ftjob-1", "new"}


@pytest.mark.parametrize(
    ("removal", "spec", "gone"), [(COLLECT, NAMING_FILE, FILE), (DELETE, NAMING_JOB, "ftjob-1")]
)
def test_what_is_about_to_go_can_be_named_no_more(
    world: World, removal: tuple[str, dict[str, Any]], spec: dict[str, Any], gone: str
) -> None:
    error = world.together(removal, submit(spec))
    assert error is not None
    assert f"{gone}, which job new names, was removed at this moment" in str(error)
    assert "new" not in world.left()[1]


def test_a_job_that_is_taken_up_again_keeps_its_checkpoint(world: World) -> None:
    checkpoint = FILE.replace("conversations", "checkpoint")
    world.one.rpc("submit_job", spec=job("fails"))
    run = world.one.rpc("claim_job", worker_id="w")["run"]["id"]
    world.one.rpc(
        "append_events", run_id=run, events=[event("k", type="checkpoint", file=checkpoint)]
    )
    world.one.rpc("finish_run", run_id=run, attempt=1, status="failed")
    with psycopg.connect(world.url) as db:
        db.execute("update public.files set id = %s, purpose = 'checkpoint'", (checkpoint,))
        db.execute("update public.jobs set updated_at = now() - interval '9 days'")
    assert world.together(("restart_job", {"job_id": "fails"}), COLLECT) is None
    assert world.left()[0] == {checkpoint}


def test_the_locks_are_what_keeps_them(world: World) -> None:
    """The control: without them the new job is left with nothing, in each of these orders."""
    with psycopg.connect(world.url) as db:
        query = "select pg_get_functiondef('openweights.note_job_files'::regproc)"
        [(text,)] = db.execute(query).fetchall()
        assert HELD in text
        db.execute(text.replace(HELD, "").encode())
    assert world.together(submit(NAMING_FILE), COLLECT) is None
    assert world.left()[0] == set()
    assert world.together(submit(NAMING_JOB | {"id": "other"}), DELETE) is None
    assert world.left()[1] == {"new", "other"}
