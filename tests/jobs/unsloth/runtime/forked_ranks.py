"""Ranks that train together, forked from one process that has imported the training stack.

Importing it takes a process several seconds; a fork of one that has it takes none. One line of JSON
on standard input is one group of ranks, `{"ranks": 2, "function": "module:name", "arguments": []}`;
its answer is `{"codes": [0, 0], "log": "…"}`, when all of them have ended.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import IO, Any

from openweights.jobs.unsloth.runtime.importing import importing

ROOT = Path(__file__).parents[4]
HANGS_S = 240  # what takes longer hangs, however busy the machine is
# With gloo on the CPU. Threads would not survive the fork.
OWN = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


class ForkedRanks:
    """Starts groups of ranks, one after the other."""

    def __init__(self, log: Path) -> None:
        self._log = log.open("wb")
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            env={**os.environ, **OWN},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,
            text=True,
        )

    def run(self, ranks: int, function: str, *arguments: str) -> None:
        """Call `module:name` in so many processes that know of each other, to their end."""
        assert self._process.stdin is not None and self._process.stdout is not None
        asked = {"ranks": ranks, "function": function, "arguments": arguments}
        print(json.dumps(asked), file=self._process.stdin, flush=True)
        if not select.select([self._process.stdout], [], [], HANGS_S)[0]:
            os.killpg(self._process.pid, signal.SIGKILL)
        answer = self._process.stdout.readline()
        assert answer, f"the ranks hung, or what forks them has ended: {self._log.name}"
        done = json.loads(answer)
        assert done["codes"] == [0] * ranks, done["log"][-3000:]

    def close(self) -> None:
        """End the process that forks."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._log.close()


def _serve() -> None:
    # What the functions need, before the first fork. None of it is garbage, and no fork looks for
    # any among it, which takes a second whenever a trainer starts.
    with importing("trl"):
        import openweights.jobs.unsloth.grpo_ft
        import openweights.jobs.unsloth.preference.trainer
        import openweights.jobs.unsloth.sdft
        import openweights.jobs.unsloth.sft  # noqa: F401

    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    for line in sys.stdin:
        print(json.dumps(_run(json.loads(line))), file=answers, flush=True)


def _run(asked: Mapping[str, Any]) -> dict[str, Any]:
    module, _, name = asked["function"].partition(":")
    function = getattr(import_module(module), name)
    with tempfile.TemporaryFile("w+") as log, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        pids = [_fork(rank, function, asked, port, log) for rank in range(asked["ranks"])]
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        log.seek(0)
        return {"codes": codes, "log": log.read()}


def _fork(
    rank: int, function: Callable[..., object], asked: Mapping[str, Any], port: int, log: IO[str]
) -> int:
    if pid := os.fork():
        return pid
    code = 1
    try:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
        size = str(asked["ranks"])
        if asked["ranks"] > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size}
            os.environ |= {"LOCAL_WORLD_SIZE": size, "MASTER_PORT": str(port)}
            os.environ["MASTER_ADDR"] = "127.0.0.1"
        function(*asked["arguments"])
        code = 0
    except BaseException:  # noqa: BLE001 - a fork must not go on with its parent's work
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
