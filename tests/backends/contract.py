"""What every store has to do: one test set over all verbs of `openweights.backends.base.Backend`.

A subclass named `Test…` provides the fixture `backend`, with a short lease, and `pass_time` if it
can do better than to sleep. Nothing here knows how a store works inside.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import math
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from openweights.backends.base import Backend
from openweights.errors import (
    FencedError,
    InvalidInputError,
    InvalidStateError,
    NotFoundError,
)
from openweights.types import Claim, EventDraft, JobSpec, WorkerSpec
from tests.backends.life_cycle import LifeCycle

NOW = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
_keys = itertools.count()


def spec(job_id: str = "job-1", **changes: Any) -> JobSpec:
    base = JobSpec(
        id=job_id,
        type="custom",
        script="true",
        params={"validated_params": {"x": 1}, "cloud_type": "SECURE"},
    )
    return dataclasses.replace(base, **changes)


def draft(**data: Any) -> EventDraft:
    return EventDraft(f"key-{next(_keys)}", data, NOW)


def claim(backend: Backend, worker_id: str = "w1") -> Claim:
    found = backend.claim_job(worker_id)
    assert found is not None
    return found


def start(backend: Backend, *, worker_id: str = "w1", **changes: Any) -> Claim:
    """Submit one job and have a new worker claim it."""
    backend.register_worker(WorkerSpec(worker_id))
    backend.submit_job(spec(**changes))
    return claim(backend, worker_id)


class BackendContract:
    """Inherit, provide the fixture `backend`, and every verb is tested."""

    max_examples = 30

    def pass_time(self, backend: Backend, seconds: float) -> None:
        time.sleep(seconds)

    def pass_lease(self, backend: Backend) -> None:
        self.pass_time(backend, backend.lease_s * 1.5)

    # ---- files

    def test_files_are_named_by_content_and_purpose(self, backend: Backend) -> None:
        first = backend.put_file(io.BytesIO(b"abc"), "result", "/home/me/secret/out.txt")
        again = backend.put_file(io.BytesIO(b"abc"), "result", "other.txt")
        windows = backend.put_file(io.BytesIO(b""), "log", "C:\\me\\half \udcff.txt")
        other = backend.put_file(io.BytesIO(b"abc"), "conversations", "out.txt")
        assert (first.filename, first.bytes, first.purpose) == ("out.txt", 3, "result")
        assert again == first == backend.get_file(first.id)
        assert (windows.filename, windows.bytes) == ("half ?.txt", 0)
        assert first.id.startswith("result:file-") and len(first.id) == len("result:file-") + 12
        assert other.id.partition(":")[2] == first.id.partition(":")[2]
        assert [f.id for f in backend.list_files()] == [other.id, windows.id, first.id]
        assert backend.list_files(purpose="result") == [first]
        assert backend.list_files(limit=1) == [other]
        with backend.open_file(first.id) as content:
            assert content.read() == b"abc"

    def test_deleted_files_are_gone_and_can_come_back(self, backend: Backend) -> None:
        file = backend.put_file(io.BytesIO(b"abc"), "result", "a")
        backend.delete_file(file.id)
        backend.delete_file(file.id)
        for look in (backend.get_file, backend.open_file):
            with pytest.raises(NotFoundError, match=file.id):
                look(file.id)
        assert backend.put_file(io.BytesIO(b"abc"), "result", "a").id == file.id
        with backend.open_file(file.id) as content:
            assert content.read() == b"abc"

    @pytest.mark.parametrize("purpose", ["", "../x", "a/b", "a:b", " ", "ü"])
    def test_purposes_that_no_id_can_hold_are_refused(self, backend: Backend, purpose: str) -> None:
        with pytest.raises(InvalidInputError, match="purpose"):
            backend.put_file(io.BytesIO(b"abc"), purpose, "a")
        assert backend.list_files() == []

    # ---- jobs

    def test_a_job_comes_back_as_submitted(self, backend: Backend) -> None:
        full = spec(
            model="org/model",
            docker_image="image:1",
            requires_vram_gb=24,
            allowed_hardware=("1x H100S", "2x A100"),
            bundle_file="source:file-0123456789ab",
            priority=-3,
            max_attempts=5,
            timeout_at=NOW,
            params={"validated_params": {"ü": [1, None, {"a": 0.5}]}, "cloud_type": "ALL"},
        )
        job = backend.submit_job(full)
        assert {f.name: getattr(job, f.name) for f in dataclasses.fields(full)} == {
            f.name: getattr(full, f.name) for f in dataclasses.fields(full)
        }
        assert (job.status, job.attempts, job.outputs, job.worker_id) == ("pending", 0, None, None)
        assert job.organization_id == backend.organization_id
        assert job.created_at.utcoffset() == timedelta(0)
        assert backend.get_job(job.id) == job
        assert backend.submit_job(spec("bare")).allowed_hardware is None

    def test_resubmitting_a_waiting_job_only_moves_it(self, backend: Backend) -> None:
        backend.submit_job(spec())
        job = backend.submit_job(
            spec(
                script="false",
                priority=9,
                docker_image="new",
                requires_vram_gb=80,
                allowed_hardware=("1x H200",),
                bundle_file="source:file-2",
                params={"validated_params": {"x": 2}, "cloud_type": "ALL"},
            )
        )
        assert (job.docker_image, job.requires_vram_gb, job.bundle_file) == (
            "new",
            80,
            "source:file-2",
        )
        assert job.allowed_hardware == ("1x H200",)
        assert job.params == {"validated_params": {"x": 1}, "cloud_type": "ALL"}
        assert (job.script, job.priority, job.status) == ("true", 0, "pending")
        assert len(backend.list_jobs()) == 1

    def test_resubmitting_a_running_or_completed_job_changes_nothing(
        self, backend: Backend
    ) -> None:
        held = start(backend)
        assert backend.submit_job(spec(docker_image="new")) == held.job
        done = backend.finish_run(held.run.id, held.run.attempt, "completed")
        assert backend.submit_job(spec(docker_image="new")) == done

    @pytest.mark.parametrize("status", ["failed", "canceled"])
    def test_resubmitting_an_ended_job_starts_it_anew(self, backend: Backend, status: Any) -> None:
        held = start(backend, max_attempts=1)
        backend.append_events(held.run.id, [draft(loss=1)])
        backend.finish_run(held.run.id, held.run.attempt, status)
        job = backend.submit_job(spec(script="new", priority=4))
        assert (job.status, job.script, job.priority, job.max_attempts) == ("pending", "new", 4, 3)
        assert (job.outputs, job.attempts, job.worker_id) == (None, 1, None)
        assert claim(backend).run.attempt == 2
        assert [run.attempt for run in backend.list_runs(job_id=job.id)] == [1, 2]

    def test_jobs_are_listed_newest_change_first(self, backend: Backend) -> None:
        for name in "abcd":
            backend.submit_job(spec(name))
            self.pass_time(backend, 0.002)
        backend.cancel_job("b")
        self.pass_time(backend, 0.002)
        backend.set_timeout("a", NOW)

        def listed(**how: Any) -> str:
            return "".join(job.id for job in backend.list_jobs(**how))

        assert listed() == "abdc"
        assert listed(limit=2) == "ab"
        assert listed(statuses=["canceled"]) == "b"
        assert listed(statuses=["pending"], limit=2) == "ad"
        assert listed(statuses=["pending", "canceled"], limit=None) == "abdc"
        assert listed(statuses=[]) == ""

    def test_jobs_are_found_by_what_their_params_contain(self, backend: Backend) -> None:
        nested = {"model": "m", "lora": {"r": 8, "bias": None}, "flag": True, "mods": ["q", "k"]}
        backend.submit_job(spec("a", params={"validated_params": nested}))
        backend.submit_job(spec("b", params={"validated_params": {"model": "n", "flag": 1}}))

        def found(limit: int | None = None, **part: Any) -> list[str]:
            where = {"validated_params": part}
            return sorted(job.id for job in backend.list_jobs(where=where, limit=limit))

        assert found() == ["a", "b"]
        assert found(model="m") == found(lora={"r": 8.0}) == found(lora={"bias": None}) == ["a"]
        assert found(mods=("q", "k")) == found(flag=True) == ["a"]
        assert found(flag=1) == ["b"]
        assert found(mods=["q"]) == found(r=8) == found(other=None) == found(lora={"r": 9}) == []
        # Filtered before the limit: the newer job does not use it up.
        assert found(limit=1, model="m") == ["a"]

    def test_only_what_has_not_ended_can_be_canceled(self, backend: Backend) -> None:
        backend.submit_job(spec("a"))
        canceled = backend.cancel_job("a")
        assert canceled.status == "canceled"
        assert backend.cancel_job("a") == canceled
        for status in ("completed", "failed"):
            held = start(backend, job_id=status)
            ended = backend.finish_run(held.run.id, held.run.attempt, status)
            with pytest.raises(InvalidStateError, match=status):
                backend.cancel_job(status)
            assert backend.get_job(status) == ended

    def test_only_failed_and_canceled_jobs_can_be_restarted(self, backend: Backend) -> None:
        held = start(backend)
        backend.submit_job(spec("waiting"))
        backend.append_events(held.run.id, [draft(loss=2)])
        for job_id in ("job-1", "waiting"):
            with pytest.raises(InvalidStateError, match="restart"):
                backend.restart_job(job_id)
        failed = backend.finish_run(held.run.id, held.run.attempt, "failed", error="boom")
        assert failed.outputs == {"loss": 2}
        again = backend.restart_job("job-1")
        assert (again.status, again.attempts, again.outputs) == ("pending", 1, None)
        second = claim(backend)
        assert (second.job.id, second.run.attempt) == ("job-1", 2)
        backend.finish_run(second.run.id, 2, "completed")
        with pytest.raises(InvalidStateError, match="completed"):
            backend.restart_job("job-1")

    def test_ids_that_do_not_exist(self, backend: Backend) -> None:
        backend.register_worker(WorkerSpec("w1"))
        calls = [
            lambda: backend.get_job("nix"),
            lambda: backend.cancel_job("nix"),
            lambda: backend.restart_job("nix"),
            lambda: backend.set_timeout("nix", None),
            lambda: backend.list_runs(job_id="nix"),
            lambda: backend.list_runs(worker_id="nix"),
            lambda: backend.list_events(job_id="nix"),
            lambda: backend.latest_values(job_id="nix"),
            lambda: backend.get_run(77),
            lambda: backend.finish_run(77, 1, "completed"),
            lambda: backend.release_run(77, 1, reason=""),
            lambda: backend.append_events(77, [draft(a=1)]),
            lambda: backend.list_events(run_id=77),
            lambda: backend.latest_values(run_id=77),
            lambda: backend.append_log(77, 0, b"x"),
            lambda: backend.read_log(77),
            lambda: backend.set_worker_status("nix", "shutdown"),
            lambda: backend.claim_job("nix"),
            lambda: backend.heartbeat("nix"),
            lambda: backend.heartbeat("w1", 77),
        ]
        for call in calls:
            with pytest.raises(NotFoundError, match="nix|77"):
                call()

    def test_values_that_cannot_be_stored_are_refused(self, backend: Backend) -> None:
        with pytest.raises(InvalidInputError, match="params"):
            backend.submit_job(spec(params={"x": object()}))
        with pytest.raises(InvalidInputError, match="time zone"):
            backend.submit_job(spec(timeout_at=datetime(2026, 1, 1)))
        held = start(backend)
        with pytest.raises(InvalidInputError, match="event"):
            backend.append_events(held.run.id, [draft(a=1), draft(a={1, 2})])
        loop: dict[str, Any] = {}
        loop["loop"] = loop
        with pytest.raises(InvalidInputError, match="event"):
            backend.append_events(held.run.id, [draft(a=loop)])
        with pytest.raises(InvalidInputError):
            backend.list_events()
        with pytest.raises(InvalidInputError):
            backend.latest_values(job_id=held.job.id, run_id=held.run.id)
        assert list(backend.list_events(run_id=held.run.id)) == []

    # ---- claims

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
        backend.submit_job(spec(max_attempts=1))
        for attempt in (1, 2, 3):
            held = claim(backend)
            assert held.run.attempt == attempt
            for _ in range(2):  # a lost answer, sent again
                job = backend.release_run(held.run.id, attempt, reason="shutting down")
                assert (job.status, job.attempts, job.worker_id) == ("pending", attempt, None)
        run = backend.get_run(held.run.id)
        assert (run.status, run.error) == ("failed", "shutting down")
        assert run.ended_at is not None

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
        assert backend.finish_run(held.run.id, 1, "completed").status == "completed"

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

    # ---- cancel and timeout

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
            assert backend.get_run(held.run.id).status == "canceled"

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

    # ---- runs

    def test_finishing_again_is_no_error_but_otherwise_is(self, backend: Backend) -> None:
        held = start(backend)
        job = backend.finish_run(held.run.id, 1, "failed", error="exit code 3 \udcff")
        assert (job.status, job.worker_id) == ("failed", None)
        assert backend.finish_run(held.run.id, 1, "failed", error="other") == job
        run = backend.get_run(held.run.id)
        assert (run.status, run.error) == ("failed", "exit code 3 ?")
        with pytest.raises(FencedError, match="job-1"):
            backend.finish_run(held.run.id, 1, "completed")
        with pytest.raises(FencedError):
            backend.finish_run(held.run.id, 2, "failed")
        with pytest.raises(FencedError):
            backend.release_run(held.run.id, 1, reason="late")
        assert backend.get_run(held.run.id) == run

    def test_runs_are_listed_oldest_first(self, backend: Backend) -> None:
        for worker_id, status in [("w1", "failed"), ("w2", "failed"), ("w1", "completed")]:
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

    # ---- events and logs

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

    def test_events_of_a_job_are_those_of_all_its_runs(self, backend: Backend) -> None:
        first = start(backend)
        backend.append_events(first.run.id, [draft(step=1), draft(old=True)])
        backend.finish_run(first.run.id, 1, "failed")
        backend.append_events(first.run.id, [draft(step=2)])  # late, but not replaced yet
        assert backend.get_job("job-1").outputs == {"step": 2, "old": True}
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

    # ---- workers

    def test_a_worker_comes_back_as_registered(self, backend: Backend) -> None:
        worker = WorkerSpec(
            id="w1",
            docker_image="image:1",
            hardware_type="2x H100S",
            gpu_count=2,
            vram_gb=160,
            cloud_type="SECURE",
            pod_id="pod-1",
            cached_models=("a", "b"),
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

    # ---- everything together

    def test_the_life_cycle_follows_its_model(self, backend: Backend) -> None:
        def machine() -> LifeCycle:
            return LifeCycle(backend, lambda seconds: self.pass_time(backend, seconds))

        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=self.max_examples,
                stateful_step_count=40,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
