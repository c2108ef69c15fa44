"""Numbers for people: one way to write each, in Python and on the page."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from pathlib import Path

import pytest

import openweights
from openweights.number_words import number_words, value_words

WRITTEN = {5e-5: "5e-5", 1e-4: "1e-4", 1.5e-4: "1.5e-4", 2e-4 / 3: "6.666666666666667e-5"} | {
    **{0.001: "0.001", 0.05: "0.05", -3e-7: "-3e-7", 12.5: "12.5"}
}


@pytest.mark.parametrize(("value", "words"), WRITTEN.items())
def test_a_number_is_written_as_people_write_rates(value: float, words: str) -> None:
    assert number_words(value) == words and float(words) == value
    assert value_words({"rate": [value]}) == f"{{'rate': [{words}]}}"


def test_digits_are_bounded_and_nothing_else_is_changed() -> None:
    assert number_words(2e-4 / 3, 6) == "6.66667e-5" and number_words(3, 1) == "3"
    assert number_words(1.0) == "1.0" and number_words(0.0, 5) == "0"
    assert number_words(math.nan) == "nan" and number_words(1e16) == "1e+16"
    assert value_words("5e-05 as it is") == "5e-05 as it is" and value_words([True, None]) == (
        "[True, None]"
    )


@pytest.mark.skipif(shutil.which("node") is None, reason="the page's own code needs node")
def test_the_page_writes_them_alike() -> None:
    static = Path(openweights.__file__).parent / "dashboard" / "static" / "dom.js"
    script = f"import {{ valueText }} from {json.dumps(static.as_uri())};"
    script += f"console.log(JSON.stringify({json.dumps([*WRITTEN])}.map(valueText)))"
    done = subprocess.run(
        ["node", "--input-type=module", "-e", script], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == [*WRITTEN.values()]
