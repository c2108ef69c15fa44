"""Rows to labels: what is learned is checked by decoding it."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from openweights.errors import ConfigError, DatasetError
from openweights.jobs.unsloth.config.rows import check_rows, read_rows, run_steps
from openweights.jobs.unsloth.data import sft_examples
from openweights.jobs.unsloth.validate import DatasetRef, TrainingConfig, training_config
from openweights.models.templates.rendering import prompt_token_ids
from openweights.models.tokens import IGNORED, Collator
from tests.jobs.unsloth.malformed_configs import DPO, GOOD, GRPO
from tests.tiny_model import EOS, make_tokenizer

TOKENIZER: Any = make_tokenizer()
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": " Hello there, ünder "},
    {"role": "user", "content": "Hello there, ünder"},
    {"role": "assistant", "content": "Bye"},
]
# After the conversation, as some templates do it: an emptied think block, trimmed answers, another
# end token, and no closing for the last turn.
TRIMMING = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}A:{% if loop.last "
    "%}<think></think>{% endif %}"
    "{{ m['content'] | trim }}{% if not loop.last %}{{ '\n<|endoftext|>' }}{% endif %}"
    "{% else %}U:{{ m['content'] }}|{% endif %}{% endfor %}"
)
REWRITING = "{% for m in messages %}{{ m['content'] | upper }}<|im_end|>{% endfor %}"


def config(**changes: Any) -> TrainingConfig:
    return training_config({**GOOD, **changes})


def learned(example: dict[str, list[int]]) -> list[str]:
    """The learned stretches of a row, decoded."""
    texts: list[list[int]] = [[]]
    for label in example["labels"]:
        if label != IGNORED:
            texts[-1].append(label)
        elif texts[-1]:
            texts.append([])
    return [TOKENIZER.decode(text) for text in texts if text]


def test_only_answers_and_their_end_are_learned() -> None:
    [example] = sft_examples(config(), TOKENIZER, [{"messages": TURNS}])
    assert learned(example) == [f" Hello there, ünder {EOS}", f"Bye{EOS}"]
    whole = TOKENIZER.apply_chat_template(TURNS, tokenize=False)
    assert TOKENIZER.decode(example["input_ids"]) == whole
    pairs = zip(example["input_ids"], example["labels"], strict=True)
    assert all(label in (IGNORED, token) for token, label in pairs)
    # The learned tokens continue exactly the prompt that generation starts from.
    prompt = prompt_token_ids(TOKENIZER, TURNS[:-1])
    assert (
        example["input_ids"][: len(prompt)] == prompt and example["labels"][len(prompt)] != IGNORED
    )


def test_other_templates() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TRIMMING
    ends = tokenizer.convert_tokens_to_ids([EOS, "<|endoftext|>"])
    [example] = sft_examples(config(), tokenizer, [{"messages": TURNS[1:]}], ends=ends)
    # The template trims; what the row says is learned.
    assert learned(example) == [" Hello there, ünder \n<|endoftext|>", "Bye<|endoftext|>"]
    tokenizer.chat_template = REWRITING
    for train_on in ("last", "responses", "all"):
        with pytest.raises(DatasetError, match=r"training_file:1: messages\[0\]: the .* rewrites"):
            sft_examples(config(train_on=train_on), tokenizer, [{"messages": TURNS}])
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="chat_template: the model's tokenizer has none"):
        sft_examples(config(), tokenizer, [{"messages": TURNS}])
    tokenizer.chat_template = "{{ raise_exception('no system turn') }}{{ messages }}"
    with pytest.raises(DatasetError, match="training_file:1: the .* refuses it .no system turn"):
        sft_examples(config(), tokenizer, [{"messages": TURNS}])


def test_whole_conversations_text_and_blocks() -> None:
    [example] = sft_examples(
        config(train_on_responses_only=False), TOKENIZER, [{"messages": TURNS}]
    )
    assert example["labels"][0] == IGNORED and example["labels"][1:] == example["input_ids"][1:]
    [text] = sft_examples(config(), TOKENIZER, [{"text": "Once upon"}])
    assert TOKENIZER.decode(text["input_ids"]) == f"Once upon{EOS}"
    assert text["labels"] == [IGNORED, *text["input_ids"][1:]]
    blocks = [{"type": "text", "text": "By"}, {"text": "e", "tag": "x"}]
    row = {"messages": [*TURNS[:-1], {"role": "assistant", "content": blocks}]}
    assert sft_examples(config(), TOKENIZER, [row]) == sft_examples(
        config(), TOKENIZER, [{"messages": TURNS}]
    )


def test_long_rows_are_cut_or_dropped_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        {"messages": [*TURNS[:3]]},
        {"messages": [{"role": "user", "content": "x" * 90}, TURNS[4]]},
    ]
    with caplog.at_level(logging.INFO):
        [example] = sft_examples(config(max_seq_length=50), TOKENIZER, rows)
    assert len(example["input_ids"]) == 50 and learned(example)[0].startswith(" Hello")
    assert "2 of 2 rows (100%) are longer than max_seq_length=50 and lose their end" in caplog.text
    assert "1 of 2 rows dropped: nothing to learn is left" in caplog.text
    with pytest.raises(DatasetError, match="nothing to learn is left of any row"):
        sft_examples(config(max_seq_length=4), TOKENIZER, rows)


def test_collator_pads_right_or_packs() -> None:
    rows = [{"input_ids": [5, 6], "labels": [-100, 6]}, {"input_ids": [7], "labels": [-100]}]
    padded = Collator(3)(rows)
    assert padded["input_ids"].tolist() == [[5, 6], [7, 3]]
    assert padded["labels"].tolist() == [[-100, 6], [-100, -100]]
    assert padded["attention_mask"].tolist() == [[1, 1], [1, 0]]
    packed = Collator(3, packed=True)(rows)
    assert packed["input_ids"].tolist() == [[5, 6, 7]] and "attention_mask" not in packed
    assert packed["position_ids"].tolist() == [[0, 1, 0]]


def trained_on(settings: TrainingConfig) -> tuple[TrainingConfig, DatasetRef]:
    return settings, settings.datasets()[0]


def test_rows_are_checked_by_line() -> None:
    assert read_rows([b'{"text": "a"}\n', b"\n"]) == [{"text": "a"}]
    for lines, words in [
        ([b"{"], "line 1: no JSON"),
        ([b"\n", b"[]"], "line 2: list"),
        ([], "no rows"),
    ]:
        with pytest.raises(DatasetError, match=words):
            read_rows(lines)
    weighted = [{"type": "text", "text": "x", "weight": 0.5}]
    rows = [
        (1, {"messages": TURNS}),
        (3, {"messages": TURNS[:2]}),
        (4, {"messages": [{"role": "assistant", "content": weighted}]}),
        (5, {"messages": [{"role": "assistant"}]}),
        (6, {"messages": "x"}),
        (7, {"notes": "x"}),
    ]
    with pytest.raises(DatasetError) as caught:
        check_rows(rows, *trained_on(config()))
    assert [line.split(": ")[:2] for line in str(caught.value).splitlines()] == [
        ["training_file:3", "messages"],
        ["training_file:5", "messages[0].content"],
        ["training_file:6", "messages"],
        ["training_file:7", "messages"],
    ]
    rows = [(n, {"messages": TURNS}) for n in range(1, 4)]
    kept = config(holdout_fraction=0.5)
    assert check_rows(rows, *trained_on(kept)) == 3 and run_steps(kept, 40) == 2
    with pytest.raises(DatasetError, match="holdout_fraction: 0.5 of 1 rows leaves none to train"):
        check_rows(rows[:1], *trained_on(kept))
    weighted_turn = {"role": "assistant", "content": weighted}
    with pytest.raises(DatasetError, match="has a weight, which sdft cannot use"):
        check_rows([(4, {"messages": [TURNS[1], weighted_turn]})], *trained_on(config(loss="sdft")))
    with pytest.raises(DatasetError, match="training_file:2: weight: a row has none; give it to"):
        check_rows([(2, {"messages": TURNS, "weight": 0})], *trained_on(config()))
    with pytest.raises(DatasetError, match="training_file: every row: messages: is missing"):
        check_rows([(n, {}) for n in range(25)], *trained_on(config()))
    with pytest.raises(DatasetError, match="training_file:1: demonstration: is missing"):
        check_rows([(1, {"messages": TURNS[:2]})], *trained_on(config(loss="sdft")))


def test_columns_that_a_loss_does_not_read_are_no_messages() -> None:
    """A text called `prompt` is what many files have beside their messages."""
    others = {"prompt": "hello", "chosen": [{"weight": 0.5}], "rejected": 3}
    rows = [(n, {"messages": TURNS, **others}) for n in range(1, 9)]
    for settings in (config(), config(loss="sdft"), training_config(GRPO)):
        assert check_rows(rows, *trained_on(settings)) == 8
    [example] = sft_examples(config(), TOKENIZER, [rows[0][1]])
    assert learned(example) == [f" Hello there, ünder {EOS}", f"Bye{EOS}"]
    pair = {"prompt": TURNS[:2], "chosen": TURNS[2:3], "rejected": TURNS[4:], "messages": "x"}
    assert check_rows([(1, pair)], *trained_on(training_config(DPO))) == 1


@pytest.mark.parametrize("index", [0, 1, 3])
def test_a_weight_that_would_not_count_is_refused(index: int) -> None:
    """Files of OpenAI's format say 0 or 1 of each answer; of others a 1 says that they are learned,
    which only sft can do, and not with train_on='last'.
    """

    def check(weights: dict[int, float], **changes: Any) -> int:
        turns = [{**turn, "weight": weights.get(n)} for n, turn in enumerate(TURNS)]
        return check_rows([(1, {"messages": turns})], *trained_on(config(**changes)))

    assert check({index: 1}) == 1
    for changes in ({"loss": "sdft"}, {"train_on": "last"}):
        assert check({2: 1, 4: 1}, **changes) == check({2: 0, index: 0}, **changes) == 1
        for weights in ({index: 1}, {2: 0.5}, {index: -1}):
            with pytest.raises(DatasetError, match=r"messages\[\d\]: has a weight"):
                check(weights, **changes)


def test_weights_of_what_train_on_learns_are_counted() -> None:
    def check(weights: list[float | None], train_on: str) -> int:
        turns = [{**turn, "weight": w} for turn, w in zip(TURNS[1:], weights, strict=True)]
        settings = config(train_on=train_on)
        return check_rows([(1, {"messages": turns})], *trained_on(settings))

    assert check([None, 0, None, 0], "all") == 1, "what the user says"
    assert check([None, 1, None, 0], "responses") == 1
    for weights, train_on in (([0, 0, 0, 0], "all"), ([None, 1, None, 0], "last")):
        with pytest.raises(DatasetError, match="every weight is 0"):
            check(weights, train_on)


def test_a_weighted_row_of_which_nothing_is_left_is_dropped(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    long = {"messages": [{**TURNS[1], "content": "word " * 50}, {**TURNS[4], "weight": 0.5}]}
    unlearned = {"messages": [TURNS[1], {**TURNS[4], "weight": 0}]}
    rows = [long, unlearned, {"messages": TURNS[:3]}]
    assert len(sft_examples(config(max_seq_length=64), TOKENIZER, rows)) == 2
    assert "1 of 3 rows dropped: nothing to learn is left" in caplog.text
    with pytest.raises(DatasetError, match="nothing to learn is left of any row"):
        sft_examples(config(max_seq_length=16), TOKENIZER, [long] * 3)
