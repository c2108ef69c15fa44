"""Runs the managers of several organizations, one process for each: RunPod's SDK knows one key per
process.

An organization is managed while its file `<name>.env` lies in the supervisor's folder: the file
holds the variables of its manager, keys among them, and nothing else of this process's environment
reaches it. A file that changes restarts its manager, so that new keys count; a file that goes ends
it. Managers that end by themselves are started again, later each time.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import re
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dotenv.parser import parse_stream

from openweights.credentials import write_private
from openweights.errors import ConfigurationError, InvalidInputError, NotFoundError
from openweights.retry import backoff_s

logger = logging.getLogger(__name__)

POLL_S = 5.0
FIRST_PAUSE_S = 2.0
LONGEST_PAUSE_S = 300.0
STEADY_S = 600.0  # a manager that ran for this long is started again at once
STOP_S = 60.0
NEEDED = ("SUPABASE_URL", "SUPABASE_ANON_KEY", "OPENWEIGHTS_API_KEY", "RUNPOD_API_KEY")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_UNREADABLE = "\0"


# ---- the folder ----------------------------------------------------------------------------------


def manage(folder: Path, name: str, text: str) -> None:
    """Put an organization under management, or change its variables.

    Raises:
        InvalidInputError: `name` is not one that a file can have.
        ConfigurationError: A variable is missing.
    """
    if not _NAME.fullmatch(name):
        raise InvalidInputError(f"{name!r} cannot name a file; use letters, digits, '_' and '-'")
    missing = [variable for variable in NEEDED if not parse_env(text).get(variable)]
    if missing:
        raise ConfigurationError(f"{name}: {', '.join(missing)} must be set in the file")
    write_private(folder / f"{name}.env", text)


def unmanage(folder: Path, name: str) -> None:
    """Take an organization out of management; raises NotFoundError."""
    try:
        (folder / f"{name}.env").unlink()
    except FileNotFoundError:
        known = ", ".join(sorted(path.stem for path in folder.glob("*.env"))) or "none"
        raise NotFoundError(f"{name!r} is not managed here; managed: {known}") from None


def parse_env(text: str) -> dict[str, str]:
    """Variables of an env file, as python-dotenv reads them, but that `${NAME}` stays: what
    this process has in its environment does not reach a manager.

    Raises:
        InvalidInputError: A line is no variable. It is not shown, for it may hold a secret.
    """
    found: dict[str, str] = {}
    for binding in parse_stream(io.StringIO(text)):
        if binding.error or (binding.key is not None and binding.value is None):
            line = (
                binding.original.line
                + len(binding.original.string)
                - len(binding.original.string.lstrip("\n"))
            )
            raise InvalidInputError(f"line {line} of the env file is not NAME=value")
        if binding.key is not None:
            found[binding.key] = binding.value or ""
    return found


# ---- the processes -------------------------------------------------------------------------------


@dataclass(slots=True)
class _Child:
    digest: str
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    failures: int = 0
    retry_at: float = 0.0


class Supervisor:
    """Keeps a manager running for each file of the folder.

    Args:
        command: What a manager is started with.
        env: What every manager's process needs on this machine; nothing secret.
    """

    def __init__(self, folder: Path, command: Sequence[str], env: Mapping[str, str]) -> None:
        self._folder = folder
        self._command = list(command)
        self._env = env
        self._children: dict[str, _Child] = {}

    def run(self, stop: threading.Event, poll_s: float = POLL_S) -> None:
        """Until `stop` is set; then the managers are ended, and their pods stay."""
        try:
            while not stop.is_set():
                self.step(time.monotonic())
                stop.wait(poll_s)
        finally:
            self._end(list(self._children))

    def step(self, now: float) -> None:
        """Look at the files and the processes once. `now`: seconds of any clock."""
        files = self._read()
        changed = [
            name
            for name, child in self._children.items()
            if name not in files or child.digest != _digest(files[name])
        ]
        self._end(changed)
        for name, text in files.items():
            child = self._children.setdefault(name, _Child(_digest(text)))
            self._note_end(name, child, now)
            if child.process is None and now >= child.retry_at:
                self._start(name, child, text, now)

    def processes(self) -> dict[str, int]:
        """Number of each running manager's process, by name."""
        running = {name: child.process for name, child in self._children.items()}
        return {name: process.pid for name, process in running.items() if process is not None}

    def _read(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for path in sorted(self._folder.glob("*.env")):
            with contextlib.suppress(FileNotFoundError):
                try:
                    found[path.stem] = path.read_text(encoding="utf-8")
                except (PermissionError, IsADirectoryError, UnicodeDecodeError):
                    found[path.stem] = _UNREADABLE  # no reason to end the others
        return found

    def _note_end(self, name: str, child: _Child, now: float) -> None:
        if child.process is None or (code := child.process.poll()) is None:
            return
        child.process = None
        child.failures = 1 if now - child.started_at >= STEADY_S else child.failures + 1
        pause_s = backoff_s(child.failures - 1, FIRST_PAUSE_S, LONGEST_PAUSE_S)
        child.retry_at = now + pause_s
        logger.warning("the manager of %s ended with %d; again in %.0f s", name, code, pause_s)

    def _start(self, name: str, child: _Child, text: str, now: float) -> None:
        try:
            if text == _UNREADABLE:
                raise InvalidInputError(f"{name}.env cannot be read")
            env = {**self._env, **parse_env(text)}
            with (self._folder / f"{name}.log").open("ab") as log:
                child.process = subprocess.Popen(
                    self._command,
                    env=env,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
        except (OSError, ValueError) as error:  # InvalidInputError is one, too
            child.retry_at = now + LONGEST_PAUSE_S
            logger.error("the manager of %s cannot be started: %s", name, error)
            return
        child.started_at = now
        logger.info("started the manager of %s, process %d", name, child.process.pid)

    def _end(self, names: Sequence[str]) -> None:
        ended = {name: self._children.pop(name).process for name in names}
        for process in ended.values():
            if process is not None:
                process.terminate()
        for name, process in ended.items():
            if process is None:
                continue
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            logger.info("ended the manager of %s", name)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
