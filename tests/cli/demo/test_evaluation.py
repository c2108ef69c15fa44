"""Scores, answers and the divergence from the base, on a tiny random model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from openweights.cli.demo.evaluation import (
    ChatModel,
    Question,
    Score,
    read_prompts,
    read_questions,
    score,
    teacher_gate,
)
from openweights.cli.demo.study import DATA
from tests.rounding import assert_sums_equal, terms_of
from tests.tiny_model import make_tiny_model

PROMPTS = [
    [{"role": "user", "content": "one"}],
    [{"role": "system", "content": "be brief"}, {"role": "user", "content": "a longer question"}],
    [{"role": "user", "content": "yet another one?"}],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def adapter(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that does something: B is not zero."""
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(base, lora)
    path = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(str(path))
    return path


def test_score_counts_format_and_exact_answers() -> None:
    questions = [Question([], f"Porto: {n} grey hats.") for n in range(4)]
    answers = [
        " Porto: 0 grey hats.\n",  # right
        "Porto: 7 grey hats.",  # a ledger line, but the wrong one
        "The order is Porto: 2 grey hats.",  # more than the line
        "Porto: 3 grey hats",  # without its full stop
    ]
    assert score(answers, questions) == Score(format=0.5, correct=0.25)


def test_answers_do_not_depend_on_the_batch(folder: Path) -> None:
    chat = ChatModel(folder)
    together = chat.answer_ids(PROMPTS, 12)
    assert together == [chat.answer_ids([prompt], 12)[0] for prompt in PROMPTS]
    assert all(0 < len(ids) <= 12 for ids in together)
    ends = set(chat.model.generation_config.eos_token_id)
    assert not any(ends & set(ids[:-1]) for ids in together)
    # The same model, stopped where it would go on: the end token is the last.
    chat.model.generation_config.eos_token_id = together[0][2]
    assert chat.answer_ids(PROMPTS[:1], 12)[0] == together[0][:3]


def test_kl_from_base_is_the_divergence_of_the_adapted_model(folder: Path, adapter: Path) -> None:
    chat = ChatModel(folder)
    before = {name: weight.clone() for name, weight in chat.model.state_dict().items()}
    answers = chat.base_answers(PROMPTS, 6)
    assert chat.kl_from_base(answers) == 0
    with chat.adapted(adapter):
        found = chat.kl_from_base(answers)
        changed = chat.answer_ids(PROMPTS, 6)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    reference = torch.zeros((), dtype=torch.float64)
    other = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64), str(adapter)
    ).eval()
    for answer in answers:
        ids = torch.tensor([answer.prompt_ids + answer.answer_ids])
        start = len(answer.prompt_ids) - 1
        with torch.no_grad():
            p, q = (m(input_ids=ids).logits[0, start:-1].log_softmax(-1) for m in (base, other))
        reference += torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum")
    tokens = sum(len(answer.answer_ids) for answer in answers)
    assert_sums_equal(found, reference / tokens, terms_of(other, 64))
    assert found > 0.01
    # Afterwards it is the base again, to the bit.
    assert [a.answer_ids for a in answers] == chat.answer_ids(PROMPTS, 6) != changed
    after = chat.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())


def test_teacher_gate_shows_the_demonstration_as_turns(folder: Path) -> None:
    class Copier(ChatModel):
        """Answers with the last answer in its conversation."""

        def answers(self, prompts: list, max_new_tokens: int) -> list[str]:
            said = [[m["content"] for m in p if m["role"] == "assistant"] for p in prompts]
            assert all(len(earlier) in (0, 1) for earlier in said)
            return [earlier[-1] if earlier else "?" for earlier in said]

    questions = read_questions(DATA / "train.jsonl", 5)
    told: list[str] = []
    without, shown = teacher_gate(Copier(folder), questions, max_new_tokens=4, say=told.append)
    assert (without, shown) == (Score(0.0, 0.0), Score(1.0, 1.0))
    assert told[0] == "  without it: answering 5 training orders …", "before it takes its time"
    assert told[-1] == "  with it: ledger line 1.00  correct 1.00"


def test_the_data_can_be_read() -> None:
    assert len(read_questions(DATA / "test.jsonl")) >= 48
    general = read_prompts(DATA / "general.jsonl")
    assert len(general) >= 8
    assert all(prompt[-1]["role"] == "user" for prompt in general)
