"""Failures that are understood: no memory, no hub, a job that hangs; and what is tried again."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openweights.backends.base import Backend
from openweights.backends.scheduling import LONGEST_BACKOFF_S, pause_before_retry
from openweights.types import Retry
from openweights.worker.causes import advice, cause_of, oom_kills
from tests.waiting import comes_true
from tests.worker.harness import Jobs, WorkerThread

InThread = Callable[..., WorkerThread]
CUDA = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."


@pytest.mark.parametrize(
    ("last_lines", "cause"),
    [
        (f"  return F.linear(x)\n{CUDA}", "oom"),
        ("RuntimeError: CUDA error: out of memory", "oom"),
        ("RuntimeError: [enforce fail] . DefaultCPUAllocator: can't allocate memory", "oom"),
        ("MemoryError", "oom"),
        ("numpy._core._exceptions._ArrayMemoryError: Unable to allocate 8.00 TiB", "oom"),
        ("model: x/y does not fit into the GPU's memory; ask for a larger GPU", "oom"),
        ("model: x/y is not on this machine and the Hugging Face hub cannot be reached", "hub"),
        ("pushing to a/b: failed 5 times, last: timed out", "hub"),
        ("OSError: We couldn't connect to 'https://huggingface.co' to load the files", "hub"),
        ("HfHubHTTPError: 503 Server Error: for url: https://huggingface.co/api/m", "hub"),
        ("HfHubHTTPError: 404 Client Error: for url: https://huggingface.co/api/m", None),
        ("model: x/y is gated or private; ask for access and set HF_TOKEN", None),
        ("ValueError: no rows", None),
        ("we talked about a MemoryError the other day", None),
        ("", None),
    ],
)
def test_last_lines_tell_the_cause(last_lines: str, cause: str | None) -> None:
    assert cause_of(1, last_lines) == cause


def test_a_kill_is_for_lack_of_memory_where_the_kernel_says_so() -> None:
    for code in (-signal.SIGKILL, 128 + signal.SIGKILL):
        assert cause_of(code, "step 3", oom_kills=1) == "oom"
        assert cause_of(code, "step 3", oom_kills=0) is None
    assert cause_of(1, "step 3", oom_kills=1) is None, "another process was killed"
    before = oom_kills()
    assert before >= 0 and oom_kills() >= before


def test_the_two_settings_to_lower() -> None:
    sft = {"per_device_train_batch_size": 8, "max_seq_length": 2048, "r": 32, "loss": "sft"}
    assert advice(sft) == "lower per_device_train_batch_size (8) or max_seq_length (2048)"
    one = sft | {"per_device_train_batch_size": 1}
    assert advice(one) == "lower max_seq_length (2048) or r (32)"
    grpo = sft | {"loss": "grpo", "grpo_max_completion_length": 512, "sdft_max_new_tokens": 9}
    assert advice(grpo).endswith("or grpo_max_completion_length (512)")
    assert advice({"max_tokens": 9}) == (
        "lower max_tokens (9), or ask for more with requires_vram_gb"
    )


CODES = st.one_of(st.none(), st.integers(-64, 255))


@given(
    st.builds(
        Retry,
        max=st.integers(0, 5),
        backoff_s=st.floats(0, LONGEST_BACKOFF_S),
        on=st.lists(st.sampled_from(["any", "oom", "hub", "exit:75", "exit:137"])).map(tuple),
    ),
    st.integers(0, 2000),
    st.sampled_from([None, "oom", "hub"]),
    CODES,
)
def test_pauses_between_retries(
    retry: Retry, retries: int, cause: str | None, exit_code: int | None
) -> None:
    pause = pause_before_retry(retry, retries, cause, exit_code)
    named = cause in retry.on
    if exit_code is not None:
        as_a_shell_says = exit_code if exit_code >= 0 else 128 - exit_code
        named |= "any" in retry.on or f"exit:{as_a_shell_says}" in retry.on
    assert (pause is not None) == (named and retries < retry.max)
    if pause is not None:
        assert retry.backoff_s <= pause <= LONGEST_BACKOFF_S
        if pause < LONGEST_BACKOFF_S:
            assert pause == pytest.approx(retry.backoff_s * 2**retries)
    assert pause_before_retry(None, retries, cause, exit_code) is None


def test_out_of_memory_is_said_and_retried(
    jobs: Jobs, backend: Backend, in_thread: InThread, home: Path
) -> None:
    script = f"test -e {{}} && echo fine || {{{{ touch {{}}; echo '{CUDA}' >&2; exit 1; }}}}"
    mark = home / "mark"
    retry = Retry(max=2, backoff_s=0.1, on=("oom",))
    job = jobs.submit(script.format(mark, mark), retry=retry)
    with in_thread():
        assert jobs.wait_for_end(job) == "completed"
    first, second = backend.list_runs(job_id=job.id)
    assert (first.cause, first.exit_code, second.cause) == ("oom", 1, None)
    assert first.error is not None
    assert first.error.startswith(
        "out of memory: ask for more with requires_vram_gb (exit code 1: "
    )
    assert b"out of memory" in backend.read_log(first.id)


def test_a_job_that_hangs_is_ended_and_taken_up_again(
    jobs: Jobs, backend: Backend, in_thread: InThread, home: Path
) -> None:
    mark = home / "mark"
    script = f"test -e {mark} || {{ touch {mark}; echo begun; sleep 9999; }}; echo went on"
    job = jobs.submit(script, stall_timeout_s=1.0)
    with in_thread():
        assert jobs.wait_for_end(job) == "completed"
    first, second = backend.list_runs(job_id=job.id)
    assert first.error == "stopped: no log line, event or sign of life for 1 s"
    assert (first.status, second.status) == ("failed", "completed")


def test_a_job_whose_guard_is_killed_is_not_said_to_have_hung(
    jobs: Jobs, backend: Backend, in_thread: InThread, home: Path
) -> None:
    mark = home / "mark"
    script = f"test -e {mark} || {{ touch {mark}; kill -9 $PPID; sleep 9999; }}; echo went on"
    job = jobs.submit(script, stall_timeout_s=600)
    with in_thread():
        assert jobs.wait_for_end(job) == "completed"
    first, second = backend.list_runs(job_id=job.id)
    assert first.error == "the process that guards the job was killed, and the job with it"
    assert (first.status, first.is_given_back, second.status) == ("failed", False, "completed")


def test_a_run_that_takes_too_long_is_stopped(
    jobs: Jobs, backend: Backend, in_thread: InThread
) -> None:
    backend.set_max_duration(1.0)
    job = jobs.submit("sleep 9999")
    with in_thread():
        assert jobs.wait_for_end(job) == "failed"
    assert "timeout" in (jobs.error(job) or "")


def test_nothing_is_taken_while_the_queue_is_paused(
    jobs: Jobs, backend: Backend, in_thread: InThread
) -> None:
    backend.set_paused(True)
    job = jobs.submit("true")
    with in_thread():
        assert not comes_true(lambda: jobs.status(job) != "pending", within_s=1.0)
        backend.set_paused(False)
        assert jobs.wait_for_end(job) == "completed"
