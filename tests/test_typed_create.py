"""pyright knows the arguments of `create`: `typed_create.py` has right ones and wrong ones."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).with_name("typed_create.py")
IGNORED = re.compile(r"  # pyright: ignore\[(\w+)\]")


def errors_in(file: Path) -> dict[int, str]:
    """Line -> rule of each error that pyright finds."""
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--outputjson"]
    done = subprocess.run([*command, file], cwd=EXAMPLES.parents[1], capture_output=True, text=True)
    found = json.loads(done.stdout)["generalDiagnostics"]
    return {error["range"]["start"]["line"] + 1: error["rule"] for error in found}


@pytest.mark.slow
def test_wrong_arguments_are_found_and_right_ones_are_not(tmp_path: Path) -> None:
    assert errors_in(EXAMPLES) == {}
    text = EXAMPLES.read_text(encoding="utf-8")
    bare = tmp_path / "bare.py"
    bare.write_text(IGNORED.sub("", text), encoding="utf-8")
    wrong = {
        number: match[1]
        for number, line in enumerate(text.splitlines(), start=1)
        if (match := IGNORED.search(line))
    }
    assert len(wrong) >= 6 and errors_in(bare) == wrong
    lines = text.splitlines()
    assert any("training_fil=" in lines[number - 1] for number in wrong)
    assert any('loss="ppo"' in lines[number - 1] for number in wrong)
