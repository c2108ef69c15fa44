"""What the teacher gate says of a model, and how long it takes.

    python -m tests.benchmarks.teacher_gate MODEL [--rows F] [--reward file.py:function]
        [--count 8] [--new 96] [--engine auto] [--json F]

Rows are a `conversations` file; by default the orders of the cookbook.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from openweights.generation.choose import generation_engine
from openweights.jobs.unsloth.distillation.gate import open_gate
from openweights.jobs.unsloth.validate import TrainingConfig
from openweights.models.forward import active_adapter
from openweights.models.load import load_trained

ORDERS = Path(__file__).parents[2] / "cookbook" / "sdft" / "data" / "train.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--rows", type=Path, default=ORDERS)
    parser.add_argument("--reward")
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--new", type=int, default=96)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.NamedTemporaryFile(suffix=".jsonl") as data:
        config = TrainingConfig(
            model=options.model,
            training_file=data.name,
            loss="sdft",
            max_seq_length=4096,
            sdft_max_new_tokens=options.new,
            sdft_gate="warn",
            sdft_gate_rows=options.count,
            sdft_gate_reward=options.reward,
        )
    model, tokenizer = load_trained(options.model)
    engine = generation_engine(options.engine, model, tokenizer)
    rows = [json.loads(line) for line in options.rows.read_text(encoding="utf-8").splitlines()]
    events: list[dict[str, Any]] = []
    for _ in range(2):  # the first call captures and compiles
        started = time.perf_counter()
        gate = open_gate(
            config, engine, active_adapter(model), tokenizer, rows, lambda file, target: Path(file)
        )
        assert gate is not None, "no row fits"
        gate.choose(events.append)
        seconds = time.perf_counter() - started
    result = {"engine": engine.name, "s": round(seconds, 2), **events[-1]}
    print(json.dumps(result, indent=1, ensure_ascii=False))
    if options.json:
        options.json.write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
