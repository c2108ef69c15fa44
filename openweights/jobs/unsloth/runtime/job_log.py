"""What a job says in its log: its own lines, and what ended it in one of them."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from openweights import progress
from openweights.errors import OpenWeightsError, in_a_line, wants_room
from openweights.jobs.unsloth.runtime.launcher import rank

logger = logging.getLogger(__name__)

LONGEST_ERROR = 500  # characters of what an error says


def exit_status(act: Callable[[], int], failure: str) -> int:
    """What `act` returns, or 1 when it fails or exits early: why is the last line of the log.

    Args:
        failure: What is said above the traceback of an error that is not ours.
    """
    try:
        return act()
    except OpenWeightsError as error:
        logger.debug("why", exc_info=True)
        logger.error("%s", error)
    except Exception as error:  # noqa: BLE001 - the end of the process: told in full, then in one line
        logger.exception("%s", failure)
        logger.error("%s", one_line(error))
    except SystemExit as error:
        if error.code:
            raise
        # Whoever called it, the job is not done, which status 0 would say.
        logger.error("%s: sys.exit() was called before the end; remove that call", failure)
    return 1


def run_job(
    arguments: Sequence[str], act: Callable[[str], int], *, module: str, failure: str
) -> int:
    """The exit status of a module that does a job, whose id is its only argument; why it failed is
    the last line of the log.

    Args:
        module: As `python -m` starts it.
        failure: As of `exit_status`.
    """
    set_up_logging()
    if len(arguments) != 1:
        logger.error("usage: python -m %s JOB_ID", module)
        return 2
    return exit_status(lambda: heard(lambda: act(arguments[0])), failure)


def heard(act: Callable[[], int]) -> int:
    """What `act` returns; its signs of life reach the run that this process belongs to."""
    from openweights import OpenWeights

    ow = OpenWeights()
    if ow.settings.run_id is None:
        return act()
    with progress.heard_by(ow.run.heartbeat):
        return act()


def one_line(error: Exception) -> str:
    """What went wrong, and, where it is known, what to do."""
    text = " ".join(str(error).split())
    if wants_room(error) or "No space left" in text or "failed writing file" in text:
        return "the disk is full; free some space, or raise save_steps"
    if "out of memory" in text.lower():
        return (
            "the GPU's memory is full; lower per_device_train_batch_size or max_seq_length, use "
            "load_in_4bit=True, or ask for more with requires_vram_gb"
        )
    return in_a_line(error)[:LONGEST_ERROR]


def set_up_logging() -> None:
    """Our lines on standard error, and what libraries warn of, a line for each and once; of several
    ranks those of the first, and errors.

    No progress bars: they would fill the log with fragments.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    # Its logger has a handler of its own, so that each of its warnings would be there twice.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    logging.basicConfig(
        level=logging.ERROR if rank() else logging.INFO,
        format="%(asctime)s %(levelname)s %(message)s",
        stream=sys.stderr,
    )
    for handler in logging.getLogger().handlers:
        handler.addFilter(_OfUse())
    for noisy in ("httpx", "httpx2", "huggingface_hub", "filelock", *_NOISY):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    warnings.showwarning = _Warnings()


_PACKAGES = frozenset({"site-packages", "dist-packages"})
# The second warns of two callbacks of one class, as two sets of samples are; the last of each row
# that is longer than the model's context, also of those that are cut or left out, which we tell of.
_NOISY = (
    "transformers.trainer_utils",
    "transformers.trainer_callback",
    "transformers.tokenization_utils_base",
)


class _OfUse:
    """Lets pass what says something to those whose job it is: of installed libraries what fails,
    and once what they warn of.
    """

    def __init__(self) -> None:
        self._told: set[str] = set()

    def __call__(self, record: logging.LogRecord) -> bool:
        is_ours = record.name == "__main__" or record.name.partition(".")[0] == "openweights"
        if is_ours or record.levelno >= logging.ERROR or not _is_installed(record.pathname):
            return True
        text, before = record.getMessage(), len(self._told)
        if record.levelno >= logging.WARNING:
            self._told.add(text)
        return len(self._told) > before


def _is_installed(path: str) -> bool:
    return not _PACKAGES.isdisjoint(Path(path).parts)


class _Warnings:
    """Stands for `warnings.showwarning`: each warning is a line of the log, once."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def __call__(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        text = " ".join(str(message).split())
        if text not in self._told:
            self._told.add(text)
            logger.warning("%s (%s:%d)", text, _place(filename), lineno)


def _place(filename: str) -> str:
    """The package of an installed file, and the file of another one."""
    parts = Path(filename).parts
    installed = [place for place, part in enumerate(parts) if part in _PACKAGES]
    return "/".join(parts[installed[-1] + 1 :]) if installed else filename
