"""Writes the data of the SDFT example into `data/`, always the same bytes.

The skill: an order in plain words becomes one ledger line, `City: number colour things.` The base
model does not write such lines, but it does once it has been shown one, which is what
self-distillation needs. The held-out orders name cities and things, and use turns of phrase, that
no training row has.

    python cookbook/sdft/make_data.py [FOLDER]
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import NamedTuple

SEED = 20260
TRAIN_ROWS, TEST_ROWS = 192, 64

Row = dict[str, list[dict[str, str]]]


class Words(NamedTuple):
    """What the orders of one split are made of, separated by spaces; phrases by lines."""

    cities: str
    things: str
    phrases: str


COLOURS = "red green blue white black yellow brown grey orange purple"
TRAIN = Words(
    cities="Oslo Rome Paris Lima Cairo Tokyo Berlin Madrid Vienna Dublin Athens Boston Delhi Seoul "
    "Geneva Lisbon Milan Prague Warsaw Sydney Toronto Dallas Munich Naples",
    things="lamps chairs books cups shirts plates pens boxes towels ropes bottles candles bags "
    "hats spoons brushes curtains tables blankets umbrellas",
    phrases="""\
Please send {count} {colour} {things} to {city}.
We need {count} {colour} {things} in {city}.
{city} asks for {count} {colour} {things}.
Can you ship {count} {colour} {things} to {city}?
Our shop in {city} wants {count} {colour} {things}.
I would like {count} {colour} {things} delivered to {city}.
The office in {city} has run out of {things}: send {count} {colour} ones.
It is for {city}: {count} {things}, all of them {colour}.
""",
)
TEST = Words(
    cities="London Moscow Nairobi Havana Zurich Chicago Helsinki Mumbai Denver Bergen Kyoto Porto",
    things="jackets clocks mirrors buckets pillows baskets scarves bowls ladders benches",
    phrases="""\
Could we have {count} {colour} {things} in {city}, please?
A customer from {city} ordered {count} {colour} {things}.
Send {city} {count} {colour} {things}.
My team in {city} is waiting for {count} {colour} {things}.
""",
)


def order_row(words: Words, rng: random.Random) -> Row:
    """One conversation: the order, and the ledger line that answers it."""
    city, things = rng.choice(words.cities.split()), rng.choice(words.things.split())
    colour, count = rng.choice(COLOURS.split()), rng.randint(2, 40)
    phrase = rng.choice(words.phrases.splitlines())
    order = phrase.format(city=city, things=things, colour=colour, count=count)
    return {
        "messages": [
            {"role": "user", "content": f"Summarise this order: {order}"},
            {"role": "assistant", "content": f"{city}: {count} {colour} {things}."},
        ]
    }


def order_rows(words: Words, count: int, rng: random.Random) -> list[Row]:
    """`count` rows with different orders."""
    rows: dict[str, Row] = {}
    while len(rows) < count:
        row = order_row(words, rng)
        rows.setdefault(row["messages"][0]["content"], row)
    return list(rows.values())


def make_files() -> dict[str, str]:
    """File name to content, from the fixed seed."""
    rng = random.Random(SEED)
    splits = {
        "train.jsonl": order_rows(TRAIN, TRAIN_ROWS, rng),
        "test.jsonl": order_rows(TEST, TEST_ROWS, rng),
    }
    return {name: "".join(json.dumps(row) + "\n" for row in rows) for name, rows in splits.items()}


def main() -> None:
    """Write the files."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("folder", type=Path, nargs="?", default=Path(__file__).parent / "data")
    folder: Path = asked.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in make_files().items():
        (folder / name).write_text(text)
        print(f"{folder / name}: {len(text.splitlines())} rows")


if __name__ == "__main__":
    main()
