"""Looks at rows with a model's own tokenizer before a job is submitted, where it is at hand.

Only transformers knows how a tokenizer's files are read, and importing it imports torch, too:
seconds of a client's time, for which nothing is computed. So a client that has not loaded torch
leaves the look to a process beside it, in which torch cannot be imported: there transformers reads
tokenizers with the same code, in less than half the time. It stays for the next jobs, and ends with
the client, or when it was not asked for a minute.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any, BinaryIO

from openweights.errors import OpenWeightsError
from openweights.models.at_hand import is_at_hand, tokenizer_at_hand
from openweights.models.templates.options import set_template

Look = Callable[[Any], Any]
Answer = tuple[str, Any]  # what came of a look, and what it gave or raised

IDLE_S = 60.0
_BEGINNING = (
    "import sys; sys.modules['torch'] = None; import pickle; "
    "sys.path[:] = pickle.load(sys.stdin.buffer); "
    "from openweights.jobs.at_hand import answer; answer()"
)


def look_at_hand(
    model: str, chat_template: str, template_options: Mapping[str, Any], look: Look
) -> Any:
    """What `look` gives for the model's tokenizer; None where that is not on this machine.

    Args:
        look: Raises what is wrong. Without torch in this process it is called in another one, where
            it can be sent there (`functools.partial` of a function of this package).

    Raises:
        ConfigError: The chat template has no such option.
        OpenWeightsError: What `look` raises.
    """
    if find_spec("transformers") is None or not is_at_hand(model):
        return None
    request = model, chat_template, dict(template_options), look
    if "torch" not in sys.modules and (found := _BESIDE.seen(request)) is not None:
        return found[0]
    return _look(*request)


def _look(model: str, chat_template: str, options: Mapping[str, Any], look: Look) -> Any:
    tokenizer = tokenizer_at_hand(model)
    if tokenizer is None:
        return None
    set_template(tokenizer, chat_template, options)
    return look(tokenizer)


class _Beside:
    """The process beside this one; started when it is needed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def seen(self, request: tuple[Any, ...]) -> tuple[Any] | None:
        """What the look gave; None where it must be done here.

        Raises:
            OpenWeightsError: What was found.
        """
        try:
            sent = pickle.dumps(request)
        except (pickle.PicklingError, AttributeError, TypeError, RecursionError):
            return None
        with self._lock:
            # It may have ended while it was not asked.
            found = self._asked(sent) or self._asked(sent)
        if found is None or found[0] == "unable":
            return None
        if found[0] == "refused":
            raise found[1]
        return (found[1],)

    def _asked(self, request: bytes) -> Answer | None:
        """Its answer; None where it has ended."""
        try:
            process = self._running()
            assert process.stdin is not None and process.stdout is not None
            # In an envelope that can be opened there whatever is in it, and to its end.
            pickle.dump(request, process.stdin)
            process.stdin.flush()
            return pickle.load(process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError):
            self.end()
            return None
        except BaseException:  # an answer that nobody reads would be the next one's
            self.end()
            raise

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _BEGINNING],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            assert self._process.stdin is not None
            pickle.dump([os.path.abspath(folder) for folder in sys.path], self._process.stdin)
        return self._process

    def end(self) -> None:
        """End it, if there is one."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):  # it has ended with something unread
                    stream.close()
        process.wait()

    def forget(self) -> None:
        """In a fork, which has none: who held the lock is not there to let it go."""
        self._process, self._lock = None, threading.Lock()


_BESIDE = _Beside()
atexit.register(_BESIDE.end)
os.register_at_fork(after_in_child=_BESIDE.forget)


def answer() -> None:
    """Look at what is asked for on the standard input, and say what was found, until nothing is."""
    requests, sys.stdin = sys.stdin.buffer, open(os.devnull)  # noqa: SIM115 - whoever asks
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whoever prints
    while (request := _next_request(requests)) is not None:
        pickle.dump(_found(request), answers)
        answers.flush()


def _next_request(requests: BinaryIO) -> bytes | None:
    idle = threading.Timer(IDLE_S, os._exit, (0,))
    idle.start()
    try:
        return pickle.load(requests)
    except EOFError:
        return None
    finally:
        idle.cancel()


def _found(request: bytes) -> Answer:
    try:
        return "fine", _look(*pickle.loads(request))
    except OpenWeightsError as error:
        return "refused", error
    except Exception:  # noqa: BLE001 - the client, which does it again, shows where it comes from;
        # and what the client defined itself is not known here
        return "unable", None
