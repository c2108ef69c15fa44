"""`ow doctor`: is everything here that this installation needs, and how to get what is not; and
`ow version`.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from openweights import __version__
from openweights.cli.doctor.project import Check, project_checks
from openweights.cli.doctor.requirements import extras, needed_by
from openweights.cli.jobs.remove import in_bytes
from openweights.cli.output import json_option, one_line, print_json, printable
from openweights.cli.store import open_store
from openweights.errors import OpenWeightsError
from openweights.settings import Settings

_MIN_PYTHON = (3, 11)
_NEEDED_EXTRAS = frozenset({"extra train", "extra plot"})
_LOW_DISK_GB = 5  # a small model, its adapters and checkpoints
_MARKS = {"ok": "ok  ", "missing": "–   ", "warning": "!   ", "broken": "FAIL"}
_COLORS = {"ok": "green", "missing": None, "warning": "yellow", "broken": "red"}


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Check this installation.

    Looks at Python, the packages of each extra, GPUs, the folder of the store, the store itself,
    its workers and its jobs; of a Supabase project also at your key, its tables and functions, its
    storage, its clock and its secrets. Extras that this machine can do without stand apart, and the
    last line says whether training works here, and whether the Hugging Face hub can be reached. The
    exit code is 1 only if something that is needed does not work.
    """
    checks: list[Check] = []
    for check in _checks():
        checks.append(check)
        if not as_json and not is_apart(check, checks):
            _print(check)
    verdict = f"{training_verdict(checks)}; {_hub_verdict()}"
    broken = any(check.status == "broken" for check in checks)
    if as_json:
        print_json({"ok": not broken, "verdict": verdict, "checks": checks})
    else:
        if apart := [check for check in checks if is_apart(check, checks)]:
            click.echo("\nnot installed, and not needed for training on this machine")
            for check in apart:
                _print(check)
        click.echo(f"\n{verdict}")
    if broken:
        sys.exit(1)


@click.command()
@json_option
def version(as_json: bool) -> None:
    """Print the version."""
    if as_json:
        print_json({"version": __version__, "python": platform.python_version()})
    else:
        click.echo(f"openweights {__version__}")


def is_apart(check: Check, before: Sequence[Check]) -> bool:
    """Whether it is an extra that is not there, and that training does without.

    Args:
        before: The checks so far, with that of the GPU.
    """
    if check.status != "missing" or not check.name.startswith("extra "):
        return False
    has_gpu = any(other.name == "gpu" and other.status == "ok" for other in before)
    return check.name not in _NEEDED_EXTRAS | ({"extra gpu"} if has_gpu else set())


def training_verdict(checks: Sequence[Check]) -> str:
    """Whether jobs that train work on this machine, and if not, because of what."""
    found = {check.name: check for check in checks}
    if broken := [check.name for check in checks if check.status == "broken"]:
        return f"training does not work here: {', '.join(broken)}"
    train, gpu = found.get("extra train"), found.get("gpu")
    if train is not None and train.status != "ok":
        is_absent = "is not installed" in train.detail
        return f"training {'does not' if is_absent else 'may not'} work here: {train.detail}"
    has_gpu = gpu is not None and gpu.status == "ok"
    return f"training works here, on {'the GPU' if has_gpu else 'the CPU, slowly'}"


def _hub_verdict() -> str:
    from openweights.models.smollm2 import check_hub

    try:
        check_hub()
    except ModuleNotFoundError:
        return "the Hugging Face hub was not asked, as huggingface_hub is not installed"
    except OpenWeightsError as error:
        return (
            f"the Hugging Face hub is out of reach ({one_line(error)}): models that are on this "
            "machine, and folders, can be used"
        )
    return "the Hugging Face hub can be reached"


def _print(check: Check) -> None:
    mark = click.style(_MARKS[check.status], fg=_COLORS[check.status])
    click.echo(f"{mark}  {check.name:<14}  {printable(check.detail)}")
    if check.remedy:
        click.echo(f"{'':<22}{printable(check.remedy)}")


def _checks() -> Iterator[Check]:
    yield _python()
    yield Check("openweights", "ok", f"{__version__} in {Path(__file__).parents[2]}")
    yield _gpu()
    yield from _packages()
    try:
        settings = Settings.from_env()
    except OpenWeightsError as error:
        yield Check("settings", "broken", one_line(error))
        return
    yield _home(settings.home)
    yield from _disk(settings.home)
    if settings.is_remote:
        checks = list(project_checks(settings))
        yield from checks
        if any(check.name == "store" for check in checks):
            return  # it is out of reach
    yield from _store(settings)


def _python() -> Check:
    detail = f"{platform.python_version()} ({sys.executable})"
    if sys.version_info[:2] < _MIN_PYTHON:
        return Check("python", "broken", detail, "use Python 3.11 or newer")
    return Check("python", "ok", detail)


# ---- packages ------------------------------------------------------------------------------------


def _packages() -> Iterator[Check]:
    for extra in extras():
        needed = needed_by(extra)
        name = f"extra {extra}" if extra else "base packages"
        problems = {item: problem for item in needed if (problem := item.problem()) is not None}
        if not problems:
            found = [f"{item.name} {importlib.metadata.version(item.name)}" for item in needed]
            yield Check(name, "ok", ", ".join(found))
            continue
        packages = dict.fromkeys(item.name + item.versions for item in problems)
        yield Check(
            name,
            "missing" if extra else "broken",
            "; ".join(f"{item.name} {problem}" for item, problem in problems.items()),
            shlex.join([sys.executable, "-m", "pip", "install", *packages]),
        )


# ---- machine -------------------------------------------------------------------------------------


def _gpu() -> Check:
    asked = "--query-gpu=name,memory.total,driver_version"
    command = ["nvidia-smi", asked, "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except FileNotFoundError:
        return Check("gpu", "missing", "none (no nvidia-smi): jobs run on the CPU, slowly")
    except (OSError, subprocess.TimeoutExpired) as error:
        return Check("gpu", "warning", f"nvidia-smi does not answer: {one_line(error)}")
    if answer.returncode != 0:
        reason = one_line(answer.stderr or answer.stdout, 200)
        return Check("gpu", "warning", f"nvidia-smi failed: {reason}", "check the NVIDIA driver")
    gpus = [one_line(line) for line in answer.stdout.splitlines() if line.strip()]
    if not gpus:
        return Check("gpu", "missing", "none: jobs run on the CPU, slowly")
    return Check("gpu", "ok", "; ".join(gpus))


def _home(home: Path) -> Check:
    """Whether the folder of the store can be written, or made where it does not exist yet."""
    folder = _existing(home)
    remedy = "set OPENWEIGHTS_HOME to a folder that you may write to"
    if not folder.is_dir():
        return Check("home", "broken", f"{home}: {folder} is not a folder", remedy)
    try:
        # access() says yes to root on a read-only file system: only writing tells.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return Check("home", "broken", f"{home} cannot be written: {error.strerror}", remedy)
    return Check("home", "ok", str(home) + ("" if home.exists() else " (not made yet)"))


def _disk(home: Path) -> Iterator[Check]:
    try:
        usage = shutil.disk_usage(_existing(home))
    except OSError:
        return  # said by the check of the home
    free_gb = usage.free / 1e9
    detail = f"{free_gb:.1f} GB free of {usage.total / 1e9:.1f} GB"
    if free_gb < _LOW_DISK_GB:
        yield Check("disk", "warning", detail, "models and checkpoints may not fit")
    else:
        yield Check("disk", "ok", detail)


def _existing(path: Path) -> Path:
    """The path, or its nearest parent that exists."""
    for candidate in (path, *path.parents):
        if os.path.lexists(candidate):
            return candidate
    return path


# ---- store ---------------------------------------------------------------------------------------


def _store(settings: Settings) -> Iterator[Check]:
    url = settings.supabase_url
    name = f"Supabase {url}" if url else f"this machine, {settings.home}"
    try:
        with open_store() as backend:
            workers = backend.list_workers(statuses=("starting", "active", "shutdown"))
            pending = len(backend.list_jobs(statuses=("pending",), limit=None))
            running = len(backend.list_jobs(statuses=("in_progress",), limit=None))
            sizes = backend.sizes()
    except (OpenWeightsError, OSError) as error:
        yield Check("store", "broken", f"{name}: {one_line(error)}")
        return
    yield Check("store", "ok", name)
    alive = ", ".join(f"{worker.id} ({worker.hardware_type})" for worker in workers)
    none = "none; one starts by itself when a job is submitted"
    if settings.is_remote:
        none = "none; `ow cluster` starts pods for jobs, `ow worker` works on this machine"
    yield Check("workers", "ok", alive or none)
    yield Check("jobs", "ok", f"{pending} pending, {running} in progress")
    detail = (
        f"{in_bytes(sizes.file_bytes)} of files, {in_bytes(sizes.log_bytes)} of logs, "
        f"{in_bytes(sizes.database_bytes)} of records"
    )
    yield Check("sizes", "ok", f"{detail}; `ow gc` removes what nobody needs")
