"""Functions of the user's are called once before a job is submitted, and what they lack is told."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from openweights import OpenWeights
from openweights.errors import ConfigError
from openweights.jobs.unsloth.grpo.trial import may_work_elsewhere, try_function

CODE = """
import os, pathlib, subprocess, sys

def fine(completions, gold_response):
    return [float(said == gold) for said, gold in zip(completions, gold_response)]

def counted(completions):
    with open(os.environ["COUNTED"], "a") as file:
        file.write("called\\n")
    return [1.0] * len(completions)

async def later(completions): return [1.0] * len(completions)
def unsure(completions): return [None] * len(completions)
def text(completions): return ["x"] * len(completions)
def numeric(completions): return ["1.0"] * len(completions)
def short(completions): return [1.0]
def raises(completions): return [1 / 0 for _ in completions]
def parses(completions):
    import json
    return [json.loads(said) for said in completions]
def quits(completions): sys.exit(0)
def misnamed(completions): return [sum(word) for word in competions]

def package(completions): import no_such_package
def file(completions): open("no such file")
def key(completions): return os.environ["NO_SUCH_KEY"]
def gpu(completions): raise RuntimeError("Found no NVIDIA driver on your system")
def dies(completions): os._exit(7)

def disturbing(completions):
    pathlib.Path("left behind").write_text("x")
    print("noise on stdout")
    os.chdir("/")
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    return [1.0] * len(completions)

def slow(completions):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    pathlib.Path(os.environ["COUNTED"]).write_text(str(child.pid))
    child.wait()
"""
ROWS = [{"prompt": [{"role": "user", "content": "q"}], "gold_response": "a"}] * 2
FIELD = "grpo_reward_function"


def tried(name: str, **asked: Any) -> str:
    return try_function(CODE.encode(), name, FIELD, ROWS, **asked)


@pytest.mark.parametrize("name", ["fine", "later", "unsure", "disturbing"])
def test_of_a_function_that_works_nothing_is_said(name: str) -> None:
    folder, files = os.getcwd(), sorted(os.listdir())
    assert tried(name) == ""
    assert (os.getcwd(), sorted(os.listdir())) == (folder, files)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("text", "gave 'x', which is text; give numbers"),
        ("numeric", "gave '1.0', which is text; give numbers"),
        ("short", "one number for each of the 2 completions, not \\[1.0\\]"),
        ("raises", r"raised ZeroDivisionError: division by zero \(line 17\)"),
        ("parses", "raised JSONDecodeError"),
        ("quits", r"sys.exit\(0\) was called"),
        ("misnamed", "raised NameError"),
        ("absent", "has no function 'absent'"),
    ],
)
def test_what_is_wrong_is_refused(name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=f"^{FIELD}: .*{words}.*tried on 2 rows; OPENWEIGHTS_TRY"):
        tried(name)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("package", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("file", "FileNotFoundError"),
        ("key", "KeyError: 'NO_SUCH_KEY'"),
        ("gpu", "no NVIDIA driver"),
        ("dies", "its process ended with status 7"),
    ],
)
def test_what_the_worker_may_have_is_told_and_not_refused(name: str, words: str) -> None:
    assert words in tried(name)


def test_a_slow_one_is_ended_with_all_that_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COUNTED", str(tmp_path / "child"))
    assert "it took more than 8 s" in tried("slow", limit_s=8)
    child = int((tmp_path / "child").read_text())
    end = time.monotonic() + 10
    while Path(f"/proc/{child}/cmdline").exists() and time.monotonic() < end:
        if not Path(f"/proc/{child}/cmdline").read_bytes():  # ended, and not yet waited for
            break
        time.sleep(0.05)
    else:
        assert not Path(f"/proc/{child}").exists()


def test_what_others_define_may_work_elsewhere() -> None:
    from pydantic import ValidationError
    from pydantic_core import PydanticCustomError

    assert may_work_elsewhere(PydanticCustomError("a", "b"))  # as a client of a judge's may raise
    assert not may_work_elsewhere(KeyError("score")) and not may_work_elsewhere(ValueError())
    assert issubclass(ValidationError, ValueError), "so its type alone does not tell"


def rows_of(folder: Path) -> str:
    path = folder / "rows.jsonl"
    said = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path.write_text((json.dumps({"messages": said}) + "\n") * 8)
    return str(path)


@pytest.fixture
def plans(tmp_path: Path) -> dict[str, Callable[[str], object]]:
    """A plan of each kind with a function of one's own."""
    (tmp_path / "reward.py").write_text(CODE)
    rows, model = rows_of(tmp_path), "org/name-135M"

    def own(name: str) -> str:
        return f"{tmp_path / 'reward.py'}:{name}"

    def trained(**asked: Any) -> object:
        return OpenWeights().fine_tuning.plan(model=model, training_file=rows, **asked)

    return {
        "grpo_reward_function": lambda name: trained(
            loss="grpo", grpo_num_generations=2, grpo_reward_function=own(name)
        ),
        "sdft_gate_reward": lambda name: trained(loss="sdft", sdft_gate_reward=own(name)),
        "suite": lambda name: OpenWeights().evaluate.plan(
            models=[model], suite=[own(name)], prompts=rows
        ),
    }


@pytest.mark.parametrize("field", ["grpo_reward_function", "sdft_gate_reward", "suite"])
def test_each_kind_tries_a_function_once(
    field: str,
    plans: dict[str, Callable[[str], object]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    count = tmp_path / "count"
    monkeypatch.setenv("COUNTED", str(count))
    plan = plans[field]
    plan("counted")
    plan("counted")
    assert count.read_text() == "called\n"
    with pytest.raises(ConfigError, match=f"^{field}: reward text: gave 'x'"):
        plan("text")
    with caplog.at_level(logging.WARNING):
        plan("package")
    assert f"{field}: package could not be tried here" in caplog.text
    monkeypatch.setenv("OPENWEIGHTS_TRY_FUNCTIONS", "no")
    plan("text")
