"""Setting a project up, doing it again, finding what was altered by hand, and what grants allow."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import psycopg
import pytest

from openweights.backends.supabase.sql import apply
from openweights.errors import ConfigurationError, InvalidInputError, StoreUnavailableError
from tests.supabase_double.postgres import PostgresServer

_SCHEMA = Path(apply.__file__).parent / "schema"
_STEPS = sorted(f"schema/{step.name}" for step in _SCHEMA.glob("*.sql"))


def _execute(url: str, *statements: str) -> None:
    with psycopg.connect(url) as db:
        for statement in statements:
            db.execute(statement.encode())


def _rows(url: str, query: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(url) as db:
        return db.execute(query.encode()).fetchall()


# Everything that the database knows about itself and about us, with what tells when it was written.
_EVERYTHING = """
    select 'class', relname::text, relacl::text, reltuples >= -1 from pg_class
        where relnamespace in ('public'::regnamespace, 'openweights'::regnamespace)
    union all select 'function', proname, md5(pg_get_functiondef(oid)) || proacl::text, true
        from pg_proc where pronamespace in ('public'::regnamespace, 'openweights'::regnamespace)
    union all select 'policy', polrelid::regclass || polname::text, pg_get_expr(polqual, polrelid),
        true from pg_policy
    union all select 'installed', kind || name, definition || xmin, true from openweights.installed
    union all select 'step', name, applied_at::text || xmin, true from openweights.steps
    union all select 'source', name, sha256 || xmin, true from openweights.sources
    union all select 'bucket', id, xmin::text, public from storage.buckets
    order by 1, 2, 3
"""


def test_setting_up_twice_changes_nothing(postgres: PostgresServer) -> None:
    url = postgres.create()
    first = apply.init(url)
    assert (first.steps, first.repaired, first.differences) == (_STEPS, [], [])
    before = _rows(url, _EVERYTHING)
    second = apply.init(url)
    assert (second.steps, second.repaired, second.differences) == ([], [], [])
    assert _rows(url, _EVERYTHING) == before
    assert apply.check(url) == []


def test_two_at_once_set_up_once(postgres: PostgresServer) -> None:
    url = postgres.create()
    outcomes: list[apply.Outcome] = []
    threads = [threading.Thread(target=lambda: outcomes.append(apply.init(url))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(len(outcome.steps) for outcome in outcomes) == [0, 0, len(_STEPS)]
    assert apply.check(url) == []


# What a person may do by hand -> what `check` says of it, and whether `init` puts it right.
_ALTERATIONS = {
    "alter function public.whoami security invoker": ("function public.whoami() was changed", True),
    "drop function public.heartbeat": ("function public.heartbeat(text,bigint) is missing", True),
    "grant execute on function openweights.new_key to anon": (
        "grant to anon on function openweights.new_key() is not ours: EXECUTE",
        True,
    ),
    "grant insert, update on public.jobs to authenticated": (
        "grant to authenticated on table public.jobs was changed",
        True,
    ),
    "grant select (key_hash) on public.api_keys to anon": (
        "grant to anon on column public.api_keys.key_hash is not ours: SELECT",
        True,
    ),
    "revoke select on public.files from anon": (
        "grant to anon on table public.files is missing",
        True,
    ),
    "alter table public.events disable row level security": (
        "table public.events was changed",
        True,
    ),
    "alter policy people_or_its_worker on public.jobs using (true)": (
        "policy public.jobs.people_or_its_worker was changed",
        True,
    ),
    "drop policy openweights_read on storage.objects": (
        "policy storage.objects.openweights_read is missing",
        True,
    ),
    "update storage.buckets set public = true": ("bucket files was changed", True),
    "create policy mine on public.runs for select to anon using (true)": (
        "policy public.runs.mine is not ours: r t anon true",
        False,
    ),
    "create policy everything on storage.objects to anon using (true)": (
        "policy storage.objects.everything is not ours: * t anon true",
        False,
    ),
    "drop index public.jobs_pending": ("index public.jobs_pending is missing", False),
    "alter table public.workers drop column provider": (
        "column public.workers.provider is missing",
        False,
    ),
    "alter table public.jobs alter column priority drop not null": (
        "column public.jobs.priority was changed",
        False,
    ),
    "alter domain openweights.job_status drop constraint job_status_check": (
        "domain openweights.job_status was changed",
        False,
    ),
    "drop trigger jobs_transition on public.jobs": (
        "trigger public.jobs.jobs_transition is missing",
        False,
    ),
    "alter table public.runs drop constraint runs_organization_id_job_id_fkey": (
        "constraint public.runs.runs_organization_id_job_id_fkey is missing",
        False,
    ),
}


@pytest.mark.parametrize("statement", _ALTERATIONS)
def test_what_was_altered_by_hand_is_named(project: str, statement: str) -> None:
    line, is_repaired = _ALTERATIONS[statement]
    _execute(project, statement)
    assert line in apply.check(project)
    outcome = apply.init(project)
    if is_repaired:
        assert line in outcome.repaired and outcome.differences == []
        assert apply.check(project) == []
    else:
        # It is not taken for ours from then on, however often it is set up again.
        assert apply.init(project).differences == outcome.differences == apply.check(project)
        assert line in outcome.differences


def test_what_others_have_in_the_database_is_their_own(project: str) -> None:
    _execute(
        project,
        "create table public.theirs (x int)",
        "create function public.their_function() returns int language sql as 'select 1'",
        "create policy theirs on storage.objects to anon using (bucket_id = 'theirs')",
    )
    assert apply.check(project) == []


def test_another_version_is_told(project: str) -> None:
    _execute(project, "update openweights.sources set sha256 = 'old' where name like '%grants%'")
    assert apply.check(project) == [
        "code/090_grants.sql is not that of this version of openweights: run `ow db init`"
    ]
    apply.init(project)
    assert apply.check(project) == []
    _execute(project, "insert into openweights.steps values ('schema/999_later.sql')")
    with pytest.raises(ConfigurationError, match="newer openweights.*999_later.*upgrade"):
        apply.init(project)


def test_a_set_up_that_fails_leaves_nothing_behind(postgres: PostgresServer) -> None:
    url = postgres.create()
    _execute(url, "create table public.events (x int)")
    with pytest.raises(ConfigurationError, match="events.*already exists"):
        apply.init(url)
    assert _rows(url, "select to_regnamespace('openweights')") == [(None,)]
    assert apply.check(url) == ["the database is not set up: run `ow db init`"]
    with pytest.raises(ConfigurationError, match="not set up"):
        apply.create_organization(url, "Lab", "a@example.org")


def test_what_is_no_project_is_refused(postgres: PostgresServer) -> None:
    with pytest.raises(ConfigurationError, match="no Supabase project"):
        apply.init(postgres.url("postgres"))
    with pytest.raises(StoreUnavailableError) as caught:
        apply.check(postgres.url("nowhere") + "&password=hunter2")
    assert "hunter2" not in str(caught.value)
    _execute(postgres.url("postgres"), "create role somebody login")
    with pytest.raises(ConfigurationError, match="role that owns"):
        apply.init(postgres.create().replace("user=postgres", "user=somebody"))


def test_an_organization_needs_a_name_and_an_admin(project: str) -> None:
    wrong = (("", "a@example.org", "organization: "), ("Lab", "nobody", "email: 'nobody'"))
    for name, email, words in wrong:
        with pytest.raises(InvalidInputError, match=words):
            apply.create_organization(project, name, email)


def test_nothing_of_ours_is_open_to_the_public(project: str) -> None:
    open_to_all = """
        select p.oid::regprocedure::text from pg_proc p,
            aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a
        where pronamespace in ('public'::regnamespace, 'openweights'::regnamespace)
            and a.grantee = 0
    """
    assert _rows(project, open_to_all) == []


def test_every_function_that_runs_as_its_owner_says_where_names_are_looked_up(
    project: str,
) -> None:
    definers = """
        select oid::regprocedure::text, proconfig from pg_proc
        where pronamespace in ('public'::regnamespace, 'openweights'::regnamespace) and prosecdef
    """
    found = _rows(project, definers)
    assert len(found) > 40
    path = "search_path=openweights, public, pg_temp"
    assert [name for name, settings in found if path not in (settings or [])] == []
    # What clients may call in `public` runs as its owner, and begins by asking who calls.
    unguarded = """
        select proname from pg_proc where pronamespace = 'public'::regnamespace
            and not (prosecdef and prosrc ~ 'me api_keys := openweights\\.caller\\(')
    """
    assert _rows(project, unguarded) == []


def test_the_schema_itself_forbids_what_the_life_cycle_forbids(project: str) -> None:
    legal = {
        ("pending", "in_progress"),
        ("pending", "canceled"),
        ("in_progress", "pending"),
        ("in_progress", "completed"),
        ("in_progress", "failed"),
        ("in_progress", "canceled"),
        ("failed", "pending"),
        ("canceled", "pending"),
    }
    statuses = ("pending", "in_progress", "completed", "failed", "canceled")
    created = apply.create_organization(project, "Lab", "a@example.org")
    columns = "organization_id, id, type, script, params, status, submitted_by_key"
    key = "(select id from public.api_keys)"
    row = f"(%s, %s, 'custom', '', '{{}}', %s, {key})"
    with psycopg.connect(project, autocommit=True) as db:
        for old in statuses:
            for new in statuses:
                values = (created.organization_id, f"{old}-{new}", old)
                db.execute(f"insert into public.jobs ({columns}) values {row}".encode(), values)
                change = ("update public.jobs set status = %s where id = %s", (new, values[1]))
                if new == old or (old, new) in legal:
                    db.execute(*change)
                else:
                    with pytest.raises(psycopg.errors.CheckViolation, match="life cycle"):
                        db.execute(*change)


def test_a_function_of_another_type_is_named(project: str) -> None:
    """`create or replace` cannot change what a function returns."""
    with psycopg.connect(project) as db:
        db.execute("DROP FUNCTION openweights.hash(text)")
        db.execute(
            "CREATE FUNCTION openweights.hash(p_key text) RETURNS int LANGUAGE sql AS 'SELECT 1'"
        )
    with pytest.raises(ConfigurationError, match=r"DROP FUNCTION openweights.hash\(text\) first"):
        apply.init(project)
