"""What a store removes: a job with all that is its own, and by age what nobody names."""

from __future__ import annotations

import io
import itertools
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from openweights.backends.base import Backend
from openweights.errors import InvalidInputError, InvalidStateError, NotFoundError
from openweights.types import FileRecord, WorkerSpec
from tests.backends.steps import Contract, claim, draft, spec, start

_DAY_S = 86_400.0
_count = itertools.count()


def put(backend: Backend, purpose: str = "result") -> FileRecord:
    content = io.BytesIO(b"content %d" % next(_count))
    return backend.put_file(content, purpose, "f")


def ids(backend: Backend) -> set[str]:
    return {file.id for file in backend.list_files(limit=None)}


def checkpoint(file: FileRecord, **data: Any) -> Any:
    return draft(type="checkpoint", step=1, file=file.id, **data)


class RetentionContract(Contract):
    """`delete_job`, `collect_garbage` and `sizes`."""

    def test_a_job_is_deleted_with_all_that_is_its_own(self, backend: Backend) -> None:
        held = start(backend)
        file = put(backend)
        backend.append_events(held.run.id, [draft(path="f", file=file.id)])
        backend.append_log(held.run.id, 0, b"hello")
        for status in ("in_progress", "canceled"):
            with pytest.raises(InvalidStateError, match=f"job-1 is {status}"):
                backend.delete_job("job-1")
            if status == "in_progress":
                backend.cancel_job("job-1")
        backend.finish_run(held.run.id, 1, "canceled")
        backend.delete_job("job-1")
        backend.delete_job("job-1")
        backend.delete_job("never")
        for look in (
            lambda: backend.get_job("job-1"),
            lambda: backend.get_run(held.run.id),
            lambda: backend.read_log(held.run.id),
            lambda: backend.append_events(held.run.id, [draft(x=1)]),
            lambda: backend.append_log(held.run.id, 0, b"late"),
        ):
            with pytest.raises(NotFoundError):
                look()
        assert backend.list_jobs() == []
        assert ids(backend) == {file.id}, "whether others name it is found out later"
        backend.submit_job(spec())
        again = claim(backend)
        assert again.run.attempt == 1
        assert again.run.id > held.run.id, "numbers of runs never come again"
        assert backend.read_log(again.run.id) == b""

    def test_a_job_that_one_to_come_names_stays(self, backend: Backend) -> None:
        held = start(backend, job_id="ftjob-1")
        backend.finish_run(held.run.id, 1, "completed")
        backend.submit_job(spec("next", params={"validated_params": {"model": "ftjob-1"}}))
        with pytest.raises(InvalidStateError, match="named by job next"):
            backend.delete_job("ftjob-1")
        backend.cancel_job("next")
        backend.delete_job("ftjob-1")

    def test_what_nobody_names_goes_once_it_is_old(self, backend: Backend) -> None:
        held = start(backend, params={"mounted_files": {"a": (mounted := put(backend)).id}})
        result, saved, kept = put(backend), put(backend, "checkpoint"), put(backend, "checkpoint")
        stray, early = put(backend), put(backend, "conversations")
        backend.append_events(
            held.run.id,
            [draft(path="f", file=result.id), checkpoint(saved), checkpoint(kept, kept=True)],
        )
        assert backend.collect_garbage(0).files == 0, "it may be named in a moment"
        self.age(backend, 2 * _DAY_S)
        assert backend.heartbeat("w1", held.run.id) == "continue"
        late = put(backend)
        with backend.open_file(early.id) as content:  # put anew, as by another client
            again = backend.put_file(io.BytesIO(content.read()), "conversations", "g")
        assert again.id == early.id
        before = ids(backend)
        planned = backend.collect_garbage(_DAY_S, dry_run=True)
        assert ids(backend) == before
        assert backend.collect_garbage(_DAY_S) == planned
        assert (planned.files, planned.file_bytes) == (1, stray.bytes)
        assert before - ids(backend) == {stray.id}
        with pytest.raises(NotFoundError):
            backend.open_file(stray.id)
        backend.finish_run(held.run.id, 1, "failed")
        assert backend.collect_garbage(_DAY_S).files == 0, "it may be restarted"
        self.age(backend, 2 * _DAY_S)
        backend.collect_garbage(_DAY_S)
        assert ids(backend) == {mounted.id, result.id, kept.id}
        assert late.id in before
        backend.delete_job("job-1")
        assert backend.collect_garbage(_DAY_S).files == 3
        assert ids(backend) == set()

    def test_checkpoints_stay_while_a_job_to_come_names_theirs(self, backend: Backend) -> None:
        held = start(backend, job_id="ftjob-1")
        saved = put(backend, "checkpoint")
        backend.append_events(held.run.id, [checkpoint(saved)])
        backend.finish_run(held.run.id, 1, "failed")
        backend.submit_job(spec("next", params={"validated_params": {"model": "ftjob-1"}}))
        self.age(backend, 2 * _DAY_S)
        backend.collect_garbage(_DAY_S)
        assert ids(backend) == {saved.id}
        backend.cancel_job("next")
        backend.collect_garbage(_DAY_S)
        assert ids(backend) == set()

    def test_of_an_old_log_a_line_is_left(self, backend: Backend) -> None:
        held = start(backend)
        backend.append_log(held.run.id, 0, b"x" * 5000)
        backend.finish_run(held.run.id, 1, "completed")
        other = start(backend, worker_id="w2", job_id="job-2")
        backend.append_log(other.run.id, 0, b"y" * 5000)
        assert backend.sizes().log_bytes == 10_000
        self.age(backend, 2 * _DAY_S)
        assert backend.heartbeat("w2", other.run.id) == "continue"
        removed = backend.collect_garbage(_DAY_S)
        assert (removed.logs, removed.log_bytes) == (1, 5000)
        line = b"[openweights] this log of 5000 bytes was removed\n"
        assert backend.read_log(held.run.id) == line
        assert backend.get_run(held.run.id).log_bytes == len(line)
        assert backend.read_log(other.run.id) == b"y" * 5000
        assert backend.collect_garbage(_DAY_S).logs == 0

    def test_sizes(self, backend: Backend) -> None:
        files = [put(backend), put(backend)]
        sizes = backend.sizes()
        assert sizes.file_bytes == sum(file.bytes for file in files)
        assert sizes.log_bytes == 0 and sizes.database_bytes > 4096

    def test_a_log_has_an_end(self, backend: Backend) -> None:
        held = start(backend)
        most, piece = backend.log_limit_bytes, b"x" * (1 << 20)
        stored = 0
        while stored < most:
            backend.append_log(held.run.id, stored, piece)
            stored += len(piece)
        with pytest.raises(InvalidInputError, match=f"no more than {most}"):
            backend.append_log(held.run.id, stored, b"x")
        assert backend.get_run(held.run.id).log_bytes == most

    def test_nothing_that_is_needed_is_ever_removed(self, backend: Backend) -> None:
        """Random jobs that name random files: those that may go, worked out a second time."""
        purposes = ("conversations", "result", "checkpoint")
        jobs = st.lists(
            st.tuples(
                st.sampled_from(["pending", "in_progress", "failed", "completed"]),
                st.lists(st.integers(0, 5), max_size=2),  # names in its params
                st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=3),  # in events
                st.integers(0, 3),  # another job that it names, if there is one
                st.booleans(),  # ended long ago
            ),
            max_size=4,
        )

        @settings(
            max_examples=self.retention_examples,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(jobs)
        def check(wanted: list[Any]) -> None:
            files = [put(backend, purposes[n % 3]) for n in range(6)]
            names = [f"ftjob-{next(_count)}x" for _ in wanted]
            self._make(backend, wanted, files, names)
            keep = _needed(wanted, files)
            backend.collect_garbage(_DAY_S)
            left = {file.id for file in files} & ids(backend)
            assert left == keep
            for (status, *_), name in zip(wanted, names, strict=True):
                if status in ("pending", "in_progress"):
                    backend.cancel_job(name)

        check()

    retention_examples = 25

    def _make(
        self, backend: Backend, wanted: list[Any], files: list[FileRecord], names: list[str]
    ) -> None:
        running: list[tuple[str, int]] = []
        for is_old in (True, False):
            for number, (status, inputs, outputs, other, ended_long_ago) in enumerate(wanted):
                if (ended_long_ago or status in ("pending", "in_progress")) != is_old:
                    continue
                params = {
                    "mounted_files": {str(n): files[n].id for n in inputs},
                    "validated_params": {"model": names[other] if other < number else "m"},
                }
                # The newest goes first, whatever is left of other examples.
                backend.submit_job(spec(names[number], params=params, priority=next(_count)))
                if status == "pending":
                    continue
                worker = f"w-{names[number]}"
                backend.register_worker(WorkerSpec(worker))
                run = claim(backend, worker).run
                assert run.job_id == names[number]
                backend.append_events(run.id, [_event(files, n, kept) for n, kept in outputs])
                if status == "in_progress":
                    running.append((worker, run.id))
                else:
                    backend.finish_run(run.id, run.attempt, status)
            if is_old:
                self.age(backend, 2 * _DAY_S)
                for worker, run_id in running:
                    assert backend.heartbeat(worker, run_id) == "continue"


def _event(files: list[FileRecord], number: int, kept: bool) -> Any:
    file = files[number]
    is_checkpoint = file.purpose == "checkpoint"
    return checkpoint(file, kept=kept) if is_checkpoint else draft(path="f", file=file.id)


def _needed(wanted: list[Any], files: list[FileRecord]) -> set[str]:
    """Ids of the files that must stay, by the rule as it is told to people."""
    keep: set[str] = set()
    for number, (status, inputs, outputs, _, ended_long_ago) in enumerate(wanted):
        is_active = status in ("pending", "in_progress")
        named_by_active = any(
            one[0] in ("pending", "in_progress") and one[3] == number
            for later, one in enumerate(wanted)
            if later > number
        )
        keep |= {files[n].id for n in inputs}
        for n, kept in outputs if status != "pending" else ():
            is_spent = n % 3 == 2 and not kept
            if not is_spent or is_active or named_by_active or not ended_long_ago:
                keep.add(files[n].id)
    return keep
