"""SQLite connections for an object that many threads, and processes forked from it, use.

Each thread has its own connection: SQLite then lets readers run beside a writer, and no thread
waits behind another one's cursor. Before a fork all of them are closed, because SQLite keeps locks
per process in memory, which a child would inherit and wrongly trust; both sides open new ones when
they need them. The same happens when the database, or the log of its last changes (`-wal`), was
deleted or replaced: SQLite would go on with a file that nobody else can see; and after an error of
the disk, after which a connection may fail for ever.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import weakref
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from openweights.errors import InvalidStateError


class _Held:
    """A thread's connection; `busy` is held while it is in use."""

    def __init__(self, db: sqlite3.Connection, path: Path) -> None:
        self.db = db
        # The second exists for as long as a connection is open.
        names = (path, Path(f"{path}-wal"))
        self._files = [(name, os.stat(name)) for name in names if name.exists()]
        self.thread = weakref.ref(threading.current_thread())
        self.busy = threading.RLock()
        self.is_open = True

    def belongs_here(self) -> bool:
        """Whether this thread made it, for the files that are there now."""
        return self.thread() is threading.current_thread() and self.is_of_these_files()

    def is_of_these_files(self) -> bool:
        try:
            return all(os.path.samestat(os.stat(name), known) for name, known in self._files)
        except FileNotFoundError:
            return False

    def close(self) -> None:
        with self.busy:
            self.is_open = False
            self.db.close()


class Connections:
    """Hands every thread its own connection to `path`, made by `connect` on first use."""

    def __init__(self, path: Path, connect: Callable[[], sqlite3.Connection]) -> None:
        self._path = path
        self._connect = connect
        self._lock = threading.RLock()
        self._by_thread: dict[int, _Held] = {}
        self._is_closed = False
        _all.add(self)

    @contextmanager
    def use(self) -> Generator[sqlite3.Connection, None, None]:
        """The calling thread's connection."""
        while True:
            held = self._held()
            with held.busy:
                if held.is_open:
                    try:
                        yield held.db
                    except sqlite3.Error as error:
                        if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_IOERR:
                            self._drop(held)
                        raise
                    return
            # A fork in another thread closed it in between: take a new one.

    @contextmanager
    def write(self) -> Generator[sqlite3.Connection, None, None]:
        """A transaction that holds the write lock from its start, so it never fails half-way."""
        with self.use() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                # SQLite has already rolled back after errors such as a full disk.
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise

    def _drop(self, held: _Held) -> None:
        with self._lock:
            if self._by_thread.get(threading.get_ident()) is held:
                del self._by_thread[threading.get_ident()]
        held.close()

    def close(self) -> None:
        """Close every connection, waiting for those in use; later calls of `use` raise."""
        self._is_closed = True
        self._close_all()

    def _close_all(self) -> None:
        with self._lock:
            while self._by_thread:
                self._by_thread.popitem()[1].close()

    def _held(self) -> _Held:
        held = self._by_thread.get(threading.get_ident())
        if held is not None and held.belongs_here():
            return held
        if held is not None and not held.is_of_these_files():
            self._close_all_of_process()
        with self._lock:
            if self._is_closed:
                raise InvalidStateError("this store object was closed: open a new one")
            self._close_those_of_ended_threads()
            held = self._by_thread[threading.get_ident()] = _Held(self._connect(), self._path)
            return held

    def _close_all_of_process(self) -> None:
        """SQLite shares what it knows of a database within a process: while one connection to the
        lost files is open, a new one gets them, too. The last one to close brings into the database
        what was in a lost log.
        """
        for connections in list(_all):
            if connections._path == self._path:
                connections._close_all()

    def _close_those_of_ended_threads(self) -> None:
        for ident, held in list(self._by_thread.items()):
            thread = held.thread()
            if thread is None or not thread.is_alive() or ident == threading.get_ident():
                del self._by_thread[ident]
                held.close()

    def before_fork(self) -> None:
        self._lock.acquire()
        self._close_all()

    def after_fork(self) -> None:
        self._lock.release()

    def __del__(self) -> None:
        for held in self._by_thread.values():
            held.db.close()


_all: weakref.WeakSet[Connections] = weakref.WeakSet()
_forking: list[Connections] = []


def _before_fork() -> None:
    _forking.extend(_all)
    for connections in _forking:
        connections.before_fork()


def _after_fork() -> None:
    while _forking:
        _forking.pop().after_fork()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)
