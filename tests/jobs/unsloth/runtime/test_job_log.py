"""What ends a job, and with which status; and which lines its log has."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from openweights.errors import JobFailedError
from openweights.jobs.unsloth.runtime.job_log import exit_status
from openweights.jobs.unsloth.runtime.launcher import EXIT_TERMINATED


def ends_with(error: BaseException) -> int:
    def act() -> int:
        raise error

    return exit_status(act, "training failed")


@pytest.mark.parametrize("code", [0, None, False, ""])
def test_a_job_that_exits_before_its_end_has_failed(
    code: object, caplog: pytest.LogCaptureFixture
) -> None:
    assert ends_with(SystemExit(code)) == 1
    assert "sys.exit() was called before the end" in caplog.text


def test_other_ends_keep_their_status() -> None:
    assert exit_status(lambda: 0, "") == 0
    assert ends_with(JobFailedError("no")) == ends_with(ValueError("no")) == 1
    with pytest.raises(SystemExit) as stopped:
        exit_status(lambda: sys.exit(EXIT_TERMINATED), "")
    assert stopped.value.code == EXIT_TERMINATED


LIBRARY = """
import logging, warnings
def speak():
    logging.getLogger("noise").info("chatter")
    logging.getLogger("noise").warning("careful")
    warnings.warn("one thing\\nand   another", UserWarning)
    logging.getLogger("transformers.tokenization_utils_base").warning("a row is long")
"""
JOB = """
import logging, warnings
from openweights.jobs.unsloth.runtime.job_log import set_up_logging
set_up_logging()
import library
for _ in range(2):
    warnings.simplefilter("always")  # as several libraries ask for
    library.speak()
logging.getLogger("reward").info("a line of the user's")
logging.getLogger("openweights.jobs").info("a line of ours")
warnings.warn("the user's own")
"""


def test_a_log_has_our_lines_and_each_warning_once(tmp_path: Path) -> None:
    """In a process of its own, as a job is, with a library that is installed."""
    installed = tmp_path / "lib" / "site-packages"
    installed.mkdir(parents=True)
    (installed / "library.py").write_text(LIBRARY)
    (tmp_path / "job.py").write_text(JOB)
    paths = f"import sys; sys.path[:0] = {[str(installed), *sys.path]!r}; "
    source = f"{paths}exec(compile(open('job.py').read(), 'job.py', 'exec'))"
    done = subprocess.run(
        [sys.executable, "-c", source], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    lines = [re.sub(r"^[-\d]+ [:,\d]+ ", "", line) for line in done.stderr.splitlines()]
    assert lines == [
        "WARNING careful",
        "WARNING one thing and another (library.py:6)",
        "INFO a line of the user's",
        "INFO a line of ours",
        "WARNING the user's own (job.py:11)",
    ]
