"""What every store has to do about runs, their events and their logs."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from openweights.backends.base import Backend
from openweights.errors import FencedError, InvalidInputError, InvalidStateError, NotFoundError
from openweights.types import WorkerSpec
from tests.backends.steps import NOW, Contract, claim, draft, spec, start


class RunContract(Contract):
    """Runs, cancel and timeout, events and logs."""

    def test_a_canceled_job_stays_canceled_whatever_its_worker_reports(
        self, backend: Backend
    ) -> None:
        held = start(backend)
        backend.append_events(held.run.id, [draft(loss=3)])
        assert backend.cancel_job("job-1").status == "canceled"
        assert backend.get_run(held.run.id).status == "in_progress"
        assert backend.heartbeat("w1", held.run.id) == "cancel"
        for _ in range(2):
            job = backend.finish_run(held.run.id, 1, "completed")
            assert (job.status, job.outputs, job.worker_id) == ("canceled", {"loss": 3}, None)
        assert backend.get_run(held.run.id).status == "canceled"
        assert backend.heartbeat("w1", held.run.id) == "fenced"
        assert backend.claim_job("w1") is None

    def test_a_canceled_job_is_not_requeued_by_release_or_loss(self, backend: Backend) -> None:
        released = start(backend, job_id="released")
        backend.cancel_job("released")
        assert backend.release_run(released.run.id, 1, reason="bye").status == "canceled"
        lost = start(backend, job_id="lost")
        backend.cancel_job("lost")
        backend.set_worker_status("w1", "terminated")
        assert backend.get_job("lost").status == "canceled"
        for held in (released, lost):
            run = backend.get_run(held.run.id)
            assert (run.status, run.is_given_back) == ("canceled", False)

    def test_restarting_while_the_canceled_run_is_being_stopped(self, backend: Backend) -> None:
        old = start(backend)
        backend.register_worker(WorkerSpec("w2"))
        backend.cancel_job("job-1")
        backend.restart_job("job-1")
        assert backend.get_run(old.run.id).status == "canceled"
        new = claim(backend, "w2")
        assert new.run.attempt == 2
        assert backend.heartbeat("w1", old.run.id) == "fenced"
        with pytest.raises(FencedError):
            backend.finish_run(old.run.id, 1, "canceled")
        assert backend.get_job("job-1").status == "in_progress"
        assert backend.claim_job("w1") is None

    def test_a_worker_that_asks_again_does_not_get_its_canceled_job(self, backend: Backend) -> None:
        held = start(backend)
        backend.cancel_job("job-1")
        backend.submit_job(spec("next"))
        assert claim(backend).job.id == "next"
        assert backend.get_run(held.run.id).status == "canceled"

    def test_timeouts_are_told_by_the_heartbeat(self, backend: Backend) -> None:
        held = start(backend)
        assert backend.set_timeout("job-1", NOW).timeout_at == NOW
        assert backend.heartbeat("w1", held.run.id) == "timeout"
        later = datetime.now(UTC) + timedelta(days=1)
        assert backend.set_timeout("job-1", later).timeout_at == later
        assert backend.heartbeat("w1", held.run.id) == "continue"
        backend.set_timeout("job-1", None)
        assert backend.heartbeat("w1", held.run.id) == "continue"
        with pytest.raises(InvalidInputError, match="time zone"):
            backend.set_timeout("job-1", datetime(2026, 1, 1))

    def test_finishing_again_is_no_error_but_otherwise_is(self, backend: Backend) -> None:
        held = start(backend)
        job = backend.finish_run(held.run.id, 1, "failed", error="exit code 3 \udcff", exit_code=3)
        assert (job.status, job.worker_id) == ("failed", None)
        assert backend.finish_run(held.run.id, 1, "failed", error="other") == job
        run = backend.get_run(held.run.id)
        assert (run.status, run.error, run.exit_code) == ("failed", "exit code 3 ?", 3)
        with pytest.raises(FencedError, match="job-1"):
            backend.finish_run(held.run.id, 1, "completed")
        with pytest.raises(FencedError):
            backend.finish_run(held.run.id, 2, "failed")
        with pytest.raises(FencedError):
            backend.release_run(held.run.id, 1, reason="late")
        assert backend.get_run(held.run.id) == run

    def test_runs_are_listed_oldest_first(self, backend: Backend) -> None:
        ends: list[tuple[str, Any]] = [("w1", "failed"), ("w2", "failed"), ("w1", "completed")]
        for worker_id, status in ends:
            held = start(backend, worker_id=worker_id)
            backend.finish_run(held.run.id, held.run.attempt, status)
        other = start(backend, worker_id="w3", job_id="other")

        def attempts(**how: Any) -> list[tuple[str, int]]:
            return [(run.job_id, run.attempt) for run in backend.list_runs(**how)]

        assert attempts(job_id="job-1") == [("job-1", 1), ("job-1", 2), ("job-1", 3)]
        assert attempts(limit=2) == [("job-1", 3), ("other", 1)]
        assert attempts(worker_id="w1") == [("job-1", 1), ("job-1", 3)]
        assert attempts(job_id="job-1", status="failed", limit=1) == [("job-1", 2)]
        assert backend.list_runs(status="in_progress") == [other.run]

    def test_a_script_run_has_no_worker_and_is_not_reaped(self, backend: Backend) -> None:
        held = backend.start_script_run(spec("sjob-1", type="script"))
        assert (held.job.type, held.job.status, held.run.attempt) == ("script", "in_progress", 1)
        assert held.job.worker_id is None is held.run.worker_id
        with pytest.raises(InvalidStateError, match="sjob-1"):
            backend.start_script_run(spec("sjob-1", type="script"))
        backend.register_worker(WorkerSpec("w1"))
        self.pass_lease(backend)
        assert backend.claim_job("w1") is None
        assert backend.get_job("sjob-1") == held.job
        backend.append_events(held.run.id, [draft(loss=1)])
        job = backend.finish_run(held.run.id, 1, "failed", error="interrupted")
        assert (job.status, job.outputs) == ("failed", {"loss": 1})
        with pytest.raises(InvalidStateError, match="script"):
            backend.restart_job("sjob-1")

    def test_a_canceled_script_run_ends_at_once(self, backend: Backend) -> None:
        held = backend.start_script_run(spec("sjob-1", type="script"))
        backend.append_events(held.run.id, [draft(loss=1)])
        job = backend.cancel_job("sjob-1")
        assert (job.status, job.outputs) == ("canceled", {"loss": 1})
        assert backend.get_run(held.run.id).status == "canceled"
        assert backend.finish_run(held.run.id, 1, "completed") == job

    def test_events_come_back_in_order_and_only_once(self, backend: Backend) -> None:
        held = start(backend)
        drafts = [draft(step=i, nested={"a": [i]}) for i in range(2500)]
        backend.append_events(held.run.id, drafts[:1200])
        backend.append_events(held.run.id, drafts[1100:])
        backend.append_events(held.run.id, [])
        events = list(backend.list_events(run_id=held.run.id))
        assert [event.data["step"] for event in events] == list(range(2500))
        assert events[7].data == drafts[7].data
        assert {(event.run_id, event.created_at) for event in events} == {(held.run.id, NOW)}
        assert [event.id for event in events] == sorted({event.id for event in events})
        after = backend.list_events(job_id="job-1", after=events[2400].id)
        assert list(after) == events[2401:]

    def test_events_of_a_type(self, backend: Backend) -> None:
        first = start(backend)
        steps = [draft(step=i) for i in range(1500)]
        backend.append_events(first.run.id, [draft(type="a", n=0), *steps, draft(type="b", n=1)])
        backend.append_events(first.run.id, [draft(type=None), draft(type=7), draft(note="a")])
        backend.release_run(first.run.id, 1, reason="its worker ended")
        second = claim(backend)
        backend.append_events(second.run.id, [draft(type="a", n=i) for i in range(2, 1202)])

        def found(**asked: Any) -> list[int]:
            return [event.data["n"] for event in backend.list_events(**asked)]

        assert found(job_id="job-1", type="a") == [0, *range(2, 1202)]
        assert found(run_id=first.run.id, type="a") == [0]
        assert found(job_id="job-1", type="b") == [1]
        assert found(job_id="job-1", type="c' or '1'='1") == []
        events = list(backend.list_events(job_id="job-1", type="a"))
        after = backend.list_events(job_id="job-1", type="a", after=events[1100].id)
        assert list(after) == events[1101:]
        with pytest.raises(NotFoundError):
            list(backend.list_events(job_id="nix", type="a"))

    def test_events_of_a_job_are_those_of_all_its_runs(self, backend: Backend) -> None:
        first = start(backend)
        backend.append_events(first.run.id, [draft(step=1), draft(old=True)])
        backend.finish_run(first.run.id, 1, "failed")
        late = draft(step=2)
        backend.append_events(first.run.id, [late])  # late, but not replaced yet
        job = backend.get_job("job-1")
        assert job.outputs == {"step": 2, "old": True}
        # What adds nothing does not make it the job that was changed last.
        backend.append_events(first.run.id, [late])
        backend.append_events(first.run.id, [])
        assert backend.get_job("job-1") == job
        backend.restart_job("job-1")
        assert backend.latest_values(job_id="job-1") == {"step": 2, "old": True}
        second = claim(backend)
        assert backend.latest_values(job_id="job-1") == {}
        backend.append_events(second.run.id, [draft(step=3)])
        steps = [event.data.get("step") for event in backend.list_events(job_id="job-1")]
        assert steps == [1, None, 2, 3]
        job = backend.finish_run(second.run.id, 2, "completed")
        assert job.outputs == {"step": 3}
        assert backend.latest_values(run_id=first.run.id) == {"step": 2, "old": True}

    def test_latest_values(self, backend: Backend) -> None:
        held = start(backend)
        backend.append_events(
            held.run.id,
            [draft(step=1, loss=2.0, tag="a"), draft(step=2, loss=None), draft(note={"k": 1})],
        )
        latest = {"step": 2, "loss": None, "tag": "a", "note": {"k": 1}}
        assert backend.latest_values(job_id="job-1") == latest
        keys = ["tag", "step", "missing"]
        assert backend.latest_values(keys, run_id=held.run.id) == {"tag": "a", "step": 2}
        assert keys == ["tag", "step", "missing"]
        assert backend.latest_values([], run_id=held.run.id) == {}
        backend.submit_job(spec("no run"))
        assert backend.latest_values(job_id="no run") == {}

    def test_numbers_that_json_lacks_become_null(self, backend: Backend) -> None:
        held = start(backend)
        backend.append_events(held.run.id, [draft(loss=math.nan, all=[1.0, math.inf])])
        assert backend.latest_values(run_id=held.run.id) == {"loss": None, "all": [1.0, None]}

    def test_logs_are_written_by_offset(self, backend: Backend) -> None:
        held = start(backend)
        assert backend.read_log(held.run.id) == b""
        backend.append_log(held.run.id, 0, b"hello ")
        backend.append_log(held.run.id, 6, b"world\xff\n")
        backend.append_log(held.run.id, 6, b"world\xff\n")
        assert backend.read_log(held.run.id) == b"hello world\xff\n"
        assert backend.read_log(held.run.id, 6, 5) == b"world"
        assert backend.read_log(held.run.id, 13) == b"" == backend.read_log(held.run.id, 99)
        assert backend.get_run(held.run.id).log_bytes == 13
        assert claim(backend).run.log_bytes == 13
        with pytest.raises(InvalidInputError, match="offset 14"):
            backend.append_log(held.run.id, 14, b"gap")
        backend.finish_run(held.run.id, 1, "completed")
        backend.append_log(held.run.id, 13, b"last words")
        assert backend.list_runs(job_id="job-1")[0].log_bytes == 23
