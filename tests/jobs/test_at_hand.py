"""The look at rows before a job is submitted, in the process that a client without torch has."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from openweights.errors import DatasetError
from openweights.jobs.at_hand import look_at_hand
from openweights.jobs.multiple_choice import MultipleChoice
from openweights.jobs.unsloth.config.first_look import check_each
from openweights.jobs.unsloth.config.rows import NumberedRow

GOOD: dict[str, Any] = {"question": "Is it?", "choices": ["yes", "no"], "answer": 0}
BAD = {**GOOD, "choices": ["yes", "<|im_end|>"]}

SCRIPT = """
import json, os, sys
from functools import partial
from openweights.errors import OpenWeightsError
from openweights.jobs import at_hand
from openweights.jobs.multiple_choice import MultipleChoice
from openweights.jobs.unsloth.config.first_look import check_each

folder, rows = sys.argv[1], json.loads(sys.argv[2])

def looked(rows, render=MultipleChoice.render_row):
    look = partial(check_each, rows=list(enumerate(rows, 1)), render=render, name="dataset")
    try:
        at_hand.look_at_hand(folder, "default", {}, look)
    except OpenWeightsError as error:
        return f"{type(error).__name__}: {error}"

def own(row, tokenizer):
    seen.append(type(tokenizer).__name__)

class Unknown:  # to the other process, and larger than what pickle sends at a time
    def __init__(self):
        self.notes = [str(i) * 500 for i in range(2000)]

    def __call__(self, tokenizer):
        pass

def in_a_fork():
    with at_hand._BESIDE._lock:  # as another thread may
        child = os.fork()
        if not child:
            os._exit(looked(rows) != found["bad"])
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def beside():
    return at_hand._BESIDE._process.pid

seen, found = [], {}
found["good"], first = looked(rows[:1]), beside()
found["bad"], found["many"] = looked(rows), looked(rows[:1] * 5000)
found["stays"] = beside() == first
os.kill(first, 9)
found["again"], found["is_new"] = looked(rows), beside() != first
found["unable"] = at_hand._BESIDE.seen((folder, "default", {}, Unknown()))
found["after"] = [looked(rows[:1]), looked(rows)]
found["fork"] = in_a_fork()
found["torch"] = "torch" in sys.modules
looked(rows[:1], own)
found["own"], found["torch_for_own"] = seen, "torch" in sys.modules
print(json.dumps(found))
"""


def refused_here(folder: Path, rows: list[dict[str, Any]]) -> str:
    numbered: list[NumberedRow] = list(enumerate(rows, 1))
    look = partial(check_each, rows=numbered, render=MultipleChoice.render_row, name="dataset")
    with pytest.raises(DatasetError) as refused:
        look_at_hand(str(folder), "default", {}, look)
    return f"{type(refused.value).__name__}: {refused.value}"


@pytest.mark.long
def test_a_client_without_torch_looks_in_another_process(tiny: Path) -> None:
    """It finds the same, word for word, goes on after that process was killed, and looks itself at
    what cannot be sent there.
    """
    command = [sys.executable, "-c", SCRIPT, str(tiny), json.dumps([GOOD, BAD])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    same = refused_here(tiny, [GOOD, BAD])
    assert found == {
        **{"good": None, "bad": same, "many": None, "stays": True},
        **{"again": same, "is_new": True, "torch": False},
        **{"unable": None, "after": [None, same], "fork": 0},
        **{"own": ["TokenizersBackend"], "torch_for_own": True},
    }
