"""Answers a file of prompts with a model, an adapter, or a fine-tuning job.

python cookbook/inference/run_inference.py [--model NAME|FOLDER|ftjob-…] [--prompts FILE] [-n 2]
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cookbook.models import Choice, as_command, choice, count, parser
from openweights import OpenWeights

PROMPTS = Path(__file__).parent / "prompts.jsonl"


def params(chosen: Choice, prompts: str = str(PROMPTS), n: int = 1) -> dict[str, Any]:
    """What `inference.create` is told."""
    return {
        "model": chosen.model,
        "input_file_id": prompts,
        "max_tokens": 40,
        "temperature": 0.7,
        "n_completions_per_prompt": n,
    }


def main() -> None:
    """Ask, wait, and print each prompt with its answers."""
    ow = OpenWeights()
    options = parser(__doc__)
    options.add_argument("--prompts", default=str(PROMPTS), help="JSON lines with `messages`")
    options.add_argument("-n", type=count, default=1, help="answers to each prompt")
    asked = options.parse_args()
    chosen = choice(ow, asked)
    job = ow.inference.create(
        **params(chosen, asked.prompts, asked.n), requires_vram_gb=chosen.vram_gb
    )
    job.wait()
    assert job.outputs is not None
    for line in ow.files.content(job.outputs["file"]).splitlines():
        row = json.loads(line)
        print(f"[{row.get('topic', '')}] {row['messages'][-1]['content']}")
        answers = row["completion"]
        for answer in [answers] if isinstance(answers, str) else answers:
            print(f"    -> {' '.join(answer.split())}")


if __name__ == "__main__":
    as_command(main)
