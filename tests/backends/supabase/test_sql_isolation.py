"""Who may do what: every table, function and stored object, with every kind of key.

The tables below say what must happen; the tests try all of it in the database, with the role and
the headers of a request, and undo it. A refused attempt must also have changed nothing, and no
attempt of a stranger may change or tell anything of the first organization.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from psycopg.types.json import Jsonb

from tests.backends.supabase.sql_calls import become, job
from tests.backends.supabase.sql_world import World, build, event, file_id, file_record
from tests.supabase_double.postgres import PostgresServer

CALLERS = (
    "admin",
    "member",
    "holder",  # a worker that holds the job `held`, and has held `before`
    "idler",  # a worker that holds the job `idlers`
    "stranger",  # admin of another organization
    "nobody",
    "revoked",
    "expired",
    "left",  # its member was removed
)
DEAD = ("nobody", "revoked", "expired", "left")
PEOPLE = ("admin", "member")
DENIED = "denied"

# ---- what must happen: tables -------------------------------------------------------------------

_JOBS = {"before", "held", "idlers", "failed", "waiting", "script"}
_FILES = {
    *("of-held", "of-idlers", "of-waiting", "of-before", "of-nobody", "gone"),
    *("put-by-holder", "cp", "shared"),
}
_OF_HOLDER = {"of-held", "put-by-holder", "cp", "shared"}
_OF_IDLER = {"of-idlers", "shared"}
_ALL_RUNS = {"before", "held", "idlers", "script"}

_ACTIONS = {
    *("job.submit", "job.cancel", "job.script", "key.create", "key.revoke", "member.add"),
    *("member.remove", "secret.set"),
}

# table -> (what names a row, rows of the first organization that people, holder and idler see);
# None: nobody may read it. The stranger sees nothing, dead keys are told so, and nobody may write.
TABLES: dict[str, tuple[str, set[str], set[str], set[str]] | None] = {
    "organizations": ("name", {"First"}, {"First"}, {"First"}),
    "files": ("filename", _FILES, _OF_HOLDER, _OF_IDLER),
    "workers": ("id", {"w-holder", "w-idler", "w-pod"}, {"w-holder"}, {"w-idler"}),
    "jobs": ("id", _JOBS, {"held", "before"}, {"idlers"}),
    "runs": ("job_id", _ALL_RUNS, {"held", "before"}, {"idlers"}),
    "audit": ("action", _ACTIONS, set(), set()),
    "events": ("job_id", {"before", "held", "idlers"}, {"held", "before"}, {"idlers"}),
    "members": None,
    "api_keys": None,
    "secrets": None,
    "file_keys": None,
    "job_files": None,
    "run_values": None,
    "log_chunks": None,
}

# ---- what must happen: functions ----------------------------------------------------------------

OK, NO, NONE = "ok", "forbidden", "not_found"
Parameters = Callable[[World], dict[str, Any]]


def _run(name: str, **more: Any) -> Parameters:
    return lambda world: {"run_id": world.runs[name]} | more


def _fixed(**parameters: Any) -> Parameters:
    return lambda world: parameters


_END: dict[str, Any] = {"attempt": 1, "status": "completed", "error": None}

# (function, its parameters) -> what admin, member, holder, idler and stranger get; dead keys are
# unauthenticated everywhere. The stranger's "ok" is about the stranger's own organization.
FUNCTIONS: list[tuple[str, Parameters, tuple[str, str, str, str, str]]] = [
    ("whoami", _fixed(), (OK, OK, OK, OK, OK)),
    ("submit_job", _fixed(spec=job("waiting", model="m")), (OK, OK, NO, NO, OK)),
    ("submit_job", _fixed(spec=job("failed")), (OK, OK, NO, NO, OK)),
    ("cancel_job", _fixed(job_id="held"), (OK, OK, NO, NO, NONE)),
    ("restart_job", _fixed(job_id="failed"), (OK, OK, NO, NO, NONE)),
    ("set_timeout", _fixed(job_id="held", timeout_at=None), (OK, OK, NO, NO, NONE)),
    ("delete_job", _fixed(job_id="before"), (OK, NO, NO, NO, OK)),
    ("collect_garbage", _fixed(keep_s=0, dry_run=False), (OK, NO, NO, NO, OK)),
    ("set_retention", _fixed(log_limit_mb=8, keep_days=None), (OK, NO, NO, NO, OK)),
    ("store_sizes", _fixed(), (OK, OK, NO, NO, OK)),
    ("queue_state", _fixed(), (OK, OK, NO, NO, OK)),
    ("place_in_queue", _fixed(), (OK, OK, NO, NO, OK)),
    ("place_in_queue", _fixed(job={"id": "x", "after": ["held"]}), (OK, OK, NO, NO, OK)),
    ("set_paused", _fixed(is_paused=True), (OK, NO, NO, NO, OK)),
    ("set_max_duration", _fixed(seconds=5), (OK, NO, NO, NO, OK)),
    ("touch_run", _run("held"), (OK, NO, OK, NO, NONE)),
    ("touch_run", _run("script"), (OK, OK, NO, NO, NONE)),
    ("start_script_run", _fixed(spec=job("new script")), (OK, OK, NO, NO, OK)),
    ("finish_run", _run("held", **_END), (OK, NO, OK, NO, NONE)),
    ("finish_run", _run("script", **_END), (OK, OK, NO, NO, NONE)),
    ("release_run", _run("held", attempt=1, reason="x"), (OK, NO, OK, NO, NONE)),
    ("append_events", _run("held", events=[event("new", loss=2)]), (OK, NO, OK, NO, NONE)),
    ("append_events", _run("script", events=[event("new", loss=2)]), (OK, OK, NO, NO, NONE)),
    ("latest_values", _fixed(job_id="held"), (OK, OK, OK, NO, NONE)),
    ("latest_values", _run("before"), (OK, OK, OK, NO, NONE)),
    ("append_log", _run("held", offset=2, data="aGk="), (OK, NO, OK, NO, NONE)),
    ("read_log", _run("held"), (OK, OK, OK, NO, NONE)),
    ("read_log", _run("script"), (OK, OK, NO, NO, NONE)),
    ("register_worker", _fixed(worker={"id": "w-holder"}), (OK, NO, OK, NO, OK)),
    ("register_worker", _fixed(worker={"id": "w-new"}), (OK, NO, NO, NO, OK)),
    (
        "set_worker_status",
        _fixed(worker_id="w-holder", status="terminated"),
        (OK, NO, OK, NO, NONE),
    ),
    ("claim_job", _fixed(worker_id="w-holder"), (OK, NO, OK, NO, NONE)),
    ("heartbeat", _fixed(worker_id="w-holder"), (OK, NO, OK, NO, NONE)),
    (
        "heartbeat",
        lambda world: {"worker_id": "w-holder", "run_id": world.runs["held"]},
        (OK, NO, OK, NO, NONE),
    ),
    ("create_worker", _fixed(worker={"id": "w-new"}), (OK, NO, NO, NO, OK)),
    ("set_worker_pod", _fixed(worker_id="w-pod", pod_id="p"), (OK, NO, NO, NO, NONE)),
    ("end_worker_pod", _fixed(worker_id="w-pod"), (OK, NO, NO, NO, NONE)),
    ("pending_jobs", _fixed(), (OK, NO, NO, NO, OK)),
    ("market", _fixed(), (OK, OK, NO, NO, OK)),
    ("manager_state", _fixed(), (OK, NO, NO, NO, OK)),
    ("set_manager_state", _fixed(state={}), (OK, NO, NO, NO, OK)),
    ("put_file_record", _fixed(**file_record("fresh")), (OK, OK, NONE, NONE, NONE)),
    ("put_file_record", _fixed(**file_record("in-flight")), (NONE, NONE, OK, NONE, NONE)),
    ("find_file", _fixed(id=file_id("of-held")), (OK, OK, OK, OK, OK)),
    ("delete_file_record", _fixed(id=file_id("of-held")), (OK, OK, NO, NO, OK)),
    ("delete_file_record", _fixed(id=file_id("cp", "checkpoint")), (OK, OK, OK, NO, OK)),
    ("delete_file_record", _fixed(id=file_id("shared", "checkpoint")), (OK, OK, NO, NO, OK)),
    ("rename_organization", _fixed(name="Other"), (OK, NO, NO, NO, OK)),
    ("list_members", _fixed(), (OK, OK, NO, NO, OK)),
    ("add_member", _fixed(email="new@example.org", role="admin"), (OK, NO, NO, NO, OK)),
    (
        "remove_member",
        lambda world: {"member_id": world.members["member"]},
        (OK, NO, NO, NO, NONE),
    ),
    ("create_key", _fixed(name="new", role="admin"), (OK, NO, NO, NO, OK)),
    ("create_key", _fixed(name="new", role="worker"), (OK, NO, NO, NO, OK)),
    (
        "create_key",
        lambda world: {"name": "n", "role": "admin", "member_id": world.members["admin"]},
        (OK, NO, NO, NO, NONE),
    ),
    ("list_keys", _fixed(), (OK, NO, NO, NO, OK)),
    ("revoke_key", lambda world: {"key_id": world.key_ids["idler"]}, (OK, NO, NO, NO, NONE)),
    (
        "set_budget",
        lambda world: {"key_id": world.key_ids["member"], "usd": 5},
        (OK, NO, NO, NO, NONE),
    ),
    ("set_secrets_key", _fixed(public_key="new"), ("invalid_state", NO, NO, NO, OK)),
    ("secrets_key", _fixed(), (OK, OK, NO, NO, OK)),
    ("set_secret", _fixed(name="HF_TOKEN", sealed="mine"), (OK, OK, NO, NO, OK)),
    ("delete_secret", _fixed(name="HF_TOKEN"), (OK, OK, NO, NO, OK)),
    ("list_secrets", _fixed(), (OK, OK, NO, NO, OK)),
    ("job_secrets", _run("held"), (OK, NO, OK, NO, NONE)),
    ("job_secrets", _run("before"), (NO, NO, NO, NO, NONE)),
    ("cost_report", _fixed(), (OK, OK, NO, NO, OK)),
]

# ---- what must happen: stored objects -----------------------------------------------------------

_READABLE = {
    "people": _FILES - {"gone"} | {"fresh", "old", "in-flight"},
    "holder": _OF_HOLDER | {"in-flight"},
    "idler": _OF_IDLER,
}
_INSERT = "insert into storage.objects (bucket_id, name) values (%s, %s) returning name"
_UPDATE = "update storage.objects set metadata = '{}' where name = %s returning name"
_DELETE = "delete from storage.objects where name = %s returning name"


def _in_first(world: World, name: str) -> str:
    return f"{world.organization}/{name}"


def _of_holder(world: World, name: str) -> str:
    return _in_first(world, f"{world.key_ids['holder']}/{file_id(name)}")


# statement, its parameters, and who may do it; others are denied, or reach no row
OBJECTS: dict[str, tuple[str, Callable[[World], tuple[str, ...]], tuple[str, ...]]] = {
    "insert": (_INSERT, lambda w: ("files", _of_holder(w, "n")), ("holder",)),
    "insert where older clients do": (
        _INSERT,
        lambda w: ("files", _in_first(w, file_id("n"))),
        PEOPLE,
    ),
    "insert what is there": (_INSERT, lambda w: ("files", _in_first(w, file_id("old"))), ()),
    "insert under another name": (_INSERT, lambda w: ("files", _in_first(w, "x.txt")), ()),
    "insert deeper": (_INSERT, lambda w: ("files", _in_first(w, f"a/{file_id('n')}")), ()),
    "insert beside": (_INSERT, lambda w: ("files", file_id("n")), ()),
    "insert into another bucket": (
        _INSERT,
        lambda w: ("other", _in_first(w, file_id("n"))),
        (),
    ),
    "update what has a record": (_UPDATE, lambda w: (_in_first(w, file_id("of-held")),), ()),
    "update what has none": (_UPDATE, lambda w: (_of_holder(w, "in-flight"),), ("holder",)),
    "update an upload in flight": (_UPDATE, lambda w: (_in_first(w, file_id("fresh")),), PEOPLE),
    "update what was left": (_UPDATE, lambda w: (_in_first(w, file_id("old")),), PEOPLE),
    "give another name": (
        "update storage.objects set name = %s where name = %s returning name",
        lambda w: (_in_first(w, "x.txt"), _in_first(w, file_id("fresh"))),
        (),
    ),
    "take the name of a file": (
        "update storage.objects set name = %s where name = %s returning name",
        lambda w: (_in_first(w, file_id("gone")), _in_first(w, file_id("fresh"))),
        (),
    ),
    "delete what has a record": (_DELETE, lambda w: (_in_first(w, file_id("of-held")),), ()),
    "delete what has none": (
        _DELETE,
        lambda w: (_of_holder(w, "in-flight"),),
        (*PEOPLE, "holder"),
    ),
    "delete an upload in flight": (_DELETE, lambda w: (_in_first(w, file_id("fresh")),), PEOPLE),
    "delete what was left": (_DELETE, lambda w: (_in_first(w, file_id("old")),), PEOPLE),
    "delete another bucket's": (_DELETE, lambda w: ("theirs",), ()),
}

ATTEMPTS = len(CALLERS) * (len(TABLES) * 4 + len(FUNCTIONS) + len(OBJECTS) + 1)

# ---- trying it ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(postgres: PostgresServer) -> World:
    found = build(postgres.create_project())
    with psycopg.connect(found.url) as db:
        db.execute("insert into storage.buckets (id, name) values ('other', 'other')")
        db.execute("insert into storage.objects (bucket_id, name) values ('other', 'theirs')")
    return found


@pytest.fixture(scope="module")
def database(world: World) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(world.url) as db:
        yield db


class Attempts:
    """Tries things and undoes them."""

    def __init__(self, db: psycopg.Connection[Any], world: World) -> None:
        self.db = db
        self.world = world

    def state(self) -> str:
        """All that the first organization has, in one digest."""
        parts = " union all ".join(
            f"select md5(t::text) as line from {table} t" for table in self._own_tables()
        )
        query = f"select md5(string_agg(line, '' order by line)) from ({parts}) as lines"
        row = self.db.execute(query.encode()).fetchone()
        assert row is not None
        return row[0]

    def _own_tables(self) -> Iterator[str]:
        own = f"organization_id = '{self.world.organization}'"
        for table in TABLES:
            if table == "organizations":
                yield f"(select * from public.organizations where id = '{self.world.organization}')"
            elif table in ("run_values", "log_chunks"):
                runs = f"select id from public.runs where {own}"
                yield f"(select * from public.{table} where run_id in ({runs}))"
            else:
                yield f"(select * from public.{table} where {own})"
        yield f"(select * from storage.objects where name like '{self.world.organization}/%')"

    def statement(self, caller: str, text: str, values: tuple[object, ...] = ()) -> Any:
        """Its rows, or `denied`, or what our functions refuse with; and then undone."""
        before = self.state()
        try:
            with self.db.transaction():
                become(self.db, self.world.keys[caller])
                rows = self.db.execute(text.encode(), values).fetchall()
                if caller == "stranger":
                    self.db.execute("reset role")
                    assert self.state() == before
                    assert self.world.organization not in json.dumps(rows, default=str)
                raise psycopg.Rollback
        except psycopg.errors.InsufficientPrivilege:
            rows = DENIED
        except psycopg.errors.UniqueViolation:
            rows = DENIED
        except psycopg.Error as error:
            assert error.sqlstate is not None and error.sqlstate.startswith("PT4"), error
            assert self.world.organization not in str(error)
            rows = str(error.diag.message_detail)
        assert self.state() == before
        return rows

    def call(self, caller: str, name: str, parameters: dict[str, Any]) -> str:
        given = ", ".join(f"p_{parameter} => %s" for parameter in parameters)
        values = tuple(
            Jsonb(value) if isinstance(value, dict | list) else value
            for value in parameters.values()
        )
        answer = self.statement(caller, f"select public.{name}({given})", values)
        return OK if isinstance(answer, list) else answer


@pytest.fixture
def attempts(database: psycopg.Connection[Any], world: World) -> Iterator[Attempts]:
    with database.transaction(force_rollback=True):
        yield Attempts(database, world)


@pytest.mark.parametrize("table", TABLES)
def test_tables_are_read_by_whom_they_concern(attempts: Attempts, table: str) -> None:
    expected = TABLES[table]
    for caller in CALLERS:
        column = "1" if expected is None else expected[0]
        found = attempts.statement(caller, f"select {column} from public.{table}")
        if expected is None:
            assert found == DENIED, caller
            continue
        if caller in DEAD:
            assert found == "unauthenticated", caller
            continue
        _, people, holder, idler = expected
        wanted = {"holder": holder, "idler": idler} | dict.fromkeys(PEOPLE, people)
        names = {name for (name,) in found}
        foreign = {"Second"} if table == "organizations" and caller == "stranger" else set[str]()
        assert names == wanted.get(caller, foreign), caller


@pytest.mark.parametrize("table", TABLES)
def test_tables_are_written_by_nobody(attempts: Attempts, table: str) -> None:
    column = {"organizations": "name", "run_values": "run_id", "log_chunks": "run_id"}
    name = column.get(table, "organization_id")
    for caller in CALLERS:
        for statement in (
            f"insert into public.{table} default values returning 1",
            f"update public.{table} set {name} = {name} returning 1",
            f"delete from public.{table} returning 1",
        ):
            assert attempts.statement(caller, statement) == DENIED, (caller, statement)


@pytest.mark.parametrize(
    ("name", "parameters", "expected"),
    FUNCTIONS,
    ids=[f"{index}-{name}" for index, (name, _, _) in enumerate(FUNCTIONS)],
)
def test_functions_serve_whom_they_are_for(
    attempts: Attempts, name: str, parameters: Parameters, expected: tuple[str, ...]
) -> None:
    given = parameters(attempts.world)
    found = {caller: attempts.call(caller, name, given) for caller in CALLERS}
    wanted = dict(zip(CALLERS, expected, strict=False)) | dict.fromkeys(DEAD, "unauthenticated")
    assert found == wanted


def test_objects_are_read_by_whom_they_concern(attempts: Attempts) -> None:
    checkpoints = {file_id(name, "checkpoint"): name for name in ("cp", "shared")}
    names = {file_id(name): name for name in _READABLE["people"]} | checkpoints
    for caller in CALLERS:
        kind = "people" if caller in PEOPLE else caller
        rows = attempts.statement(caller, "select name from storage.objects")
        found = {names[name.rpartition("/")[2]] for (name,) in rows}
        assert found == _READABLE.get(kind, set()), caller


@pytest.mark.parametrize("action", OBJECTS)
def test_objects_are_written_by_whom_they_concern(attempts: Attempts, action: str) -> None:
    statement, parameters, allowed = OBJECTS[action]
    for caller in CALLERS:
        found = attempts.statement(caller, statement, parameters(attempts.world))
        assert (found not in (DENIED, [])) == (caller in allowed), (caller, found)


# ---- that the tables above hold everything, and would notice ------------------------------------


def test_the_matrix_covers_all_there_is(attempts: Attempts) -> None:
    def names(query: str) -> set[str]:
        return {name for (name,) in attempts.db.execute(query.encode()).fetchall()}

    public = "where pronamespace = 'public'::regnamespace"
    assert names(f"select proname from pg_proc {public}") == {name for name, _, _ in FUNCTIONS}
    assert names("select tablename from pg_tables where schemaname = 'public'") == set(TABLES)
    assert names("select viewname from pg_views where schemaname = 'public'") == set()
    assert ATTEMPTS >= 300


def test_what_is_not_exposed_is_not_open_either(attempts: Attempts) -> None:
    """Should a project expose the schema `openweights` by mistake, nothing is lost."""
    for role in ("anon", "authenticated"):
        query = """
            select proname from pg_proc where pronamespace = 'openweights'::regnamespace
                and has_function_privilege(%s, oid, 'execute')
        """
        found = {name for (name,) in attempts.db.execute(query, (role,)).fetchall()}
        assert found == {
            "organization",
            "organization_or_null",
            "is_person",
            "worker",
            "worker_jobs",
            "worker_files",
            "has_record",
            "is_own_place",
            "key_id",
        }
    for table in ("steps", "installed", "sources"):
        statement = f"select 1 from openweights.{table}"
        assert attempts.statement("admin", statement) == DENIED


def test_a_worker_reads_what_its_job_builds_on(attempts: Attempts, world: World) -> None:
    """The jobs that it waits for or names as a model, and what they have made; not their data."""
    made, own = "result:file-00000000000a", file_id("of-idlers")
    ids = ["s-no-job", "sftjob-00000000000a", "ftjob-00000000000b-x"]
    attempts.db.execute(
        "insert into public.jobs (organization_id, id, type, script, params, status, "
        "submitted_by_key) select organization_id, new_id, type, '', '{}', 'completed', "
        "submitted_by_key from public.jobs, unnest(%s::text[]) new_id "
        "where id = 'before' and organization_id = %s",
        (ids, world.organization),
    )
    attempts.db.execute(
        "insert into public.files (organization_id, id, purpose, filename, bytes, sha256, "
        "created_by_key) select organization_id, %s, 'result', 'made', bytes, sha256, "
        "created_by_key from public.files where id = %s",
        (made, own),
    )
    attempts.db.execute(
        "insert into public.job_files values (%s, 'before', %s)", (world.organization, made)
    )

    def seen() -> tuple[set[str], set[str]]:
        jobs = attempts.statement("idler", "select id from public.jobs")
        files = attempts.statement("idler", "select filename from public.files")
        return {id for (id,) in jobs}, {name for (name,) in files}

    assert seen() == ({"idlers"}, _OF_IDLER), "the control"
    attempts.db.execute(
        "update public.jobs set after = '{before}', params = jsonb_build_object('a', "
        "'sftjob-00000000000a/checkpoint-3', 'b', '[\"x ftjob-00000000000b-x\"]') "
        "where id = 'idlers'"
    )
    assert seen() == ({"idlers", "before", "sftjob-00000000000a"}, _OF_IDLER | {"made"})
    assert attempts.call("idler", "find_file", {"id": made}) == OK
    attempts.db.execute("update public.runs set status = 'failed' where job_id = 'idlers'")
    assert "before" not in seen()[0], "only while it holds the job"


# What makes the database unsafe, and an attempt that then goes through.
_HOLES = {
    "alter policy people_or_its_worker on public.jobs using (true)": (
        "idler",
        "select id from public.jobs where id = 'held'",
    ),
    "alter table public.files disable row level security": (
        "idler",
        "select id from public.files where filename = 'of-held'",
    ),
    "grant select on public.secrets to anon; "
    "create policy p on public.secrets to anon using (true)": (
        "nobody",
        "select sealed from public.secrets",
    ),
    "grant execute on function openweights.new_key to anon": (
        "nobody",
        "select openweights.new_key()",
    ),
}


@pytest.mark.parametrize("hole", _HOLES)
def test_a_hole_would_be_noticed(attempts: Attempts, hole: str) -> None:
    caller, statement = _HOLES[hole]
    assert attempts.statement(caller, statement) in ([], DENIED)
    attempts.db.execute(hole.encode())
    assert attempts.statement(caller, statement) not in ([], DENIED)
