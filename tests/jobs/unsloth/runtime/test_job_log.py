"""What ends a job, and with which status."""

from __future__ import annotations

import sys

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
