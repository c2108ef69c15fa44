"""Many processes claim from one store: no job twice, none lost; and what somebody begins to use is
not collected as garbage. Controls show that the tests would notice.
"""

from __future__ import annotations

from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

from openweights.backends.local.backend import LocalBackend
from tests.backends import processes

_PROCESSES = 8
_JOBS = 600


def _race(home: Path, claim_all: Any) -> Counter[str]:
    """How often each job was claimed by eight processes that start together."""
    with closing(LocalBackend(home)) as backend:
        for index in range(_JOBS):
            backend.submit_job(processes.job(f"job-{index}"))
    answers = processes.start_all(claim_all, home, _PROCESSES)
    return Counter(job_id for claimed in answers for job_id in claimed)


def test_no_job_is_claimed_twice_and_none_is_lost(tmp_path: Path) -> None:
    claims = _race(tmp_path, processes.claim_all)
    assert claims == Counter({f"job-{index}": 1 for index in range(_JOBS)})
    with closing(LocalBackend(tmp_path)) as backend:
        jobs = backend.list_jobs(statuses=["completed"], limit=None)
        assert {job.id for job in jobs} == set(claims)
        assert {job.attempts for job in jobs} == {1}
        runs = backend.list_runs()
        assert sorted(run.job_id for run in runs) == sorted(claims)
        # How the work was shared depends on the machine, but several must have taken part.
        assert len({run.worker_id for run in runs}) > 1


def test_the_race_is_real(tmp_path: Path) -> None:
    """Claims that are not atomic show up as double claims in the very same set-up."""
    claims = _race(tmp_path, processes.claim_all_racily)
    assert set(claims) == {f"job-{index}" for index in range(_JOBS)}
    assert max(claims.values()) > 1


def test_what_somebody_begins_to_use_is_not_collected(tmp_path: Path) -> None:
    assert processes.race_for_files(tmp_path, processes.collect, 2) == []
    with closing(LocalBackend(tmp_path)) as backend:
        backend.collect_garbage(0)
        assert backend.list_files() == []
        assert not [path for path in (tmp_path / "files").rglob("*") if path.is_file()]


def test_the_race_for_files_is_real(tmp_path: Path) -> None:
    assert processes.race_for_files(tmp_path, processes.collect_racily, 2)
