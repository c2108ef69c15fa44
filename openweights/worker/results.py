"""What a job leaves behind: events in its spool, and files under uploads/."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from openweights.backends.base import Backend
from openweights.types import EventDraft
from openweights.worker.backoff import persist

logger = logging.getLogger(__name__)


def replay_events(backend: Backend, spool: Path, give_up: threading.Event) -> None:
    """Append the events that the job wrote down and did not send; those that arrived are skipped by
    their key.
    """
    from openweights.client.event_sender import replay_spool

    try:
        persist(lambda: replay_spool(backend, spool), give_up=give_up)
    except (ValueError, KeyError, TypeError) as error:
        # The job's own result does not hang on a line that something else wrote into its spool.
        logger.warning("%s: not all of it are events: %s", spool, error)


def collect_uploads(
    backend: Backend, run_id: int, uploads: Path, folder: Path, give_up: threading.Event
) -> int:
    """Store each file under `uploads` and log its event `{path, file}`. Returns how many.

    Links are followed while they stay inside `folder`, so that a job can upload what it made
    elsewhere without a copy.
    """
    count = 0
    for path, name in upload_files(uploads, folder):

        def store(path: Path = path, name: str = name) -> None:
            with path.open("rb") as content:
                record = backend.put_file(content, "result", path.name)
            # The key comes from the path, so that trying again does not log the file twice.
            key = "result-" + hashlib.sha256(f"{run_id}/{name}".encode()).hexdigest()[:32]
            data = {"path": name, "file": record.id}
            backend.append_events(run_id, [EventDraft(key, data, datetime.now(UTC))])

        persist(store, give_up=give_up)
        count += 1
    return count


def upload_files(uploads: Path, folder: Path) -> Iterator[tuple[Path, str]]:
    """Files below `uploads` with their name relative to it, sorted; each real folder once."""
    root = folder.resolve()
    seen: set[Path] = set()

    def walk(directory: Path) -> Iterator[Path]:
        real = directory.resolve()
        if real in seen or not real.is_relative_to(root):
            logger.warning("uploads: %s leads out of the job's folder or in a circle", directory)
            return
        seen.add(real)
        for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
            path = Path(entry.path)
            if entry.is_dir():
                yield from walk(path)
            elif entry.is_file() and path.resolve().is_relative_to(root):
                yield path
            else:
                logger.warning("uploads: %s: not a file of the job's folder", path)

    if uploads.is_dir():
        for path in walk(uploads):
            yield path, path.relative_to(uploads).as_posix()
