"""Log-probabilities equal those of a plain forward; what is written of them; multiple choice."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from openweights.client.questions import Question
from openweights.jobs.unsloth.tracking.logprob_rows import ScoredRow, score_rows, scored_rows
from openweights.jobs.unsloth.tracking.multiple_choice import ask
from openweights.jobs.unsloth.trainer_args import precision
from openweights.jobs.unsloth.validate import training_config
from openweights.models import log_probs as logprobs
from openweights.models.forward import Head, base_model, row_groups
from openweights.models.load import load_model
from openweights.models.log_probs import (
    all_log_probs,
    answer_log_probs,
    linear_scores,
    scored_log_probs,
)
from openweights.models.templates.rendering import prompt_token_ids
from tests.jobs.unsloth.malformed_configs import GOOD
from tests.rounding import assert_equal_in_float64, assert_sums_equal, terms_of
from tests.tiny_model import EOS, make_tiny_model

TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Name a thing"},
    {"role": "assistant", "content": "The moon, then the thing"},
]
BLOCKS = [
    {"role": "user", "content": [{"type": "text", "text": "Say "}, {"text": "it", "tag": "ask"}]},
    {
        "role": "assistant",
        "content": [
            {"type": "text", "text": "first", "tag": "a", "weight": -1},
            {"type": "text", "text": " second"},
            {"type": "text", "text": " third", "tag": "b"},
        ],
    },
]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    tiny = make_tiny_model(tmp_path_factory.mktemp("tiny"))
    model, tokenizer = load_model(training_config({**GOOD, "model": str(tiny)}))
    model.float()  # on a GPU it is loaded in half precision
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return model, tokenizer


@torch.no_grad()
def plain(model: Any, ids: list[int]) -> list[float]:
    """Log-probabilities of all tokens but the first, from a plain forward in float64."""
    exact = copy.deepcopy(model).double().eval()
    logits = exact(torch.tensor([ids], device=model.device)).logits[0].log_softmax(-1)
    return [float(logits[t - 1, ids[t]]) for t in range(1, len(ids))]


ROWS = [[5, 6, 7, 30, 31], [9, 8], list(range(40, 80)), [4, 4, 4]]


def test_equal_a_plain_forward_whatever_the_batch(loaded: tuple[Any, Any]) -> None:
    model, _ = loaded
    for size in (1, 3, 8):
        for ids, found in zip(ROWS, all_log_probs(model, ROWS, 3, batch_size=size), strict=True):
            assert_sums_equal(found, plain(model, ids), terms_of(model, len(ids)))
    model.train()
    list(all_log_probs(model, ROWS, 3, batch_size=2))
    assert model.training, "its mode is put back"


def test_chunks_change_neither_values_nor_gradients(
    loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = loaded
    ids = torch.tensor([list(range(40, 72)), list(range(60, 92))], device=model.device)
    drawn = torch.rand(2, 32, generator=torch.Generator().manual_seed(0))
    scored = drawn.to(model.device) < 0.6

    def run(chunk: int, at: torch.Tensor = scored) -> list[torch.Tensor]:
        monkeypatch.setattr(logprobs, "CHUNK_TOKENS", chunk)
        model.zero_grad()
        values = scored_log_probs(base_model(model), {"input_ids": ids}, at)
        values.square().sum().backward()
        return [values, *[p.grad.clone() for p in model.parameters() if p.grad is not None]]

    terms, whole = terms_of(model, ids.numel()), run(1024)
    assert len(whole) > 10
    assert_sums_equal(run(5), whole, terms)
    # The control: with one place less, every gradient is another.
    fewer = scored.clone()
    fewer[1, int(scored[1].nonzero()[-1])] = False
    for gradient, expected in zip(run(5, fewer)[1:], whole[1:], strict=True):
        with pytest.raises(AssertionError, match="differs by"):
            assert_sums_equal(gradient, expected, terms)
    # Nothing scored: an empty answer, not an error.
    nothing = torch.zeros_like(scored)
    assert scored_log_probs(base_model(model), {"input_ids": ids}, nothing).shape == (0,)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, None), (1.0, 5.0), (0.5, 3.0)])
def test_scores_of_a_frozen_head(bias: bool, scale: float, softcap: float | None) -> None:
    """Values, and gradients that differ from token to token, against autograd in float64."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(50, 16, dtype=torch.float64, generator=draw)
    head = Head(weight, torch.randn(50, dtype=torch.float64) if bias else None, scale, softcap)
    hidden = torch.randn(13, 16, dtype=torch.float64, generator=draw).requires_grad_()
    targets = torch.randint(50, (13,), generator=draw)
    wanted = torch.randn(13, dtype=torch.float64, generator=draw)

    found = linear_scores(hidden, head, targets, chunk_tokens=5)
    (gradient,) = torch.autograd.grad((found.log_probs * wanted).sum(), hidden)
    log_p = head.logits(hidden).log_softmax(-1)
    values = log_p.gather(-1, targets[:, None]).squeeze(-1)
    (expected,) = torch.autograd.grad((values * wanted).sum(), hidden)
    assert_equal_in_float64(found.log_probs, values)
    assert_equal_in_float64(gradient, expected)
    assert_equal_in_float64(found.entropy, -(log_p.exp() * log_p).sum(-1))
    assert found.is_top.tolist() == (log_p.argmax(-1) == targets).tolist()
    assert linear_scores(hidden[:0], head, targets[:0], chunk_tokens=5).log_probs.shape == (0,)


def test_sums_by_row(loaded: tuple[Any, Any]) -> None:
    model, _ = loaded
    batch = {
        "input_ids": torch.tensor([ROWS[0], [9, 8, 3, 3, 3]], device=model.device),
        "attention_mask": torch.tensor([[1] * 5, [1, 1, 0, 0, 0]], device=model.device),
        "labels": torch.tensor([[-100, -100, 7, 30, 31], [-100] * 5], device=model.device),
    }
    with torch.no_grad():
        sums, tokens = answer_log_probs(model.eval(), batch)
    assert tokens.tolist() == [3, 0] and float(sums[1]) == 0
    assert_sums_equal(sums[0], sum(plain(model, ROWS[0])[1:]), terms_of(model, 5))


# ---- what is written


def rows_of(loaded: tuple[Any, Any], *rows: Any, **options: Any) -> list[ScoredRow]:
    return scored_rows(rows, loaded[1], ends=[2, 0], **options)


def test_a_conversation(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    given = [{"messages": TURNS, "id": 4}, {"text": "Once"}]
    found = score_rows(model, tokenizer, rows_of(loaded, *given), batch_size=2)
    assert not found.blockwise and found.blocks == []
    talk, text = found.rows
    assert talk["id"] == 4 and talk["messages"] == TURNS and talk["logprobs"][0] is None
    terms = terms_of(model, len(talk["token_ids"]))
    assert_sums_equal(talk["logprobs"][1:], plain(model, talk["token_ids"]), terms)
    pairs = list(zip(talk["tokens"], talk["is_answer"], strict=True))
    assert (
        "".join(token for token, answer in pairs if answer)
        == f"Hello{EOS}{TURNS[3]['content']}{EOS}"
    )
    assert text["token_ids"][-1] == tokenizer.eos_token_id
    assert text["is_answer"] == [False, *[True] * (len(text["tokens"]) - 1)]
    answers = [
        value
        for row in found.rows
        for value, wanted in zip(row["logprobs"], row["is_answer"], strict=True)
        if wanted
    ]
    assert found.loss == pytest.approx(-sum(answers) / len(answers), rel=1e-6)


def test_blocks(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    mixed = [{"messages": BLOCKS}, {"messages": TURNS}]
    found = score_rows(model, tokenizer, rows_of(loaded, *mixed), batch_size=1)
    assert found.blockwise and found.rows[1] == {"messages": TURNS}
    contents = [message["content"] for message in found.rows[0]["messages"]]
    for blocks, given in zip(contents, BLOCKS, strict=True):
        for block, before in zip(blocks, given["content"], strict=True):
            assert "".join(block["tokens"]) == before["text"] == block["text"]
            assert len(block["logprobs"]) == len(block["tokens"]) > 0
    text = tokenizer.apply_chat_template(
        [{**m, "content": "".join(b["text"] for b in m["content"])} for m in BLOCKS], tokenize=False
    )
    ids = tokenizer(text)["input_ids"]
    values = plain(model, ids)
    start = next(i for i in range(len(ids)) if tokenizer.decode(ids[i:]).startswith("first"))
    said = contents[1][0]["logprobs"] + contents[1][1]["logprobs"] + contents[1][2]["logprobs"]
    expected = values[start - 1 : start - 1 + len(said)]
    assert_sums_equal(said, expected, terms_of(model, len(ids)))
    tagged = [(b["row"], b["message"], b["block"], b["tag"], b["text"]) for b in found.blocks]
    assert tagged == [(0, 0, 1, "ask", "it"), (0, 1, 0, "a", "first"), (0, 1, 2, "b", " third")]
    assert found.blocks[1]["logprobs"] == contents[1][0]["logprobs"]


def test_long_rows_lose_their_end(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    long = [{"messages": BLOCKS}, {"messages": TURNS}]
    found = score_rows(model, tokenizer, rows_of(loaded, *long, limit=12), batch_size=2)
    assert found.rows[0]["messages"][1]["content"][2]["logprobs"] == []
    assert found.loss is None, "nothing of an answer is left"


# ---- multiple choice


def test_choices_are_scored_as_answers(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    questions = [
        Question("What is it?", ("the moon", "a", "nothing that anyone has seen"), 0),
        Question("Is it?", ("yes", "no"), 1),
    ]
    found = ask(model, tokenizer, questions, batch_size=2)
    for row, question in zip(found.rows, questions, strict=True):
        prompt = prompt_token_ids(tokenizer, [{"role": "user", "content": question.text}])
        means = []
        for choice in question.choices:
            ids = tokenizer(choice)["input_ids"]
            means.append(sum(plain(model, prompt + ids)[-len(ids) :]) / len(ids))
        terms = terms_of(model, len(prompt) + 40)
        assert_sums_equal(row["logprobs"], means, terms)
        total = sum(math.exp(mean) for mean in row["logprobs"])
        expected = [math.exp(mean) / total for mean in row["logprobs"]]
        assert row["probabilities"] == pytest.approx(expected, rel=1e-9)
        assert row["correct"] == (max(means) == means[question.answer])
    summary = found.summary()
    right = [row["probabilities"][row["answer"]] for row in found.rows]
    assert summary["questions"] == 2 and summary["probability"] == pytest.approx(
        sum(right) / 2, rel=1e-9
    )
    assert summary["accuracy"] == sum(row["correct"] for row in found.rows) / 2


def test_logits_are_not_narrowed_by_autocast() -> None:
    """Which on a CPU, too, lets adapters compute in the type of a bfloat16 base."""
    torch.manual_seed(0)
    head = Head(torch.randn(50, 16).bfloat16())
    hidden = torch.randn(7, 16).bfloat16()
    plain = head.logits(hidden)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = hidden.float() @ head.weight.float().T
        assert torch.equal(head.logits(hidden), plain) and plain.dtype == torch.float32
        assert narrow.dtype == torch.bfloat16, "the control"
    layer = nn.Linear(4, 4)
    adapter = nn.Linear(4, 4)
    for dtype, expected in ((torch.bfloat16, True), (torch.float32, False)):
        model = nn.ModuleList([layer.to(dtype).requires_grad_(False), adapter])
        if not torch.cuda.is_available():
            assert precision(model) == {"bf16": expected}


def test_logits_of_a_head_in_bfloat16_are_sums_in_float32() -> None:
    """Their factors are multiplied in bfloat16, which they come in, and not rounded to it again."""
    draw = torch.Generator().manual_seed(0)
    head = Head(torch.randn(300, 64, generator=draw).bfloat16())
    hidden = torch.randn(40, 64, generator=draw).bfloat16()
    before = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    exact = hidden.double() @ head.weight.double().T
    size = float((hidden.double().abs() @ head.weight.double().abs().T).max())
    assert_sums_equal(head.logits(hidden), exact.float(), 64 + 1, size=size)
    assert torch.backends.mkldnn.matmul.fp32_precision == before  # type: ignore[attr-defined]
    with pytest.raises(AssertionError, match="differs by"):
        narrow = (hidden @ head.weight.T).float()
        assert_sums_equal(narrow, exact.float(), 64 + 1, size=size)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_scores_do_not_depend_on_how_many_rows_are_scored_at_a_time() -> None:
    """A vocabulary of which a few rows at a time fit into the caches of two cores."""
    draw = torch.Generator().manual_seed(0)
    size = 2**19
    head = Head(torch.randn(size, 2, generator=draw, dtype=torch.float64))
    hidden = torch.randn(13, 2, generator=draw, dtype=torch.float64)
    targets = torch.randint(size, (13,), generator=draw)
    assert len([*row_groups(head.logits(hidden))]) > 1
    scores = linear_scores(hidden, head, targets, chunk_tokens=100)
    one_by_one = [
        linear_scores(hidden[i : i + 1], head, targets[i : i + 1], chunk_tokens=1)
        for i in range(len(hidden))
    ]
    for found, expected in zip(scores, zip(*one_by_one, strict=True), strict=True):
        assert_equal_in_float64(found, torch.cat(expected))
