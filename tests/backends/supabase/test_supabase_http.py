"""What is particular to the store in a Supabase project: lost answers, refusals, pages, large
files, and what it says when something is missing.
"""

from __future__ import annotations

import hashlib
import io
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO, cast

import pytest

from openweights import OpenWeights
from openweights.backends import open_backend
from openweights.backends.base import Backend
from openweights.backends.supabase.backend import SupabaseBackend
from openweights.errors import (
    ConfigurationError,
    FencedError,
    InvalidInputError,
    InvalidStateError,
    NotFoundError,
    PlatformError,
    StoreUnavailableError,
)
from openweights.settings import Settings
from openweights.types import WorkerSpec
from tests.backends.steps import claim, draft, spec, start
from tests.supabase_double.team import ROOT, Team
from tests.waiting import HANGS_S

MIB = 1 << 20


@pytest.fixture
def backend(team: Team) -> Iterator[SupabaseBackend]:
    with closing(team.backend(patience_s=5.0)) as backend:
        yield backend


# ---- lost answers


def test_no_verb_minds_a_lost_answer(team: Team, backend: SupabaseBackend) -> None:
    """Nearly half of the answers are lost, after the write: a whole life of a job all the same."""
    with closing(team.backend(patience_s=60.0)) as backend:
        team.fault(drop_answers=0.4)
        for attempt in (1, 2, 3):
            file = backend.put_file(io.BytesIO(b"%d" % attempt), "result", "a")
            held = start(backend, job_id="job-1")
            assert held.run.attempt == attempt
            backend.append_events(held.run.id, [draft(step=n) for n in range(5)])
            backend.append_log(held.run.id, 0, b"hello")
            assert backend.heartbeat("w1", held.run.id) == "continue"
            assert backend.finish_run(held.run.id, attempt, "failed").status == "failed"
            assert backend.restart_job("job-1").status == "pending"
            backend.delete_file(file.id)
        script = backend.start_script_run(spec("sjob-1", type="script"))
        backend.cancel_job("job-1")
        team.fault(drop_answers=0.0)
        assert [len(list(backend.list_events(run_id=r.id))) for r in backend.list_runs()] == [
            *(5, 5, 5),
            0,
        ]
        assert script.run == backend.list_runs(job_id="sjob-1")[0]
        assert backend.list_files() == []
    assert team.report()["dropped"] > 10


def test_what_may_not_be_done_twice_is_still_refused(backend: SupabaseBackend) -> None:
    """The control of the test above: without a lost answer nothing is taken for done."""
    backend.submit_job(spec())
    with pytest.raises(InvalidStateError, match="restart"):
        backend.restart_job("job-1")
    backend.start_script_run(spec("sjob-1", type="script"))
    with pytest.raises(InvalidStateError, match="sjob-1"):
        backend.start_script_run(spec("sjob-1", type="script"))


def test_a_busy_project_is_asked_again_when_it_says(team: Team, backend: SupabaseBackend) -> None:
    team.fault(statuses=[503, 429], retry_after_s=1, forget=True)
    began = time.monotonic()
    backend.submit_job(spec())
    assert time.monotonic() - began >= 2.0
    assert len(team.moments_of("rpc/submit_job")) == 3


def test_patience_ends(team: Team) -> None:
    with closing(team.backend(patience_s=0.5)) as backend:
        team.fault(is_down=True)
        began = time.monotonic()
        for call in (lambda: backend.list_jobs(), lambda: backend.submit_job(spec())):
            with pytest.raises(StoreUnavailableError, match=team.url):
                call()
        team.fault(is_down=False, statuses=[429], retry_after_s=3600)
        with pytest.raises(StoreUnavailableError, match="429"):
            backend.list_jobs()
        assert time.monotonic() - began < HANGS_S
        assert backend.list_jobs() == []


def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with (
        closing(SupabaseBackend(url, "key", "ow_" + "0" * 48, patience_s=0.3)) as backend,
        pytest.raises(StoreUnavailableError, match=url),
    ):
        backend.list_jobs()


# ---- refusals


def test_a_revoked_key_is_refused_at_once(team: Team, backend: SupabaseBackend) -> None:
    new = backend.create_key("short", "member")
    with closing(team.backend(new.key)) as other:
        backend.submit_job(spec())
        assert [job.id for job in other.list_jobs()] == ["job-1"]
        backend.revoke_key(new.id)
        for call in (lambda: other.cancel_job("job-1"), lambda: other.list_jobs()):
            with pytest.raises(ConfigurationError) as refused:
                call()
            assert new.key[:11] in str(refused.value) and new.key not in str(refused.value)
    assert backend.get_job("job-1").status == "pending"


def test_unknown_keys_are_refused(team: Team) -> None:
    with (
        closing(team.backend("ow_" + "0" * 48)) as backend,
        pytest.raises(ConfigurationError, match="ow_00000000…"),
    ):
        _ = backend.organization_id
    wrong = SupabaseBackend(team.url, "another public key", team.admin_key)
    with closing(wrong), pytest.raises(ConfigurationError, match="Invalid API key"):
        wrong.list_jobs()


def test_another_organization_sees_and_changes_nothing(
    team: Team, backend: SupabaseBackend, double: str, shared_project: str
) -> None:
    held = start(backend)
    file = backend.put_file(io.BytesIO(b"secret"), "result", "a")
    with (
        closing(Team(shared_project, double)) as others,
        closing(others.backend()) as other,
    ):
        assert other.list_jobs() == [] == other.list_files() == other.list_workers()
        for call in (
            lambda: other.get_job("job-1"),
            lambda: other.cancel_job("job-1"),
            lambda: other.finish_run(held.run.id, 1, "completed"),
            lambda: other.append_events(held.run.id, [draft(a=1)]),
            lambda: other.read_log(held.run.id),
            lambda: other.open_file(file.id),
        ):
            with pytest.raises(NotFoundError):
                call()
    assert backend.get_job("job-1") == held.job


def test_an_older_schema_is_named(team: Team, backend: SupabaseBackend) -> None:
    with pytest.raises(ConfigurationError, match="ow db init"):
        backend.rpc("of_a_later_version", thing=1)


def test_a_project_that_moved(tmp_path: Path, team: Team) -> None:
    class Elsewhere(SupabaseBackend):
        pass

    with pytest.raises(ConfigurationError, match="SUPABASE_URL"):
        Elsewhere("ftp://x", "k", team.admin_key)
    with pytest.raises(ConfigurationError, match="OPENWEIGHTS_API_KEY") as refused:
        Elsewhere(team.url, "k", "sk-secret")
    assert "secret" not in str(refused.value)


# ---- settings


@pytest.mark.parametrize("given", [1, 2, 3, 4, 5, 6])
def test_half_a_configuration_is_named(tmp_path: Path, given: int) -> None:
    values = {
        "SUPABASE_URL": "https://x.supabase.co",
        "OPENWEIGHTS_API_KEY": "ow_" + "1" * 48,
        "SUPABASE_ANON_KEY": "sb_publishable_x",
    }
    env = {name: value for bit, (name, value) in enumerate(values.items()) if given >> bit & 1}
    settings = Settings.from_env({"OPENWEIGHTS_HOME": str(tmp_path), **env})
    if set(env) == {"SUPABASE_ANON_KEY"}:
        open_backend(settings).close()  # names no store
        return
    with pytest.raises(ConfigurationError) as refused:
        open_backend(settings)
    for name in values:
        assert name in str(refused.value)
    assert "111" not in str(refused.value)


def test_opening_does_nothing_and_closing_is_final(team: Team, tmp_path: Path) -> None:
    team.fault(forget=True)
    backend = open_backend(team.settings(tmp_path))
    assert isinstance(backend, SupabaseBackend) and team.admin_key not in repr(backend)
    assert team.report()["requests"] == [] and backend.liveness_fds == ()
    assert backend.organization_id == team.organization_id
    assert (backend.heartbeat_s, backend.lease_s) == (10.0, 60.0)
    backend.close()
    with pytest.raises(InvalidStateError, match="closed"):
        backend.list_jobs()


def test_no_worker_starts_by_itself(team: Team, home: Path) -> None:
    with closing(OpenWeights(settings=team.settings(home))) as ow:
        ow.ensure_worker()
        assert ow.backend.list_workers() == []
    assert not home.exists()


def test_the_organization_is_checked(team: Team, tmp_path: Path) -> None:
    settings = team.settings(tmp_path)
    right = OpenWeights(settings=settings, organization_id=team.organization_id)
    assert right.jobs.list() == []
    right.close()
    with pytest.raises(ConfigurationError, match="belongs to the organization"):
        OpenWeights(settings=settings, organization_id="another").jobs.list()


def test_without_the_package_it_says_what_to_install(tmp_path: Path) -> None:
    code = """
import sys
sys.modules["supabase"] = None
from openweights import OpenWeights
try:
    OpenWeights("https://x.supabase.co", "k", "ow_" + "1" * 48).jobs.list()
except Exception as error:
    print(type(error).__name__, error)
"""
    answer = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(ROOT), "OPENWEIGHTS_HOME": str(tmp_path)},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert answer.startswith("ConfigurationError") and "openweights[supabase]" in answer


# ---- pages


@pytest.mark.parametrize("cap", [100, 1000])
def test_nothing_is_cut_off_by_the_cap(team: Team, backend: SupabaseBackend, cap: int) -> None:
    team.fault(max_rows=cap)
    held = start(backend)
    backend.append_events(held.run.id, [draft(step=n) for n in range(1005)])
    backend.release_run(held.run.id, 1, reason="test")
    for number in range(210):
        backend.submit_job(spec(f"job-{number:03}", params={"n": number % 2}))
    assert len(list(backend.list_events(run_id=held.run.id))) == 1005
    assert len(list(backend.list_events(job_id="job-1"))) == 1005
    jobs = backend.list_jobs(limit=None)
    assert [job.id for job in jobs] == [f"job-{n:03}" for n in range(209, -1, -1)] + ["job-1"]
    assert [job.id for job in backend.list_jobs(limit=150)] == [job.id for job in jobs][:150]
    odd = backend.list_jobs(where={"n": 1}, limit=104)
    assert [job.id for job in odd] == [f"job-{n:03}" for n in range(209, 1, -2)]


def test_text_that_postgres_cannot_hold(backend: SupabaseBackend) -> None:
    held = start(backend, params={"validated_params": {"a\0": "x\0\udcff", "b": "ü😀"}})
    assert held.job.params == {"validated_params": {"a\ufffd": "x\ufffd?", "b": "ü😀"}}
    backend.append_events(held.run.id, [draft(text="\0", list=["\ud83d", 1])])
    backend.finish_run(held.run.id, 1, "failed", error="a\0b\udcff")
    assert backend.latest_values(run_id=held.run.id) == {"text": "\ufffd", "list": ["?", 1]}
    assert backend.get_run(held.run.id).error == "a\ufffdb?"


# ---- files


class Pattern(io.RawIOBase):
    """Bytes that are not all the same, and never all in memory."""

    def __init__(self, size: int) -> None:
        self.left = size

    def read(self, size: int = -1, /) -> bytes:
        count = self.left if size < 0 else min(size, self.left)
        block = hashlib.sha256(b"%d" % self.left).digest() * (count // 32 + 1)
        self.left -= count
        return block[:count]


def digest(stream: BinaryIO) -> str:
    with stream:
        return hashlib.file_digest(cast(Any, stream), "sha256").hexdigest()


@pytest.mark.parametrize("size", [6 * MIB, 6 * MIB + 1, 20 * MIB])
def test_large_files_survive_a_bad_network(team: Team, backend: SupabaseBackend, size: int) -> None:
    with closing(team.backend(patience_s=60.0)) as backend:
        content = io.BytesIO(Pattern(size).read())
        content.seek(3)  # from where the caller stands
        team.fault(drop_answers=0.4, cut_downloads=5 * MIB)
        file = backend.put_file(content, "checkpoint", "c")
        assert file.bytes == size - 3
        found = digest(backend.open_file(file.id))
    assert found == hashlib.sha256(content.getvalue()[3:]).hexdigest()


def test_equal_content_is_sent_once(team: Team, backend: SupabaseBackend) -> None:
    member = team.key("member")
    first = backend.put_file(io.BytesIO(b"x" * 7 * MIB), "result", "a")
    team.fault(forget=True)
    with closing(team.backend(member)) as other:
        assert other.put_file(io.BytesIO(b"x" * 7 * MIB), "result", "b") == first
    assert not team.moments_of("upload/resumable")
    # Content that got lost comes back; of a record alone nobody has anything.
    team.execute("delete from storage.objects where name like %s", f"{team.organization_id}/%")
    with pytest.raises(NotFoundError, match="upload it again"):
        backend.open_file(first.id)
    assert backend.put_file(io.BytesIO(b"x" * 7 * MIB), "result", "b") == first
    backend.open_file(first.id).close()


def test_other_content_under_a_files_id_is_noticed(team: Team, backend: SupabaseBackend) -> None:
    file = backend.put_file(io.BytesIO(b"right"), "source", "a")
    bucket = backend._open().client.storage.from_("files")  # pyright: ignore[reportPrivateUsage]
    key = f"{team.organization_id}/{backend.identity['key_id']}/{file.id}"
    with pytest.raises(ConfigurationError, match="row-level security"):
        bucket.upload(key, b"wrong", {"upsert": "true"})
    backend.delete_file(file.id)
    # Without a record nothing is protected, and nothing trusted.
    bucket.upload(key, b"wrong")
    backend.put_file(io.BytesIO(b"right"), "source", "a")
    with backend.open_file(file.id) as stream:
        assert stream.read() == b"right"
    team.execute("update files set id = 'moved' where id = %s", file.id)
    bucket.upload(key, b"wrong", {"upsert": "true"})
    team.execute("update files set id = %s where id = 'moved'", file.id)
    with pytest.raises(PlatformError, match="not that file"), backend.open_file(file.id) as stream:
        stream.read()


def test_files_that_are_too_large_for_the_project(team: Team, backend: SupabaseBackend) -> None:
    team.fault(most_bytes=7 * MIB)
    with pytest.raises(InvalidInputError, match="storage settings"):
        backend.put_file(cast(BinaryIO, Pattern(8 * MIB)), "result", "a")
    assert backend.list_files() == []


# ---- workers' keys


def test_a_workers_key_is_enough_for_a_worker(team: Team, backend: SupabaseBackend) -> None:
    data = backend.put_file(io.BytesIO(b"data"), "mount", "d")
    hidden = backend.put_file(io.BytesIO(b"hidden"), "mount", "h")
    backend.submit_job(spec(params={"validated_params": {}, "mounted_files": {"d": data.id}}))
    with closing(team.backend(team.key("worker"))) as worker:
        worker.register_worker(WorkerSpec("w1"))
        held = claim(worker)
        with worker.open_file(data.id) as content:
            assert content.read() == b"data"
        with pytest.raises(NotFoundError):
            worker.open_file(hidden.id)
        checkpoint = worker.put_file(io.BytesIO(b"c"), "checkpoint", "c")
        worker.append_events(held.run.id, [draft(type="checkpoint", file=checkpoint.id)])
        worker.append_log(held.run.id, 0, b"log")
        assert worker.heartbeat("w1", held.run.id) == "continue"
        worker.finish_run(held.run.id, 1, "completed")
        worker.delete_file(checkpoint.id)
        for call in (
            lambda: worker.delete_file(hidden.id),
            lambda: worker.create_key("k", "worker"),
            lambda: worker.submit_job(spec("more")),
            lambda: worker.heartbeat("w2"),
        ):
            with pytest.raises(ConfigurationError):
                call()
    assert [file.id for file in backend.list_files()] == [hidden.id, data.id]


@pytest.mark.parametrize("size", [7, 7 * MIB])
def test_a_worker_may_store_what_is_there_already(
    team: Team, backend: SupabaseBackend, size: int
) -> None:
    """Also when it cannot see the other's record: equal small files come out of many runs."""
    hidden = backend.put_file(io.BytesIO(b"x" * size), "result", "a")
    with closing(team.backend(team.key("worker"))) as worker:
        worker.register_worker(WorkerSpec("w1"))
        assert worker.list_files() == []
        assert worker.put_file(io.BytesIO(b"x" * size), "result", "b") == hidden
        worker.open_file(hidden.id).close()


def test_a_zombie_is_fenced_over_http(team: Team, backend: SupabaseBackend) -> None:
    first = start(backend)
    backend.register_worker(WorkerSpec("w2"))
    team.pass_time(backend.lease_s * 1.5)
    second = claim(cast(Backend, backend), "w2")
    for late in (
        lambda: backend.finish_run(first.run.id, 1, "completed"),
        lambda: backend.append_events(first.run.id, [draft(zombie=True)]),
    ):
        with pytest.raises(FencedError):
            late()
    assert backend.finish_run(second.run.id, 2, "completed").outputs == {}
