"""The README and the documents say what is there: their example, tables and tree are compared with
the code.
"""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import openweights
from openweights.cli import COMMANDS
from openweights.cli.demo.study import DATA, Plan, methods, submit
from openweights.cli.jobs.fields import field_sections, page
from openweights.client import OpenWeights
from openweights.client.job_kinds import field_defaults
from openweights.client.job_options import JobOptions
from openweights.client.jobs import Job
from openweights.jobs.unsloth import FineTuning
from openweights.jobs.unsloth.config.fields import DEFAULT_WARMUP_STEPS
from openweights.jobs.unsloth.config.grpo_fields import REWARD_NAMES
from openweights.jobs.unsloth.validate import FILE_PURPOSES, TrainingConfig

ROOT = Path(__file__).parents[1]
DEFAULTS = field_defaults(TrainingConfig)
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


def example_arguments() -> dict[str, Any]:
    """What the README's example gives to `create`, but for its data."""
    (call,) = [c for name, c in calls(code(README, "python")[0]) if name == "ow.fine_tuning.create"]
    given = {str(keyword.arg): keyword.value for keyword in call.keywords}
    del given["training_file"]
    return {name: ast.literal_eval(value) for name, value in given.items()}


def test_example_is_the_demo() -> None:
    """The same run, so that its time and its answers are the demo's."""
    demo = OpenWeights()
    model = demo.settings.home / "models" / "SmolLM2-135M-Instruct"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    forward = next(method for method in methods(Plan()) if method.key == "forward_kl")
    job = submit(demo, forward, Plan(), model=model, data=DATA, suffix=None)
    job.cancel()
    theirs = job.params["validated_params"] | {"model": example_arguments()["model"]}
    ours = example_arguments()
    # The default warm-up of 32 steps is the demo's; nothing is pushed without a token.
    assert ours.items() <= theirs.items()
    assert theirs["warmup_steps"] == min(DEFAULT_WARMUP_STEPS, ours["max_steps"] // 10)
    usual = {"model", "loss", "training_file", "finetuned_model_id", "warmup_steps", "push_to_hub"}
    changed = {name for name, value in theirs.items() if value != DEFAULTS.get(name, value)}
    assert changed <= ours.keys() | usual


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
