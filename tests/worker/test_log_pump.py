"""Of a log that is too long the beginning and the end are kept, and a line says so."""

from __future__ import annotations

import re
from contextlib import closing
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from openweights import hardware
from openweights.backends import open_backend
from openweights.settings import Settings
from openweights.worker.log_pump import LogWindow
from tests.worker.harness import Jobs, WorkerThread

_NOTE = re.compile(rb"\[openweights\] (\d+) bytes are left out here\n")


@given(
    st.lists(st.binary(max_size=200) | st.sampled_from([b"line\n", b"x" * 999]), max_size=60),
    st.integers(1300, 4000),
)
def test_beginning_and_end_stay_within_the_limit(pieces: list[bytes], most: int) -> None:
    window, text = LogWindow(most), b"".join(pieces)
    stored = b"".join(map(window.feed, pieces)) + window.flush()
    assert len(stored) <= most
    head = text[: most * 3 // 4]
    assert stored.startswith(head)
    if len(text) < most * 3 // 4:
        assert stored == text
        return
    rest = stored[len(head) :].split(b"when the run ends\n", 1)[1]
    note = _NOTE.match(rest)
    tail = rest[note.end() :] if note else rest
    left_out = int(note[1]) if note else 0
    assert text.endswith(tail)
    assert len(head) + left_out + len(tail) == len(text), "what is missing is counted"


def test_a_chatty_job_fills_no_store(settings: Settings) -> None:
    small = replace(settings, log_limit_mb=1.0)
    with closing(open_backend(small)) as backend, WorkerThread(small, backend, hardware.CPU):
        jobs = Jobs(backend)
        job = jobs.submit("seq 1 400000; echo problem >&2; exit 3")
        assert jobs.wait_for_end(job) == "failed"
        assert jobs.error(job) == "exit code 3: problem"
        log = jobs.log(job)
        assert backend.list_runs(job_id=job.id)[0].log_bytes == len(log) <= 1 << 20
    assert log.startswith(b"1\n2\n3\n")
    assert log.endswith(b"\n400000\nproblem\n[openweights] failed: exit code 3\n")
    (left_out,) = _NOTE.findall(log)
    assert int(left_out) > 1_500_000
