"""What an engine answers to rows: samples, log-probabilities, stop texts, limits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from openweights.errors import DatasetError
from openweights.generation.choose import generation_engine
from openweights.jobs.inference import InferenceConfig
from openweights.jobs.inference.answers import engine_answers
from tests.jobs.inference.result_reader import read_results
from tests.rounding import assert_sums_equal, terms_of

ROW = {"messages": [{"role": "user", "content": "Hi there"}]}


@pytest.fixture(scope="module")
def model(tiny: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny).eval()


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny)


def answers(model: Any, tokenizer: Any, rows: list[Any], **params: Any) -> list[dict[str, Any]]:
    config = InferenceConfig(model="some/model", input_file_id="conversations:file-0", **params)
    engine = generation_engine("transformers", model, tokenizer)
    found = engine_answers(engine, tokenizer, None, config, rows, range(len(rows)))
    whole = [(row, result) for row, result, _ in found if result is not None]
    return [dict(result) for _, result in sorted(whole, key=lambda item: item[0])]


def test_answers_are_told_of_while_they_grow(model: Any, tokenizer: Any) -> None:
    config = InferenceConfig(
        model="some/model", input_file_id="conversations:file-0", max_tokens=9, min_tokens=9
    )
    engine = generation_engine("transformers", model, tokenizer)
    found = list(engine_answers(engine, tokenizer, None, config, [ROW, ROW], range(2)))
    grown = [result is None for _, result, _ in found]
    assert grown == [True] * 18 + [False] * 2, "a token of a row each, then both answers"
    assert sum(tokens for _, _, tokens in found) == 18


def test_samples_are_a_list_and_a_function_of_the_seed(model: Any, tokenizer: Any) -> None:
    params: dict[str, Any] = {"n_completions_per_prompt": 3, "max_tokens": 10}
    first = answers(model, tokenizer, [ROW, ROW], **params)
    assert [len(row["completion"]) for row in first] == [3, 3]
    texts = [text for row in first for text in row["completion"]]
    assert len(set(texts)) == 6, "each row and each sample has random numbers of its own"
    written = "".join(json.dumps({**ROW, **row}) + "\n" for row in first).encode()
    assert read_results(written, [ROW, ROW], n=3)
    assert answers(model, tokenizer, [ROW, ROW], **params) == first
    assert answers(model, tokenizer, [ROW, ROW], seed=1, **params) != first


def test_log_probabilities_equal_a_plain_forward(model: Any, tokenizer: Any) -> None:
    params: dict[str, Any] = {"max_tokens": 8, "logprobs": 3, "n_completions_per_prompt": 2}
    (row,) = answers(model, tokenizer, [ROW], **params)
    read_results(json.dumps({**ROW, **row}).encode() + b"\n", [ROW], n=2, logprobs=3)
    messages = ROW["messages"]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    known = {tokenizer.decode([token]): token for token in range(len(tokenizer))}
    exact = model.double()
    for told in row["logprobs"]:
        ids = [known[entry["token"]] for entry in told if entry["token"] in known]
        if len(ids) < len(told) or "\ufffd" in "".join(entry["token"] for entry in told):
            told, ids = told[:1], ids[:1]  # bytes that are no characters have no names
        with torch.no_grad():
            logits = exact(torch.tensor([[*prompt, *ids]])).logits[0]
        logps = logits.log_softmax(-1)[len(prompt) - 1 :]
        for entry, token, place in zip(told, ids, logps, strict=False):
            tops = [top["logprob"] for top in entry["top_logprobs"]]
            found, terms = [entry["logprob"], *tops], terms_of(model, len(prompt) + 8)
            assert_sums_equal(found, [place[token].item(), *place.topk(3).values.tolist()], terms)
    model.float()


def test_stop_texts_prefill_and_limits(model: Any, tokenizer: Any) -> None:
    plain, begun = (
        answers(model, tokenizer, [ROW], temperature=0, max_tokens=20, prefill=prefill)[0]
        for prefill in ("", "No, ")
    )
    assert plain != begun
    text = plain["completion"]
    stop = text[5:7]
    (stopped,) = answers(model, tokenizer, [ROW], temperature=0, max_tokens=20, stop=stop)
    assert stopped["completion"] == text[: text.index(stop)]
    same = {"messages": [*ROW["messages"], {"role": "assistant", "content": "No, "}]}
    assert answers(model, tokenizer, [same], temperature=0, max_tokens=20)[0] == begun
    long = {"messages": [{"role": "user", "content": "x" * 600}]}
    with pytest.raises(DatasetError, match="row 2: the prompt has 6.. tokens, and the context 512"):
        answers(model, tokenizer, [ROW, long])
    with pytest.raises(DatasetError, match="row 1: the prompt has .* tokens, and the context 30;"):
        answers(model, tokenizer, [ROW], max_model_len=30)
    (cut,) = answers(model, tokenizer, [ROW], max_model_len=60, temperature=0, logprobs=0)
    assert 0 < len(cut["logprobs"]) < 60, "the context ends it"
