"""`ow rm` and `ow gc`: what goes, what is asked, and what is said."""

from __future__ import annotations

import io
import json
import sqlite3
from pathlib import Path

from openweights.backends.base import Backend
from openweights.client.serving.sampling import LABEL
from tests.cli.conftest import Ow, claim, submit


def test_jobs_that_have_ended_are_deleted(ow: Ow, backend: Backend) -> None:
    run = claim(backend, "ftjob-done").run
    backend.finish_run(run.id, run.attempt, "completed")
    submit(backend, "ftjob-waiting")
    answer = ow("rm", "ftjob-done", "ftjob-waiting", "ftjob-none", "--yes")
    assert answer.exit_code == 1
    assert answer.stdout == "ftjob-done  deleted\n"
    pending, unknown = answer.stderr.splitlines()
    assert pending == "ow: job ftjob-waiting is pending: cancel it first"
    assert "no job ftjob-none" in unknown
    assert [job.id for job in backend.list_jobs()] == ["ftjob-waiting"]
    ow("cancel", "ftjob-waiting")
    refused = ow("rm", "--json", stdin="ftjob-waiting\n")
    (result,) = json.loads(refused.stdout)
    assert refused.exit_code == 1 and "nobody can be asked here; add --yes" in result["error"]
    assert [job.id for job in backend.list_jobs()] == ["ftjob-waiting"]
    (result,) = json.loads(ow("rm", "--json", "--yes", stdin="ftjob-waiting\n").stdout)
    assert result == {"id": "ftjob-waiting", "status": "deleted", "error": None}


def test_what_nobody_names_is_collected(ow: Ow, backend: Backend, home: Path) -> None:
    file = backend.put_file(io.BytesIO(b"x" * 1500), "conversations", "f")
    with sqlite3.connect(home / "openweights.db") as db:
        db.execute("UPDATE files SET used_at = 0, created_at = 0")
    assert ow("gc", "--dry-run").stdout == "would go: 1 files (1.5 kB), 0 logs (0 B)\n"
    assert backend.get_file(file.id)
    found = json.loads(ow("gc", "--json", "--keep-days", "1").stdout)
    assert found == {"files": 1, "file_bytes": 1500, "logs": 0, "log_bytes": 0, "jobs": 0}
    assert ow("gc").stdout == "removed: 0 files (0 B), 0 logs (0 B)\n"
    backend.put_file(io.BytesIO(b"new"), "conversations", "f")
    young = ow("gc", "--keep-days", "0")
    assert young.stdout == "removed: 0 files (0 B), 0 logs (0 B)\n"
    assert young.stderr == "what is younger than an hour is kept\n"
    assert "of records" in ow("doctor").stdout


def test_old_jobs_of_sample_go(ow: Ow, backend: Backend, home: Path) -> None:
    # Anybody may give a job that label: neither a training nor another inference goes.
    own = ("ftjob-o-sample", "inferencejob-o", "inferencejob-u-sample")
    for job_id in ("inferencejob-s-sample", *own):
        label = None if job_id == "inferencejob-u-sample" else LABEL
        kind = "fine-tuning" if job_id.startswith("ftjob") else "inference"
        run = claim(backend, job_id, label=label, type=kind).run
        backend.finish_run(run.id, run.attempt, "completed")
    submit(backend, "inferencejob-w-sample", label=LABEL, type="inference")
    assert ow("gc").stdout.endswith("0 logs (0 B)\n"), "they are young"
    with sqlite3.connect(home / "openweights.db") as db:
        db.execute("UPDATE jobs SET updated_at = 0")
    assert ow("gc", "--dry-run").stdout.endswith(", 1 jobs of job.sample\n")
    assert json.loads(ow("gc", "--json").stdout)["jobs"] == 1
    assert {job.id for job in backend.list_jobs()} == {*own, "inferencejob-w-sample"}
