"""What every store has to do about files and jobs."""

from __future__ import annotations

import dataclasses
import io
from datetime import datetime, timedelta
from typing import Any

import pytest

from openweights.backends.base import Backend
from openweights.errors import InvalidInputError, InvalidStateError, NotFoundError
from openweights.types import WorkerSpec
from tests.backends.steps import NOW, Contract, claim, draft, spec, start


class JobContract(Contract):
    """Files, jobs, and what is refused."""

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
