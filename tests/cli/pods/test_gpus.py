"""`ow gpus` without RunPod and with it, and `ow completion`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from openweights.backends.base import Backend
from openweights.gpu_catalogue import CATALOGUE
from tests.cli.conftest import Ow, submit


def test_gpus_of_the_catalogue(ow: Ow) -> None:
    rows = json.loads(ow("gpus", "--json").stdout)
    assert {row["gpu"] for row in rows} == set(CATALOGUE)
    prices = [row["secure_usd"] or row["community_usd"] or 0 for row in rows]
    assert prices == sorted(prices)
    assert all(row["secure_stock"] is None for row in rows), "nobody was asked"
    header, *lines = ow("gpus", "--vram-gb", "100").stdout.splitlines()
    assert header.split() == ["GPU", "MEMORY", "GB", "SECURE", "$/H", "COMMUNITY", "$/H"]
    assert {line.split()[0] for line in lines} == {"H200", "B200"}
    said = ow("gpus").stderr
    assert "use 5 GB less" in said and "seen from 2026-03-10 to 2026-11-09" in said


def test_gpus_are_found_by_the_memory_that_people_say(ow: Ow) -> None:
    shown = ow("gpus", "--vram-gb", "80").stdout
    assert {"A100", "H100S"} <= {line.split()[0] for line in shown.splitlines()}
    none = ow("gpus", "--vram-gb", "99999")
    assert (none.exit_code, none.stdout) == (1, "")
    assert "no GPU has 99999 GB; the largest is B200 with 180 GB" in none.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(ow: Ow, shell: str) -> None:
    script = ow("completion", shell).stdout
    assert "_OW_COMPLETE" in script and f"{shell}_complete" in script


def test_job_ids_are_completed(backend: Backend) -> None:
    submit(backend, "ftjob-abc")
    submit(backend, "ftjob-xyz")
    env = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[3]),
        "_OW_COMPLETE": "bash_complete",
        "COMP_WORDS": "ow show ftjob-a",
        "COMP_CWORD": "2",
    }
    code = "import sys; sys.argv = ['ow']; from openweights.cli import main; main(prog_name='ow')"
    shown = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert shown.stdout.split() == ["plain,ftjob-abc"]
