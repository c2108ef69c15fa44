"""Puts an evaluation of inspect-ai to a model: tasks of one's own, or those of inspect_evals.

python cookbook/evaluation/inspect_eval.py [--model NAME|ftjob-…] [--eval inspect_evals/gsm8k]
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cookbook.models import RESULTS, Choice, as_command, choice, parser
from openweights import OpenWeights

TASKS = f"{Path(__file__).parent / 'tasks.py'}@capitals"


def params(chosen: Choice, eval_name: str = TASKS) -> dict[str, Any]:
    """What `inspect_ai.create` is told."""
    limit = "" if chosen.most_steps is None else f"--limit {chosen.most_steps}"
    return {"model": chosen.model, "eval_name": eval_name, "options": limit, "max_model_len": 2048}


def main() -> None:
    """Evaluate, print the scores, and fetch the log, which `inspect view` shows."""
    ow = OpenWeights()
    options = parser(__doc__)
    options.add_argument("--eval", default=TASKS, help="file.py@task, or inspect_evals/NAME")
    asked = options.parse_args()
    chosen = choice(ow, asked)
    job = ow.inspect_ai.create(**params(chosen, asked.eval), requires_vram_gb=chosen.vram_gb)
    job.wait()
    for event in job.events(type="inspect"):
        scores = {name: event.data[name] for name in ("accuracy", "stderr") if name in event.data}
        print(event.data["task"], event.data["scorer"], scores)
    folder = RESULTS / job.id
    job.download(folder)
    print(f"the log is in {folder}/inspect")


if __name__ == "__main__":
    as_command(main)
