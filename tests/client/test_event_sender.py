"""Events reach the store in order and once, whatever happens to the process or the store."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pytest

from openweights import InvalidInputError, InvalidStateError, StoreUnavailableError
from openweights.backends.base import Backend
from openweights.client.event_sender import BATCH_BYTES, EventSender, replay_spool
from openweights.types import Claim, EventDraft
from tests.client.conftest import QuietClient, every_store  # noqa: F401 - a fixture
from tests.client.kinds import Echo
from tests.waiting import HANGS_S, NEVER_S, wait_until

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def run_id(ow: QuietClient, claim: Callable[[], Claim]) -> int:
    Echo(ow).create(text="a")
    return claim().run.id


class AwayBackend:
    """The real store, which is away until `returns` is set; it may have stored what it failed to
    confirm.
    """

    def __init__(self, backend: Backend, *, loses_answers: bool = False) -> None:
        self._backend = backend
        self._loses_answers = loses_answers
        self.returns = threading.Event()
        self.failures = 0
        self.pace_s = backend.pace_s

    def append_events(self, run_id: int, events: Sequence[EventDraft]) -> None:
        if self._loses_answers or self.returns.is_set():
            self._backend.append_events(run_id, events)
        if not self.returns.is_set():
            self.failures += 1
            raise StoreUnavailableError("no route to the store")


def values(ow: QuietClient, run_id: int) -> list[Any]:
    return [event.data["n"] for event in ow.events.list(run_id=run_id)]


def test_ten_thousand_events_do_not_block(ow: QuietClient, run_id: int, tmp_path: Path) -> None:
    before = datetime.now(UTC)
    sender = EventSender(ow.backend, run_id, tmp_path)
    start = time.process_time()
    for number in range(10_000):
        sender.log({"n": number, "loss": 0.5})
    # CPU time of all threads: also what the background does meanwhile is little.
    assert time.process_time() - start < 3.0
    assert sender.close()
    assert values(ow, run_id) == list(range(10_000))
    assert list(tmp_path.glob("*.jsonl")) == []
    events = ow.events.list(run_id=run_id)
    moments = [event.created_at for event in events]
    assert before < moments[0] <= moments[-1] and moments == sorted(moments)


def test_log_takes_no_longer_while_the_store_is_away(
    ow: QuietClient, run_id: int, tmp_path: Path
) -> None:
    away = AwayBackend(ow.backend)
    sender = EventSender(cast("Backend", away), run_id, tmp_path)
    slowest = 0.0
    for number in range(300):
        start = time.perf_counter()
        sender.log({"n": number})
        slowest = max(slowest, time.perf_counter() - start)
    wait_until(lambda: away.failures > 0)
    assert slowest < 10.0
    assert not sender.flush(timeout=0.05)
    assert values(ow, run_id) == []
    away.returns.set()
    assert sender.close()
    assert values(ow, run_id) == list(range(300))


class ForgetfulBackend(AwayBackend):
    """The control: events get a new key each time they are sent."""

    def append_events(self, run_id: int, events: Sequence[EventDraft]) -> None:
        super().append_events(run_id, [replace(event, key=uuid.uuid4().hex) for event in events])


def test_control_without_keys_events_are_doubled(
    ow: QuietClient, run_id: int, tmp_path: Path
) -> None:
    away = ForgetfulBackend(ow.backend, loses_answers=True)
    sender = EventSender(cast("Backend", away), run_id, tmp_path)
    sender.log({"n": 1})
    wait_until(lambda: away.failures > 0)
    away.returns.set()
    assert sender.close()
    assert len(values(ow, run_id)) > 1


@pytest.mark.parametrize("loses_answers", [False, True])
def test_nothing_is_lost_doubled_or_reordered(
    ow: QuietClient, run_id: int, tmp_path: Path, loses_answers: bool
) -> None:
    away = AwayBackend(ow.backend, loses_answers=loses_answers)
    sender = EventSender(cast("Backend", away), run_id, tmp_path)
    for number in range(700):
        sender.log({"n": number})
        if number == 350:
            wait_until(lambda: away.failures > 0)
    away.returns.set()
    assert sender.flush()
    away.returns.clear()
    failures = away.failures
    for number in range(700, 900):
        sender.log({"n": number})
    wait_until(lambda: away.failures > failures)
    away.returns.set()
    assert sender.close()
    assert values(ow, run_id) == list(range(900))


def test_closing_in_vain_keeps_the_file_for_a_replay(
    ow: QuietClient, run_id: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sender = EventSender(
        cast("Backend", AwayBackend(ow.backend, loses_answers=True)), run_id, tmp_path
    )
    for number in range(5):
        sender.log({"n": number})
    assert not sender.close(timeout=0.3)
    assert str(sender.path) in caplog.text
    begun = time.monotonic()
    assert not sender.close(timeout=NEVER_S) and time.monotonic() - begun < HANGS_S, (
        "there is nobody to wait for"
    )
    # The file's five lines, though the store has them already; and another's half line is no event.
    with sender.path.open("ab") as spool:
        spool.write(b'{"key": "half')
    (tmp_path / "notes.jsonl").write_text("not ours")
    assert replay_spool(ow.backend, run_id, tmp_path) == 5
    assert values(ow, run_id) == list(range(5))
    assert [path.name for path in tmp_path.glob("*.jsonl")] == ["notes.jsonl"]
    assert replay_spool(ow.backend, run_id, tmp_path) == 0


def test_a_closed_sender_says_so(ow: QuietClient, run_id: int, tmp_path: Path) -> None:
    sender = EventSender(ow.backend, run_id, tmp_path)
    assert sender.close()
    # The next descriptor is the one that the sender had: nothing may be written to it.
    with (tmp_path / "other").open("wb"), pytest.raises(InvalidStateError, match="is closed"):
        sender.log({"n": 1})
    assert (tmp_path / "other").read_bytes() == b""


def test_replay_needs_the_store(ow: QuietClient, run_id: int, tmp_path: Path) -> None:
    away = AwayBackend(ow.backend)
    sender = EventSender(cast("Backend", away), run_id, tmp_path)
    sender.log({"n": 1})
    sender.close(timeout=0.1)
    with pytest.raises(StoreUnavailableError):
        replay_spool(cast("Backend", away), run_id, tmp_path)
    assert sender.path.exists()


def test_whatever_is_written_into_a_spool_the_events_among_it_are_stored(
    ow: QuietClient, run_id: int, tmp_path: Path
) -> None:
    """Also lines nested deeply, files of other runs, and links to what is not the job's."""
    at = "2026-01-02T03:04:05+00:00"
    nested = "[" * 99_999 + "]" * 99_999
    good = [json.dumps({"key": str(n), "created_at": at, "data": {"n": n}}) for n in range(2)]
    deep = f'{{"key": "d", "created_at": "{at}", "data": {{"x": {nested}}}}}'
    bad = [
        *("", "null", "[]", "7", '"x"', "{", "[" * 200_000, '{"key": 1}', deep, "\ud800"),
        f'{{"key": "k", "created_at": "{at}", "data": [1]}}',
        '{"key": "k", "created_at": "yesterday", "data": {}}',
        '{"key": "k", "created_at": "2026-01-02T03:04:05", "data": {}}',
    ]
    text = "\n".join([good[0], *bad, good[1], ""])
    (tmp_path / f"{run_id}-1-01234567.jsonl").write_text(text, errors="surrogatepass")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text(good[0])
    (tmp_path / f"{run_id}-1-01234568.jsonl").symlink_to(elsewhere)
    (tmp_path / "999-1-01234567.jsonl").write_text(good[0])
    replay_spool(ow.backend, run_id, tmp_path)
    assert values(ow, run_id) == [0, 1]
    assert elsewhere.exists() and (tmp_path / "999-1-01234567.jsonl").exists()


KILLED = """
import os, signal, sys
from openweights import OpenWeights
ow = OpenWeights()
if sys.argv[1] == "away":
    from openweights import StoreUnavailableError
    def away(*args):
        raise StoreUnavailableError("away")
    ow.backend.append_events = away
for number in range(200):
    ow.run.log({"n": number})
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("store", ["away", "there"])
def test_killed_process_leaves_all_it_logged(
    ow: QuietClient, run_id: int, home: Path, tmp_path: Path, store: str
) -> None:
    spool = tmp_path / "spool"
    env = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "OPENWEIGHTS_RUN_ID": str(run_id),
        "OPENWEIGHTS_SPOOL": str(spool),
    }
    ended = subprocess.run([sys.executable, "-c", KILLED, store], env=env, check=False)
    assert ended.returncode == -signal.SIGKILL
    (file,) = spool.glob(f"{run_id}-*.jsonl")
    kept = [json.loads(line) for line in file.read_bytes().splitlines()]
    assert [line["data"]["n"] for line in kept] == list(range(200))
    assert kept[0].keys() == {"key", "created_at", "data"}
    replay_spool(ow.backend, run_id, spool)
    assert values(ow, run_id) == list(range(200))


FULL_DISK = """
import resource, signal, sys, threading
from openweights import OpenWeights, PlatformError
from openweights.client import event_sender
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
def leave_room(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))
run = OpenWeights().run
run.log({"n": 0})
run.flush()
leave_room(100)
if sys.argv[1] == "soon":
    threading.Timer(0.5, leave_room, [most]).start()
else:
    event_sender.FULL_DISK_WAIT_S = 0.5
try:
    for n in range(1, 4):
        run.log({"n": n, "text": "x" * 100})
except PlatformError as error:
    print(error)
leave_room(most)
"""


@pytest.mark.parametrize(
    ("room", "kept"), [("soon", [0, 1, 2, 3]), ("never", [0])], ids=["soon", "control: never"]
)
def test_a_full_disk_is_waited_for(
    ow: QuietClient, run_id: int, tmp_path: Path, room: str, kept: list[int]
) -> None:
    env = {**os.environ, "OPENWEIGHTS_RUN_ID": str(run_id), "TMPDIR": str(tmp_path)}
    ended = subprocess.run(
        [sys.executable, "-c", FULL_DISK, room], env=env, check=True, capture_output=True, text=True
    )
    assert ("see to that disk, and restart the job" in ended.stdout) == (room == "never")
    assert values(ow, run_id) == kept


def test_what_is_no_event_takes_no_other_along(
    ow: QuietClient, run_id: int, tmp_path: Path
) -> None:
    def line(**record: Any) -> bytes:
        return json.dumps({"created_at": "2026-01-01T00:00:00+00:00", **record}).encode() + b"\n"

    garbage = [b"garbage\n", b"[]\n", line(key="a"), line(key="b", data=3), b"\xff\n", b"\n"]
    refused = line(key="c", data={"n": 5}, created_at="2026-01-01T00:00:00")  # no time zone
    many = [b"x" * (BATCH_BYTES // 2) + b"\n"] * 5  # batches of nothing else
    (spool := tmp_path / "spool").mkdir()
    for number, parts in enumerate(([*garbage, refused], many, []), start=1):
        path = spool / f"{run_id}-{number}-01234567.jsonl"
        path.write_bytes(b"".join([*parts, line(key=str(number), data={"n": number})]))
        os.utime(path, (number, number))
    replay_spool(ow.backend, run_id, spool)
    assert values(ow, run_id) == [1, 2, 3]
    assert list(spool.iterdir()) == []


def test_exit_flushes(ow: QuietClient, run_id: int, tmp_path: Path) -> None:
    code = "from openweights import OpenWeights\nOpenWeights().run.log({'n': 1})"
    env = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "OPENWEIGHTS_RUN_ID": str(run_id),
        "TMPDIR": str(tmp_path),
    }
    subprocess.run([sys.executable, "-c", code], env=env, check=True)
    assert values(ow, run_id) == [1]
    assert list(tmp_path.glob("openweights-spool-*")) == []


def test_forked_child_sends_its_own(ow: QuietClient, run_id: int, tmp_path: Path) -> None:
    code = """
import os
from openweights import OpenWeights
run = OpenWeights().run
run.log({"n": 1})
run.flush()
child = os.fork()
run.log({"n": 2 if child else 3})
if child:
    os.waitpid(child, 0)
else:
    assert run.flush()
    os._exit(0)
"""
    env = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "OPENWEIGHTS_RUN_ID": str(run_id),
        "TMPDIR": str(tmp_path),
    }
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=env, check=True)
    assert sorted(values(ow, run_id)) == [1, 2, 3]


def test_replaced_attempt_stops_quietly(
    ow: QuietClient,
    run_id: int,
    claim: Callable[[], Claim],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    ow.backend.release_run(run_id, 1, reason="test")
    claim()
    sender = EventSender(ow.backend, run_id, tmp_path)
    sender.log({"n": 1})
    assert not sender.flush()
    sender.log({"n": 2})
    sender.close()
    assert caplog.text.count("its later events are dropped") == 1
    assert values(ow, run_id) == []


def test_bad_value_is_refused_where_it_is_logged(
    ow: QuietClient, run_id: int, tmp_path: Path
) -> None:
    sender = EventSender(ow.backend, run_id, tmp_path)
    with pytest.raises(InvalidInputError, match="'model'"):
        sender.log({"n": 0, "model": object()})
    sender.log({"n": 1})
    assert sender.close()
    assert values(ow, run_id) == [1]


def test_many_threads_log_whole_lines(ow: QuietClient, run_id: int, tmp_path: Path) -> None:
    sender = EventSender(ow.backend, run_id, tmp_path)

    def log(thread: int) -> None:
        for number in range(200):
            sender.log({"n": [thread, number], "text": "x" * 500})

    threads = [threading.Thread(target=log, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sender.close()
    found = values(ow, run_id)
    assert len(found) == 800
    for thread in range(4):
        assert [number for owner, number in found if owner == thread] == list(range(200))
