"""Which files of a folder leave this machine with a job: what git would take, and never secrets,
environments or caches. One rule for `ow exec`, `ow ssh` and mounted folders.

What looks like a secret goes by its name: the files that gitrob and shhgit search repositories for,
and where the tools of this field keep their keys. It is left out with a word; a single file that is
named itself (`mount={"key.pem": …}`) is meant, and goes.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from pathspec import GitIgnoreSpec

from openweights.errors import InvalidInputError
from openweights.settings import home_folder

logger = logging.getLogger(__name__)

# `uploads` is where a job leaves its results: what is taken along there would come back as one.
_SKIPPED_FOLDERS = frozenset(
    {
        ".cache",
        ".git",
        ".hg",
        ".svn",
        "__pycache__",
        ".mypy_cache",
        ".pytest_cache",
        ".ruff_cache",
        ".ipynb_checkpoints",
        ".tox",
        ".nox",
        "node_modules",
    }
)
_RESULTS = "uploads"
_OF_THE_JOB = (_RESULTS, ".spool")
_SECRET_FOLDERS = frozenset(
    {
        *(".openweights", ".ssh", ".aws", ".azure", ".config", ".docker", ".gnupg", ".kube"),
        *(".huggingface", ".kaggle", ".modal", ".password-store", ".runpod", ".supabase", ".wandb"),
        *("gcloud", ".gcloud", ".oci", ".terraform.d", ".mozilla", ".thunderbird", ".local"),
    }
)
_SECRET_FILES = re.compile(
    r"\.env.*|.*\.env|env|[._]netrc|\.npmrc|\.pypirc|\.pgpass|\.my\.cnf|\.git-credentials"
    r"|\.dockercfg|\.dockerconfigjson|\.s3cfg|\.boto|\.htpasswd|\.modal\.toml|\.rclone\.conf"
    r"|\..*_?history|id_(rsa|dsa|ecdsa|ed25519).*|.*\.(pem|key|p12|pfx|pkcs12|jks|keystore|kdbx?"
    r"|keychain|kwallet|ovpn|ppk|asc|psafe3|tfstate|tfvars)"
    r"|(.*[-_])?credentials(\.(json|csv|txt|ini|ya?ml))?|gha-creds-.*\.json|kubeconfig(\.ya?ml)?"
    r"|auth\.json|\.vault-token|.*(api|access|secret)[-_]?(key|token)s?(\.(txt|json|csv|ya?ml))?"
    r"|client_secrets?.*\.json|service[-_]?account.*\.json|secrets?\.(json|toml|ya?ml|txt|ini|env)"
    r"|(hf_|access_|api_)?token(\.txt|\.json)?",
    re.IGNORECASE,
)
MOST_BYTES = 1 << 30

_Rules = tuple[tuple[Path, GitIgnoreSpec], ...]


def collect_files(
    folder: Path, *, is_named: bool = False, even_home: bool = False, most_bytes: int = MOST_BYTES
) -> dict[str, Path]:
    """Path below `folder` -> file, for each file to take along.

    Left out: what a `.gitignore` (here, below, or above up to the repository's root) ignores;
    `.git`, secrets, virtual environments, caches and a folder `uploads`; the store on this machine;
    links to folders, to what is never taken along, and out of the folder.

    Args:
        is_named: The folder was asked for by its name: what lies above it does not ignore it.
        even_home: It may be a home folder, or the root.

    Raises:
        InvalidInputError: It is one of these, or its files are larger than `most_bytes` together.
    """
    folder = folder.resolve()
    if not even_home and (folder == Path.home().resolve() or folder.parent == folder):
        raise InvalidInputError(
            f"{folder} is no project's folder, and all that is in it would be uploaded: change to "
            "the folder that the job needs, or say --yes"
        )
    rules = () if is_named else _rules_above(folder)
    files = {path.relative_to(folder).as_posix(): path for path in _walk(folder, folder, rules)}
    _check_size(folder, files, most_bytes)
    return dict(sorted(files.items()))


def _check_size(folder: Path, files: Mapping[str, Path], most_bytes: int) -> None:
    sizes = {name: path.stat().st_size for name, path in files.items()}
    if (total := sum(sizes.values())) > most_bytes:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
        raise InvalidInputError(
            f"the files of {folder} have {total / 1e9:.1f} GB, and at most {most_bytes / 1e9:.1f} "
            f"are taken along; the largest: {', '.join(largest)}. Name them in .gitignore, or "
            "upload them with ow.files"
        )


def _walk(root: Path, folder: Path, rules: _Rules) -> Iterator[Path]:
    rules = (*rules, *_rules_of(folder))
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path = Path(entry.path)
        if entry.is_dir(follow_symlinks=False):
            if _takes_folder(root, path) and not _is_ignored(path, rules, is_folder=True):
                yield from _walk(root, path, rules)
        elif not _is_ignored(path, rules, is_folder=False):
            if _is_of_the_job(root, path):
                continue
            if _is_never_taken(entry.name):
                _say_left_out(path)
                continue
            refused = _refusal(root, path) if entry.is_symlink() else None
            if refused:
                logger.warning("%s is left out: it is a link %s", path, refused)
            elif entry.is_file():
                yield path


def _takes_folder(root: Path, path: Path) -> bool:
    if path.name in _SKIPPED_FOLDERS or path.name.endswith(".egg-info"):
        return False
    # A folder `env` may be anything; a file of that name is one of variables.
    if path.name != "env" and _is_never_taken(path.name):
        _say_left_out(path)
        return False
    # The store on this machine, wherever it is: it holds keys, and would hold itself.
    if (path / "openweights.db").exists() or path == home_folder().resolve():
        return False
    if _is_of_the_job(root, path):
        return False
    # What makes a virtual environment one, whatever its name; conda's is the second.
    return not (path / "pyvenv.cfg").exists() and not (path / "conda-meta").exists()


def _is_of_the_job(root: Path, path: Path) -> bool:
    """A file or folder whose name a job's own folder has."""
    is_one = path.parent == root and path.name in _OF_THE_JOB
    if is_one:
        logger.warning("%s is left out: the job keeps there what it makes", path.name)
    return is_one


def _is_never_taken(name: str) -> bool:
    """Secrets; and `.git`, which is a file in a work tree or a submodule."""
    is_secret = name.lower() in _SECRET_FOLDERS or _SECRET_FILES.fullmatch(name) is not None
    return name == ".git" or is_secret


def _say_left_out(path: Path) -> None:
    # Nobody expects these to travel.
    if path.name != ".git" and not path.name.lower().startswith(".env"):
        logger.warning("%s is left out: by its name it is a secret", path)


def _refusal(root: Path, link: Path) -> str | None:
    """Why a link cannot travel, or None if it can, as a copy of its file."""
    target = Path(os.path.realpath(link))
    if not target.is_relative_to(root):
        return "that leads out of the folder"
    if target.is_dir():
        return "to a folder; use the folder itself, or a copy"
    if any(map(_is_never_taken, target.relative_to(root).parts)):
        return "to what is never taken along"
    return None


def _is_ignored(path: Path, rules: _Rules, *, is_folder: bool) -> bool:
    """As git decides: the last matching pattern of the deepest `.gitignore` that has one."""
    for base, spec in reversed(rules):
        name = path.relative_to(base).as_posix() + ("/" if is_folder else "")
        verdict = spec.check_file(name).include
        if verdict is not None:
            return verdict
    return False


def _rules_above(folder: Path) -> _Rules:
    """Rules of the folders from the repository's root down to the parent of `folder`; none outside
    a repository.
    """
    above: list[Path] = []
    current = folder
    while not (current / ".git").exists():
        if current.parent == current:
            return ()
        current = current.parent
        above.append(current)
    rules: list[tuple[Path, GitIgnoreSpec]] = []
    exclude = current / ".git" / "info" / "exclude"
    rules.extend(_read_rules(exclude, current))
    for parent in reversed(above):
        rules.extend(_rules_of(parent))
    return tuple(rules)


def _rules_of(folder: Path) -> _Rules:
    return _read_rules(folder / ".gitignore", folder)


def _read_rules(path: Path, base: Path) -> _Rules:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ()
    return ((base, GitIgnoreSpec.from_lines(lines)),)
