"""`ow whoami`, `ow token`, `ow org` and `ow env` on a project, with every role."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from openweights.cluster.launch import worker_env
from openweights.settings import ClusterSettings, Settings
from tests.cli.conftest import Ow
from tests.cli.test_nonsense import check_refusal
from tests.supabase_double.team import Team

SECRET = "hf_very_secret_0123456789"
LINES = {
    "whoami": ["whoami"],
    "token create": ["token", "create", "--name", "n", "--role", "member"],
    "token ls": ["token", "ls"],
    "token revoke": ["token", "revoke", "0000"],
    "token budget": ["token", "budget", "0000", "1"],
    "org show": ["org", "show"],
    "org rename": ["org", "rename", "Other"],
    "org keep": ["org", "keep", "--days", "30"],
    "org members ls": ["org", "members", "ls"],
    "org members add": ["org", "members", "add", "a@b.example"],
    "org members rm": ["org", "members", "rm", "a@b.example"],
    "env init": ["env", "init"],
    "env set": ["env", "set", "NAME=value"],
    "env ls": ["env", "ls"],
    "env rm": ["env", "rm", "NAME"],
}
ADMINS_ONLY = {
    *("token create", "token ls", "token revoke", "token budget"),
    *("org rename", "org keep", "org members add"),
}
ADMINS_ONLY |= {"env init"}


@pytest.fixture
def use(team: Team, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`use(key)`: the key of the next commands; the first is the admin's."""
    team.set_environment(monkeypatch.setenv)

    def use(key: str) -> None:
        monkeypatch.setenv("OPENWEIGHTS_API_KEY", key)

    return use


def done(ow: Ow, *arguments: str, stdin: str = "") -> str:
    """What a command that must work prints."""
    answer = ow(*arguments, stdin=stdin)
    assert answer.exit_code == 0, answer.output
    return answer.stdout


def refused(ow: Ow, *arguments: str, stdin: str = "") -> str:
    """What a command that must fail says."""
    answer = ow(*arguments, stdin=stdin)
    check_refusal(answer.exit_code, answer.stderr)
    return answer.stderr


# ---- who may do what -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", LINES)
def test_a_store_on_this_machine_has_no_team(ow: Ow, home: Path, name: str) -> None:
    said = refused(ow, *LINES[name])
    assert "Supabase project" in said and "`ow login`" in said
    assert not home.exists()


def test_each_role_may_do_what_it_may(
    ow: Ow, team: Team, use: Callable[[str], None], home: Path
) -> None:
    for role in ("member", "worker"):
        use(team.key(role))
        for name, line in LINES.items():
            answer = ow(*line)
            is_denied = "may not do this; it takes the role" in answer.stderr
            expected = name in ADMINS_ONLY or (role == "worker" and name != "whoami")
            if name != "org members rm":  # it ends before: there is no such member
                assert (answer.exit_code == 1 and is_denied) == expected, (
                    role,
                    name,
                    answer.output,
                )
    assert not (home / "errors").exists()


def test_a_revoked_key_is_refused_on_its_next_request(
    ow: Ow, team: Team, use: Callable[[str], None]
) -> None:
    key = done(ow, "token", "create", "--name", "laptop", "--role", "member").strip()
    use(key)
    assert "member" in done(ow, "whoami")
    use(team.admin_key)
    assert "laptop" in done(ow, "token", "revoke", key)
    use(key)
    for line in (["whoami"], ["ls"], ["org", "show"], ["env", "ls"]):
        said = refused(ow, *line)
        assert "has been revoked" in said and key not in said


# ---- keys ----------------------------------------------------------------------------------------


def test_keys_are_made_listed_and_revoked(ow: Ow, use: Callable[[str], None]) -> None:
    line = ["token", "create", "--name", "ci", "--role", "worker", "--budget-usd", "2.5"]
    answer = ow(*line, "--expires-in-days", "3")
    key = answer.stdout.strip()
    assert len(key) == 51 and key.startswith("ow_") and key not in answer.stderr
    listed = done(ow, "token", "ls")
    assert f"{key[:11]}…" in listed and key not in listed
    assert "good until 20" in listed and "2.50" in listed and "never" in listed
    rows = {row["name"]: row for row in json.loads(done(ow, "token", "ls", "--json"))}
    assert rows["ci"]["role"] == "worker" and rows["ci"]["budget_usd"] == 2.5
    assert done(ow, "token", "revoke", rows["ci"]["id"][:8]) == f"revoked {rows['ci']['id']} (ci)\n"
    assert done(ow, "token", "budget", rows["ci"]["id"], "7").endswith("(ci): 7.00\n")
    assert "7.00" in done(ow, "token", "ls")
    assert done(ow, "token", "budget", rows["ci"]["id"], "none").endswith("(ci): none\n")
    done(ow, "token", "revoke", rows["ci"]["id"])  # again changes nothing
    assert "revoked" in done(ow, "token", "ls")
    made = json.loads(done(ow, "token", "create", "--name", "x", "--role", "admin", "--json"))
    assert set(made) == {"id", "key"}


@pytest.mark.parametrize(
    "line",
    [
        ["token"],
        ["token", "create"],
        ["token", "budget", "0000", "much"],
        ["token", "budget", "0000", "nan"],
        ["token", "create", "--name", " ", "--role", "member"],
        ["token", "create", "--name", "n", "--role", "root"],
        ["token", "create", "--name", "n", "--role", "member", "--expires-in-days", "0"],
        ["token", "create", "--name", "n", "--role", "member", "--expires-in-days", "nan"],
        ["token", "create", "--name", "n", "--role", "member", "--expires-in-days", "1e9"],
        ["token", "create", "--name", "n", "--role", "member", "--budget-usd", "-1"],
        ["token", "create", "--name", "n", "--role", "member", "--budget-usd", "nan"],
        ["token", "create", "--name", "n", "--role", "member", "--budget-usd", "inf"],
        ["token", "create", "--name", "n", "--role", "member", "--member", "x@y.example"],
        ["token", "revoke"],
        ["token", "revoke", ""],
        ["token", "revoke", "no-such-key"],
        ["token", "revoke", "'; drop table api_keys; --"],
        ["org", "rename", "  "],
        ["org", "members", "add", "nobody"],
        ["org", "members", "add", "a@b.example", "--role", "owner"],
        ["org", "members", "rm", "nobody@lab.example"],
        ["org", "members", "rm", "admin@lab.example"],
        ["env", "set"],
        ["env", "set", ""],
        ["env", "set", "=value"],
        ["env", "set", "A-B=value"],
        ["env", "set", "1A=value"],
        ["env", "set", "É=value"],
        ["env", "set", "PATH=/bin"],
        ["env", "set", "OPENWEIGHTS_API_KEY=x"],
        ["env", "set", "NAME="],
        ["env", "set", "NAME=a\x00b"],
        ["env", "set", "NAME=\udcff"],
        ["env", "set", "NAME"],
        ["env", "set", "NAME=" + "x" * 70_000],
        ["env", "rm", "NO_SUCH"],
        ["env", "rm", "a b"],
        ["env", "import", "no-such-file"],
        ["env", "init", "now"],
    ],
    ids=lambda line: " ".join(line)[:50],
)
def test_nonsense(ow: Ow, use: Callable[[str], None], home: Path, line: list[str]) -> None:
    if line[0] == "env" and len(line) > 2 and line[1] != "init":
        done(ow, "env", "init")
    answer = ow(*line)
    assert answer.exit_code in (1, 2) and "Traceback" not in answer.output
    assert answer.stdout == "" and not (home / "errors").exists(), answer.output
    assert len(answer.stderr) < 700


# ---- the organization ----------------------------------------------------------------------------


def test_what_is_kept_is_the_organizations_to_say(
    ow: Ow, team: Team, use: Callable[[str], None]
) -> None:
    assert "64 MB" in done(ow, "org", "keep") and "`ow gc`" in done(ow, "org", "keep")
    assert "30 days" in done(ow, "org", "keep", "--days", "30")
    said = done(ow, "org", "keep", "--log-mb", "8")
    assert "8 MB" in said and "30 days" in said
    with contextlib.closing(team.backend()) as backend:
        assert (backend.log_limit_bytes, backend.retention()) == (8 << 20, (8, 30.0))
    assert "`ow gc`" in done(ow, "org", "keep", "--for-ever")
    for wrong in (["--days", "0.5"], ["--days", "nan"], ["--log-mb", "0"], ["--log-mb", "5000"]):
        refused(ow, "org", "keep", *wrong)


def test_members_come_get_keys_and_go(ow: Ow, team: Team, use: Callable[[str], None]) -> None:
    done(ow, "org", "rename", "  The Lab ")
    assert "organization     The Lab" in done(ow, "org", "show")
    assert "anna@lab.example is a member" in done(ow, "org", "members", "add", "anna@lab.example")
    line = ["token", "create", "--name", "hers", "--role", "member", "--member", "ANNA@lab.example"]
    key = done(ow, *line).strip()
    use(key)
    assert "anna@lab.example" in done(ow, "whoami")
    use(team.admin_key)
    assert "no admin" in refused(ow, *line[:5], "admin", *line[6:])
    people = {
        row["email"]: row["role"] for row in json.loads(done(ow, "org", "members", "ls", "--json"))
    }
    assert people == {"admin@lab.example": "admin", "anna@lab.example": "member"}
    assert "anna@lab.example" in done(ow, "org", "members", "rm", "anna@lab.example")
    use(key)
    assert "ow whoami" not in refused(ow, "whoami")


# ---- secrets -------------------------------------------------------------------------------------


def test_secrets_are_set_listed_and_removed_but_never_shown(
    ow: Ow, team: Team, use: Callable[[str], None], tmp_path: Path
) -> None:
    assert "`ow env init`" in refused(ow, "env", "set", f"EARLY={SECRET}")
    line = done(ow, "env", "init").strip()
    assert line.startswith("OPENWEIGHTS_SECRETS_KEY=owsk_")
    assert "--replace" in refused(ow, "env", "init")
    use(team.key("member"))
    file = tmp_path / "secrets.env"
    file.write_text(f"# ours\nexport WANDB_API_KEY='{SECRET}'\n\nSHORT=yes\n")
    shown = ow("env", "set", f"HF_TOKEN={SECRET}").output
    shown += ow("env", "set", "PIPED", stdin=f"{SECRET}\n").output
    imported = ow("env", "import", str(file))
    assert "SHORT is shorter than 8 characters: logs will show it" in imported.stderr
    shown += imported.output + ow("env", "ls").output + ow("env", "ls", "--json").output
    assert SECRET not in shown
    names = [row["name"] for row in json.loads(done(ow, "env", "ls", "--json"))]
    assert names == ["HF_TOKEN", "PIPED", "SHORT", "WANDB_API_KEY"]
    assert found_in_database(team, SECRET) == []
    use(team.admin_key)
    assert "there are secrets" in refused(ow, "env", "init", "--replace")
    done(ow, "env", "rm", *names)
    assert done(ow, "env", "init", "--replace").strip() != line


def test_exec_names_secrets(
    ow: Ow, use: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done(ow, "env", "init")
    done(ow, "env", "set", f"HF_TOKEN={SECRET}")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    Path("script.sh").write_text("true")
    job = json.loads(done(ow, "exec", "--json", "--secret", "HF_TOKEN", "sh script.sh"))
    assert job["params"]["secrets"] == ["HF_TOKEN"] and SECRET not in json.dumps(job)
    for name in ("NO_SUCH", "A-B", ""):
        assert "secrets: " in refused(ow, "exec", "--secret", name, "sh script.sh")


def test_an_import_is_all_or_nothing(ow: Ow, use: Callable[[str], None], tmp_path: Path) -> None:
    done(ow, "env", "init")
    file = tmp_path / "bad.env"
    for content in (f"GOOD={SECRET}\n{SECRET}\n", f"GOOD={SECRET}\nPATH={SECRET}", "", "\n#\n"):
        file.write_text(content)
        assert SECRET not in refused(ow, "env", "import", str(file))
    file.write_bytes(b"GOOD=\xff\xfe\n")
    assert "not UTF-8" in refused(ow, "env", "import", str(file))
    assert json.loads(done(ow, "env", "ls", "--json")) == []


def test_the_search_of_the_database_finds_what_is_there(team: Team) -> None:
    """The control of the test above and of the one with a worker."""
    team.execute("update organizations set name = %s where id = %s", SECRET, team.organization_id)
    assert found_in_database(team, SECRET) == ["public.organizations"]
    team.execute(
        "update organizations set secrets_public_key = encode(%s, 'base64'), name = 'x' "
        "where id = %s",
        SECRET.encode(),
        team.organization_id,
    )
    assert found_in_database(team, SECRET) == ["public.organizations"]


def found_in_database(team: Team, text: str) -> list[str]:
    """Tables that hold `text`, as it is, in base64 or in the hexadecimal of a bytea."""
    import base64

    # In base64 the text may start at any of three places: the middle of each is common to all.
    plain = text.encode()
    encoded = [
        base64.b64encode(plain[i : i + 3 * ((len(plain) - i) // 3)]).decode() for i in (0, 1, 2)
    ]
    wanted = [text, plain.hex(), *encoded]
    tables = team.execute(
        "select schemaname || '.' || tablename from pg_tables "
        "where schemaname not in ('pg_catalog', 'information_schema') order by 1"
    )
    found: list[str] = []
    for (table,) in tables:
        rows = f"{table} t, unnest(%s::text[]) wanted"
        query = f"select exists (select from {rows} where strpos(t::text, wanted) > 0)"
        if team.execute(query, wanted)[0][0]:
            found.append(table)
    return found


# ---- doctor --------------------------------------------------------------------------------------


def checks_of(ow: Ow) -> dict[str, dict[str, str]]:
    report = json.loads(ow("doctor", "--json").stdout)
    return {check["name"]: check for check in report["checks"]}


def test_doctor_looks_at_the_project(
    ow: Ow, team: Team, use: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = checks_of(ow)
    for name in ("store", "key", "schema", "storage", "clock"):
        assert found[name]["status"] == "ok", found[name]
    assert found["secrets"]["status"] == "missing" and "ow env init" in found["secrets"]["remedy"]
    assert "admin's of Lab" in found["key"]["detail"]
    assert team.execute("select from storage.objects where name like %s", "%/doctor:%") == []

    key = done(ow, "env", "init").strip().partition("=")[2]
    monkeypatch.setenv("OPENWEIGHTS_SECRETS_KEY", key)
    assert checks_of(ow)["secrets"]["detail"] == "0 set"
    done(ow, "env", "init", "--replace")
    assert checks_of(ow)["secrets"]["status"] == "broken"
    monkeypatch.setenv("OPENWEIGHTS_SECRETS_KEY", "owsk_x")
    assert "holds no private key" in checks_of(ow)["secrets"]["detail"]
    monkeypatch.setenv("OPENWEIGHTS_SECRETS_KEY", key)

    use(
        done(
            ow, "token", "create", "--name", "w", "--role", "worker", "--expires-in-days", "1"
        ).strip()
    )
    found = checks_of(ow)
    assert found["key"]["status"] == "warning" and found["key"]["detail"].startswith("worker's")
    assert found["storage"]["status"] == found["secrets"]["status"] == "ok"

    use("ow_" + "0" * 48)
    found = checks_of(ow)
    assert (
        found["store"]["status"] == "broken" and "does not know the key" in found["store"]["detail"]
    )
    assert "jobs" not in found


def test_doctor_notices_a_project_that_was_changed(
    ow: Ow, postgres: object, double: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from contextlib import closing

    from tests.supabase_double.postgres import PostgresServer

    assert isinstance(postgres, PostgresServer)
    with closing(Team(postgres.create_project(), double)) as team:
        team.set_environment(monkeypatch.setenv)
        team.execute("update openweights.sources set sha256 = 'x' where name like 'code/060%%'")
        team.execute("drop policy openweights_write on storage.objects")
        team.execute(
            "create policy anybody on storage.objects for all to anon using (true) "
            "with check (true)"
        )
        found = checks_of(ow)
        assert found["schema"]["status"] == "warning" and "ow db init" in found["schema"]["remedy"]
        assert found["storage"]["status"] == "broken"
        assert "folders of other organizations" in found["storage"]["detail"]
        team.execute("drop policy anybody on storage.objects")
        assert checks_of(ow)["storage"]["status"] == "broken"


def test_settings_never_show_the_key_that_opens_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENWEIGHTS_SECRETS_KEY", "owsk_secret")
    settings = Settings.from_env()
    assert settings.secrets_key == "owsk_secret" and "owsk_" not in repr(settings)
    assert "OPENWEIGHTS_SECRETS_KEY" not in settings.child_env()
    # Only the workers of pods get it.
    assert worker_env(settings, ClusterSettings())["OPENWEIGHTS_SECRETS_KEY"] == "owsk_secret"
