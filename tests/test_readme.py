"""The README and the documents say what is there: their example, tables and tree are compared with
the code.
"""

from __future__ import annotations

import ast
import inspect
import re
import runpy
from pathlib import Path

import pytest

import openweights
from openweights.cli import COMMANDS
from openweights.cli.demo.study import DATA, Plan, methods, submit
from openweights.cli.jobs.fields import field_sections, page
from openweights.client import OpenWeights
from openweights.client.job_options import JobOptions
from openweights.client.jobs import Job
from openweights.jobs.unsloth import FineTuning
from openweights.jobs.unsloth.config.grpo_fields import REWARD_NAMES
from openweights.jobs.unsloth.validate import FILE_PURPOSES, TrainingConfig

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
TRAINING = (ROOT / "docs/training.md").read_text(encoding="utf-8")
COMMANDS_PAGE = (ROOT / "docs/commands.md").read_text(encoding="utf-8")


def section(document: str, heading: str) -> str:
    """The text below a heading, up to the next one."""
    match = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", document, re.M | re.S)
    assert match, heading
    return match[1]


def rows(text: str) -> list[list[str]]:
    """The rows of the first table in `text`, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines[2:]]
    return [[cell.strip() for cell in row] for row in cells]


def code(document: str, language: str) -> list[str]:
    """The code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", document, re.M | re.S)


def calls(source: str) -> list[tuple[str, ast.Call]]:
    """The calls of a script, by the dotted name of what is called."""
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [(ast.unparse(call.func), call) for call in found]


def test_example_uses_what_exists() -> None:
    scripts = [*code(README, "python"), (ROOT / "cookbook/sdft/sdft_smollm2.py").read_text()]
    assert len(scripts) >= 2
    client = OpenWeights()
    create = set(inspect.signature(FineTuning.create).parameters)
    for script in scripts:
        for name, call in calls(script):
            keywords = {keyword.arg for keyword in call.keywords if keyword.arg}
            target, _, method = name.partition(".")
            if name == "ow.fine_tuning.create":
                assert keywords <= create, keywords - create
            elif target == "ow":
                function = client
                for part in method.split("."):
                    function = getattr(function, part)
                assert keywords <= set(inspect.signature(function).parameters), name
            elif target == "job":
                inspect.signature(getattr(Job, method)).bind(
                    None, *call.args, **dict.fromkeys(keywords)
                )
        imported = [n for n in ast.walk(ast.parse(script)) if isinstance(n, ast.ImportFrom)]
        for statement in imported:
            if statement.module == "openweights":
                assert all(hasattr(openweights, alias.name) for alias in statement.names)


def test_example_is_accepted() -> None:
    """Its parameters are valid, with a real upload; the model is not loaded for that."""
    ow = OpenWeights()
    data = ROOT / "cookbook/sdft/data/train.jsonl"
    file = ow.files.upload(data, purpose="conversations")["id"]
    (call,) = [
        call for name, call in calls(code(README, "python")[0]) if name == "ow.fine_tuning.create"
    ]
    params = {
        str(keyword.arg): file
        if keyword.arg == "training_file"
        else ast.literal_eval(keyword.value)
        for keyword in call.keywords
    }
    config = ow.fine_tuning.validate(params)
    ow.fine_tuning.check(config)
    assert config.loss == "sdft"


def test_example_is_the_demo() -> None:
    """The very job: after `make demo` the example finds it done."""
    ow = OpenWeights()
    model = ow.settings.home / "models" / "SmolLM2-135M-Instruct"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    forward = next(method for method in methods(Plan()) if method.key == "forward_kl")
    job = submit(ow, forward, Plan(), model=model, data=DATA, suffix=None)
    job.cancel()
    call = next(c for name, c in calls(code(README, "python")[0]) if name.endswith("create"))
    given = {str(keyword.arg): keyword.value for keyword in call.keywords}
    del given["training_file"]
    own = {name: ast.literal_eval(value) for name, value in given.items()}
    rows = str(DATA / "train.jsonl")
    assert ow.fine_tuning.prepare(**own, training_file=rows).id == job.id
    assert ow.fine_tuning.prepare(**own | {"seed": 7}, training_file=rows).id != job.id


def test_a_job_of_each_kind_of_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The short jobs are submitted as they stand, and the reward is one."""
    reward, jobs = code(README, "python")[1:]
    (tmp_path / "reward.py").write_text(reward)
    (tmp_path / "jobs.py").write_text(jobs)
    (tmp_path / "cookbook").symlink_to(ROOT / "cookbook")
    monkeypatch.chdir(tmp_path)
    OpenWeights().jobs.pause()  # they are not run here
    score = runpy.run_path("reward.py")["score"]
    assert score(["Oslo: 2 pens.\n", "Two."], ["Oslo: 2 pens."] * 2) == [1.0, 0.0]
    made = runpy.run_path("jobs.py")
    assert [made[loss].status for loss in ("sft", "dpo", "grpo")] == ["pending"] * 3
    assert made["grpo"].record.after == made["dpo"].record.after == (made["sft"].id,)
    made["sft"].cancel()  # those after it fail with it


def test_the_lines_of_the_queue_are_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they stand, with rows for `one` and `two`, and for the dots what every training needs."""
    in_line, again = code((ROOT / "docs/queue.md").read_text(encoding="utf-8"), "python")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "report.py").write_text("print('done')\n")
    rows = str(ROOT / "cookbook/sdft/data/train.jsonl")
    ow = OpenWeights()
    ow.jobs.pause()  # they are not run here
    (tmp_path / "in_line.py").write_text(in_line)
    made = runpy.run_path("in_line.py", {"ow": ow, "one": rows, "two": str(DATA / "train.jsonl")})
    assert made["second"].record.after == (made["first"].id,)
    assert made["report"].record.after == (made["first"].id, made["second"].id)
    given = {"model": "Qwen/Qwen3-4B", "training_file": rows, "loss": "sft"}
    (tmp_path / "again.py").write_text(f"kept = {again.replace('...', '**given')}")
    kept = runpy.run_path("again.py", {"ow": ow, "given": given})["kept"]
    assert kept.record.retry.max == 2
    made["first"].cancel()  # those after it fail with it
    kept.cancel()


def test_methods_named_in_the_text_exist() -> None:
    for method in re.findall(r"`job\.(\w+)\(", README + TRAINING + COMMANDS_PAGE):
        assert callable(getattr(Job, method)), method


def test_command_table_lists_the_commands() -> None:
    names = [
        row[0].strip("`").split()[1] for row in rows(section(COMMANDS_PAGE, "The command `ow`"))
    ]
    assert sorted(names) == sorted(COMMANDS)


def test_page_of_fields_is_that_of_the_config() -> None:
    made = page(field_sections())
    assert (ROOT / "docs/fields.md").read_text(encoding="utf-8") == made, (
        "make it anew: ow fields --markdown > docs/fields.md"
    )
    listed = set(re.findall(r"^\| `(\w+)` \|", made, re.M))
    assert {*TrainingConfig.model_fields, *JobOptions.model_fields} <= listed


def test_tables_of_losses_and_sdft_fields_are_complete() -> None:
    losses = {row[0].strip("`"): row for row in rows(section(TRAINING, "Losses"))}
    assert {name: row[1].strip("`") for name, row in losses.items()} == FILE_PURPOSES
    fields = {row[0].strip("`"): row[1].strip("`") for row in rows(section(TRAINING, "SDFT"))}
    defaults = {
        name: "built in" if name == "sdft_demo_template" else str(field.default)
        for name, field in TrainingConfig.model_fields.items()
        if name.startswith("sdft_")
    }
    assert fields == defaults


def test_table_of_rewards_is_complete() -> None:
    named = {
        name
        for row in rows(section(TRAINING, "GRPO"))
        for name in re.findall(r"`([\w.:]+)`", row[0])
    }
    assert named == {*REWARD_NAMES, "file.py:function"}


def test_tree_lists_what_is_there() -> None:
    (tree,) = code(ARCHITECTURE, "text")
    folders: list[str] = []
    named: set[str] = set()
    for line in tree.splitlines():
        indent, entry = len(line) - len(line.lstrip()), line.strip()
        if indent > 2 * len(folders):  # the second line of a description
            names, prefix = re.findall(r"[\w.]+\.py", entry), "/".join(folders)
        else:
            folders = folders[: indent // 2]
            name, _, text = entry.partition("  ")
            names, prefix = [name], "/".join(folders)
            if name.endswith("/"):
                folders.append(name.rstrip("/"))
                inside = "/".join(folders)
                named |= {f"{inside}/{file}" for file in re.findall(r"[\w.]+\.py", text)}
        named |= {f"{prefix}/{name}".strip("/") for name in names}
    missing = [path for path in named if not (ROOT / path).exists()]
    assert not missing
    inside = [path.parent.relative_to(ROOT) for path in ROOT.glob("openweights/*/**/__init__.py")]
    assert {str(folder) for folder in inside} <= {name.rstrip("/") for name in named}
