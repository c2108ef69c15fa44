"""The README of a result: what it is, what it was made from and how, and how to load it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from openweights.jobs.unsloth.validate import TrainingConfig
from openweights.number_words import number_words

# Said in other words, or of no interest to whoever has the result.
_HIDDEN = frozenset(
    {"model", "training_file", "test_file", "loss", "finetuned_model_id", "job_id_suffix", "meta"}
    | {"logp_callback_datasets", "sampling_callbacks", "mcq_callbacks", "push_to_hub"}
)
_LOAD_ADAPTER = """\
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

here = "."  # this folder, or the name of this repository
model = AutoPeftModelForCausalLM.from_pretrained(here)
tokenizer = AutoTokenizer.from_pretrained(here)"""
_LOAD_MERGED = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

here = "."  # this folder, or the name of this repository
model = AutoModelForCausalLM.from_pretrained(here)
tokenizer = AutoTokenizer.from_pretrained(here)"""


def model_card(
    config: TrainingConfig,
    record: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    *,
    base: str,
    job_id: str,
    is_merged: bool = False,
) -> str:
    """A card in Markdown, with the hub's metadata on top.

    Args:
        record: What `record.reproducibility` gives.
        history: The trainer's log.
        base: The model that the adapter is on.
        is_merged: Whether the adapter is merged into it.
    """
    is_folder = Path(base).is_absolute()
    name = Path(base).name if is_folder else base
    what = f"`{name}` with a LoRA adapter merged into it" if is_merged else f"A LoRA on `{name}`"
    if not config.is_peft:
        what, is_merged = f"`{name}`, all weights of it", True
    commit = record.get("model_commit")
    at = f", as it was at commit `{commit}`" if commit else ""
    versions = record["versions"]
    packages = ", ".join(f"{p} {versions[p]}" for p in ("torch", "transformers", "peft", "trl"))
    return "\n".join(
        [
            *_metadata(config, None if is_folder else base, is_merged),
            f"\n# {name}, {config.loss} ({job_id})\n",
            f"{what}{at}, trained with loss `{config.loss}` by openweights, job `{job_id}`.",
            "\n## How to load it\n",
            f"```python\n{_LOAD_MERGED if is_merged else _LOAD_ADAPTER}\n```",
            "\n## Data\n",
            *_table(("file", "id", "SHA-256"), _data(record)),
            "\n## Settings\n",
            *_table(("field", "value"), _settings(config)),
            "\nEverything else is at its default.",
            "\n## Figures at the end\n",
            *_table(("measure", "value"), _figures(history)),
            f"\nTrained on {record['device']} with {packages}. "
            "`reproducibility.json` among the job's results has the rest.\n",
        ]
    )


def _metadata(config: TrainingConfig, base: str | None, is_merged: bool) -> list[str]:
    lines = ["---", f"library_name: {'transformers' if is_merged else 'peft'}"]
    if base is not None:
        relation = "finetune" if is_merged else "adapter"
        lines += [f"base_model: {base}", f"base_model_relation: {relation}"]
    lines += ["pipeline_tag: text-generation", "tags:", "- openweights", f"- {config.loss}", "---"]
    return lines


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    return [line(head), line(["---"] * len(head)), *map(line, rows)]


def _data(record: Mapping[str, Any]) -> Iterable[tuple[str, str, str]]:
    for name, file in record["data"].items():
        # Of a local file only the name: where it lay is nobody's business.
        yield name, f"`{Path(file['file']).name}`", f"`{file['sha256']}`"


def _settings(config: TrainingConfig) -> Iterable[tuple[str, str]]:
    for name, value in config.model_dump(mode="json", exclude_defaults=True).items():
        if name not in _HIDDEN:
            yield f"`{name}`", f"`{_setting(value)}`".replace("\n", " ")


def _setting(value: object) -> str:
    if isinstance(value, float):
        return number_words(value)
    return json.dumps(value, ensure_ascii=False)


def _figures(history: Sequence[Mapping[str, Any]]) -> Iterable[tuple[str, str]]:
    """The last value of each number in the trainer's log."""
    last: dict[str, Any] = {}
    for entry in history:
        last |= entry
    for name, value in last.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield f"`{name}`", number_words(value, 6)
