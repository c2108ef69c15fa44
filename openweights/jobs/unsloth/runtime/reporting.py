"""Where a training run writes: into the store when a worker runs it, else into a folder.

Both keep events and checkpoints, so a run that was killed goes on from its last checkpoint in both.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from openweights.client.results import write_table
from openweights.errors import ConfigError, NotFoundError
from openweights.events import Checkpoint
from openweights.jobs.model_source import unpack_checkpoint
from openweights.jobs.unsloth.validate import TrainingConfig

if TYPE_CHECKING:
    from openweights import OpenWeights
    from openweights.client.runs import Run

logger = logging.getLogger(__name__)

CHECKPOINT_PURPOSE = "checkpoint"

# What trainers need of a reporter: `log` without a file, and `fetch`.
LogEvent = Callable[[dict[str, Any]], None]
Fetch = Callable[[str, Path], Path]


class Reporter(Protocol):
    """What the callbacks of a run need of the world outside.

    Attributes:
        job_id: Names the result.
    """

    job_id: str

    def log(self, data: Mapping[str, Any], file: Path | None = None) -> None:
        """Record an event, with a file to keep when there is one."""
        ...

    def heartbeat(self) -> None:
        """Say that the run lives, though there is nothing to record."""
        ...

    def fetch(self, file: str, target: Path) -> Path:
        """Make a dataset readable: the path of a local one, a download of a stored one."""
        ...

    def save_checkpoint(self, folder: Path, step: int) -> None:
        """Keep a checkpoint, and forget the one before only then."""
        ...

    def newest_checkpoint(self, target: Path) -> Path | None:
        """The folder of the newest checkpoint of this job, over all its runs, or None."""
        ...

    def close(self, *, completed: bool) -> None:
        """Wait until what was logged is kept. After completion there is nothing to resume."""
        ...


def log_rows(
    reporter: Reporter, event: Mapping[str, Any], rows: Iterable[Mapping[str, Any]], *, folder: str
) -> None:
    """Record an event with rows as a JSONL file, which a job's download delivers at its `path`.

    Args:
        event: Has `tag` and `step`, which name the file.
        folder: Of the path.
    """
    name = f"{event['tag'].replace('/', '_')}-{event['step']}.jsonl"
    with tempfile.TemporaryDirectory() as temporary:
        path = write_table(rows, Path(temporary) / name)
        reporter.log({**event, "path": f"{folder}/{name}"}, file=path)


class StoreReporter:
    """Reports to the run of a job in the store."""

    def __init__(self, ow: OpenWeights, run: Run, keep_checkpoints: int = 0) -> None:
        self._ow = ow
        self._run = run
        self.job_id = run.job_id
        self._keep = keep_checkpoints
        self._checkpoints: list[str] = []

    def log(self, data: Mapping[str, Any], file: Path | None = None) -> None:
        self._run.log(data, file)

    def heartbeat(self) -> None:
        self._run.heartbeat()

    def fetch(self, file: str, target: Path) -> Path:
        if Path(file).is_file():
            return Path(file)
        return Path(self._ow.files.download(file, target))

    def save_checkpoint(self, folder: Path, step: int) -> None:
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            archive = Path(temporary) / f"{folder.name}.tar"
            # Equal content is one file, which goes with the job that it is of: each has its own.
            with tarfile.open(archive, "w", pax_headers={"comment": self.job_id}) as tar:
                tar.add(folder, arcname=folder.name)
            stored = self._ow.files.create(archive, CHECKPOINT_PURPOSE)["id"]
        self.log(Checkpoint(step=step, file=stored, kept=self._keep > 0 or None).data())
        self._checkpoints.append(stored)
        # The event that names the new one must have arrived before an old one goes.
        while len(self._checkpoints) > max(1, self._keep) and self._run.flush():
            if (old := self._checkpoints.pop(0)) not in self._checkpoints:
                with suppress(NotFoundError):
                    self._ow.files.delete(old)

    def newest_checkpoint(self, target: Path) -> Path | None:
        events = self._ow.events.list(job_id=self.job_id, type=Checkpoint.type)
        saved = [Checkpoint.of(event.data) for event in events]
        for at in reversed(range(len(saved))):
            try:
                unpack_checkpoint(self._ow, str(saved[at].file), target)
            except NotFoundError:
                continue
            self._checkpoints = [str(checkpoint.file) for checkpoint in saved[: at + 1]]
            logger.info("resuming from the checkpoint of step %d", saved[at].step)
            return target / f"checkpoint-{saved[at].step}"
        return None

    def close(self, *, completed: bool) -> None:
        """The worker drops the last checkpoint once it has stored the result."""
        if not self._run.flush():
            logger.warning("some events have not arrived yet; the worker sends them after the run")


class FolderReporter:
    """Reports into a folder, for a run from a config file: `events.jsonl` and files.

    Checkpoints stay in `output_dir`.
    """

    def __init__(self, folder: Path, config: TrainingConfig) -> None:
        self._folder = folder
        self._checkpoints = Path(config.output_dir)
        text = json.dumps(config.model_dump(mode="json"), sort_keys=True)
        self._fingerprint = hashlib.sha256(text.encode()).hexdigest()
        self.job_id = config.job_id_suffix or "local"

    def heartbeat(self) -> None:
        """Nobody listens."""

    def log(self, data: Mapping[str, Any], file: Path | None = None) -> None:
        from openweights.client.event_json import event_data

        if file is not None:
            kept = self._folder / "files" / file.name
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, kept)
            data = {**data, "file": str(kept)}
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / "events.jsonl").open("a", encoding="utf-8") as events:
            events.write(json.dumps(event_data(data)) + "\n")

    def fetch(self, file: str, target: Path) -> Path:
        if not Path(file).is_file():
            raise ConfigError(
                f"{file!r} is no file on this machine; a run from a config file needs local paths"
            )
        return Path(file)

    def save_checkpoint(self, folder: Path, step: int) -> None:
        """A checkpoint counts from the moment at which its mark is written."""
        (folder / "complete").write_text(self._fingerprint, encoding="utf-8")
        self.log(Checkpoint(step=step, path=str(folder)).data())

    def newest_checkpoint(self, target: Path) -> Path | None:
        """Those of another config are left alone."""
        complete: list[tuple[int, Path]] = []
        for mark in self._checkpoints.glob("checkpoint-*/complete"):
            if mark.read_text(encoding="utf-8") == self._fingerprint:
                complete.append((int(mark.parent.name.rsplit("-", 1)[1]), mark.parent))
        if not complete:
            return None
        step, folder = max(complete)
        logger.info("resuming from the checkpoint of step %d", step)
        return folder

    def close(self, *, completed: bool) -> None:
        """The next run of the same config starts anew."""
        if completed:
            for mark in self._checkpoints.glob("checkpoint-*/complete"):
                mark.unlink()


class FollowerReporter:
    """The reporter of every rank but the first: reads what the run needs, writes nothing."""

    def __init__(self, leader: Reporter, number: int) -> None:
        self._leader = leader
        self._folder = f"rank-{number}"
        self.job_id = leader.job_id

    def log(self, data: Mapping[str, Any], file: Path | None = None) -> None:
        """Nothing: the first rank says it."""

    def heartbeat(self) -> None:
        """Nothing: the first rank does."""

    def fetch(self, file: str, target: Path) -> Path:
        """A copy of its own, since ranks share a folder."""
        return self._leader.fetch(file, target.parent / self._folder / target.name)

    def save_checkpoint(self, folder: Path, step: int) -> None:
        """Nothing: the first rank does."""

    def newest_checkpoint(self, target: Path) -> Path | None:
        """A copy of its own."""
        return self._leader.newest_checkpoint(target / self._folder)

    def close(self, *, completed: bool) -> None:
        """Nothing."""
