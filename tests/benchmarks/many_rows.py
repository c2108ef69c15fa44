"""CPU time and peak memory of large datasets: what `create` takes, and a training of one step of a
tiny random model, nearly all of it before that step.

Run it with `python -m tests.benchmarks.many_rows short|long [sft|dpo|orpo] [rows]`: `short` are
1.24 million chats of 170 bytes each, `long` 200 answers of a megabyte.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
KINDS = {"short": (1_240_000, 8), "long": (200, 180_000)}  # rows, and words of an answer

MODEL = """
import sys
from pathlib import Path
from tests.tiny_model import make_tiny_model
make_tiny_model(Path(sys.argv[1]))
"""
CREATE = """
import sys
from openweights import OpenWeights
params = __import__("json").loads(sys.argv[1])
print(OpenWeights().fine_tuning.create(**params, dry_run=True))
"""


def texts(words: int, seed: int = 0) -> Iterator[str]:
    """Texts of about so many random words, of 5.5 characters each with the space."""
    draw = random.Random(seed)
    vocabulary = [
        "".join(draw.choices("etaoinshrdlucmfwyp", k=draw.randint(2, 7))) for _ in range(5000)
    ]
    while True:
        yield " ".join(draw.choices(vocabulary, k=draw.randint(words // 2, words * 3 // 2)))


def write_rows(path: Path, rows: int, words: int, loss: str) -> str:
    """Write a file for a loss, and say its purpose."""
    asked, said = texts(8, seed=1), texts(words)
    with path.open("w") as file:
        for _ in range(rows):
            user = {"role": "user", "content": next(asked)}
            answer, other = ({"role": "assistant", "content": next(said)} for _ in range(2))
            row = {"messages": [user, answer]}
            if loss in ("dpo", "orpo"):
                row = {"prompt": [user], "chosen": [answer], "rejected": [other]}
            file.write(json.dumps(row) + "\n")
    return "preference" if loss in ("dpo", "orpo") else "conversations"


def measured(arguments: list[str], folder: Path, home: Path) -> str:
    """What a Python with these arguments takes, in words."""
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OPENWEIGHTS_HOME": str(home)}
    before, output = time.monotonic(), folder / "out.txt"
    with output.open("wb") as out:
        command = [sys.executable, *arguments]
        child = subprocess.Popen(command, cwd=folder, env=env, stdout=out, stderr=out)
        _, status, used = os.wait4(child.pid, 0)  # of this child and its own alone
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        print(output.read_text()[-2000:])
    cpu, wall = used.ru_utime + used.ru_stime, time.monotonic() - before
    return f"{cpu:.1f} s of CPU ({wall:.1f} s), {used.ru_maxrss / 1e6:.2f} GB at most"


def main() -> None:
    """Print a line for each of the two processes."""
    kind, loss = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "sft"
    rows, words = KINDS[kind]
    rows = int(sys.argv[3]) if len(sys.argv) > 3 else rows
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = folder / "model"
        measured(["-c", MODEL, str(model)], folder, folder / "home")
        file = folder / "rows.jsonl"
        purpose = write_rows(file, rows, words, loss)
        print(f"{rows:,} {kind} rows, {file.stat().st_size / 1e6:.0f} MB ({purpose}), {loss}")
        params = {
            "model": str(model),
            "training_file": str(file),
            "loss": loss,
            "max_steps": 1,
            "max_seq_length": 512,
        }
        created = measured(["-c", CREATE, json.dumps(params)], folder, folder / "home")
        print(f"create:  {created}")
        (folder / "config.json").write_text(json.dumps(params))
        training = ["-m", "openweights.jobs.unsloth.training", "config.json"]
        print(f"training: {measured(training, folder, folder / 'home')}")


if __name__ == "__main__":
    main()
