"""A job gets the secrets that it names: from its organization, or from its worker's environment."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from openweights import OpenWeights
from openweights.client.jobs import Job
from openweights.errors import (
    ConfigError,
    ConfigurationError,
    InvalidStateError,
    JobFailedError,
)
from tests.cli.project.test_team_commands import found_in_database
from tests.supabase_double.team import ROOT, Team
from tests.waiting import HANGS_S, wait_until

WANTED, OTHER = "hf_wanted_0123456789", "wandb_other_0123456789"
# Also in two pieces, and not at all: what the job has seen is told by the lengths.
SHOW = (
    "python -c \"import os, sys; v = os.environ.get('HF_TOKEN', ''); w = sys.stdout.write; "
    "w('it is ' + v[:5]); sys.stdout.flush(); w(v[5:] + '\\n'); "
    "print('lengths', len(v), len(os.environ.get('OTHER', '')), "
    "'OPENWEIGHTS_SECRETS_KEY' in os.environ)\""
)


@pytest.fixture
def private_key(team: Team, home: Path) -> str:
    """What opens the organization's secrets."""
    with closing(OpenWeights(settings=team.settings(home))) as admin:
        return admin.secrets.create_key()


@pytest.fixture
def ow(team: Team, home: Path, private_key: str) -> Iterator[OpenWeights]:
    """A member's client, of an organization with two secrets."""
    with closing(OpenWeights(settings=team.settings(home, team.key("member")))) as ow:
        ow.secrets.set({"HF_TOKEN": WANTED, "OTHER": OTHER})
        yield ow


def work(team: Team, home: Path, **env: str) -> str:
    """`ow worker --once` with a worker's key, as in a pod; returns what it says."""
    settings = team.settings(home, team.key("worker"))
    answer = subprocess.run(
        [sys.executable, "-m", "openweights.cli", "worker", "--once"],
        env=settings.child_env() | {"PYTHONPATH": str(ROOT), **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=HANGS_S,
        check=False,
    )
    return answer.stdout + answer.stderr


def submit(ow: OpenWeights, folder: Path, command: str = SHOW, **options: object) -> Job:
    folder.mkdir(exist_ok=True)
    (folder / "empty.txt").touch()
    ow.exec.folder = folder
    return ow.exec.create(command=command, requires_vram_gb=0, **options)  # pyright: ignore


def test_a_job_gets_what_it_names_and_nothing_else(
    ow: OpenWeights, private_key: str, team: Team, tmp_path: Path
) -> None:
    job = submit(ow, tmp_path / "job", secrets=["HF_TOKEN"])
    assert job.params["secrets"] == ["HF_TOKEN"]
    said = work(team, tmp_path / "pod", OPENWEIGHTS_SECRETS_KEY=private_key)
    job.refresh()
    log = job.logs()
    assert job.status == "completed", said + log
    assert "it is [HF_TOKEN redacted]\n" in log
    assert f"lengths {len(WANTED)} 0 False\n" in log
    for value in (WANTED, OTHER, private_key):
        assert value not in said + log
        assert found_in_database(team, value) == []
        assert all(value.encode() not in p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())


def test_without_naming_any_it_gets_none(
    ow: OpenWeights, private_key: str, team: Team, tmp_path: Path
) -> None:
    with_secret = submit(ow, tmp_path / "job", secrets="HF_TOKEN")
    with_secret.cancel()
    job = submit(ow, tmp_path / "job")
    assert job.id == with_secret.id and "secrets" not in job.params
    work(team, tmp_path / "pod", OPENWEIGHTS_SECRETS_KEY=private_key)
    assert "lengths 0 0 False" in job.logs()
    # A job that waits does not change; one that failed starts anew with what is named now.
    waiting = submit(ow, tmp_path / "job", "false")
    with pytest.raises(InvalidStateError, match="pending already, without HF_TOKEN: cancel it"):
        submit(ow, tmp_path / "job", "false", secrets=["HF_TOKEN"])
    waiting.cancel()
    assert submit(ow, tmp_path / "job", "false", secrets=["HF_TOKEN"]).params["secrets"]


@pytest.mark.parametrize("what", ["no key", "no private key", "another key", "gone", "tampered"])
def test_a_job_that_cannot_have_its_secret_fails_and_says_why(
    ow: OpenWeights, private_key: str, team: Team, tmp_path: Path, what: str
) -> None:
    from openweights.backends.supabase.sealing import new_key_pair

    reasons = {
        "no key": "this worker has no OPENWEIGHTS_SECRETS_KEY to open HF_TOKEN with",
        "no private key": "OPENWEIGHTS_SECRETS_KEY holds no private key",
        "another key": "secret HF_TOKEN was sealed with another key than the one here",
        "gone": "the organization has no secret HF_TOKEN (any more)",
        "tampered": "the box of secret HF_TOKEN was changed, or is that of another secret",
    }
    keys = {"no key": "", "no private key": "owsk_nonsense", "another key": new_key_pair().private}
    job = submit(ow, tmp_path / "job", secrets=["HF_TOKEN"])
    if what == "gone":
        ow.secrets.delete("HF_TOKEN")
    if what == "tampered":
        # Whoever can write to the database hands the job what it did not ask for.
        team.execute(
            "update secrets s set sealed = o.sealed from secrets o where s.name = 'HF_TOKEN' "
            "and o.name = 'OTHER' and s.organization_id = o.organization_id"
        )
    key = keys.get(what, private_key)
    said = work(team, tmp_path / "pod", OPENWEIGHTS_SECRETS_KEY=key)
    job.refresh()
    assert job.status == "failed" and reasons[what] in str(job.runs[-1].error), said
    assert reasons[what] in job.logs() and "lengths" not in job.logs()
    assert not key or key not in said + job.logs()


def test_names_are_checked_before_a_job_is_submitted(ow: OpenWeights, tmp_path: Path) -> None:
    for names, reason in (
        (["HF_TOKN"], "the organization has no HF_TOKN; .* there are HF_TOKEN, OTHER"),
        (["A-B"], "secrets: 'A-B' cannot name a secret"),
        ([3], r"secrets\[0\]: must be a string, not 3"),
        ([""], "cannot name a secret"),
        (["PATH"], "PATH is set by the worker"),
        (["openweights_api_key"], "is set by the worker"),
    ):
        with pytest.raises(ConfigError, match=reason):
            submit(ow, tmp_path / "job", secrets=names)
    assert ow.jobs.list() == []


def test_the_store_on_this_machine_takes_them_from_the_worker(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", WANTED)
    monkeypatch.setenv("MY_NOTE", OTHER)
    show = "echo $MY_NOTE"
    with closing(OpenWeights()) as ow:
        job = submit(ow, tmp_path / "job", show, secrets=["MY_NOTE"]).wait(timeout=HANGS_S)
        assert job.logs() == "[MY_NOTE redacted]\n"
        # The control: by its name alone it is no secret.
        assert OTHER in submit(ow, tmp_path / "job", f" true; {show}").wait(timeout=HANGS_S).logs()
        missing = submit(ow, tmp_path / "job", "true", secrets=["NO_SUCH"])
        with pytest.raises(JobFailedError, match="nor its worker has NO_SUCH"):
            missing.wait(timeout=HANGS_S)
        for use in (ow.secrets.list, ow.secrets.create_key, lambda: ow.secrets.set({"A": "b"})):
            with pytest.raises(ConfigurationError, match="kept by a Supabase project"):
                use()


def test_a_job_on_this_machine_has_the_keys_of_who_submits_it(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not those that the worker was started with; and nothing of them is kept afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENWEIGHTS_WORKER_IDLE_S", "20")
    with closing(OpenWeights()) as ow:
        monkeypatch.setenv("HF_TOKEN", "hf_of_the_first")
        first = ow.exec.create(command="echo ${#HF_TOKEN} ${#MINE}", requires_vram_gb=0)
        assert first.wait(timeout=HANGS_S).logs() == "15 0\n"
        monkeypatch.setenv("HF_TOKEN", WANTED)
        monkeypatch.setenv("MINE", OTHER)
        second = ow.exec.create(
            command="echo ${#HF_TOKEN} ${#MINE} $MINE", secrets=["MINE"], requires_vram_gb=0
        )
        assert (
            second.wait(timeout=HANGS_S).logs() == f"{len(WANTED)} {len(OTHER)} [MINE redacted]\n"
        )
        assert len(ow.backend.list_workers()) == 1, "the same worker"
        kept = home / "handed-over"
        wait_until(lambda: not list(kept.iterdir()), "the end of what was handed over")
        assert kept.stat().st_mode & 0o077 == 0
        ow.backend.set_worker_status(ow.backend.list_workers()[0].id, "shutdown")
    assert not any(OTHER.encode() in f.read_bytes() for f in home.rglob("*") if f.is_file())
