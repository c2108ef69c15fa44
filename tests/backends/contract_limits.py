"""Whatever is given to a store is a record that every reader reads, or is refused in a sentence."""

from __future__ import annotations

import dataclasses
import io
import itertools
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from openweights.backends.base import Backend
from openweights.errors import InvalidInputError, OpenWeightsError, StoreUnavailableError
from openweights.types import EventDraft, JobSpec, WorkerSpec
from tests.backends.steps import Contract, spec, start

_TEXT = st.text(max_size=30) | st.sampled_from(
    [
        "..",
        ".",
        "",
        "../../x",
        "/etc/passwd",
        "C:\\x\\..",
        "a\0b",
        "\ud800",
        "\u202eabc",
        "-rf",
        "é",
    ]
)
_MOMENTS = st.datetimes(timezones=st.none() | st.just(UTC)) | st.sampled_from(
    [datetime.max, datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)]
)
_NUMBERS = st.integers() | st.floats() | st.sampled_from([0, -1, 2**31, 2**63, 10**30])
_JSON = st.recursive(
    st.none() | st.booleans() | _NUMBERS | _TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner, max_size=3),
    max_leaves=6,
)
_PARAMS = st.dictionaries(
    st.sampled_from(["validated_params", "mounted_files", "secrets", "cloud_type"]) | _TEXT, _JSON
)
_ID = _TEXT | st.sampled_from(["job-1", "w1", "result:file-000000000000"])
_INTS = st.integers(-(2**70), 2**70) | st.sampled_from([0, -1, 1, 2**31, 2**63, 2**63 - 1])
_LIMIT = st.none() | _INTS
_KEYS = st.none() | st.lists(_TEXT, max_size=3)
# Verb -> its arguments, those after a minus by name.
_VERBS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "get_file": {"id": _ID},
    "open_file": {"id": _ID},
    "delete_file": {"id": _ID},
    "list_files": {"-purpose": st.none() | _TEXT, "-limit": _LIMIT},
    "put_file": {"content": st.builds(io.BytesIO), "purpose": _TEXT, "name": _TEXT},
    "get_job": {"id": _ID},
    "list_jobs": {"-where": st.none() | _PARAMS, "-limit": _LIMIT},
    "cancel_job": {"id": _TEXT},
    "restart_job": {"id": _ID},
    "delete_job": {"id": _TEXT},
    "set_timeout": {"id": _ID, "at": st.none() | _MOMENTS},
    "get_run": {"id": _INTS},
    "list_runs": {"-job_id": st.none() | _ID, "-worker_id": st.none() | _ID, "-limit": _LIMIT},
    "finish_run": {"id": _INTS, "attempt": _INTS, "status": st.just("failed"), "-error": _TEXT},
    "release_run": {"id": _INTS, "attempt": _INTS, "-reason": _TEXT},
    "list_events": {"-run_id": _INTS, "-after": _INTS, "-type": st.none() | _TEXT},
    "latest_values": {"keys": _KEYS, "-job_id": _ID},
    "append_log": {"id": _INTS, "offset": _INTS, "data": st.binary(max_size=9)},
    "read_log": {"id": st.just(1) | _INTS, "offset": _INTS, "limit": _INTS},
    "register_worker": {
        "worker": st.builds(
            WorkerSpec,
            id=st.just("w9") | _TEXT,
            docker_image=_TEXT,
            hardware_type=_TEXT,
            gpu_count=_INTS,
            vram_gb=_INTS,
            pod_id=st.none() | _TEXT,
        )
    },
    "set_worker_status": {"id": _TEXT, "status": st.just("shutdown")},
    "claim_job": {"id": _TEXT},
    "heartbeat": {"id": _ID, "run": st.none() | _INTS},
    "collect_garbage": {"keep_s": st.floats(), "-dry_run": st.booleans()},
}
_quick = settings(
    max_examples=25,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
_ids = itertools.count()


def _refused_or(call: Callable[[], Any]) -> Any:
    """The answer of `call`; None when it is refused in a sentence."""
    try:
        return call()
    except OpenWeightsError as error:
        assert str(error) and "Traceback" not in str(error)
        assert not isinstance(error, StoreUnavailableError), "it is there, and would be asked again"
        return None


class LimitsContract(Contract):
    """Names, moments and parameters of any kind."""

    def test_a_files_name_is_always_a_base_name(self, backend: Backend) -> None:
        @_quick
        @given(_TEXT)
        def check(name: str) -> None:
            content = io.BytesIO(f"content {next(_ids)}".encode())
            stored = _refused_or(lambda: backend.put_file(content, "result", name))
            if stored is None:
                return
            for file in (stored, backend.get_file(stored.id), backend.list_files(limit=1)[0]):
                assert file.filename not in ("", ".", "..") and not set("/\\\0") & {*file.filename}
                assert len(file.filename.encode()) <= 255 and min(file.filename) >= " "

        check()

    def test_any_job_is_read_again_or_refused(self, backend: Backend) -> None:
        @_quick
        @given(
            st.fixed_dictionaries(
                {},
                optional={
                    "params": _PARAMS,
                    "timeout_at": _MOMENTS,
                    "requires_vram_gb": _NUMBERS,
                    "priority": _NUMBERS,
                    "max_attempts": _NUMBERS,
                    "script": _TEXT,
                    "docker_image": _TEXT,
                    "model": _TEXT,
                    "allowed_hardware": st.lists(_TEXT, max_size=3).map(tuple),
                },
            )
        )
        def check(changes: dict[str, Any]) -> None:
            given_spec: JobSpec = spec(f"any-{next(_ids)}", **changes)
            job = _refused_or(lambda: backend.submit_job(given_spec))
            if job is not None:
                assert backend.get_job(job.id) == job
                assert job in backend.list_jobs(statuses=["pending"], limit=None)
                moved = _refused_or(lambda: backend.set_timeout(job.id, job.timeout_at))
                assert moved is not None and moved.timeout_at == job.timeout_at
                backend.cancel_job(job.id)

        check()

    def test_any_event_is_read_again_or_refused(self, backend: Backend) -> None:
        held = start(backend)

        @_quick
        @given(st.dictionaries(_TEXT, _JSON, max_size=4), _MOMENTS, _TEXT)
        def check(data: dict[str, Any], moment: datetime, key: str) -> None:
            event = EventDraft(f"{next(_ids)}{key}", data, moment)
            before = len(list(backend.list_events(run_id=held.run.id)))
            _refused_or(lambda: backend.append_events(held.run.id, [event]))
            events = list(backend.list_events(run_id=held.run.id))
            assert len(events) in (before, before + 1)
            assert all(2000 <= event.created_at.year <= 2200 for event in events)

        check()

    def test_any_argument_of_any_verb_is_taken_or_refused(self, backend: Backend) -> None:
        """No traceback of a driver, and afterwards every reader reads everything."""
        held = start(backend)

        @settings(_quick, max_examples=self.verb_examples)
        @given(st.sampled_from(sorted(_VERBS)), st.data())
        def check(verb: str, data: st.DataObject) -> None:
            arguments = [data.draw(strategy, name) for name, strategy in _VERBS[verb].items()]
            positional = [a for n, a in zip(_VERBS[verb], arguments, strict=True) if n[0] != "-"]
            named = {n[1:]: a for n, a in zip(_VERBS[verb], arguments, strict=True) if n[0] == "-"}

            def call() -> None:
                answer = getattr(backend, verb)(*positional, **named)
                list(answer) if verb == "list_events" else None

            _refused_or(call)

        check()
        self._read_all(backend, held.run.id)

    verb_examples = 250

    def _read_all(self, backend: Backend, run_id: int) -> None:
        for job in backend.list_jobs(limit=None):
            assert backend.get_job(job.id) == job
            for run in backend.list_runs(job_id=job.id):
                backend.read_log(run.id)
                list(backend.list_events(run_id=run.id))
        assert backend.get_run(run_id).id == run_id
        assert all(backend.get_file(f.id) == f for f in backend.list_files(limit=None))
        assert backend.list_workers() and backend.sizes()

    def test_values_of_other_types_are_refused_by_name(self, backend: Backend) -> None:
        """A text is no list of its letters, and no number is a word for one."""
        hardware: list[Any] = ["1x H100S", [None], [["1x H100S"]], {"1x H100S": 1}, 5]
        jobs: dict[str, list[Any]] = {
            "allowed_hardware": hardware,
            "after": ["job-1", [None], 5],
            "id": [5, None],
            "script": [None, 5],
            "docker_image": [None, 5],
            "label": [5],
            "params": [None, [], "x"],
            "priority": ["high", None, 1.5],
            "requires_vram_gb": ["24", None, 2.5],
            "max_running": ["2", 1.5],
        }
        workers: dict[str, list[Any]] = {
            "id": [5, None],
            "hardware_type": [None, 5, "x" * 300, "a\x1b[31m", ["1x H100S"]],
            "gpu_count": [-1, None, "1", 2.5],
            "vram_gb": [2**40, None, float("nan")],
            "cloud_type": ["FREE", 5],
            "pod_id": ["a\nb", 5],
        }
        for field, values in jobs.items():
            for value in values:
                with pytest.raises(InvalidInputError, match=field):
                    backend.submit_job(dataclasses.replace(spec("odd"), **{field: value}))
        for field, values in workers.items():
            for value in values:
                with pytest.raises(InvalidInputError, match=field):
                    backend.register_worker(dataclasses.replace(WorkerSpec("w"), **{field: value}))
        assert backend.list_jobs() == [] == backend.list_workers()

    def test_texts_have_an_end(self, backend: Backend) -> None:
        held = start(backend)
        for field, value in (("script", "x" * 200_000), ("docker_image", "i" * 5000)):
            try:
                backend.submit_job(spec("long", **{field: value}))
            except InvalidInputError as error:
                assert field in str(error)
            else:
                raise AssertionError(f"{field} was taken")
        backend.finish_run(held.run.id, 1, "failed", error="e" * 2_000_000)
        error = backend.get_run(held.run.id).error
        assert error is not None and len(error) == 4000

    def test_a_moment_that_no_clock_shows_is_refused(self, backend: Backend) -> None:
        start(backend)
        for years in (-100, 400):
            try:
                backend.set_timeout("job-1", datetime.now(UTC) + timedelta(days=365 * years))
            except InvalidInputError as error:
                assert "2000 to 2199" in str(error)
            else:
                raise AssertionError(f"{years} years from now was taken")
        assert backend.get_job("job-1").timeout_at is None
        assert backend.register_worker(WorkerSpec("w2")).id == "w2"
