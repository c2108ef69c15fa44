"""What every store has to do about workers and what they claim."""

from __future__ import annotations

import dataclasses

import pytest

from openweights.backends.base import Backend
from openweights.errors import FencedError
from openweights.types import WorkerSpec
from tests.backends.steps import Contract, claim, draft, spec, start


class WorkerContract(Contract):
    """Claims, leases, attempts, registration."""

    def test_a_claim_starts_a_run(self, backend: Backend) -> None:
        held = start(backend)
        assert (held.job.status, held.job.attempts, held.job.worker_id) == ("in_progress", 1, "w1")
        assert held.job == backend.get_job("job-1")
        assert held.run == backend.get_run(held.run.id)
        assert (held.run.job_id, held.run.worker_id, held.run.attempt) == ("job-1", "w1", 1)
        assert (held.run.status, held.run.ended_at, held.run.log_bytes) == ("in_progress", None, 0)
        assert claim(backend) == held  # a lost answer, asked for again
        assert len(backend.list_runs()) == 1
        backend.register_worker(WorkerSpec("w2"))
        assert backend.claim_job("w2") is None

    def test_jobs_are_claimed_by_priority_then_age(self, backend: Backend) -> None:
        backend.register_worker(WorkerSpec("w1"))
        for name, priority in [("a", 0), ("b", 5), ("c", 0), ("d", 5), ("e", -1)]:
            backend.submit_job(spec(name, priority=priority))
            self.pass_time(backend, 0.002)
        order = ""
        for _ in "abcde":
            held = claim(backend)
            order += held.job.id
            backend.finish_run(held.run.id, held.run.attempt, "completed")
        assert order == "bdace"
        assert backend.claim_job("w1") is None

    def test_a_released_run_uses_up_no_attempt(self, backend: Backend) -> None:
        backend.register_worker(WorkerSpec("w1"))
        backend.submit_job(spec(max_attempts=2))
        for attempt in (1, 2, 3):
            held = claim(backend)
            assert held.run.attempt == attempt
            for _ in range(2):  # a lost answer, sent again
                job = backend.release_run(held.run.id, attempt, reason="shutting down")
                assert (job.status, job.attempts, job.worker_id) == ("pending", attempt, None)
        run = backend.get_run(held.run.id)
        assert (run.status, run.error) == ("failed", "shutting down")
        assert run.is_given_back and run == backend.list_runs(job_id="job-1")[-1]
        assert not backend.claim_job("w1").run.is_given_back  # type: ignore[union-attr]
        assert run.ended_at is not None
        for expected in ("pending", "failed"):
            held = claim(backend)
            backend.register_worker(WorkerSpec("w1"))
            assert backend.get_job("job-1").status == expected
        # An old run is not ended by the number of a newer one.
        with pytest.raises(FencedError):
            backend.finish_run(run.id, held.run.attempt, "failed")

    def test_an_expired_lease_gives_the_job_to_another(self, backend: Backend) -> None:
        first = start(backend)
        backend.register_worker(WorkerSpec("w2"))
        self.pass_lease(backend)
        second = claim(backend, "w2")
        assert (second.job.id, second.run.attempt, second.job.worker_id) == ("job-1", 2, "w2")
        lost = backend.get_run(first.run.id)
        assert lost.status == "failed" and lost.error is not None and "w1" in lost.error
        # The zombie changes nothing.
        assert backend.heartbeat("w1", first.run.id) == "fenced"
        for late in (
            lambda: backend.finish_run(first.run.id, 1, "completed"),
            lambda: backend.finish_run(first.run.id, 2, "completed"),
            lambda: backend.release_run(first.run.id, 1, reason=""),
            lambda: backend.append_events(first.run.id, [draft(zombie=True)]),
        ):
            with pytest.raises(FencedError):
                late()
        assert backend.get_run(first.run.id) == lost
        assert backend.get_job("job-1") == second.job
        assert backend.heartbeat("w2", second.run.id) == "continue"

    def test_heartbeats_keep_a_lease(self, backend: Backend) -> None:
        held = start(backend)
        backend.register_worker(WorkerSpec("w2"))
        for _ in range(4):
            self.pass_time(backend, backend.lease_s * 0.5)
            assert backend.heartbeat("w1", held.run.id) == "continue"
            assert backend.claim_job("w2") is None
        assert backend.get_job("job-1").worker_id == "w1"

    def test_a_heartbeat_wins_an_expired_lease_back(self, backend: Backend) -> None:
        held = start(backend, max_attempts=2)
        backend.register_worker(WorkerSpec("w2"))
        self.pass_lease(backend)
        assert backend.heartbeat("w1", held.run.id) == "continue"
        assert backend.claim_job("w2") is None
        # Also when another worker's claim has returned the job to the queue, but took another one.
        backend.submit_job(spec("urgent", priority=1))
        self.pass_lease(backend)
        assert claim(backend, "w2").job.id == "urgent"
        assert backend.get_job("job-1").status == "pending"
        assert backend.heartbeat("w1", held.run.id) == "continue"
        run, job = backend.get_run(held.run.id), backend.get_job("job-1")
        assert (run.status, run.error, run.ended_at) == ("in_progress", None, None)
        assert (job.status, job.worker_id, job.attempts) == ("in_progress", "w1", 1)
        # What was won back is not counted as lost.
        backend.register_worker(WorkerSpec("w1"))
        assert backend.get_job("job-1").status == "pending"

    def test_a_worker_with_another_job_wins_nothing_back(self, backend: Backend) -> None:
        old = start(backend)
        backend.submit_job(spec("job-2"))
        backend.submit_job(spec("urgent", priority=1))
        backend.register_worker(WorkerSpec("w2"))
        self.pass_lease(backend)
        assert claim(backend, "w2").job.id == "urgent"
        backend.cancel_job("urgent")
        backend.submit_job(spec("urgent too", priority=1))
        new = claim(backend, "w1")
        assert new.job.id == "urgent too"
        assert backend.heartbeat("w1", old.run.id) == "fenced"
        assert backend.heartbeat("w1", new.run.id) == "continue"
        assert backend.get_job("job-1").status == "pending"

    def test_a_job_fails_when_its_allowance_of_lost_runs_is_used_up(self, backend: Backend) -> None:
        backend.register_worker(WorkerSpec("w1"))
        backend.submit_job(spec(max_attempts=2))
        for expected in ("pending", "failed"):
            held = claim(backend)
            backend.append_events(held.run.id, [draft(step=held.run.attempt)])
            backend.register_worker(WorkerSpec("w1"))
            assert backend.get_job("job-1").status == expected
        job, run = backend.get_job("job-1"), backend.get_run(held.run.id)
        assert (job.outputs, job.attempts, job.worker_id) == ({"step": 2}, 2, None)
        assert run.error is not None and "2 of at most 2" in run.error
        assert backend.heartbeat("w1", held.run.id) == "fenced"
        # A restart gives a new allowance, and so does submitting it again.
        for revive in (backend.restart_job, lambda _: backend.submit_job(spec(max_attempts=2))):
            revive("job-1")
            for expected in ("pending", "failed"):
                claim(backend)
                backend.register_worker(WorkerSpec("w1"))
                assert backend.get_job("job-1").status == expected

    def test_a_worker_comes_back_as_registered(self, backend: Backend) -> None:
        worker = WorkerSpec(
            id="w1",
            docker_image="image:1",
            hardware_type="2x H100S",
            gpu_count=2,
            vram_gb=160,
            cloud_type="SECURE",
            pod_id="pod-1",
        )
        record = backend.register_worker(worker)
        assert {f.name: getattr(record, f.name) for f in dataclasses.fields(worker)} == {
            f.name: getattr(worker, f.name) for f in dataclasses.fields(worker)
        }
        assert record.status == "active" and record.created_at <= record.pinged_at
        self.pass_time(backend, 0.002)
        backend.register_worker(WorkerSpec("w2"))
        self.pass_time(backend, 0.002)
        assert backend.heartbeat("w1") == "continue"
        workers = backend.list_workers()
        assert [w.id for w in workers] == ["w2", "w1"]
        assert workers[1].pinged_at > record.pinged_at
        backend.set_worker_status("w2", "shutdown")
        assert [w.id for w in backend.list_workers(statuses=["active"])] == ["w1"]
        assert [w.id for w in backend.list_workers(statuses=["shutdown", "terminated"])] == ["w2"]

    def test_a_worker_that_is_asked_to_end_gets_nothing_new(self, backend: Backend) -> None:
        held = start(backend)
        backend.submit_job(spec("next"))
        assert backend.set_worker_status("w1", "shutdown").status == "shutdown"
        assert backend.heartbeat("w1", held.run.id) == "shutdown" == backend.heartbeat("w1")
        assert claim(backend) == held
        backend.release_run(held.run.id, 1, reason="shutdown")
        assert backend.claim_job("w1") is None

    def test_a_terminated_worker_loses_what_it_held(self, backend: Backend) -> None:
        held = start(backend)
        assert backend.set_worker_status("w1", "terminated").status == "terminated"
        job = backend.get_job("job-1")
        assert (job.status, job.attempts, job.worker_id) == ("pending", 1, None)
        assert backend.get_run(held.run.id).status == "failed"
        assert backend.claim_job("w1") is None
        assert backend.heartbeat("w1", held.run.id) == "fenced"
        assert backend.heartbeat("w1") == "shutdown"
        assert backend.set_worker_status("w1", "shutdown").status == "terminated"
        assert [w.status for w in backend.list_workers()] == ["terminated"]
        backend.register_worker(WorkerSpec("w1"))
        assert claim(backend).run.attempt == 2
