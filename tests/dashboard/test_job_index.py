"""The table of jobs: filters, order, pages, and that changes are found without reading it all."""

from __future__ import annotations

from typing import Any

import pytest

from openweights import OpenWeights
from openweights.client.serving.sampling import LABEL
from openweights.dashboard.job_index import JobIndex, JobQuery
from openweights.types import JobSpec


def _submit(ow: OpenWeights, number: int, **params: Any) -> None:
    validated = {"model": f"org/m{number % 2}", "loss": "sdft", **params}
    ow.backend.submit_job(
        JobSpec(
            id=f"ftjob-{number:04}",
            type="fine-tuning",
            script="true",
            params={"validated_params": validated},
            model=validated["model"],
        )
    )


def _ids(index: JobIndex, **query: Any) -> list[str]:
    return [row["id"] for row in index.page(JobQuery(**query))["rows"]]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ({"text": "NEEDLE"}, ["ftjob-0003"]),
        ({"text": "needle m1"}, ["ftjob-0003"]),
        ({"text": "needle m0"}, []),
        ({"model": "org/m0"}, ["ftjob-0004", "ftjob-0002", "ftjob-0000"]),
        ({"tag": "sweep"}, ["ftjob-0004", "ftjob-0003"]),
        ({"tag": "sweep=3"}, ["ftjob-0003"]),
        ({"status": "canceled"}, ["ftjob-0001"]),
        ({"kind": "inference"}, []),
        ({"kind": "sdft", "trained": True, "tag": "sweep=3"}, ["ftjob-0003"]),
        ({"sort": "id", "descending": False, "limit": 2}, ["ftjob-0000", "ftjob-0001"]),
        ({"sort": "id", "descending": False, "limit": 2, "offset": 4}, ["ftjob-0004"]),
    ],
)
def test_filters(ow: OpenWeights, query: dict[str, Any], expected: list[str]) -> None:
    for number in range(5):
        extra = {"job_id_suffix": "needle"} if number == 3 else {}
        _submit(ow, number, **extra, meta={"sweep": number} if number > 2 else {})
    ow.backend.cancel_job("ftjob-0001")
    index = JobIndex(ow.backend)
    assert sorted(_ids(index, **query)) == sorted(expected)


def test_kinds_have_the_words_of_the_command_line(ow: OpenWeights) -> None:
    """Those of `ow ls`, not those of the store, to which most kinds are "custom"."""
    _submit(ow, 0)
    own = {"validated_params": {"loss": "x"}}
    for job_id in ("evaljob-1", "execjob-1", "inferencejob-1", "minejob-1"):
        ow.backend.submit_job(JobSpec(job_id, "custom", "true", own))
    page = JobIndex(ow.backend).page(JobQuery())
    assert page["kinds"] == ["evaluate", "exec", "inference", "minejob", "sdft"]
    assert _ids(JobIndex(ow.backend), kind="evaluate") == ["evaljob-1"]
    assert _ids(JobIndex(ow.backend), trained=True) == ["ftjob-0000"]


def test_waiting_jobs_say_for_what_they_wait(ow: OpenWeights) -> None:
    for number in range(2):
        _submit(ow, number)
    rows = JobIndex(ow.backend).page(JobQuery(sort="id", descending=False))["rows"]
    assert [row["last"] for row in rows] == [
        "for its worker, which is starting",
        "behind ftjob-0000",
    ]


def test_what_sample_has_made_is_shown_on_demand(ow: OpenWeights) -> None:
    _submit(ow, 0)
    spec = JobSpec("inferencejob-s-sample", "inference", "true", {}, label=LABEL)
    ow.backend.submit_job(spec)
    index = JobIndex(ow.backend)
    assert _ids(index) == ["ftjob-0000"] and index.page(JobQuery())["samples"] == 1
    assert len(_ids(index, samples=True)) == 2


def test_statuses_are_counted_over_the_other_filters(ow: OpenWeights) -> None:
    for number in range(4):
        _submit(ow, number)
    ow.backend.cancel_job("ftjob-0000")
    page = JobIndex(ow.backend).page(JobQuery(model="org/m0", status="pending"))
    assert page["statuses"] == {"pending": 1, "canceled": 1}
    assert page["total"] == 1


def test_changes_are_found_also_when_there_are_many(
    ow: OpenWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = JobIndex(ow.backend)
    _submit(ow, 0)
    assert len(_ids(index)) == 1
    last = index.page(JobQuery())["rows"][0]["updated"]
    for number in range(1, 150):
        _submit(ow, number)
    ow.backend.cancel_job("ftjob-0000")
    monkeypatch.setattr("openweights.dashboard.job_index._FRESH_S", 0.0)
    changed = index.changed_since(last)
    assert len(changed) == 150
    assert changed[-1]["id"] == "ftjob-0000" and changed[-1]["status"] == "canceled"
