"""`ow cancel` and `ow restart`: a result for each job, ids from arguments or standard input."""

from __future__ import annotations

import json

import pytest

from openweights.backends.base import Backend
from tests.cli.conftest import Ow, claim, submit


@pytest.fixture
def jobs(backend: Backend) -> Backend:
    """Two pending jobs and a completed one."""
    run = claim(backend, "ftjob-done").run
    backend.finish_run(run.id, run.attempt, "completed")
    submit(backend, "ftjob-one")
    submit(backend, "ftjob-two")
    return backend


def test_cancel_says_for_each_job_how_it_went(ow: Ow, jobs: Backend) -> None:
    answer = ow("cancel", "ftjob-one", "ftjob-done", "ftjob-none", "ftjob-t")
    assert answer.exit_code == 1
    assert sorted(answer.stdout.splitlines()) == ["ftjob-one  canceled", "ftjob-two  canceled"]
    completed, unknown = answer.stderr.splitlines()
    assert completed.startswith("ow: job ftjob-done ") and "completed" in completed
    assert unknown.startswith("ow: no job ftjob-none; did you mean ftjob-one")
    assert jobs.get_job("ftjob-one").status == "canceled"
    assert jobs.get_job("ftjob-done").status == "completed"


def test_cancel_takes_ids_from_the_table_of_ls(ow: Ow, jobs: Backend) -> None:
    table = ow("ls", "--status", "pending").stdout
    assert table.startswith("ID ")
    answer = ow("cancel", stdin=table)
    assert answer.exit_code == 0
    assert sorted(answer.stdout.split()[::2]) == ["ftjob-one", "ftjob-two"]
    assert ow("cancel", "ftjob-one").stdout == "ftjob-one  canceled\n"  # again: as it was


@pytest.mark.parametrize("order", [slice(None), slice(None, None, -1)], ids=["as made", "reversed"])
def test_jobs_that_wait_for_one_another_are_canceled_and_none_fails(
    ow: Ow, backend: Backend, order: slice
) -> None:
    submit(backend, "ftjob-a")
    submit(backend, "ftjob-b", after=("ftjob-a",))
    submit(backend, "ftjob-c", after=("ftjob-b",))
    ids = ["ftjob-a", "ftjob-b", "ftjob-c"]
    answer = ow("cancel", *ids[order])
    assert answer.exit_code == 0 and answer.stderr == ""
    assert {backend.get_job(id).status for id in ids} == {"canceled"}


def test_results_as_json(ow: Ow, jobs: Backend) -> None:
    answer = ow("cancel", "--json", stdin="ftjob-one\n\nftjob-done\n")
    assert answer.exit_code == 1
    first, second = json.loads(answer.stdout)
    assert first == {"id": "ftjob-one", "status": "canceled", "error": None}
    assert second["status"] is None and "completed" in second["error"]


def test_restart_makes_a_job_pending_again(ow: Ow, jobs: Backend) -> None:
    ow("cancel", "ftjob-one")
    answer = ow("restart", "ftjob-one", "ftjob-two")
    assert answer.exit_code == 1
    assert answer.stdout == "ftjob-one  pending\n"
    assert answer.stderr.startswith("ow: job ftjob-two ")
    assert jobs.get_job("ftjob-one").status != "canceled"


@pytest.mark.parametrize("command", ["cancel", "restart"])
def test_no_ids_at_all(ow: Ow, command: str) -> None:
    answer = ow(command)
    assert answer.exit_code == 2
    assert "no job ids" in answer.stderr


@pytest.mark.parametrize("command", ["cancel", "restart"])
def test_an_id_is_said_once(ow: Ow, command: str) -> None:
    assert ow(command, "nope").stderr == "ow: no job nope; `ow ls` lists them\n"


def test_what_is_about_one_job_and_what_about_all_point_to_each_other(
    ow: Ow, jobs: Backend
) -> None:
    [waiting, *_] = [job.id for job in jobs.list_jobs(statuses=("pending",))]
    for command, other in (("resume", "restart"), ("pause", "cancel")):
        answer = ow(command, waiting)
        assert answer.exit_code == 2 and "it takes no JOB" in answer.stderr
        assert f"`ow {other} JOB`" in answer.stderr and jobs.queue_state().paused_at is None
    assert "only a failed or canceled job can be restarted" in ow("restart", waiting).stderr
    ow("pause")
    answer = ow("restart", waiting)
    assert answer.exit_code == 1 and "the queue is paused: `ow resume`" in answer.stderr


def test_the_queue_is_paused_and_resumed(ow: Ow, jobs: Backend) -> None:
    answer = ow("pause")
    assert answer.stdout.startswith("the queue is paused since 2")
    waiting = ow("ls", "--status", "pending").stdout.splitlines()[1:]
    assert [line.endswith("for the queue, which is paused: `ow resume`") for line in waiting] == [
        True,
        True,
    ]
    assert json.loads(ow("pause", "--json").stdout)["paused_at"] is not None
    jobs.cancel_job("ftjob-one")
    jobs.cancel_job("ftjob-two")  # else the command would start a worker for them
    assert ow("resume").stdout == "the queue goes on\n"


def test_who_did_what(ow: Ow, jobs: Backend) -> None:
    ow("cancel", "ftjob-one")
    heading, last, *_ = ow("audit").stdout.splitlines()
    assert heading.split() == ["WHEN", "WHO", "KEY", "WHAT", "OF", "DETAILS"]
    assert last.split()[-3:] == ["job.cancel", "ftjob-one", "status=pending"]
    of_one = json.loads(ow("audit", "ftjob-one", "--json").stdout)
    assert [change["action"] for change in of_one] == ["job.cancel", "job.submit"]
    assert ow("audit", "nix").stderr == "ow: nothing has been changed of nix\n"
