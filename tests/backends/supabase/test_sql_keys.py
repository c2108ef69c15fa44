"""Keys: what ends them, what they can never gain, and what a worker's key is kept from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest

from tests.backends.supabase.sql_calls import Caller, job, sign_up
from tests.backends.supabase.sql_world import World, build, digest_of, event, file_id, file_record
from tests.supabase_double.postgres import PostgresServer

_JOBS = "select id from public.jobs"


@pytest.fixture
def admin(project: str) -> Iterator[Caller]:
    caller = Caller(project, sign_up(project))
    caller.rpc("submit_job", spec=job("j"))
    yield caller
    caller.close()


@pytest.fixture(scope="module")
def world(postgres: PostgresServer) -> World:
    return build(postgres.create_project())


@pytest.fixture
def holder(world: World) -> Iterator[Caller]:
    caller = Caller(world.url, world.keys["holder"])
    yield caller
    caller.close()


def _refused(call: Callable[[], Any]) -> tuple[str | None, str]:
    with pytest.raises(psycopg.Error) as caught:
        call()
    return caught.value.diag.message_detail, caught.value.diag.message_primary or ""


def _revoke(admin: Caller, key: dict[str, Any], member: str) -> None:
    admin.rpc("revoke_key", key_id=key["id"])


def _remove(admin: Caller, key: dict[str, Any], member: str) -> None:
    admin.rpc("remove_member", member_id=member)


def _expire(admin: Caller, key: dict[str, Any], member: str) -> None:
    with psycopg.connect(admin.url) as db:
        db.execute("update public.api_keys set expires_at = now() where id = %s", (key["id"],))


@pytest.mark.parametrize(
    ("end", "reason"),
    [(_revoke, "has been revoked"), (_remove, "has left"), (_expire, "has expired")],
)
def test_a_key_that_ends_is_refused_on_its_next_request(
    admin: Caller, end: Callable[..., None], reason: str
) -> None:
    member = admin.rpc("add_member", email="m@example.org", role="member")["id"]
    key = admin.rpc("create_key", name="k", role="member", member_id=member)
    caller = Caller(admin.url, key["key"])
    assert caller.query(_JOBS) == [("j",)] and caller.rpc("whoami")["role"] == "member"
    end(admin, key, member)
    for call in (lambda: caller.rpc("whoami"), lambda: caller.query(_JOBS)):
        kind, message = _refused(call)
        assert kind == "unauthenticated" and reason in message
        assert key["key"] not in message and key["prefix"] in message
    caller.close()


def test_nonsense_for_a_key_is_refused(admin: Caller) -> None:
    assert admin.key is not None
    for sent in (None, "", "ow_", admin.key[:-1], admin.key.upper(), "ü' or true --"):
        caller = Caller(admin.url, sent)
        assert _refused(lambda caller=caller: caller.rpc("whoami"))[0] == "unauthenticated"
        assert _refused(lambda caller=caller: caller.query(_JOBS))[0] == "unauthenticated"
        caller.close()


def test_a_key_is_shown_once_and_stored_nowhere(admin: Caller) -> None:
    made = admin.rpc("create_key", name="k", role="worker")
    assert len(made["key"]) == 51 and made["key"].startswith("ow_")
    assert made["prefix"] == made["key"][:11]
    [listed] = [key for key in admin.rpc("list_keys") if key["id"] == made["id"]]
    assert "key" not in listed and "key_hash" not in listed
    with psycopg.connect(admin.url) as db:
        for (table,) in db.execute(
            "select tablename from pg_tables where schemaname = 'public'"
        ).fetchall():
            query = f"select count(*) from public.{table} t where t::text like %s"
            found = db.execute(query.encode(), (f"%{made['key']}%",)).fetchone()
            assert found == (0,), table


def test_the_use_of_a_key_is_noted(admin: Caller) -> None:
    [key] = admin.rpc("list_keys")
    assert key["last_used_at"] is not None and key["email"] == "admin@example.org"


def test_a_key_does_no_more_than_its_member(admin: Caller) -> None:
    row = admin.rpc("add_member", email="m@example.org", role="admin")
    key = admin.rpc("create_key", name="k", role="admin", member_id=row["id"])
    second = Caller(admin.url, key["key"])
    assert second.rpc("list_keys")
    admin.rpc("add_member", email="M@example.org", role="member")
    assert _refused(lambda: second.rpc("list_keys"))[0] == "forbidden"
    again = {"name": "k", "role": "admin", "member_id": row["id"]}
    assert _refused(lambda: admin.rpc("create_key", **again))[0] == "invalid_input"
    second.close()


def test_an_organization_keeps_an_admin(admin: Caller) -> None:
    [me] = admin.rpc("list_members")
    for call in (
        lambda: admin.rpc("remove_member", member_id=me["id"]),
        lambda: admin.rpc("add_member", email="admin@example.org", role="member"),
    ):
        kind, message = _refused(call)
        assert kind == "invalid_state" and "needs an admin" in message


@pytest.mark.parametrize(
    "parameters",
    [
        {"role": "owner"},
        {"role": "member", "worker_id": "w"},
        {"role": "member", "expires_at": "2020-01-01T00:00:00+00:00"},
        {"role": "member", "budget_usd": -1},
    ],
)
def test_keys_that_make_no_sense_are_not_made(admin: Caller, parameters: dict[str, Any]) -> None:
    call = {"name": "k"} | parameters
    assert _refused(lambda: admin.rpc("create_key", **call))[0] == "invalid_input"


def test_a_new_workers_key_takes_no_one_elses_place(world: World) -> None:
    unbound = Caller(world.url, world.keys["unbound"])
    for taken in ("w-holder", "w-pod"):
        kind, _ = _refused(lambda taken=taken: unbound.rpc("register_worker", worker={"id": taken}))
        assert kind == "forbidden"
    unbound.rpc("register_worker", worker={"id": "w-own"})
    assert unbound.rpc("whoami")["worker_id"] == "w-own"
    other = {"id": "w-second"}
    kind, message = _refused(lambda: unbound.rpc("register_worker", worker=other))
    assert kind == "forbidden" and "w-own is at work" in message
    unbound.close()


def test_a_workers_key_goes_to_the_next_worker_when_the_last_one_has_ended(world: World) -> None:
    admin = Caller(world.url, world.keys["admin"])
    made = admin.rpc("create_key", name="a box", role="worker")
    admin.close()
    caller = Caller(world.url, made["key"])
    caller.rpc("register_worker", worker={"id": "w-first"})
    caller.rpc("set_worker_status", worker_id="w-first", status="terminated")
    caller.rpc("register_worker", worker={"id": "w-second"})
    assert caller.rpc("whoami")["worker_id"] == "w-second"
    assert _refused(lambda: caller.rpc("claim_job", worker_id="w-first"))[0] == "forbidden"
    with psycopg.connect(world.url) as db:
        db.execute("update workers set pinged_at = pinged_at - interval '1 h'")
    caller.rpc("register_worker", worker={"id": "w-third"})
    assert _refused(lambda: caller.rpc("claim_job", worker_id="w-second"))[0] == "forbidden"
    caller.close()


# ---- what a worker's key is kept from -----------------------------------------------------------


def _readable(caller: Caller) -> set[str]:
    return {name for (name,) in caller.query("select filename from public.files")}


def test_a_worker_gets_the_secrets_that_its_job_names(world: World, holder: Caller) -> None:
    assert holder.rpc("job_secrets", run_id=world.runs["held"]) == {"HF_TOKEN": "sealed-hf"}
    assert _refused(lambda: holder.rpc("job_secrets", run_id=world.runs["idlers"]))[0] == (
        "forbidden"
    )


def test_naming_a_file_does_not_make_it_readable(world: World, holder: Caller) -> None:
    run = world.runs["held"]
    before = _readable(holder)
    holder.rpc("append_events", run_id=run, events=[event("theft", file=file_id("of-idlers"))])
    stolen = file_record("of-idlers") | {"sha256": digest_of("of-idlers")[:12] + "0" * 52}
    kind, message = _refused(lambda: holder.rpc("put_file_record", **stolen))
    assert kind == "not_found" and "upload it first" in message
    assert _readable(holder) == before and "of-idlers" not in before


def test_the_next_worker_reads_what_the_last_one_left(world: World, holder: Caller) -> None:
    """A checkpoint that the holder put and named; and after its job has gone to another, not the
    files of the job any more.
    """
    run = world.runs["held"]
    named = event("checkpoint", path="c", file=file_id("put-by-holder"))
    holder.rpc("append_events", run_id=run, events=[named])
    admin = Caller(world.url, world.keys["admin"])
    made = admin.rpc("create_key", name="next", role="worker", worker_id="w-next")
    following = Caller(world.url, made["key"])
    following.rpc("register_worker", worker={"id": "w-next"})
    assert _readable(following) == set()
    holder.rpc("release_run", run_id=run, attempt=1, reason="preempted")
    assert _readable(holder) == {"put-by-holder", "cp", "shared"}
    claim = following.rpc("claim_job", worker_id="w-next")
    assert claim["job"]["id"] == "held"
    assert _readable(following) == {"of-held", "put-by-holder", "cp", "shared"}
    events = following.query("select count(*) from public.events where run_id = %s", (run,))
    assert events[0][0] > 0
    for caller in (admin, following):
        caller.close()


def test_secrets_are_written_and_never_read(admin: Caller) -> None:
    admin.rpc("set_secrets_key", public_key="one")
    admin.rpc("set_secret", name="HF_TOKEN", sealed="sealed")
    assert admin.rpc("secrets_key") == "one"
    [listed] = admin.rpc("list_secrets")
    assert set(listed) == {"name", "updated_at"}
    kind, _ = _refused(lambda: admin.rpc("set_secrets_key", public_key="two"))
    assert kind == "invalid_state"
    assert _refused(lambda: admin.rpc("set_secret", name="a b", sealed="x"))[0] == "invalid_input"
    assert admin.rpc("delete_secret", name="HF_TOKEN") is True
    assert admin.rpc("delete_secret", name="HF_TOKEN") is False
    admin.rpc("set_secrets_key", public_key="two")


def test_what_admins_do_is_written_down(admin: Caller) -> None:
    """Under the member and the key that did it, without any secret."""
    made = admin.rpc("create_key", name="second", role="worker", worker_id="w-1")
    admin.rpc("set_budget", key_id=made["id"], usd=5)
    admin.rpc("revoke_key", key_id=made["id"])
    member = admin.rpc("add_member", email="new@example.org", role="member")
    admin.rpc("remove_member", member_id=member["id"])
    admin.rpc("rename_organization", name="Other")
    admin.rpc("set_secrets_key", public_key="public")
    admin.rpc("set_secret", name="TOKEN", sealed="sealed-token")
    admin.rpc("delete_secret", name="TOKEN")
    admin.rpc("delete_secret", name="TOKEN")
    query = "select action, target, who, key_name, details::text from public.audit order by id"
    rows = admin.query(query)
    assert [row[:2] for row in rows] == [
        ("job.submit", "j"),
        ("key.create", "second"),
        ("key.budget", "second"),
        ("key.revoke", "second"),
        ("member.add", "new@example.org"),
        ("member.remove", "new@example.org"),
        ("organization.rename", "Other"),
        ("secrets.key", None),
        ("secret.set", "TOKEN"),
        ("secret.delete", "TOKEN"),
    ]
    assert {row[2:4] for row in rows} == {("admin@example.org", "first")}
    text = " ".join(row[4] for row in rows)
    assert made["key"] not in text and "sealed-token" not in text and "w-1" in text
