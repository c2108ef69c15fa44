"""The README of a result."""

from __future__ import annotations

from typing import Any

from openweights.jobs.unsloth.runtime.model_card import model_card
from openweights.jobs.unsloth.validate import TrainingConfig
from tests.jobs.unsloth.malformed_configs import FILE

RECORD: dict[str, Any] = {
    "versions": {"torch": "2.13", "transformers": "5", "peft": "1", "trl": "2", "python": "3.11"},
    "device": "NVIDIA H100 NVL",
    "data": {"training_file": {"file": FILE, "sha256": "ab" * 32}},
}
HISTORY = [
    {"step": 1, "loss": 2.0, "learning_rate": 1e-4},
    {"step": 2, "eval_loss": 1.25},
    {"step": 2, "loss": 1.5},
]
CONFIG = TrainingConfig(
    model="org/name", training_file=FILE, loss="sft", r=8, learning_rate=3e-4, meta={"who": "me"}
)


def test_card_of_an_adapter() -> None:
    card = model_card(CONFIG, RECORD, HISTORY, base="org/name", job_id="ftjob-1")
    assert (
        card
        == f"""\
---
library_name: peft
base_model: org/name
base_model_relation: adapter
pipeline_tag: text-generation
tags:
- openweights
- sft
---

# org/name, sft (ftjob-1)

A LoRA on `org/name`, trained with loss `sft` by openweights, job `ftjob-1`.

## How to load it

```python
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

here = "."  # this folder, or the name of this repository
model = AutoPeftModelForCausalLM.from_pretrained(here)
tokenizer = AutoTokenizer.from_pretrained(here)
```

## Data

| file | id | SHA-256 |
| --- | --- | --- |
| training_file | `{FILE}` | `{"ab" * 32}` |

## Settings

| field | value |
| --- | --- |
| `r` | `8` |
| `learning_rate` | `3e-4` |

Everything else is at its default.

## Figures at the end

| measure | value |
| --- | --- |
| `step` | 2 |
| `loss` | 1.5 |
| `learning_rate` | 1e-4 |
| `eval_loss` | 1.25 |

Trained on NVIDIA H100 NVL with torch 2.13, transformers 5, peft 1, trl 2. \
`reproducibility.json` among the job's results has the rest.
"""
    )


def test_card_of_a_merged_model_and_of_a_folder() -> None:
    record = {**RECORD, "data": {"training_file": {"file": "/home/me/x.jsonl", "sha256": "0"}}}
    card = model_card(
        CONFIG, record, [], base="/home/me/models/tiny", job_id="local", is_merged=True
    )
    assert "/home/me" not in card and "base_model" not in card
    assert "`tiny` with a LoRA adapter merged into it" in card
    assert "library_name: transformers" in card and "AutoModelForCausalLM" in card
