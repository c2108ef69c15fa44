"""What `ow exec` takes along is what git would, less secrets and environments."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from openweights.client.exec_files import collect_files
from openweights.client.mounts import expand_mounts
from openweights.errors import InvalidInputError
from openweights.jobs.exec import Exec
from tests.client.conftest import QuietClient

IGNORE = """
*.log
!keep.log
/data/
build
docs/**/draft.md
# comment
\\#odd
spaces\\ 
"""


def write(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    root = tmp_path / "project"
    write(
        root,
        *("main.py", "a.log", "keep.log", "data/x.bin", "sub/data/y.bin", "build/z", "sub/build/z"),
        *("docs/draft.md", "docs/a/b/draft.md", "docs/a/final.md", "#odd", "sub/c.log"),
        *("sub/other.txt", "sub/keep.txt", "sub/deep/d.txt", "sub/deep/e.log", "empty.txt"),
    )
    (root / ".gitignore").write_text(IGNORE)
    (root / "sub" / ".gitignore").write_text("*.txt\n!keep.txt\n!c.log\n")
    return root


def test_same_files_as_git(project: Path) -> None:
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    command = ["git", "-c", "core.excludesFile=/dev/null", "-c", "safe.directory=*"]
    subprocess.run([*command, "init", "-q"], cwd=project, check=True)
    (project / ".git" / "info").mkdir(exist_ok=True)
    (project / ".git" / "info" / "exclude").write_text("empty.txt\n")
    for folder in (project, project / "sub", project / "sub" / "deep"):
        listed = subprocess.run(
            [*command, "ls-files", "-z", "--others", "--exclude-standard"],
            cwd=folder,
            check=True,
            capture_output=True,
            text=True,
        )
        expected = {name for name in listed.stdout.split("\0") if name}
        assert set(collect_files(folder)) == expected
    assert "keep.log" in collect_files(project)


def test_without_a_repository_the_folders_own_rules_count(project: Path) -> None:
    files = collect_files(project)
    assert {"main.py", "keep.log", "sub/c.log", "sub/keep.txt", ".gitignore"} <= set(files)
    assert not {"a.log", "data/x.bin", "build/z", "sub/other.txt", "sub/deep/d.txt"} & set(files)
    assert files["main.py"].read_text() == "main.py"
    assert list(files) == sorted(files)
    # Above it there is a rule for *.log, but no repository.
    assert "e.log" in collect_files(project / "sub" / "deep")


def test_never(tmp_path: Path) -> None:
    write(
        tmp_path,
        *("main.py", ".env", ".env.local", ".envrc", "sub/.env", ".netrc", ".git/config"),
        *(".env-prod", ".env_local", ".Env", ".ENV.PROD", ".env2/secret"),
        *("venv-of-mine/pyvenv.cfg", "venv-of-mine/bin/python", "conda/conda-meta/history"),
        *("__pycache__/main.pyc", "sub/__pycache__/x.pyc", "node_modules/x/index.js"),
        *(
            "worktree/.git",
            "worktree/code.py",
            "uploads/old.bin",
            "sub/uploads/fine.bin",
            ".hidden/fine.txt",
            "environment.py",
        ),
    )
    # Not even if a rule asks for it.
    (tmp_path / ".gitignore").write_text("!.env\n!.git\n")
    assert set(collect_files(tmp_path)) == {
        *(".gitignore", "main.py", "sub/uploads/fine.bin", ".hidden/fine.txt", "environment.py"),
        "worktree/code.py",
    }


def test_the_home_of_the_store_stays_here_whatever_it_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "main.py", "mine/notes.txt", "mine/worker.log")
    assert set(collect_files(tmp_path)) == {"main.py", "mine/notes.txt", "mine/worker.log"}
    monkeypatch.setenv("OPENWEIGHTS_HOME", str(tmp_path / "mine"))  # without a store as yet
    assert set(collect_files(tmp_path)) == {"main.py"}


_SECRETS = (
    *(
        ".openweights/credentials.json",
        ".ssh/id_rsa",
        ".ssh/config",
        ".aws/credentials",
        "prod.env",
    ),
    *(".config/gcloud/application_default_credentials.json", ".cache/huggingface/token", ".npmrc"),
    *("id_rsa", "sub/id_ed25519.bak", "key.pem", ".git-credentials", ".pypirc", "credentials.json"),
    *(".bash_history", ".python_history", "vault.kdbx", "secrets.yaml", "terraform.tfstate"),
    *("kubeconfig", "kubeconfig.yaml", "credentials.csv", "aws_credentials", "OPENAI_API_KEY.txt"),
    *("auth.json", ".vault-token", "gha-creds-0123.json", "api-keys.json", "access_token"),
    *("store/openweights.db", "store/files/ab/source_file", "sub/service-account-7.json", "env"),
)


def test_secrets_stay_here_whatever_takes_the_folder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    taken = (
        "main.py",
        "tokens.py",
        "environment.yml",
        "keys.md",
        "history.csv",
        "token_counts.json",
        *("credentials.py", "authors.json", "api_keys.py", "keyboard.txt", "secret_santa.py"),
    )
    write(tmp_path, *_SECRETS, *taken)
    assert set(collect_files(tmp_path)) == set(taken)
    assert set(expand_mounts({str(tmp_path): "in"})) == {f"in/{name}" for name in taken}
    assert "key.pem is left out" in caplog.text
    # A file that is named itself is meant.
    assert expand_mounts({str(tmp_path / "key.pem"): "key"}) == {"key": tmp_path / "key.pem"}


def test_whole_homes_and_huge_folders_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "main.py", "data/big.bin")
    (tmp_path / "data" / "big.bin").write_bytes(b"x" * 3000)
    monkeypatch.setenv("HOME", str(tmp_path))
    for folder in (tmp_path, Path("/")):
        with pytest.raises(InvalidInputError, match="--yes"):
            collect_files(folder)
    assert set(collect_files(tmp_path, even_home=True)) == {"main.py", "data/big.bin"}
    assert set(collect_files(tmp_path / "data")) == {"big.bin"}
    with pytest.raises(InvalidInputError, match="GB.*largest: data/big.bin"):
        collect_files(tmp_path, even_home=True, most_bytes=2000)


def test_links(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "root"
    write(root, "real/a.txt")
    write(tmp_path, "secret.txt")
    (root / "inside.txt").symlink_to(root / "real" / "a.txt")
    (root / "outside.txt").symlink_to(tmp_path / "secret.txt")
    write(root, ".env")
    (root / "settings").symlink_to(".env")
    (root / "broken.txt").symlink_to(root / "nothing")
    (root / "folder").symlink_to(root / "real")
    (root / "loop").symlink_to(root)
    os.mkfifo(root / "pipe")
    assert set(collect_files(root)) == {"real/a.txt", "inside.txt"}
    assert "outside.txt is left out: it is a link that leads out of the folder" in caplog.text
    assert "folder is left out: it is a link to a folder" in caplog.text
    assert "loop is left out: it is a link to a folder" in caplog.text
    assert "settings is left out: it is a link to what is never taken along" in caplog.text


def test_exec_job(ow: QuietClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "here", "main.py", ".env")
    monkeypatch.chdir(tmp_path / "here")
    job = ow.exec.create(command="  python main.py --name 'a b' ", cloud_type="COMMUNITY")
    assert job.id.startswith("execjob-")
    assert job.script == "python main.py --name 'a b'"
    assert set(job.params["mounted_files"]) == {"main.py"}
    assert job.params["cloud_type"] == "COMMUNITY"
    assert ow.exec.create(command="python main.py --name 'a b'").id == job.id
    Path("main.py").write_text("changed")
    assert ow.exec.create(command="python main.py --name 'a b'").id != job.id
    elsewhere = Exec(ow)
    elsewhere.folder = tmp_path
    assert "here/main.py" in elsewhere.create(command="true").params["mounted_files"]
    with pytest.raises(ValueError, match="^command: "):
        ow.exec.create(command="   ")


def test_the_names_of_a_jobs_own_folders_are_left_to_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, "uploads", ".spool/1-1-01234567.jsonl", "sub/uploads", "a")
    assert set(collect_files(tmp_path)) == {"sub/uploads", "a"}
    assert "uploads is left out" in caplog.text and ".spool is left out" in caplog.text
    for target in ("uploads", ".spool/x", ".spool", "./uploads"):
        with pytest.raises(InvalidInputError, match="keeps what it makes"):
            expand_mounts({str(tmp_path / "a"): target})
    assert expand_mounts({str(tmp_path / "a"): "uploads/given"}), "a first result is fine"
    with pytest.raises(InvalidInputError, match="'t' is the target of a file"):
        expand_mounts({str(tmp_path / "a"): "t", str(tmp_path / "sub" / "uploads"): "t/b"})
