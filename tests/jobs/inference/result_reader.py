"""A reader of inference results, written from the format's description alone: JSON lines in the
order of the input, each row as it was, with `completion` and `logprobs`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

ADDED = {"completion", "logprobs"}


def read_results(
    content: bytes, rows: Sequence[Mapping[str, Any]], *, n: int = 1, logprobs: int | None = None
) -> list[dict[str, Any]]:
    """The results, each looked at closely.

    Args:
        rows: The input.
        n: Completions that were asked for; with more than one, all of them are lists.
        logprobs: How many likeliest tokens were asked for.
    """
    assert content.endswith(b"\n"), "the last line is whole"
    results = [json.loads(line) for line in content.decode("utf-8").splitlines()]
    assert [{k: v for k, v in row.items() if k not in ADDED} for row in results] == list(rows)
    for result in results:
        assert result.keys() >= ADDED
        texts, values = result["completion"], result["logprobs"]
        if n == 1:
            texts, values = [texts], [values]
        elif values is None:
            values = [None] * n
        assert len(texts) == len(values) == n and all(isinstance(text, str) for text in texts)
        for tokens in values:
            _check_tokens(tokens, logprobs)
    return results


def _check_tokens(tokens: Any, logprobs: int | None) -> None:
    if logprobs is None:
        assert tokens is None
        return
    for token in tokens:
        assert isinstance(token["token"], str)
        assert math.isfinite(token["logprob"]) and token["logprob"] <= 0
        assert len(token["top_logprobs"]) <= logprobs
        likeliest = [top["logprob"] for top in token["top_logprobs"]]
        assert likeliest == sorted(likeliest, reverse=True)
