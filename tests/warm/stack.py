"""A process that has imported the training stack, and forks for whoever would import it again.

Importing it takes a process several seconds of a processor; a fork of one that has it takes none.
A test that has the fixture `warm_jobs` starts its jobs so: in their environment `python -m
openweights.jobs.…`, and Python that a worker runs, asks here (`site/sitecustomize.py`), passes on
signals and the exit status of the fork, and the fork ends when it does. All else is as ever: the
worker, its guard, the job's folder and log. Only the code is that of this repository, not that of
the source bundle. Processes that share the tests (`make test`) share it.

A request is one line of JSON, with the three standard streams beside it; the answer is the exit
status, or nothing where the fork was killed.
"""

from __future__ import annotations

import atexit
import functools
import gc
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from openweights.jobs.unsloth.runtime.importing import importing
from tests.waiting import HANGS_S

ROOT = Path(__file__).parents[2]
SITE = Path(__file__).parent / "site"
VARIABLE = "OW_TEST_STACK"
# Packages may lie on the search path alone.
PATHS = (str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)))
# On the CPU, with gloo. Neither threads nor what CUDA has set up would survive the fork.
OWN = {
    "PYTHONPATH": os.pathsep.join(PATHS),
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
# What jobs need, before the first fork.
STACK = (
    *("grpo_ft", "preference.trainer", "sdft", "sft", "callbacks", "runtime.memory"),
    *("runtime.ranks", "runtime.record", "distillation.gate", "tracking.sampling"),
)


class StackServer:
    """The process, which imports at the first request, and ends when this object is closed.

    Args:
        tests: Paths; it imports the test files there instead, with all that they import.

    Attributes:
        path: The socket on which it is asked.
    """

    def __init__(self, tests: Sequence[str] = ()) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="ow-"))
        self.path = str(self._folder / "stack")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(self.path)
            listener.listen(64)  # who asks before everything is imported waits
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(listener.fileno()), *tests],
                env={**OWN, **os.environ, "PYTHONPATH": OWN["PYTHONPATH"]}
                if tests
                else {**os.environ, **OWN},
                stdin=subprocess.PIPE,
                pass_fds=[listener.fileno()],
                start_new_session=True,
            )

    def close(self) -> None:
        """End the process that forks."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        shutil.rmtree(self._folder)


class WarmStack:
    """Who asks a `StackServer`, its own or another process's, by the path of its socket."""

    def __init__(self, path: str) -> None:
        self._path = path

    @property
    def env(self) -> dict[str, str]:
        """In this environment jobs start warm."""
        return {VARIABLE: self._path, "PYTHONPATH": os.pathsep.join((str(SITE), *PATHS))}

    def run(self, ranks: int, function: str, *arguments: str) -> None:
        """Call `module:name` in so many forks that know of each other, to their end."""
        asked = {"function": function, "arguments": arguments, "cwd": os.getcwd()}
        with tempfile.TemporaryFile("w+") as log, ExitStack() as open_ones:
            waiting: list[socket.socket] = []
            for rank_env in _rank_envs(ranks):
                connection = open_ones.enter_context(socket.socket(socket.AF_UNIX))
                connection.connect(self._path)
                request = {**asked, "env": {**os.environ, **OWN, **rank_env}}
                streams = [log.fileno()] * 3
                socket.send_fds(connection, [json.dumps(request).encode() + b"\n"], streams)
                waiting.append(connection)
            codes = _answers(waiting)
            log.seek(0)
            assert codes == [0] * ranks, f"{codes}: {log.read()[-3000:]}"


def _rank_envs(ranks: int) -> list[dict[str, str]]:
    if ranks == 1:
        return [{}]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def _answers(waiting: list[socket.socket]) -> list[int | None]:
    """The exit statuses; None of what was killed, or hangs."""
    give_up_at = time.monotonic() + HANGS_S
    codes: list[int | None] = []
    for connection in waiting:
        left_s = max(0.0, give_up_at - time.monotonic())
        has_ended = bool(select.select([connection], [], [], left_s)[0])
        answer = connection.recv(16) if has_ended else b""
        codes.append(int(answer) if answer else None)
    return codes


# ---- in the process that forks -------------------------------------------------------------------


@functools.cache
def _import_all(tests: tuple[str, ...]) -> None:
    # None of it is garbage, and no fork looks for any among it, which takes a second whenever a
    # trainer starts.
    if tests:
        # As pytest does it, whose forks find the modules.
        options = ["--collect-only", "-n0", "-pno:terminal", "-pno:cacheprovider"]
        pytest.main([*options, *tests], plugins=[_Modules()])
        gc.collect()
        gc.freeze()
        return
    with importing("trl"):
        for name in STACK:
            import_module(f"openweights.jobs.unsloth.{name}")
        import_module("transformers.models.llama.modeling_llama")


class _Modules:
    """Nothing is collected of a module but itself."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_pycollect_makeitem(self) -> list[pytest.Item]:
        return []


def serve(listener: socket.socket, tests: Sequence[str]) -> None:
    """Fork for each request, until standard input ends."""
    while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
        _import_all(tuple(tests))
        connection, _ = listener.accept()
        if not os.fork():
            listener.close()
            _answer(connection)
        connection.close()
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _answer(connection: socket.socket) -> None:
    """Do what is asked as a process of its own would, and end."""
    code = 1
    try:
        content, streams, _, _ = socket.recv_fds(connection, 65536, 3)
        while not content.endswith(b"\n"):
            content += connection.recv(65536)
        for stream, given in enumerate(streams):
            os.dup2(given, stream)
            os.close(given)
        threading.Thread(target=_obey, args=(connection,), daemon=True).start()
        code = _run(json.loads(content))
    except BaseException:  # noqa: BLE001 - a fork must not go on with its parent's work
        traceback.print_exc()
    finally:
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
            connection.sendall(str(code).encode())
        os._exit(code)


def _obey(connection: socket.socket) -> None:
    """Take the signals of who has asked, and end with it."""
    with suppress(OSError):
        while signals := connection.recv(1):
            os.kill(os.getpid(), signals[0])
    os.kill(os.getpid(), signal.SIGKILL)


def _run(asked: Mapping[str, Any]) -> int:
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["env"])
    own = asked["env"].get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [asked["cwd"], *(path for path in own if path and path not in sys.path)]
    code = 0
    try:
        if "function" in asked:
            module, _, name = asked["function"].partition(":")
            getattr(import_module(module), name)(*asked["arguments"])
        elif "code" in asked:
            sys.argv = ["-c", *asked["arguments"]]
            main = sys.modules["__main__"] = ModuleType("__main__")
            exec(asked["code"], vars(main))  # noqa: S102 - as `python -c` does
        elif "script" in asked:
            sys.argv = [asked["script"], *asked["arguments"]]
            runpy.run_path(asked["script"], run_name="__main__")
        else:
            sys.argv = [asked["module"], *asked["arguments"]]
            warnings.filterwarnings("ignore", "'openweights.*found in sys.modules")
            runpy.run_module(asked["module"], run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    threading._shutdown()
    atexit._run_exitfuncs()
    return code


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])), sys.argv[2:])
