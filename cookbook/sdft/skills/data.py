"""The skills of the study, as rows to train on and rows that are held out.

- `tool_use`: which function is to be called how, from the Berkeley Function Calling Leaderboard
  (PyPI `bfcl-eval`, Apache-2.0), which is downloaded by name when the study runs. Four categories
  with one right call; the answer is that call in Python's syntax, in square brackets.
- `arithmetic`: word problems in two steps, answered by the number alone. Made here; the held-out
  ones have people, things and stories that no training row has.
- `orders`: those of `ow demo` (`../make_data.py`).

Every row has the columns `skill` and `right`, which `grading.py` reads, and an `id`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cookbook.sdft.skills.grading import is_right
from openweights.jobs.evaluate.data import PackageFile, read_package

SEED = 20261
MOST_PROMPT_CHARACTERS = 3400
TOOL_ROWS = (800, 300)
ARITHMETIC_ROWS = (800, 200)
ORDERS = Path(__file__).parents[1] / "data"

Row = dict[str, Any]


class Split(NamedTuple):
    """Rows of a skill."""

    train: list[Row]
    test: list[Row]


def skill_rows(skill: str, *, easy: bool = False) -> Split:
    """The rows of a skill, always the same.

    Args:
        easy: Smaller numbers, for a model that cannot calculate.
    """
    makers: dict[str, Callable[[], Split]] = {
        "tool_use": _tool_use,
        "arithmetic": lambda: _arithmetic(easy),
        "orders": _orders,
    }
    return makers[skill]()


SKILLS = ("tool_use", "arithmetic", "orders")


def _row(skill: str, number: int, messages: list[dict[str, str]], right: Any = None) -> Row:
    return {
        "messages": messages,
        "id": f"{skill}-{number}",
        "skill": skill,
        "right": json.dumps(right, ensure_ascii=False),
    }


def _asked(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


# ---- tool use ------------------------------------------------------------------------------------

BFCL = "bfcl-eval==2026.3.23"
CATEGORIES = {
    "simple_python": (
        "82dd63ba502eb2520c6b5d1d9a5c4b590e03ff261565175561f6228a367d1991",
        "90cd5bc653690ee8e459b5b3f3fc9458606f7f3fcbf795bb51b7dc581f8c86dc",
    ),
    "multiple": (
        "aef168155ebd74b7ac2401198b201343bc7d16d7a3d7e0d4e6d8ee82c6969b2a",
        "244e00ce9395df948bcafc7bee64e8f9c87ef70887587d83cae45b13699f3047",
    ),
    "live_simple": (
        "1af2ac87dca47556db7b7e37e51e28b459a38b594e3c7b3c792b4903598ca0c4",
        "fec9cfa9744a936f9126981e85a2023da1e63e273eafebc81923a1162fad70ce",
    ),
    "live_multiple": (
        "fd8ccfad4d911420d0e3341dbe2fff77d1d341da934248b9bb2bda24ab3a10c8",
        "97e90d59c5bd76c55a2920ce93e5566e9046307d3f558578f085f9d3a56c3084",
    ),
}
CALL = (
    "Answer with one call of one of these functions, in Python's syntax and in square brackets, "
    "and nothing else.\n\n{functions}"
)


def _tool_use() -> Split:
    rows: list[Row] = []
    for category, hashes in CATEGORIES.items():
        name = f"BFCL_v4_{category}.json"
        files = [
            PackageFile(BFCL, f"bfcl_eval/data/{folder}{name}", sha256)
            for folder, sha256 in zip(("", "possible_answer/"), hashes, strict=True)
        ]
        questions, answers = read_package(*files)
        truths = {answer["id"]: answer["ground_truth"] for answer in answers}
        rows += [row for q in questions if (row := _call_row(q, truths[q["id"]])) is not None]
    rows = [{**row, "id": f"tool_use-{number}"} for number, row in enumerate(rows)]
    random.Random(SEED).shuffle(rows)
    train, test = TOOL_ROWS
    return Split(rows[:train], rows[train : train + test])


EXAMPLE = (
    "\n\nFor example, [get_weather(city='Paris', days=3)] is such a call, of a function that is "
    "not among these."
)


def exploring(rows: Sequence[Row]) -> list[Row]:
    """Rows whose every second prompt, of those that tell what is wanted, shows an answer's form.

    A model that never draws a call finds no reward; what it finds where it was shown one it then
    does elsewhere, too. Held-out rows show none.
    """
    return [_shown(row) if number % 2 == 0 else row for number, row in enumerate(rows)]


def _shown(row: Row) -> Row:
    first, *others = row["messages"]
    if first["role"] != "system":
        return row
    return {**row, "messages": [{**first, "content": first["content"] + EXAMPLE}, *others]}


def _call_row(question: Row, truth: Sequence[Row]) -> Row | None:
    """None for what has several turns, several calls, a long prompt, or no answer that is right."""
    if len(question["question"]) != 1 or len(truth) != 1:
        return None
    [(name, values)] = truth[0].items()
    functions = [one for one in question["function"] if one["name"] == name]
    told = CALL.format(functions="\n".join(map(json.dumps, question["function"])))
    messages = [{"role": "system", "content": told}, *question["question"][0]]
    if len(functions) != 1 or sum(len(m["content"]) for m in messages) > MOST_PROMPT_CHARACTERS:
        return None
    if [m["role"] for m in messages] != ["system", "user"]:
        return None
    given = _first(values)
    call = ", ".join(f"{argument}={value!r}" for argument, value in given.items())
    answer = {"role": "assistant", "content": f"[{name}({call})]"}
    row = _row("tool_use", 0, [*messages, answer], {"function": functions[0], "values": truth[0]})
    # A few of the board's own answers leave out what the schema requires.
    return row if is_right(answer["content"], "", row["skill"], row["right"]) else None


def _first(value: Any) -> Any:
    """Of a dictionary's values, which are lists of what is allowed, the first each; an empty text
    or nothing says that it is left out.
    """
    if isinstance(value, list):
        return [_first(one) for one in value]
    if not isinstance(value, dict):
        return value
    told = {key: allowed[0] for key, allowed in value.items() if allowed}
    return {key: _first(one) for key, one in told.items() if one != ""}


# ---- arithmetic ----------------------------------------------------------------------------------


class Story(NamedTuple):
    """A problem in words, with the numbers a, b and c."""

    text: str
    answer: Callable[[int, int, int], int]


TRAIN_STORIES = (
    Story("{who} has {a} boxes with {b} {what} each and gives away {c} {what}. How many {what} are "
          "left?", lambda a, b, c: a * b - c),
    Story("{who} buys {a} {what} on Monday and {b} on Tuesday, and loses {c} of them. How many "
          "{what} does {who} have now?", lambda a, b, c: a + b - c),
    Story("A shop sells {what} for {a} coins each. {who} buys {b} of them and pays {c} coins for a "
          "bag. How many coins does {who} spend?", lambda a, b, c: a * b + c),
)  # fmt: skip
TEST_STORIES = (
    Story("In a hall there are {a} rows of {b} {what}. {who} brings {c} more. How many {what} are "
          "there now?", lambda a, b, c: a * b + c),
    Story("{who} counts {a} {what} in one room and {b} in another, and takes {c} away. How many "
          "{what} remain?", lambda a, b, c: a + b - c),
)  # fmt: skip
TRAIN_WORDS = (
    ["Mia", "Tom", "Ana", "Leo", "Zoe", "Max", "Eva", "Ben", "Ida", "Sam"],
    ["pens", "cups", "caps", "keys", "nuts"],
)
TEST_WORDS = (["Ruth", "Omar", "Lena", "Hugo"], ["chairs", "lamps", "plants"])


def _arithmetic(easy: bool) -> Split:
    chance = random.Random(SEED)
    train, test = ARITHMETIC_ROWS
    made = _problems(chance, TRAIN_STORIES, TRAIN_WORDS, easy, train + test)
    other = _problems(chance, TEST_STORIES, TEST_WORDS, easy, test)
    return Split(made[:train], other)


def _problems(
    chance: random.Random,
    stories: Sequence[Story],
    words: tuple[list[str], list[str]],
    easy: bool,
    count: int,
) -> list[Row]:
    most = 4 if easy else 19
    found: dict[str, int] = {}
    while len(found) < count:
        story = chance.choice(stories)
        a, b, c = (chance.randint(2, most) for _ in range(3))
        answer = story.answer(a, b, c)
        if answer >= 0:
            names, things = words
            text = story.text.format(
                who=chance.choice(names), what=chance.choice(things), a=a, b=b, c=c
            )
            found[text] = answer
    rows = enumerate(found.items())
    return [
        _row("arithmetic", number, _asked(text, str(answer))) for number, (text, answer) in rows
    ]


# ---- orders --------------------------------------------------------------------------------------


def _orders() -> Split:
    splits = []
    for name in ("train", "test"):
        lines = (ORDERS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        splits.append([_row("orders", n, row["messages"]) for n, row in enumerate(rows)])
    return Split(*splits)
