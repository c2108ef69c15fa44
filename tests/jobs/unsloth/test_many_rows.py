"""Large datasets: rows that are parsed when they are read, and flat arrays of tokens, give what
lists of all rows gave, and take a small part of their memory.
"""

from __future__ import annotations

import json
import random
import tracemalloc
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from openweights.client.messages import LISTED_ERRORS
from openweights.errors import DatasetError
from openweights.jobs.unsloth.config.encoding import encode_row, pieces_of_tokens
from openweights.jobs.unsloth.config.file_rows import open_rows, rows_taken
from openweights.jobs.unsloth.config.rows import is_weighted, read_rows
from openweights.jobs.unsloth.data import end_texts, learned_rows, sft_examples
from openweights.jobs.unsloth.token_table import TokenTable
from openweights.jobs.unsloth.training import hold_out
from openweights.models.tokens import IGNORED
from tests.learned_rows import TOKENIZERS, Row, config, row, said, user
from tests.tiny_model import make_tokenizer

WORDS = ["the", "Ünder", "  and", "\n", "you're", "<b>", "\u2028", "日本", "0.5", "🙂"]


def text(draw: random.Random, most: int = 12) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(1, most))) + "."


def random_row(draw: random.Random, *, weighted: bool, bad: float) -> Row:
    """A conversation of one to three turns, or plain text; some cannot be used."""
    if draw.random() < bad:
        return row(user(f"<|im_end|>{text(draw)}"), said("a"))
    if draw.random() < 0.1:
        return {"text": text(draw)}
    turns = []
    for _ in range(draw.randint(1, 3)):
        weight = (
            {"weight": draw.choice([0, 0.3, 1, -2])} if weighted and draw.random() < 0.3 else {}
        )
        turns += [user(text(draw, draw.choice([3, 30]))), said(text(draw), **weight)]
    return row(*turns)


def write(path: Path, rows: list[Row], draw: random.Random) -> Path:
    """As a file with blank lines, perhaps with a byte order mark, or without a last line end."""
    lines = [json.dumps(one, ensure_ascii=draw.random() < 0.5) for one in rows]
    blank = [line + "\n" + draw.choice(["", "", "\n", "  \r\n"]) for line in lines]
    encoding = draw.choice(["utf-8", "utf-8-sig"])
    path.write_text("".join(blank).rstrip() + draw.choice(["", "\n"]), encoding, newline="")
    return path


def slowly(settings: Any, tokenizer: Any, rows: list[Any]) -> tuple[list[Row], list[str]]:
    """Rows one by one, all of them held: what is kept, and what is wrong with the others."""
    kept, wrong, columns = list[Row](), list[str](), ["input_ids", "labels"]
    columns += ["weights"] if any(map(is_weighted, rows)) else []
    for one in rows:
        try:
            encoded = encode_row(one, tokenizer, train_on="responses", ends=end_texts(tokenizer))
        except ValueError as error:
            wrong.append(f"training_file:{one.line}: {error}")
            continue
        whole = {column: getattr(encoded, column)[: settings.max_seq_length] for column in columns}
        if encoded.is_silent or any(label != IGNORED for label in whole["labels"]):
            kept.append(whole)
    return kept, wrong


@pytest.mark.parametrize("seed", range(8))
def test_rows_of_a_file_are_what_all_of_them_in_lists_were(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    weighted, bad = seed % 2 == 1, 0.05 if seed % 3 == 2 else 0.0
    rows = [random_row(draw, weighted=weighted, bad=bad) for _ in range(60)]
    file = write(tmp_path / "rows.jsonl", rows, draw)
    settings, tokenizer = config(max_seq_length=120), draw.choice(list(TOKENIZERS.values()))
    parsed, (expected, wrong) = open_rows(file), slowly(settings, tokenizer, read_rows(file))
    assert [*parsed] == rows == read_rows(file)
    assert [one.line for one in parsed] == [one.line for one in read_rows(file)]  # type: ignore[attr-defined]
    assert wrong or not bad
    if wrong:
        with pytest.raises(DatasetError) as caught:
            learned_rows(settings, tokenizer, parsed)
        assert str(caught.value).splitlines()[:LISTED_ERRORS] == wrong[:LISTED_ERRORS]
        return
    table = learned_rows(settings, tokenizer, parsed)
    assert table.is_weighted == weighted
    assert [*table.for_training(table.is_weighted)] == [*table] == expected
    with_weights = sft_examples(settings, tokenizer, rows, with_weights=True)
    assert [one["input_ids"] for one in with_weights] == [one["input_ids"] for one in table]
    for one, other in zip(with_weights, table, strict=True):
        plain = [float(label != IGNORED) for label in one["labels"]]
        assert one["weights"] == other.get("weights", plain)


def test_what_is_held_out_of_a_file_is_what_is_of_a_list(tmp_path: Path) -> None:
    draw = random.Random(0)
    file = write(tmp_path / "rows.jsonl", [{"text": str(at)} for at in range(40)], draw)
    rows, parsed = read_rows(file), open_rows(file)
    assert [[*part] for part in hold_out(parsed, 0.2, 3)] == [*hold_out(rows, 0.2, 3)]
    assert [one.line for one in rows_taken(parsed[::-1], [2, 0])] == [rows[-3].line, rows[-1].line]  # type: ignore[attr-defined]
    file.write_text("gone")
    assert [*parsed] == rows, "whatever becomes of the file"


def test_a_table_gives_its_rows_as_the_library_does() -> None:
    draw, table = random.Random(1), TokenTable("input_ids", "labels")
    rows = [
        {name: draw.choices(range(-100, 99), k=size) for name in table.columns}
        for size in (draw.randint(0, 9) for _ in range(50))
    ]
    for one in rows:
        table.append({**one, "weights": []})
    table.add_reals("halves", "labels", lambda label: label / 2)
    assert [*table.dataset("input_ids", "labels")] == rows == [*map(dict, table_of(table))]
    assert table[-1]["halves"] == [label / 2 for label in rows[-1]["labels"]]
    assert [one["labels"] for one in table[3:9:2]] == [one["labels"] for one in rows[3:9:2]]
    by_size = sorted(rows, key=lambda one: len(one["input_ids"]), reverse=True)
    assert table.longest(2) == [{"input_ids": one["input_ids"]} for one in by_size[:2]]
    assert table.count("labels", 5) == sum(one["labels"].count(5) for one in rows)
    with pytest.raises(IndexError):
        table[50]


def table_of(table: TokenTable) -> list[Row]:
    return [{name: one[name] for name in ("input_ids", "labels")} for one in table]


def most_held(work: Callable[[], object]) -> int:
    """Bytes that Python holds at most during some work, beside what was there."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_row_takes_its_text_and_eight_bytes_a_token(tmp_path: Path) -> None:
    draw, settings, tokenizer = random.Random(0), config(), make_tokenizer()
    rows = [row(user(text(draw)), said(text(draw))) for _ in range(300)]
    file = write(tmp_path / "rows.jsonl", rows, draw)
    first = learned_rows(settings, tokenizer, rows)  # what is kept for all rows is there by then
    # A column that is full is copied to a somewhat larger one.
    bound = file.stat().st_size + 1.5 * 8 * first.size("labels") + 32 * len(rows) + 100_000
    found = most_held(lambda: learned_rows(settings, tokenizer, open_rows(file)))
    control = most_held(lambda: slowly(settings, tokenizer, read_rows(file)))
    assert found < bound < control / 2, f"{found} bytes of {bound:.0f}, in lists {control}"


def test_a_token_is_of_the_first_piece_that_it_touches() -> None:
    draw = random.Random(2)
    for _ in range(500):
        borders = sorted(draw.choices(range(30), k=draw.randint(1, 8)))
        pieces = [(start, stop, 1.0) for start, stop in pairwise(borders) if draw.random() < 0.7]
        starts = sorted(draw.choices(range(30), k=draw.randint(0, 15)))
        offsets = [(start, start + draw.randint(0, 3)) for start in starts]
        touched = [
            [at for at, (a, b, _) in enumerate(pieces) if max(a, start) < min(b, stop)]
            for start, stop in offsets
        ]
        assert pieces_of_tokens(offsets, pieces) == [next(iter(own), None) for own in touched]
