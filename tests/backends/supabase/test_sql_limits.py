"""What a key could do to others by raw calls, and cannot: poison rows, uploads, budgets."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from typing import Any

import pytest

from openweights.backends.supabase.backend import SupabaseBackend
from openweights.cluster.planning.observation import Demand
from openweights.errors import ConfigurationError, OpenWeightsError
from openweights.types import WorkerSpec
from tests.backends.steps import spec
from tests.supabase_double.team import Team

_POISON: list[dict[str, Any]] = [
    *(
        {"timeout_at": moment}
        for moment in ("infinity", "-infinity", "20000-01-01", "0044-03-15 BC")
    ),
    *({"max_cost_usd": value} for value in ("NaN", "Infinity", -1)),
    {"allowed_hardware": [None, "1x H100S"]},
    {"params": {"cloud_type": 5}},
    {"params": {"secrets": {"a": 1}}},
    {"params": {"mounted_files": [1]}},
    {"params": {"mounted_files": {"a": 1}}},
    {"params": {"validated_params": "x"}},
    *({"requires_vram_gb": value} for value in (-5, 2_000_000)),
    {"priority": 2_147_483_647},
    {"max_attempts": -1},
    *({"id": name} for name in ("..", "-rf", "a\x1b[31m", "\u202eabc")),
    {"docker_image": 'x"; }\n'},
]


@pytest.fixture(autouse=True)
def closed_backends(team: Team) -> Iterator[None]:
    """What a test opens is closed behind it."""
    opened: list[SupabaseBackend] = []
    open_backend = team.backend

    def backend(key: str | None = None, **options: Any) -> SupabaseBackend:
        opened.append(open_backend(key, **options))
        return opened[-1]

    team.backend = backend  # type: ignore[method-assign]
    yield
    for found in opened:
        found.close()


def _raw(job_id: str, **changes: Any) -> dict[str, Any]:
    params = {"validated_params": {}, "mounted_files": {}, "cloud_type": "SECURE"}
    return {"id": job_id, "type": "custom", "script": "true", "params": params, **changes}


@pytest.mark.parametrize("poison", _POISON, ids=str)
def test_a_row_that_clients_cannot_read_is_refused(team: Team, poison: dict[str, Any]) -> None:
    member = team.backend(team.key("member"))
    with pytest.raises(OpenWeightsError):
        member.rpc("submit_job", spec=_raw("poison", **poison))
    assert member.list_jobs() == []


def test_a_row_that_is_there_all_the_same_stops_nobody(team: Team) -> None:
    """As one of before, or of a program that writes to the tables itself."""
    admin = team.backend()
    for name in ("good", "late", "early", "odd"):
        admin.submit_job(spec(name, timeout_at=None))
    poison = {
        "late": "timeout_at = 'infinity', created_at = '20000-01-01'",
        "early": "timeout_at = '-infinity', updated_at = '0044-03-15 BC'",
        "odd": "allowed_hardware = array[null, '1x H100S'], params = '{\"cloud_type\": 5}'",
    }
    for name, change in poison.items():
        team.execute(f"update jobs set {change} where id = %s", name)
    assert {job.id for job in admin.list_jobs()} == {"good", "late", "early", "odd"}
    assert {Demand.of(row.job).id for row in admin.pending_jobs()} == {
        "good",
        "late",
        "early",
        "odd",
    }
    admin.register_worker(WorkerSpec("w", docker_image="dev"))
    team.execute("update workers set pinged_at = 'infinity' where id = 'w'")
    assert [worker.id for worker in admin.list_workers()] == ["w"]
    assert [row.id for row in admin.worker_rows()] == ["w"]
    claims = {claim.job.id for _ in range(4) if (claim := _next(admin))}
    assert claims >= {"good", "late"}


def _next(backend: SupabaseBackend) -> Any:
    claim = backend.claim_job("w")
    if claim is not None:
        backend.finish_run(claim.run.id, claim.run.attempt, "completed")
    return claim


def _file_id(team: Team, content: bytes) -> tuple[str, str]:
    digest = hashlib.sha256(content + team.organization_id.encode()).hexdigest()
    return f"data:file-{digest[:12]}", digest


def test_a_workers_key_has_no_part_in_the_uploads_of_others(team: Team) -> None:
    member, worker = team.backend(team.key("member")), team.backend(team.key("worker"))
    content = b"rows that are nobody's business"
    file_id, digest = _file_id(team, content)
    in_flight = f"{team.organization_id}/{member.identity['key_id']}/{file_id}"
    bucket = member._bucket()  # pyright: ignore[reportPrivateUsage]
    bucket.upload(in_flight, content, {"content-type": "application/octet-stream"})
    theirs = worker._bucket()  # pyright: ignore[reportPrivateUsage]
    with pytest.raises(OpenWeightsError):
        theirs.download(in_flight)
    for place in (in_flight, f"{team.organization_id}/{file_id}"):
        with pytest.raises(OpenWeightsError):
            theirs.upload(place, b"poisoned", {"upsert": "true"})
    # Nor does it get the record by a digest that begins alike.
    forged = {"purpose": "data", "filename": "x", "bytes": 1, "sha256": digest[:12] + "f" * 52}
    with pytest.raises(OpenWeightsError):
        worker.rpc("put_file_record", id=file_id, **forged)
    assert member.put_file(io.BytesIO(content), "data", "rows").id == file_id
    with member.open_file(file_id) as stored:
        assert stored.read() == content


@pytest.mark.parametrize("honest_digest", [True, False])
def test_what_a_workers_key_registers_in_advance_gives_way(team: Team, honest_digest: bool) -> None:
    member, worker = team.backend(team.key("member")), team.backend(team.key("worker"))
    content = b"the next release, whose content anybody knows"
    file_id, digest = _file_id(team, content)
    place = f"{team.organization_id}/{worker.identity['key_id']}/{file_id}"
    worker._bucket().upload(place, b"evil code", {"upsert": "true"})  # pyright: ignore[reportPrivateUsage]
    claimed = digest if honest_digest else digest[:12] + "f" * 52
    record = {"purpose": "data", "filename": "x", "bytes": 9, "sha256": claimed}
    worker.rpc("put_file_record", id=file_id, **record)
    assert member.put_file(io.BytesIO(content), "data", "bundle").id == file_id
    with member.open_file(file_id) as stored:
        assert stored.read() == content


def test_names_of_files_are_base_names_whoever_calls(team: Team) -> None:
    worker = team.backend(team.key("worker"))
    file_id, digest = _file_id(team, b"evil")
    place = f"{team.organization_id}/{worker.identity['key_id']}/{file_id}"
    worker._bucket().upload(place, b"evil", {"upsert": "true"})  # pyright: ignore[reportPrivateUsage]
    record = {"id": file_id, "purpose": "data", "bytes": 4, "sha256": digest}
    for name in ("../../pwned", "/tmp/pwned", "..", "", "a\\b", "a\nb"):
        with pytest.raises(OpenWeightsError):
            worker.rpc("put_file_record", filename=name, **record)
    worker.rpc("put_file_record", filename="good", **record)
    team.execute("update files set filename = '../../pwned' where id = %s", file_id)
    assert team.backend().get_file(file_id).filename == "pwned"


def test_a_pending_job_changes_only_for_whom_it_is_charged(team: Team) -> None:
    admin, other = team.backend(), team.backend(team.key("member", budget_usd=0.01))
    admin.submit_job(spec("job", bundle_file="source:file-aaaaaaaaaaaa"))
    hijack = spec(
        "job",
        bundle_file="source:file-bbbbbbbbbbbb",
        allowed_hardware=("8x H200",),
        requires_vram_gb=1000,
        docker_image="evil/image",
    )
    assert other.submit_job(hijack) == admin.get_job("job"), "the others get the job as it is"
    assert admin.get_job("job").bundle_file == "source:file-aaaaaaaaaaaa"
    # The control: whoever may, changes it; and an admin pays for it from then on.
    other.submit_job(spec("theirs"))
    assert other.submit_job(spec("theirs", docker_image="new")).docker_image == "new"
    assert admin.submit_job(spec("theirs", docker_image="newer")).docker_image == "newer"
    with pytest.raises(ConfigurationError, match="role"):
        team.backend(team.key("worker")).submit_job(spec("x"))
