"""The committed data are what the generator writes, and can serve their purpose."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from openweights import OpenWeights

SDFT = Path(__file__).parents[3] / "cookbook" / "sdft"


def questions(name: str) -> dict[str, str]:
    """Order to ledger line, of a split."""
    lines = (SDFT / "data" / name).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line)["messages"] for line in lines]
    assert all([message["role"] for message in row] == ["user", "assistant"] for row in rows)
    return {row[0]["content"]: row[1]["content"] for row in rows}


def test_committed_files_are_the_generators_output(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(SDFT / "make_data.py"), str(tmp_path)], check=True)
    names = {"train.jsonl", "test.jsonl"}
    assert {path.name for path in tmp_path.iterdir()} == names
    for name in names:
        assert (tmp_path / name).read_bytes() == (SDFT / "data" / name).read_bytes(), name


def test_answers_are_correct_and_splits_disjoint() -> None:
    train, test = questions("train.jsonl"), questions("test.jsonl")
    assert len(train) >= 160 and len(test) >= 48
    words: dict[str, set[str]] = {"train": set(), "test": set()}
    for split, rows in (("train", train), ("test", test)):
        for order, line in rows.items():
            found = re.fullmatch(r"([A-Z][a-z]+): (\d+) ([a-z]+) ([a-z]+)\.", line)
            assert found, line
            # All of the answer stands in the order: there is nothing to be guessed.
            assert set(found.groups()) <= set(re.findall(r"\w+", order)), order
            assert re.findall(r"\d+", order) == [found[2]], order
            words[split] |= {found[1], found[4]}
    assert not train.keys() & test.keys()
    assert not words["train"] & words["test"]  # cities and things


def test_the_store_takes_the_files() -> None:
    ow = OpenWeights()
    for name in ("train.jsonl", "test.jsonl"):
        assert ow.files.validate(SDFT / "data" / name, "conversations")
