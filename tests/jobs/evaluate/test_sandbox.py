"""Programs that a model might write, by mistake or in earnest, and what becomes of them."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from openweights.jobs.evaluate.confined import filter_program
from openweights.jobs.evaluate.sandbox import MEASURES, Bounds, Outcome, run_program, run_programs
from tests.waiting import HANGS_S, NEVER_S

QUICK = Bounds(seconds=0.5)


def holds(name: str) -> bool:
    """Whether this machine's kernel can confine a program in this."""
    return name in run_program("pass").held


CONFINED = pytest.mark.skipif(
    not all(map(holds, ("files", "calls"))), reason="a kernel without Landlock or seccomp"
)


def test_a_program_that_comes_to_its_end_passes() -> None:
    source = (
        "import math, re, collections\nopen('a', 'w').write('x')\nassert open('a').read() == 'x'"
    )
    assert run_program(source) == Outcome(True, None, run_program("pass").held)
    assert set(run_program("pass").held) <= set(MEASURES)
    assert "resources" in run_program("pass").held


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("assert 1 == 2, 'not equal'", "AssertionError: not equal"),
        ("def f(:", "SyntaxError"),
        ("x = '\ud800'", "UnicodeEncodeError"),
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("import os; os._exit(0)", r"ended by itself before its end \(status 0\)"),
        ("import ctypes; ctypes.string_at(0)", r"before its end \(signal 11\)"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("x = bytearray(10_000_000_000)", "MemoryError"),
        ("f = open('a', 'w')\nwhile True: f.write('x' * 100_000)", "File too large"),
        (
            "i = 0\nwhile True:\n    i += 1\n    open(f'{i}', 'w').write('x' * 1_000_000)",
            "wrote more than 64 MB",
        ),
    ],
)
def test_what_does_not_pass(source: str, says: str) -> None:
    outcome = run_program(source)
    assert not outcome.passed and re.search(says, str(outcome.error)), outcome.error


@pytest.mark.parametrize(
    "source",
    [
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        "import time; time.sleep(60)",
        "while True: print('x' * 10_000)",
    ],
)
def test_what_does_not_end(source: str) -> None:
    assert run_program(source, QUICK).error == "not done within 0.5 s"


@pytest.mark.parametrize("answer", ["x" * 100, '{"token": "", "held": [], "error": null}'])
def test_an_answer_that_the_program_gives_itself_is_not_believed(answer: str) -> None:
    source = f"import os\nos.write(3, {answer.encode()!r})\nos._exit(0)"
    assert "ended by itself" in str(run_program(source).error)
    endless = f"import os\nwhile True: os.write(3, {answer.encode()!r})"
    assert run_program(endless).error == "it answers without end"


def test_memory_has_the_bound_that_is_given() -> None:
    source = "x = bytearray(300 << 20)"
    assert run_program(source, Bounds(memory_mb=1024)).passed
    assert not run_program(source, Bounds(memory_mb=256)).passed


@CONFINED
@pytest.mark.parametrize(
    "source",
    [
        "import os\nwhile True: os.fork()",
        "import subprocess; subprocess.run(['/bin/true'])",
        "import os; os.execv('/bin/true', ['true'])",
        "import os; os.system('true') and 1 / 0",
        "import threading; threading.Thread(target=print).start()",
        "import multiprocessing as m; m.Process(target=print).start()",
    ],
)
def test_no_second_process(source: str) -> None:
    alone = subprocess.run(
        [sys.executable, "-c", source.replace("while True: ", "")], capture_output=True
    )
    assert alone.returncode == 0, "the control: it works outside"
    assert not run_program(source).passed


@CONFINED
def test_no_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(5)
        source = f"import socket; socket.create_connection({server.getsockname()!r})"
        assert not run_program(source).passed
        subprocess.run([sys.executable, "-c", source], check=True)
        server.accept()[0].close()
        server.settimeout(0.1)
        with pytest.raises(TimeoutError):  # the control's connection was the only one
            server.accept()
    assert not run_program("import socket; socket.socket(socket.AF_UNIX)").passed


@CONFINED
def test_no_other_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret, new = tmp_path / "secret", tmp_path / "new"
    secret.write_text("ow_secret")
    monkeypatch.setenv("OPENWEIGHTS_API_KEY", "ow_secret")
    for source in (
        f"open({str(secret)!r}).read()",
        f"open({str(new)!r}, 'w')",
        f"import os; os.listdir({str(tmp_path)!r})",
        f"import os; os.remove({str(secret)!r})",
        f"import os; os.symlink({str(secret)!r}, 'a'); open('a').read()",
        "open('/proc/1/environ').read()",
        "import os; open(f'/proc/{os.getppid()}/environ', 'rb').read()",
        "open('/etc/passwd').read()",
    ):
        assert not run_program(source).passed, source
    assert secret.read_text() == "ow_secret" and not new.exists()
    assert run_program("import os; assert 'ow_secret' not in str(os.environ)").passed


@CONFINED
def test_nobody_else_is_hurt() -> None:
    bystander = subprocess.Popen(["sleep", "60"])
    try:
        for source in (
            f"import os, signal; os.kill({bystander.pid}, signal.SIGKILL)",
            f"import os, signal; os.kill({os.getpid()}, signal.SIGTERM)",
            f"import resource as r; r.prlimit({bystander.pid}, r.RLIMIT_CPU, (1, 1))",
        ):
            assert not run_program(source).passed, source
        assert bystander.poll() is None
    finally:
        bystander.send_signal(signal.SIGKILL)
        bystander.wait()


def test_a_limit_cannot_be_raised_again() -> None:
    source = "import resource as r; r.setrlimit(r.RLIMIT_AS, (1 << 40, 1 << 40))"
    assert not run_program(source).passed


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run_program("import os; os.mkdir('d'); os.chmod('d', 0)")
    assert list(tmp_path.iterdir()) == []


def test_several_run_at_a_time_and_keep_their_order() -> None:
    started_at = time.monotonic()
    sources = [f"import time; time.sleep(0.2); assert {n} % 2" for n in range(6)]
    outcomes = run_programs(sources, Bounds(seconds=NEVER_S))
    assert [outcome.passed for outcome in outcomes] == [False, True] * 3
    assert time.monotonic() - started_at < HANGS_S, "none waits for another's time-out"


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_is_whole_instructions_and_ends_by_allowing(machine: str) -> None:
    program = filter_program(machine)
    assert len(program) % 8 == 0 and len(program) // 8 < 4096, "the kernel takes no more"
    assert program[-8:] == bytes.fromhex("060000000000ff7f")
    with pytest.raises(OSError, match="no filter for m68k"):
        filter_program("m68k")
