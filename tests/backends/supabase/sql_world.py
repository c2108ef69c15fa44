"""Two organizations in one database, for the tests of who may do what to the first of them.

The first has an admin, a member, two workers that each hold a job, a job that waits, one that has
failed, one that has completed, a script's run, files of all of them, a secret and a pod. The second
has an admin, who is the stranger.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import psycopg

from openweights.backends.supabase.sql import apply
from tests.backends.supabase.sql_calls import Caller, job

_NOW = "2026-01-02T03:04:05.678901+00:00"


def digest_of(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def file_id(name: str, purpose: str = "data") -> str:
    return f"{purpose}:file-{digest_of(name)[:12]}"


def event(key: str, **data: Any) -> dict[str, Any]:
    return {"key": key, "data": data, "created_at": _NOW}


@dataclass
class World:
    """What is in the database.

    Attributes:
        organization: Id of the first organization.
        keys: Caller -> its key; None for nobody.
        runs: Job -> id of its run.
        members: E-mail address -> id.
        key_ids: Caller -> id of its key.
    """

    url: str
    organization: str
    keys: dict[str, str | None] = field(default_factory=dict[str, "str | None"])
    runs: dict[str, int] = field(default_factory=dict[str, int])
    members: dict[str, str] = field(default_factory=dict[str, str])
    key_ids: dict[str, str] = field(default_factory=dict[str, str])


def build(url: str) -> World:
    first = apply.create_organization(url, "First", "admin@example.org")
    second = apply.create_organization(url, "Second", "admin@example.org")
    world = World(url, first.organization_id)
    world.keys |= {"nobody": None, "admin": first.key, "stranger": second.key}
    admin = Caller(url, first.key)
    _add_people(world, admin)
    _add_files(world, admin)
    _add_jobs(world, admin)
    _end_some_keys(world, admin)
    admin.close()
    return world


def _add_people(world: World, admin: Caller) -> None:
    for name in ("member", "left"):
        row = admin.rpc("add_member", email=f"{name}@example.org", role="member")
        world.members[name] = row["id"]
    world.members["admin"] = admin.rpc("list_members")[0]["id"]
    wanted: dict[str, dict[str, Any]] = {
        "member": {"role": "member", "member_id": world.members["member"]},
        "left": {"role": "member", "member_id": world.members["left"]},
        "holder": {"role": "worker", "worker_id": "w-holder"},
        "idler": {"role": "worker", "worker_id": "w-idler"},
        "unbound": {"role": "worker"},
        "revoked": {"role": "admin"},
        "expired": {"role": "admin"},
    }
    for name, options in wanted.items():
        made = admin.rpc("create_key", name=name, **options)
        world.keys[name], world.key_ids[name] = made["key"], made["id"]
    admin.rpc("set_secret", name="HF_TOKEN", sealed="sealed-hf")
    admin.rpc("set_secret", name="RUNPOD_API_KEY", sealed="sealed-runpod")


def _add_files(world: World, admin: Caller) -> None:
    names = ("of-held", "of-idlers", "of-waiting", "of-before", "of-nobody", "gone")
    for name in (*names, "put-by-holder"):
        by_holder = name == "put-by-holder"
        key = world.key_ids["holder"] if by_holder else None
        put_object(world.url, world.organization, file_id(name), key=key)
        caller = Caller(world.url, world.keys["holder"]) if by_holder else admin
        caller.rpc("put_file_record", **file_record(name))
    for name in ("cp", "shared"):
        for worker in ("holder", "idler") if name == "shared" else ("holder",):
            key = world.key_ids[worker]
            put_object(world.url, world.organization, file_id(name, "checkpoint"), key=key)
            caller = Caller(world.url, world.keys[worker])
            caller.rpc("put_file_record", **file_record(name, "checkpoint"))


def file_record(name: str, purpose: str = "data") -> dict[str, Any]:
    return {
        "id": file_id(name, purpose),
        "purpose": purpose,
        "filename": name,
        "bytes": 3,
        "sha256": digest_of(name),
    }


def put_object(
    url: str, organization: str, name: str, age: str = "0", key: str | None = None
) -> None:
    """An object of the bucket, as the storage service makes it: in the folder of the key with that
    id, or where older clients put it.
    """
    name = name if key is None else f"{key}/{name}"
    with psycopg.connect(url) as db:
        db.execute(
            "insert into storage.objects (bucket_id, name, created_at) "
            "values ('files', %s, now() - %s::interval)",
            (f"{organization}/{name}", age),
        )


def _add_jobs(world: World, admin: Caller) -> None:
    holder, idler = (Caller(world.url, world.keys[name]) for name in ("holder", "idler"))
    for caller, worker in ((holder, "w-holder"), (idler, "w-idler")):
        caller.rpc("register_worker", worker={"id": worker})
    for caller, worker, name in (
        (holder, "w-holder", "before"),
        (holder, "w-holder", "held"),
        (idler, "w-idler", "idlers"),
        (idler, "w-idler", "failed"),
    ):
        files = {"training_file": file_id(f"of-{name}")}
        params = {"validated_params": files, "secrets": ["HF_TOKEN"]}
        admin.rpc("submit_job", spec=job(name, params=params, priority=1))
        if name == "failed":
            continue
        claim = caller.rpc("claim_job", worker_id=worker)
        world.runs[name] = claim["run"]["id"]
        files = {"cp": file_id("cp", "checkpoint")} if name == "held" else {}
        events = [event("k", loss=1, shared=file_id("shared", "checkpoint"), **files)]
        caller.rpc("append_events", run_id=world.runs[name], events=events)
        caller.rpc("append_log", run_id=world.runs[name], offset=0, data="aGk=")
        if name == "before":
            caller.rpc(
                "finish_run", run_id=world.runs[name], attempt=1, status="completed", error=None
            )
    admin.rpc("cancel_job", job_id="failed")
    waiting = {"mounted_files": {"data.jsonl": file_id("of-waiting")}}
    admin.rpc("submit_job", spec=job("waiting", params=waiting))
    script = admin.rpc("start_script_run", spec=job("script"))
    world.runs["script"] = script["run"]["id"]
    admin.rpc("create_worker", worker={"id": "w-pod"}, price_usd_per_hour=2)
    holder.close()
    idler.close()


def _end_some_keys(world: World, admin: Caller) -> None:
    admin.rpc("revoke_key", key_id=world.key_ids["revoked"])
    admin.rpc("remove_member", member_id=world.members["left"])
    with psycopg.connect(world.url) as db:
        db.execute(
            "update public.api_keys set expires_at = now() - interval '1 second' where id = %s",
            (world.key_ids["expired"],),
        )
    put_object(world.url, world.organization, file_id("fresh"))
    put_object(world.url, world.organization, file_id("old"), age="2 hours")
    put_object(world.url, world.organization, file_id("in-flight"), key=world.key_ids["holder"])
    with psycopg.connect(world.url) as db:
        db.execute("delete from storage.objects where name like %s", (f"%{file_id('gone')}",))
