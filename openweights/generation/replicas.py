"""One engine made of several: a process for each GPU, each with the whole model.

A request goes where the fewest samples are worked on. As a completion depends on weights, prompt,
parameters and seed alone, it does not matter where that is. The first replica is this process's own
engine; the others are processes that end when this one does.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openweights.errors import InvalidStateError, OpenWeightsError, PlatformError
from openweights.generation.engine import GenerationEngine, check_request
from openweights.generation.params import Delta, GenerationRequest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from openweights.generation.choose import EngineName

logger = logging.getLogger(__name__)

_WAIT_S = 0.02  # for the others, while this process has nothing to compute itself
_VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, slots=True)
class Opening:
    """How a model and its engine are opened, in every process alike.

    Attributes:
        base: Folder or repository of the model.
        rows: Samples that grow at a time in each process; None for what is best for the engine.
        tokenizer_from: Where its tokenizer is, if that has one; else beside the model.
    """

    base: str
    engine: EngineName
    chat_template: str = "default"
    tokenizer_from: str | None = None
    in_4bit: bool = False
    rows: int | None = None
    adapters: tuple[Path, ...] = ()

    def open(self) -> tuple[GenerationEngine, PreTrainedTokenizerBase]:
        """The engine of this process, and the tokenizer.

        Raises:
            ConfigError: The model cannot be loaded; one line that says why.
        """
        from openweights.generation.choose import generation_engine
        from openweights.models.load import load_trained

        model, tokenizer = load_trained(
            self.base,
            chat_template=self.chat_template,
            tokenizer_from=self.tokenizer_from,
            in_4bit=self.in_4bit,
        )
        engine = generation_engine(
            self.engine, model, tokenizer, rows=self.rows, adapters=self.adapters
        )
        return engine, tokenizer


def open_replicated(
    opening: Opening, gpus: int
) -> tuple[GenerationEngine, PreTrainedTokenizerBase]:
    """An engine over so many GPUs, and the tokenizer; over one, or none, the engine itself.

    Raises:
        ConfigError: The model cannot be loaded; one line that says why.
        PlatformError: A process ended by itself; its own log is above.
    """
    others = [_Other(opening, _gpu_env(number)) for number in range(1, gpus)]
    own, tokenizer = opening.open()
    if not others:
        return own, tokenizer
    replicated = ReplicatedEngine(own, others)
    logger.info("generating in %d processes, one for each GPU", gpus)
    return replicated, tokenizer


def _gpu_env(number: int) -> dict[str, str]:
    """The environment of a process that sees one GPU of those that this one sees."""
    visible = os.environ.get(_VISIBLE)
    names = visible.split(",") if visible else []
    return {**os.environ, _VISIBLE: names[number] if number < len(names) else str(number)}


class ReplicatedEngine(GenerationEngine):
    """See `GenerationEngine`.

    Attributes:
        loads: Samples that each process works on, this one first; None for one that has ended.
    """

    def __init__(self, own: GenerationEngine, others: Sequence[_Other]) -> None:
        self._own, self._others = own, list(others)
        self.name, self.end_token_ids = own.name, own.end_token_ids
        self.max_length, self.vocabulary = own.max_length, own.vocabulary
        self.is_exact = own.is_exact
        self.replicas = 1 + len(others)
        self.loads: list[int | None] = [0] * self.replicas
        self._growing: dict[str, _Growing] = {}  # by the request's id
        self._asked: dict[str, str] = {}  # by the id that the processes know it by
        self._count = 0
        self._inbox: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        self._grown: list[Delta] = []  # not given to the caller yet
        for number, other in enumerate(others, start=1):
            other.read_into(self._inbox, number)
        for _ in others:
            self._wait_for_answer()  # each says when it is ready

    @property
    def process_ids(self) -> list[int]:
        """The other processes'."""
        return [other.process.pid for other in self._others]

    def close(self) -> None:
        """End the other processes; they end by themselves when this one has ended."""
        for other in self._others:
            other.close()

    @property
    def adapters(self) -> tuple[str, ...]:
        """See `GenerationEngine`."""
        return self._own.adapters

    @property
    def is_idle(self) -> bool:
        """See `GenerationEngine`."""
        return not self._growing

    def set_adapter(self, name: str, folder: Path) -> None:
        """See `GenerationEngine`."""
        self._refuse_in_use(name)
        self._own.set_adapter(name, folder)
        self._ask_all(("set_adapter", name, folder))

    def remove_adapter(self, name: str) -> None:
        """See `GenerationEngine`."""
        self._refuse_in_use(name)
        self._own.remove_adapter(name)
        self._ask_all(("remove_adapter", name))

    def _refuse_in_use(self, name: str) -> None:
        if any(growing.adapter == name for growing in self._growing.values()):
            raise InvalidStateError(f"adapter {name!r}: is in use; wait for its requests")

    def submit(self, request: GenerationRequest) -> None:
        """See `GenerationEngine`."""
        check_request(self._own, request)
        load, number = min((x, number) for number, x in enumerate(self.loads) if x is not None)
        # An id may be used again while a process still tells of the aborted request that had it.
        self._count += 1
        name = str(self._count)
        if number == 0:
            self._own.submit(replace(request, id=name))
        else:
            self._others[number - 1].send(("submit", replace(request, id=name)))
        self._growing[request.id] = _Growing(name, number, request.params.n, request.adapter)
        self._asked[name] = request.id
        self.loads[number] = load + request.params.n

    def abort(self, request_id: str) -> None:
        """See `GenerationEngine`."""
        growing = self._growing.get(request_id)
        if growing is None:
            return
        self._forget(request_id, growing.open)
        if growing.number == 0:
            self._own.abort(growing.name)
        else:
            self._others[growing.number - 1].send(("abort", growing.name))

    def step(self) -> list[Delta]:
        """See `GenerationEngine`: a step of this process, and what the others have done since.

        Raises:
            PlatformError: A process ended by itself. Its requests are to be aborted; what comes
                after that goes to the others.
        """
        if self.is_idle:
            return []
        self._grown += self._own.step()
        # With nothing of its own to do it waits for the others, but not for long: whoever calls
        # may have requests to submit.
        self._receive(_WAIT_S if self._own.is_idle and not self._grown else 0)
        grown, self._grown = self._grown, []
        # What an aborted request still grew is nobody's.
        deltas = [
            replace(delta, request_id=self._asked[delta.request_id])
            for delta in grown
            if delta.request_id in self._asked
        ]
        for delta in deltas:
            if delta.finish_reason is not None:
                self._forget(delta.request_id, 1)
        return deltas

    def _forget(self, request_id: str, samples: int) -> None:
        """So many samples of a request grow no more."""
        growing = self._growing[request_id]
        growing.open -= samples
        load = self.loads[growing.number]
        if load is not None:
            self.loads[growing.number] = load - samples
        if not growing.open:
            del self._growing[request_id], self._asked[growing.name]

    # ---- the others

    def _ask_all(self, message: tuple[Any, ...]) -> None:
        living = [number for number, load in enumerate(self.loads) if number and load is not None]
        for number in living:
            self._others[number - 1].send(message)
        for _ in living:
            self._wait_for_answer()

    def _wait_for_answer(self) -> None:
        while not self._receive(None):
            pass

    def _receive(self, wait_s: float | None) -> bool:
        """Take what has come; whether a process has done what it was asked for.

        Args:
            wait_s: For the first message; None waits for ever.
        """
        try:
            while True:
                number, message = self._inbox.get(timeout=wait_s)
                if message == _DONE:
                    return True
                if isinstance(message, Exception):
                    self.loads[number] = None
                    raise message
                self._grown += message
                wait_s = 0
        except queue.Empty:
            return False


@dataclass(slots=True)
class _Growing:
    """A request: its name in the processes, which of them has it, and its samples that grow."""

    name: str
    number: int
    open: int
    adapter: str | None


_DONE = "done"
_END_S = 10.0  # a step may have to come to its end


class _Other:
    """A process with an engine of its own."""

    def __init__(self, opening: Opening, env: dict[str, str]) -> None:
        self._connection, theirs = Pipe()
        descriptor = theirs.fileno()
        command = [sys.executable, "-m", "openweights.generation.replicas", str(descriptor)]
        self.process = subprocess.Popen(command, pass_fds=[descriptor], env=env)
        theirs.close()
        self.send(opening)

    def send(self, message: object) -> None:
        """Nothing, where the process has ended: whoever reads hears of it."""
        try:
            self._connection.send(message)
        except OSError:
            logger.debug("a replica has ended")

    def close(self) -> None:
        """Ask it to end, and see that it does."""
        self.send(None)
        try:
            self.process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def read_into(self, inbox: queue.SimpleQueue[tuple[int, Any]], number: int) -> None:
        """Put what it says into `inbox`, and None when it has ended.

        In a thread: were its answers read between two steps alone, it could wait for a full pipe
        while this process waits for it to take a request.
        """

        def read() -> None:
            try:
                message = None
                while not isinstance(message, Exception):
                    message = self._connection.recv()
                    inbox.put((number, message))
            except (EOFError, OSError):
                ended = (
                    f"the process of GPU {number} ended by itself; its log is above. The others go "
                    "on, and what it was working on has to be asked for again"
                )
                inbox.put((number, PlatformError(ended)))

        threading.Thread(target=read, name=f"replica-{number}", daemon=True).start()


# ---- in the other processes ----------------------------------------------------------------------


def _work(connection: Connection) -> None:
    """Open the engine, and work on what is sent until the sender ends."""
    engine, _ = connection.recv().open()
    connection.send(_DONE)
    while True:
        while engine.is_idle or connection.poll():
            message = connection.recv()
            if message is None:
                return
            _obey(engine, connection, *message)
        deltas = engine.step()
        if deltas:
            connection.send(deltas)


def _obey(engine: GenerationEngine, connection: Connection, what: str, *given: Any) -> None:
    getattr(engine, what)(*given)
    if what.endswith("_adapter"):
        connection.send(_DONE)


def main(descriptor: int) -> None:
    """Be a replica for whoever holds the other end of the pipe."""
    # A stop is for the process that the job is; this one ends when that has.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    connection = Connection(descriptor)
    try:
        _work(connection)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # its end
    except OpenWeightsError as error:
        connection.send(error)


if __name__ == "__main__":
    main(int(sys.argv[1]))
