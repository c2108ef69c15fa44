"""Every file of the cookbook is checked here and stands in its README; a new one fails at first.

A script's config goes through the validation of its job kind, with the small and the large model,
files and rows included. The slow variant runs every script for two steps.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cookbook.models import LARGE, RESULTS, Choice
from openweights import OpenWeights
from openweights.jobs.unsloth import FineTuning
from openweights.jobs.unsloth.validate import TrainingConfig
from tests.tiny_model import make_tiny_model

ROOT = Path(__file__).parents[2]
COOKBOOK = ROOT / "cookbook"
STUDY = "sdft/bad_medical_advice"
Check = Callable[[OpenWeights, Path, str], None]


def trains(kind: str = "fine_tuning", **variations: list[Any]) -> Check:
    """The script's `params` are valid, and stay so with each value of its own arguments."""

    def check(ow: OpenWeights, tiny: Path, name: str) -> None:
        script, door = load(name), getattr(ow, kind)
        assert isinstance(door, FineTuning)
        changes = [{key: value} for key, values in variations.items() for value in values]
        for chosen in (Choice(str(tiny)), Choice(str(tiny), False, 2), Choice(LARGE, True)):
            for change in changes or [{}]:
                config = door.validate(script.params(chosen, **change))
                assert isinstance(config, TrainingConfig) and config.model == chosen.model
                assert config.max_steps == 2 or chosen.most_steps is None
                door.check(config)
                assert door.compute_id(config)

    return check


def asks(kind: str) -> Check:
    """The script's `params` are those of another kind of job, whose model may be any."""

    def check(ow: OpenWeights, tiny: Path, name: str) -> None:
        door = getattr(ow, kind)
        for chosen in (Choice(str(tiny)), Choice(str(tiny), False, 2), Choice(LARGE, True)):
            given = load(name).params(chosen)
            config = door.validate({k: v for k, v in given.items() if k != "requires_vram_gb"})
            assert config.model == chosen.model
            door.check(config)

    return check


def chats(ow: OpenWeights, tiny: Path, name: str) -> None:
    """The page's answers grow as they come, and know what was said before."""
    asked: list[dict[str, Any]] = []

    def create(**given: Any) -> Iterator[Any]:
        asked.append(given)
        for piece in ("Hel", "lo", None):
            delta = SimpleNamespace(content=piece)
            yield SimpleNamespace(choices=[SimpleNamespace(delta=delta)])

    completions = SimpleNamespace(create=create)
    client = SimpleNamespace(chat=SimpleNamespace(completions=completions))
    before = [{"role": "user", "content": "Hi", "metadata": None}]
    reply = load(name).replies(client, "model")
    assert list(reply("And?", before)) == ["Hel", "Hello", "Hello"]
    assert asked[0]["messages"] == [
        {"role": "user", "content": "Hi"},
        {"role": "user", "content": "And?"},
    ]


def runs(ow: OpenWeights, tiny: Path, name: str) -> None:
    """The script needs no model, and goes through as it stands."""
    assert "cat,2" in run_script(name, folder=tiny.parent)


def makes_data(ow: OpenWeights, tiny: Path, name: str) -> None:
    """The generator writes the very files that lie in its `data/`."""
    for file, text in load(name).make_files().items():
        assert (COOKBOOK / name).parent.joinpath("data", file).read_text("utf-8") == text, file


def used_by(path: str) -> Check:
    """Another file, below the root, names this one and is itself run by a test."""

    def check(ow: OpenWeights, tiny: Path, name: str) -> None:
        stem = Path(name).stem
        assert re.search(rf"\b{stem}\b", (ROOT / path).read_text("utf-8")), f"{path}: no {stem}"

    return check


CHECKS: dict[str, Check] = {
    "models.py": used_by("cookbook/sft/lora_sft.py"),
    "sft/lora_sft.py": trains(),
    "preference/dpo.py": trains(),
    "preference/orpo.py": trains(),
    "sdft/make_data.py": makes_data,
    "sdft/sdft_smollm2.py": trains(),
    "sdft/sdft_qwen3_4b.py": trains(),
    "sdft/test_sdft_vs_sft.py": trains(method=["sft", "sdft"]),
    "sdft/test_grpo_smoke.py": trains(),
    "grpo/own_reward.py": trains(),
    "grpo/brevity.py": used_by("cookbook/grpo/own_reward.py"),
    "custom_job/client_side.py": runs,
    "custom_job/worker_side.py": used_by("cookbook/custom_job/client_side.py"),
    "inference/run_inference.py": asks("inference"),
    "api/context_manager.py": asks("api"),
    "api/gradio_ui.py": chats,
    "evaluation/inspect_eval.py": asks("inspect_ai"),
    "evaluation/tasks.py": used_by("cookbook/evaluation/inspect_eval.py"),
    "evaluation/before_and_after.py": trains(),
    "evaluation/exact.py": used_by("cookbook/evaluation/before_and_after.py"),
    "tracking/log_probabilities.py": trains(),
    "tracking/sampling.py": trains(),
    "tracking/multiple_choice.py": trains(),
    "tracking/weighted_blocks.py": trains("weighted_sft"),
    "sweep/seeds_and_rates.py": trains(seed=[1, 2]),
    "sdft/skills/run.py": used_by("tests/cookbook/test_skills_study.py"),
    "sdft/skills/data.py": used_by("tests/cookbook/test_skills_study.py"),
    "sdft/skills/grading.py": used_by("tests/cookbook/test_skills_study.py"),
    "sdft/skills/plan.py": used_by("tests/cookbook/test_skills_study.py"),
    "sdft/skills/study.py": used_by("tests/cookbook/test_skills_study.py"),
    "sdft/skills/results.py": used_by("tests/cookbook/test_skills_study.py"),
    "sdft/skills/figures.py": used_by("tests/cookbook/test_skills_study.py"),
    "sdft/skills/telling.py": used_by("tests/cookbook/test_skills_telling.py"),
    f"{STUDY}/make_data.py": makes_data,
    f"{STUDY}/run_experiment.py": trains("monitored_fine_tuning", method=["sft", "sdft", "grpo"]),
    f"{STUDY}/monitoring_callback.py": used_by(f"cookbook/{STUDY}/run_experiment.py"),
    f"{STUDY}/training_monitored.py": used_by(f"cookbook/{STUDY}/run_experiment.py"),
    f"{STUDY}/trajectories.py": used_by("tests/cookbook/test_medical_study.py"),
    f"{STUDY}/eval/run_eval.py": used_by("tests/cookbook/test_medical_study.py"),
    f"{STUDY}/eval/sample_answers.py": used_by(f"cookbook/{STUDY}/eval/run_eval.py"),
    f"{STUDY}/eval/questions.py": used_by("tests/cookbook/test_medical_study.py"),
    f"{STUDY}/eval/scoring.py": used_by("tests/cookbook/test_eval_scoring.py"),
}
TRAINED = [
    name
    for name, check in CHECKS.items()
    if check.__qualname__.startswith("trains") and STUDY not in name
]


def source(name: str) -> str:
    """The text of a file of the cookbook."""
    return (COOKBOOK / name).read_text("utf-8")


def load(name: str) -> Any:
    """A file of the cookbook as a module."""
    return importlib.import_module("cookbook." + name.removesuffix(".py").replace("/", "."))


def run_script(name: str, *arguments: str, folder: Path) -> str:
    """What a script prints; it must end well."""
    done = subprocess.run(
        [sys.executable, str(COOKBOOK / name), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def unlisted(folder: Path, readme: str, checked: set[str]) -> Iterator[str]:
    """What is wrong between the files, the README's tables and the checks."""
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*.py")}
    listed = re.findall(r"^\| `([^`]+\.py)[^`]*` \|", readme, re.M)
    for place, names in (("the README's tables", set(listed)), ("the test's CHECKS", checked)):
        yield from (f"{name} is not in {place}" for name in sorted(files - names))
        yield from (f"{place} name {name}, which is not there" for name in sorted(names - files))
    yield from (f"{name} is listed twice" for name in set(listed) if listed.count(name) > 1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("cookbook") / "tiny")


@pytest.mark.parametrize("name", CHECKS)
def test_script(name: str, tiny: Path, home: Path) -> None:
    CHECKS[name](OpenWeights(), tiny, name)


def test_every_file_is_listed(tmp_path: Path) -> None:
    readme = (COOKBOOK / "README.md").read_text("utf-8")
    assert list(unlisted(COOKBOOK, readme, set(CHECKS))) == []
    # The control: a new script that is in neither place.
    (tmp_path / "new.py").write_text("")
    wrong = [line for line in unlisted(tmp_path, "| `a.py` | |", set()) if "new.py" in line]
    assert len(wrong) == 2


def test_table_of_scripts_has_all_columns() -> None:
    text = (COOKBOOK / "README.md").read_text("utf-8")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    head = [cell.strip() for cell in lines[0].strip("|").split("|")]
    assert head == ["script", "what it shows", "GPU", "minutes", "number to expect"]
    for line in lines[2 : lines.index(next(x for x in lines[1:] if x.startswith("| file")))]:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert len(cells) == len(head) and all(cells), line


@pytest.mark.parametrize("name", [name for name in CHECKS if "(ow, __doc__)" in source(name)])
def test_arguments(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit, match="0"):
        load(name).main()
    said = capsys.readouterr().out
    assert "--model" in said and "--steps" in said and "--large" in said
    # Refused before a model is fetched for it.
    monkeypatch.setattr(sys, "argv", [name, "--steps", "0"])
    with pytest.raises(SystemExit, match="2"):
        load(name).main()
    assert "argument --steps: give a whole number from 1 on" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["custom_job/client_side.py", "sdft/make_data.py"])
def test_scripts_without_a_model_have_help(name: str, tmp_path: Path) -> None:
    assert "usage: " in run_script(name, "--help", folder=tmp_path)


def test_what_stops_a_script_is_said_without_a_traceback(tmp_path: Path) -> None:
    plain = re.compile(r'__name__ == "__main__":\n    main\(\)')
    assert not [
        name for name in CHECKS if plain.search(source(name)) and "Weights()" in source(name)
    ]
    script = [sys.executable, str(COOKBOOK / "custom_job/client_side.py")]
    env = {**os.environ, "OPENWEIGHTS_HOME": str(tmp_path / "file" / "home")}
    (tmp_path / "file").write_text("")
    ended = subprocess.run(script, env=env, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr.startswith("client_side.py: ") and ended.stderr.count("\n") == 1


def test_git_ignores_what_scripts_leave() -> None:
    assert f"{RESULTS}/" in (ROOT / ".gitignore").read_text("utf-8").splitlines()
    elsewhere = re.compile(r"job\.(?:download|plot)\((?!folder|options\.out)")
    assert not [name for name in CHECKS if elsewhere.search(source(name))]


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_script_trains_two_steps(name: str, tiny: Path, tmp_path: Path) -> None:
    printed = run_script(name, "--model", str(tiny), "--steps", "2", folder=tmp_path)
    assert printed.strip()
