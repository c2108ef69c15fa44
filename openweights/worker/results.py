"""What a job leaves behind: events in its spool, and files under uploads/."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from openweights.backends.base import Backend
from openweights.errors import InvalidInputError
from openweights.events import Checkpoint, Part
from openweights.types import EventDraft
from openweights.worker.shutdown import persist

logger = logging.getLogger(__name__)

LARGE = 1 << 25  # bytes that may take a while on their way to a project


def replay_events(backend: Backend, run_id: int, spool: Path, give_up: threading.Event) -> None:
    """Append the events that the job wrote down and did not send; those that arrived are skipped by
    their key.
    """
    from openweights.client.event_sender import replay_spool

    if not spool.is_symlink():  # it would lead to what is not the job's
        persist(lambda: replay_spool(backend, run_id, spool), give_up=give_up)


def drop_checkpoints(backend: Backend, job_id: str) -> None:
    """Delete the checkpoints and parts of a job that has completed: nothing will resume from
    them. Checkpoints that it keeps stay.
    """
    saved = backend.list_events(job_id=job_id, type=Checkpoint.type)
    parts = backend.list_events(job_id=job_id, type=Part.type)
    named = {str(event.data.get("file")) for event in saved if not event.data.get("kept")}
    named |= {str(event.data.get("part")) for event in parts}
    for file_id in named:
        if file_id.startswith("checkpoint:"):
            backend.delete_file(file_id)


def collect_uploads(
    backend: Backend,
    run_id: int,
    uploads: Path,
    folder: Path,
    give_up: threading.Event,
    note: Callable[[str], None],
    is_unwanted: Callable[[], bool],
) -> None:
    """Store each file under `uploads` and log its event `{path, file}`.

    Links are followed while they stay inside `folder`, so that a job can upload what it made
    elsewhere without a copy. What cannot be stored is left out with a line to `note`.

    Args:
        is_unwanted: Asked before each file: of many, nobody waits for the rest then.
    """
    if os.path.lexists(uploads) and not uploads.is_dir():
        note("uploads is no folder any more, and is not stored")
    for path, name in upload_files(uploads, folder, note):
        if is_unwanted():
            note(f"uploads: {name!r} and what follows are not stored: the job was canceled")
            return
        try:
            name.encode()
            opened = path.open("rb")
        except UnicodeEncodeError:
            note(f"uploads: {name!r} is not stored: its name is not UTF-8")
            continue
        except OSError as error:
            note(f"uploads: {name!r} is not stored: {error.strerror}")
            continue

        def store(content: BinaryIO = opened, path: Path = path, name: str = name) -> None:
            content.seek(0)
            record = backend.put_file(content, "result", path.name)
            # The key comes from the path, so that trying again does not log the file twice.
            key = "result-" + hashlib.sha256(f"{run_id}/{name}".encode()).hexdigest()[:32]
            data = {"path": name, "file": record.id}
            backend.append_events(run_id, [EventDraft(key, data, datetime.now(UTC))])

        with opened:
            try:
                persist(store, give_up=give_up)
            except InvalidInputError as error:  # it is too large for the store, say
                note(f"uploads: {name!r} is not stored: {error}")


def upload_bytes(uploads: Path, folder: Path) -> int:
    """What `collect_uploads` has to store."""
    files = upload_files(uploads, folder, lambda _: None)
    return sum(path.stat().st_size for path, _ in files)


def upload_files(
    uploads: Path, folder: Path, note: Callable[[str], None]
) -> Iterator[tuple[Path, str]]:
    """Files below `uploads` with their name relative to it, sorted; each real folder once."""
    root = folder.resolve()
    seen: set[Path] = set()

    def walk(directory: Path) -> Iterator[Path]:
        real = directory.resolve()
        if real in seen or not real.is_relative_to(root):
            note(f"{_shown(directory)} leads out of the job's folder or in a circle")
            return
        seen.add(real)
        try:
            entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
        except OSError as error:
            note(f"{_shown(directory)} is not stored: {error.strerror}")
            return
        for entry in entries:
            path = Path(entry.path)
            if os.path.isdir(path):
                yield from walk(path)
            elif os.path.isfile(path) and path.resolve().is_relative_to(root):
                yield path
            else:
                note(f"{_shown(path)} is not stored: it is not a file of the job's folder")

    def _shown(path: Path) -> str:
        return f"uploads: {path.relative_to(uploads).as_posix()!r}"

    if uploads.is_dir():
        for path in walk(uploads):
            yield path, path.relative_to(uploads).as_posix()
