"""`ow ls`, `ow show` and `ow events` on a store with jobs of every status."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from openweights.backends.base import Backend
from openweights.client.serving.sampling import LABEL
from openweights.dashboard.job_index import JobIndex, JobQuery
from openweights.types import EventDraft, JobSpec, WorkerSpec
from tests.cli.conftest import Ow, claim, log_events, submit

JOBS = ("ftjob-canceled0000", "ftjob-completed000", "ftjob-failed00000", "ftjob-running0000")


@pytest.fixture
def filled(backend: Backend) -> Backend:
    """Jobs of every status; the running one is at step 2."""
    for job_id in JOBS:
        run = claim(backend, job_id).run
        log_events(
            backend,
            run.id,
            {"step": 1, "loss": 2.0, "tag": "train"},
            {"type": "completion", "text": "two\nlines"},
            {"step": 2, "loss": float("nan") if "failed" in job_id else 0.123456, "tag": "eval"},
            {"file": "result:file-0123456789ab", "path": "adapter/x.bin"},
        )
        backend.append_log(run.id, 0, b"hello\n")
        if "completed" in job_id:
            backend.finish_run(run.id, run.attempt, "completed")
        elif "failed" in job_id:
            backend.finish_run(run.id, run.attempt, "failed", error="exit code 3: out of\nmemory")
        elif "canceled" in job_id:
            backend.cancel_job(job_id)
            backend.finish_run(run.id, run.attempt, "canceled")
    submit(backend, "myjob-pending0000", type="custom", model=None)
    return backend


def test_ls_is_a_table(ow: Ow, filled: Backend) -> None:
    answer = ow("ls")
    assert answer.exit_code == 0
    header, *rows = answer.stdout.splitlines()
    assert header.split() == ["ID", "STATUS", "KIND", "MODEL", "AGE", "LAST"]
    by_id = {row.split()[0]: row for row in rows}
    assert set(by_id) == {*JOBS, "myjob-pending0000"}
    assert "in_progress" in by_id["ftjob-running0000"]
    assert " sdft " in by_id["ftjob-running0000"]
    assert "org/tiny" in by_id["ftjob-running0000"]
    assert "loss 0.1235" in by_id["ftjob-running0000"]
    assert "exit code 3: out of memory" in by_id["ftjob-failed00000"]
    assert by_id["myjob-pending0000"].split()[1:4] == ["pending", "myjob", "-"]


def test_a_model_that_was_served_has_ended(ow: Ow, backend: Backend) -> None:
    """It was left as it is meant to be; the record says how. One that never ran was canceled."""
    for job_id in ("apijob-served", "ftjob-canceled"):
        claim(backend, job_id)
        backend.cancel_job(job_id)
    submit(backend, "apijob-waited")
    backend.cancel_job("apijob-waited")
    shown = dict(line.split()[:2] for line in ow("ls").stdout.splitlines())
    assert shown["apijob-served"] == "ended"
    assert shown["ftjob-canceled"] == shown["apijob-waited"] == "canceled"
    assert ow("show", "apijob-served").stdout.startswith("apijob-served  ended")
    assert {row["status"] for row in json.loads(ow("ls", "--json").stdout)} == {"canceled"}
    assert len(ow("ls", "--status", "canceled", "-q").stdout.split()) == 3


def test_ls_filters_before_the_limit(ow: Ow, filled: Backend) -> None:
    # The pending job was changed last: a filter after the limit would find nothing.
    found = json.loads(ow("ls", "--status", "completed", "--limit", "1", "--json").stdout)
    assert [job["id"] for job in found] == ["ftjob-completed000"]
    both = ow("ls", "-q", "--status", "completed", "--status", "failed").stdout.split()
    assert sorted(both) == ["ftjob-completed000", "ftjob-failed00000"]
    assert len(ow("ls", "-q", "--limit", "2").stdout.splitlines()) == 2


def test_ls_json_holds_the_records(ow: Ow, filled: Backend) -> None:
    found = {job["id"]: job for job in json.loads(ow("ls", "--json").stdout)}
    failed = found["ftjob-failed00000"]
    assert failed["last"] == {"step": 2, "loss": None, "error": "exit code 3: out of\nmemory"}
    assert failed["params"]["validated_params"] == {"loss": "sdft", "r": 8}
    assert datetime.fromisoformat(failed["created_at"]).tzinfo is not None
    assert found["myjob-pending0000"]["last"] == {}


def test_what_evaluates_tells_its_scores_as_the_page_does(ow: Ow, backend: Backend) -> None:
    def event(task: str, model: str, score: float) -> dict[str, Any]:
        own = {"low": 0.1, "high": 0.9, "problems": 4}
        return {"type": "evaluation", "task": task, "model": model, "score": score} | own

    choices = {"type": "multiple_choice", "accuracy": 0.75, "probability": 0.5, "questions": 4}
    told: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
        "evaljob-one": ({"models": ["a/b"]}, [event("gsm8k", "a/b", 0.8125)]),
        "evaljob-two": (
            {"models": ["a/b", "c/d"]},
            [event("gsm8k", "a/b", 0.25), event("gsm8k", "c/d", 0.125), event("own", "c/d", 1.0)],
        ),
        "mmlujob-one": ({}, [event("law", "a/b", 0.5), event("mmlu_pro", "a/b", 0.375)]),
        "mcjob-one": ({}, [choices]),
    }
    for job_id, (params, events) in told.items():
        stored = {"validated_params": params}
        run = claim(backend, job_id, type="inference", model=None, params=stored).run
        log_events(backend, run.id, *events)
        backend.finish_run(run.id, run.attempt, "completed")
    words = {
        "evaljob-one": "gsm8k 0.8125",
        "evaljob-two": "gsm8k 0.25 · own 1, best of 2",
        "mmlujob-one": "mmlu_pro 0.375",
        "mcjob-one": "accuracy 0.75",
    }
    for listed in (ow("ls").stdout, ow("top").stdout):
        rows = {row.split()[0]: row for row in listed.splitlines()[1:]}
        assert all(rows[job_id].endswith(said) for job_id, said in words.items()), listed
    page = JobIndex(backend).page(JobQuery())["rows"]
    assert {row["id"]: row["last"] for row in page} == words
    found = {job["id"]: job["last"] for job in json.loads(ow("ls", "--json").stdout)}
    assert found["evaljob-two"] == {"scores": {"gsm8k": 0.25, "own": 1.0}}


def test_ls_leaves_out_what_sample_has_made(ow: Ow, backend: Backend) -> None:
    submit(backend, "ftjob-own", label=LABEL)  # anybody may give a job that label
    for number in range(5):
        submit(backend, f"inferencejob-{number}-sample", label=LABEL, type="inference")
    answer = ow("ls", "-q", "--limit", "1")
    assert answer.stdout == "ftjob-own\n", "however many are newer"
    assert "5 of job.sample, not ended, not shown" in ow("ls").stderr
    assert len(ow("ls", "--all", "-q").stdout.splitlines()) == 6
    assert [job["id"] for job in json.loads(ow("ls", "--json").stdout)] == ["ftjob-own"]
    for number in range(5):
        backend.cancel_job(f"inferencejob-{number}-sample")
    assert ow("ls").stderr == "", "what has ended needs no line every time"


def test_a_run_that_does_not_count_is_no_failure(ow: Ow, backend: Backend) -> None:
    first = claim(backend, "ftjob-1").run
    backend.release_run(first.id, 1, reason="its worker was shut down, not counted")
    second = backend.register_worker(WorkerSpec(id="worker-2"))
    again = backend.claim_job(second.id)
    assert again is not None
    backend.release_run(again.run.id, 2, reason="it hung", is_lost=True)
    lines = ow("show", "ftjob-1").stdout.split("\nRUN  ", 1)[1].splitlines()[1:3]
    assert "  given back  " in lines[0] and lines[0].endswith("shut down, not counted")
    assert "  failed  " in lines[1], "the control"
    told = [
        run["is_given_back"] for run in json.loads(ow("show", "ftjob-1", "--json").stdout)["runs"]
    ]
    assert told == [True, False]


def test_show_names_files(ow: Ow, backend: Backend) -> None:
    rows = backend.put_file(BytesIO(b"{}"), "conversations", "animals.jsonl").id
    script = backend.put_file(BytesIO(b"x = 1"), "custom_job_file", "short.py").id
    params: dict[str, Any] = {"training_file": rows, "test_file": "conversations:file-000000000000"}
    params["grpo_reward_function"] = {f"{script}:score": 1.0, "rouge_l": 0.5}
    submit(backend, "ftjob-1", params={"validated_params": params})
    shown = ow("show", "ftjob-1").stdout
    assert f"animals.jsonl ({rows})" in shown and "{'short.py:score': 1.0" in shown
    assert re.search(r"test_file +conversations:file-000000000000\n", shown), "is not there"


def test_ls_by_label(ow: Ow, backend: Backend) -> None:
    submit(backend, "ftjob-plain")
    assert "LABEL" not in ow("ls").stdout
    submit(backend, "ftjob-mine", label="ledger")
    for number in range(3):
        submit(backend, f"ftjob-other{number}", label="other")
    header, *rows = ow("ls").stdout.splitlines()
    assert header.split() == ["ID", "STATUS", "KIND", "MODEL", "AGE", "LABEL", "LAST"]
    assert {row.split()[0]: row.split()[5] for row in rows}["ftjob-mine"] == "ledger"
    assert ow("ls", "-q", "--label", "ledger", "--limit", "1").stdout == "ftjob-mine\n"
    assert ow("ls", "-q", "--label", "ledger", "--status", "failed").stdout == ""
    assert "no jobs of status failed with the label nobody" in (
        ow("ls", "--label", "nobody", "--status", "failed").stderr
    )


@pytest.mark.parametrize(("width", "shown"), [(80, "SmolLM2-135M"), (200, "HuggingFaceTB/SmolLM2")])
def test_a_models_organization_gives_way_before_its_name(
    ow: Ow, backend: Backend, monkeypatch: pytest.MonkeyPatch, width: int, shown: str
) -> None:
    submit(backend, "ftjob-0123456789ab", model="HuggingFaceTB/SmolLM2-135M", label="ledger")
    submit(backend, "ftjob-ba9876543210", after=("ftjob-0123456789ab",))
    monkeypatch.setenv("FORCE_COLOR", "1")  # what rich takes for a terminal
    monkeypatch.setenv("COLUMNS", str(width))
    lines = re.sub(r"\x1b\[[0-9;]*m", "", ow("ls").stdout).splitlines()
    assert max(map(len, lines)) <= width
    row = next(line for line in lines if line.startswith("ftjob-0123456789ab"))
    assert row.split()[3].startswith(shown) and "ledger" in row


def test_an_empty_store_says_so(ow: Ow, home: Path) -> None:
    assert ow("ls").stdout == ""
    assert ow("ls").stderr == f"ow: no jobs yet in the store in {home}\n"
    assert json.loads(ow("ls", "--json").stdout) == []
    assert ow("ls", "-q").output == ""
    assert "no jobs of status failed in the store" in ow("ls", "--status", "failed").stderr


def undated(text: str) -> str:
    """Without what differs from run to run."""
    text = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "MOMENT", text)
    return re.sub(r"\b\d+s\b", "0s", text)


def test_show_fits_a_screen(ow: Ow, backend: Backend) -> None:
    params = {
        "validated_params": {
            "model": "org/tiny",
            "loss": "sdft",
            "learning_rate": 3e-4,
            "r": 16,
            "finetuned_model_id": "{org_id}/tiny-ftjob-1",
            "training_file": "conversations:file-1",
        },
        "cloud_type": "SECURE",
    }
    run = claim(backend, "ftjob-1", params=params, requires_vram_gb=24).run
    log_events(
        backend,
        run.id,
        {"type": "started", "max_steps": 32, "from_step": 0},
        {"type": "completions", "completions": [{"prompt": "a", "completion": "long"}]},
        {"type": "reproducibility", "record": {"torch": "2.13"}},
        {"step": 12, "loss": 0.5234567, "learning_rate": 1.5e-4},
        {"file": "result:file-0123456789ab", "path": "adapter/x.bin"},
    )
    backend.finish_run(run.id, run.attempt, "failed", error="exit code 3: out of\nmemory")
    assert (
        undated(ow("show", "ftjob-1").stdout)
        == """\
ftjob-1  failed
  kind     sdft
  model    org/tiny
  created  MOMENT (0s ago)
  updated  MOMENT (0s ago)

parameters (1 more at their defaults)
  learning_rate  3e-4
  training_file  conversations:file-1

runs
RUN  ATTEMPT  STATUS  STARTED              LASTED  LOG  WORKER             ERROR
1    1        failed  MOMENT  0s      0 B  worker-of-ftjob-1  below

last figures (`ow events ftjob-1` prints all)
  loss           0.52346
  learning_rate  1.5e-4

result files (`ow fetch ftjob-1` fetches them)
  adapter/x.bin  result:file-0123456789ab

error
  exit code 3: out of memory
"""
    )


def test_a_job_with_much_to_show_fits_a_screen_too(ow: Ow, backend: Backend) -> None:
    given = {f"field_{number:02}": number for number in range(40)}
    mounted = {name: "custom_job_file:file-0123456789ab" for name in given}
    params = {"validated_params": {"loss": "sdft", **given}, "mounted_files": mounted}
    run = claim(backend, "ftjob-1", params=params).run
    gate = {"type": "teacher_gate", **{f"student_{number}": 0.5 for number in range(20)}}
    files = [{"file": f"result:file-{n:012}", "path": f"samples/{n}.jsonl"} for n in range(40)]
    log_events(backend, run.id, gate, {"step": 1, "loss": 1.0, "grad_norm": 2.0}, *files)
    backend.finish_run(run.id, run.attempt, "completed")
    shown = ow("show", "ftjob-1").stdout.splitlines()
    assert len(shown) <= 40
    start = next(n for n, line in enumerate(shown) if line.startswith("last figures"))
    assert shown[start + 1].split() == ["loss", "1"]
    assert [line for line in shown if "more" in line] == [
        f"  … and {n} more" for n in (31, 38, 18, 36)
    ]


def test_the_reward_leads_wherever_a_job_is_told_of(ow: Ow, backend: Backend) -> None:
    """The loss of GRPO is about 0 whatever is learned."""
    run = claim(backend, "ftjob-rewarded").run
    log_events(backend, run.id, *({"step": n, "loss": -3e-8, "reward": n / 4} for n in (1, 2)))
    for command in (("ls",), ("show", "ftjob-rewarded"), ("top",)):
        assert "step 2 · reward 0.5\n" in ow(*command).stdout
    backend.finish_run(run.id, run.attempt, "completed")
    for command in (("ls",), ("top",)):
        assert ow(*command).stdout.rstrip().endswith("reward 0.5")
    assert JobIndex(backend).page(JobQuery())["rows"][0]["last"] == "reward 0.5"


def test_a_job_that_runs_and_one_that_waits(ow: Ow, backend: Backend) -> None:
    run = claim(backend, "ftjob-running").run
    started = {"type": "started", "max_steps": 32, "from_step": 0}
    began = datetime.now(UTC) - timedelta(seconds=24)
    first_step = EventDraft("first", {"step": 1, "loss": 1.0}, began + timedelta(seconds=2))
    backend.append_events(run.id, [EventDraft("started", started, began), first_step])
    log_events(backend, run.id, {"step": 12, "loss": 0.5})
    submit(backend, "ftjob-waiting", requires_vram_gb=24)
    first, second, third = ow("ls").stdout.splitlines()
    assert first.split() == ["ID", "STATUS", "KIND", "MODEL", "AGE", "LAST"]
    by_id = {line.split()[0]: line for line in (second, third)}
    assert re.search(r" behind ftjob-running \(\d+s left\)$", by_id["ftjob-waiting"])
    assert re.search(r" step 12/32 · .* left · loss 0.5$", by_id["ftjob-running"])
    assert ow("show", "ftjob-waiting").stdout.startswith("ftjob-waiting  pending  behind ftjob-r")


def test_show_as_json(ow: Ow, filled: Backend) -> None:
    shown = json.loads(ow("show", "ftjob-failed00000", "--json").stdout)
    assert [run["status"] for run in shown["runs"]] == ["failed"]
    assert shown["runs"][0]["log_bytes"] == 6
    assert shown["last"]["step"] == 2
    assert shown["files"] == [{"path": "adapter/x.bin", "file": "result:file-0123456789ab"}]
    assert shown["outputs"]["tag"] == "eval"
    assert "pending" in ow("show", "myjob-pending0000").stdout


def test_a_job_is_found_by_the_beginning_of_its_id(ow: Ow, filled: Backend) -> None:
    assert json.loads(ow("show", "ftjob-r", "--json").stdout)["id"] == "ftjob-running0000"
    answer = ow("show", "ftjob")
    assert answer.exit_code == 1
    assert answer.stderr.startswith("ow: ftjob begins 4 job ids: ftjob-canceled0000, ")
    # A whole id is that job, also where another one begins with it.
    submit(filled, "ftjob-running0000-more")
    assert json.loads(ow("show", "ftjob-running0000", "--json").stdout)["id"] == "ftjob-running0000"


def test_events_of_all_runs_or_of_one(ow: Ow, filled: Backend) -> None:
    lines = ow("events", "ftjob-running0000").stdout.splitlines()
    assert len(lines) == 4
    assert lines[0].endswith("step=1 tag=train loss=2.0")
    assert lines[1].endswith("type=completion text=two lines")
    tagged = json.loads(ow("events", "ftjob-r", "--json", "--tag", "eval").stdout)
    assert [event["data"]["step"] for event in tagged] == [2]
    typed = json.loads(ow("events", "ftjob-r", "--json", "--type", "completion").stdout)
    assert [event["data"]["text"] for event in typed] == ["two\nlines"]
    assert json.loads(ow("events", "ftjob-r", "--json", "--type", "no").stdout) == []

    run = filled.list_runs(job_id="ftjob-failed00000")[0]
    filled.restart_job("ftjob-failed00000")
    assert len(ow("events", "ftjob-f", "--run-id", str(run.id)).stdout.splitlines()) == 4
    wrong = ow("events", "ftjob-r", "--run-id", str(run.id))
    assert wrong.exit_code == 1
    assert wrong.stderr.startswith(f"ow: job ftjob-running0000 has no run {run.id}; its runs: ")


def test_events_of_a_job_that_has_not_run(ow: Ow, filled: Backend) -> None:
    assert ow("events", "myjob").output == ""
    assert json.loads(ow("events", "myjob", "--json").stdout) == []


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_the_key_of_a_deployed_model_is_not_shown(
    ow: Ow, backend: Backend, options: list[str]
) -> None:
    key = "sk-of-a-deployment"
    params = {"validated_params": {"model": "m", "api_key": key}}
    backend.submit_job(JobSpec(id="apijob-1", type="api", script="true", params=params))
    for command in (["show", "apijob-1"], ["ls"]):
        shown = ow(*command, *options).stdout
        assert "apijob-1" in shown and key not in shown


def test_a_job_that_another_failed_says_so(ow: Ow, backend: Backend) -> None:
    """And not why it had failed itself once, before it was to come after that one."""
    late = claim(backend, "custom-late").run
    backend.finish_run(late.id, late.attempt, "failed", error="exit code 9: its own")
    submit(backend, "custom-first", type="custom", model=None, priority=1)
    spec = JobSpec("custom-late", "custom", "true", {"validated_params": {}})
    backend.submit_job(replace(spec, after=("custom-first",)))
    backend.cancel_job("custom-first")
    reason = "it was to come after job custom-first, which was canceled"
    (row,) = [line for line in ow("ls").stdout.splitlines() if "custom-late" in line]
    assert reason[:30] in row and "its own" not in row
    shown = ow("show", "custom-late").stdout
    assert reason in shown.partition("\nerror\n")[2] and "its own" in shown, "that of the run"


@pytest.mark.parametrize(("width", "blocks"), [(40, 4), (80, 2), (200, 1)])
def test_compare_is_whole_in_every_terminal(
    ow: Ow, filled: Backend, monkeypatch: pytest.MonkeyPatch, width: int, blocks: int
) -> None:
    """Jobs that do not fit beside the others follow below; no id and no value is cut."""
    monkeypatch.setenv("FORCE_COLOR", "1")  # what rich takes for a terminal
    monkeypatch.setenv("COLUMNS", str(width))
    lines = re.sub(r"\x1b\[[0-9;]*m", "", ow("compare", *JOBS).stdout).splitlines()
    assert all(any(job in line for line in lines) for job in JOBS)
    assert lines.count("") == blocks - 1
    assert sum(line.startswith("eval_loss") for line in lines) == blocks
    assert max(map(len, lines)) <= width and not any("…" in line for line in lines)


def test_compare_of_one_job_and_as_json(ow: Ow, filled: Backend) -> None:
    lines = ow("compare", JOBS[1]).stdout.splitlines()
    assert lines[0].split() == [JOBS[1]] and lines[-1].split() == ["eval_loss", "0.12346"]
    assert [row["id"] for row in json.loads(ow("compare", *JOBS, "--json").stdout)] == [*JOBS]


@pytest.mark.parametrize("command", ["show", "logs", "events", "fetch", "compare", "plot"])
def test_a_job_that_is_not_named_is_suggested(ow: Ow, backend: Backend, command: str) -> None:
    assert "There are no jobs yet in the store in " in ow(command).stderr
    for name in "abcd":
        submit(backend, f"ftjob-{name}")
    answer = ow(command)
    assert answer.exit_code == 2
    assert "The last changed are ftjob-d, ftjob-c, ftjob-b." in answer.stderr


def test_kinds_are_called_as_the_client_calls_them(ow: Ow, backend: Backend) -> None:
    params = {"validated_params": {"models": ["org/a", "ftjob-b", "org/c"]}}
    backend.submit_job(JobSpec(id="evaljob-1", type="custom", script="true", params=params))
    backend.submit_job(JobSpec(id="own-1", type="custom", script="true", params={}))
    rows = {line.split()[0]: line for line in ow("ls").stdout.splitlines()}
    assert "  evaluate  " in rows["evaljob-1"] and "org/a and 2 more" in rows["evaljob-1"]
    assert "  own  " in rows["own-1"].replace("own     ", "own  "), "a kind of one's own"


def test_compare_names_functions_as_their_files_are_called(ow: Ow, backend: Backend) -> None:
    """Each value stands in the row of its function; two files of one name have their ids."""
    first, second, other = (
        backend.put_file(BytesIO(text), "custom_job_file", name).id
        for text, name in ((b"x = 1", "r.py"), (b"x = 2", "r.py"), (b"x = 3", "o.py"))
    )
    for number, rewards in enumerate(({first: 1.0, other: 0.5}, {second: 0.25, other: 0.75})):
        weights = {f"{file}:f": weight for file, weight in rewards.items()}
        params = {"validated_params": {"loss": "grpo", "grpo_reward_function": weights}}
        submit(backend, f"ftjob-{number}", type="fine-tuning", params=params)
    lines = [line.split() for line in ow("compare", "ftjob-0", "ftjob-1").stdout.splitlines()]
    of = {words[0].removeprefix("grpo_reward_function."): words[1:] for words in lines if words}
    assert of["o.py:f"] == ["0.5", "0.75"]
    ids = [file.partition(":")[2] for file in (first, second)]
    assert of["r.py"] == [f"({ids[1]}):f", "-", "0.25"] or of["r.py"] == [f"({ids[0]}):f", "1", "-"]
    assert sum(words[:1] == ["grpo_reward_function.r.py"] for words in lines) == 2
    rows = json.loads(ow("compare", "ftjob-0", "ftjob-1", "--json").stdout)
    assert rows[0][f"grpo_reward_function.{first}:f"] == 1.0, "programs get the ids"
