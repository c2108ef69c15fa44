"""`ow db init`, `ow db check` and `ow signup` against a real database."""

from __future__ import annotations

import json

import psycopg

from tests.backends.supabase.sql_calls import Caller
from tests.cli.conftest import Ow
from tests.supabase_double.postgres import PostgresServer


def test_a_project_is_set_up_checked_and_put_right(ow: Ow, postgres: PostgresServer) -> None:
    url = postgres.create()
    answer = ow("db", "check", "--url", url)
    assert answer.exit_code == 1
    assert answer.stdout == "differs: the database is not set up: run `ow db init`\n"
    answer = ow("db", "init", "--url", url)
    assert answer.exit_code == 0, answer.output
    assert answer.stdout.startswith("applied schema/001_tables.sql\n")
    assert answer.stdout.endswith("\nthe database is set up\n")
    assert ow("db", "init", "--url", url).stdout == "the database is set up\n"
    with psycopg.connect(url) as db:
        db.execute("grant select on public.secrets to anon")
        db.execute("create policy mine on public.jobs to anon using (true)")
    answer = ow("db", "check", "--url", url, "--json")
    assert answer.exit_code == 1
    lines = [
        "grant to anon on table public.secrets is not ours: SELECT",
        "policy public.jobs.mine is not ours: * t anon true",
    ]
    assert json.loads(answer.stdout) == {"ok": False, "differences": lines}
    answer = ow("db", "init", "--url", url)
    assert answer.exit_code == 1
    assert answer.stdout == f"repaired: {lines[0]}\ndiffers: {lines[1]}\n"


def test_sign_up_shows_a_key_that_works(ow: Ow, project: str) -> None:
    answer = ow("signup", "me@example.org", "--url", project, "--organization", "Our lab")
    assert answer.exit_code == 0, answer.output
    assert "shown only now" in answer.stderr
    shown = dict(line.rsplit(maxsplit=1) for line in answer.stdout.splitlines())
    caller = Caller(project, shown["admin key"])
    me = caller.rpc("whoami")
    caller.close()
    assert me["organization_id"] == shown["organization"]
    assert (me["organization"], me["role"], me["email"]) == ("Our lab", "admin", "me@example.org")
    found = json.loads(ow("signup", "me@example.org", "--url", project, "--json").stdout)
    assert set(found) == {"organization_id", "key"} and found["key"] != shown["admin key"]


def test_what_goes_wrong_is_one_line_without_the_password(ow: Ow, postgres: PostgresServer) -> None:
    url = postgres.url("nowhere") + "&password=hunter2"
    for arguments in (("db", "init"), ("db", "check"), ("signup", "me@example.org")):
        answer = ow(*arguments, "--url", url)
        assert answer.exit_code == 1
        assert answer.stderr.startswith("ow: the database does not answer: ")
        assert "hunter2" not in answer.output and "Traceback" not in answer.output
    assert ow("signup", "nobody", "--url", url).stderr.startswith("ow: email: ")
    answer = ow("db", "init", "--url", "postgres:hunter2@host")
    assert "no connection string" in answer.stderr and "hunter2" not in answer.output
