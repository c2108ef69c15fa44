"""What is checked of loss='grpo' before a job is submitted, and what the job then holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest

from openweights import OpenWeights
from openweights.errors import ConfigError, DatasetError, OpenWeightsError
from openweights.jobs.unsloth import FineTuning
from openweights.jobs.unsloth.config.grpo_fields import (
    REWARD_NAMES,
    RewardChoice,
    check_grpo_row,
    reward_choices,
    split_gold,
)
from openweights.jobs.unsloth.config.own_functions import check_arguments
from openweights.jobs.unsloth.grpo_ft import grpo_args
from openweights.jobs.unsloth.validate import training_config
from openweights.settings import Settings
from tests.jobs.unsloth.malformed_configs import GRPO, SDFT

USER = {"role": "user", "content": "Why?"}
ANSWER = {"role": "assistant", "content": [{"type": "text", "text": "Because."}]}
ROW = {"messages": [USER, ANSWER]}
SOURCE = "def score(completions):\n    return [len(c) for c in completions]\n"


@pytest.fixture
def ow(home: Path) -> OpenWeights:
    return OpenWeights(settings=Settings(home=home))


@pytest.fixture
def rows(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text(2 * (json.dumps(ROW) + "\n"))  # a step takes two
    return str(path)


def test_defaults_are_the_documented_ones() -> None:
    config = training_config(GRPO)
    assert training_config(config.model_dump(mode="json")) == config
    stored = config.model_dump()
    assert {k.removeprefix("grpo_"): v for k, v in stored.items() if k.startswith("grpo_")} == {
        "num_generations": 8,
        "max_completion_length": 512,
        "temperature": 0.9,
        "top_p": 1.0,
        "top_k": None,
        "stop": [],
        "keep_special_tokens": False,
        "epsilon": 0.2,
        "loss_type": "dapo",
        "scale_rewards": "group",
        "enable_thinking": None,
        "think_end_tag": "</think>",
        "use_vllm": False,
        "reward_function": "rouge_l",
        "judge_model": "gpt-4.1-mini",
        "judge_prompt": None,
        "judge_best": 10.0,
        "max_failed_reward_fraction": 0.5,
    }
    assert stored["max_grad_norm"] == 1.0 and "packing" not in stored
    assert training_config({**GRPO, "beta": 0}).beta == 0


def test_rewards_are_names_functions_lists_and_weights() -> None:
    assert reward_choices("rouge_l") == [RewardChoice("rouge_l", 1.0)]
    assert [choice.name for choice in reward_choices(list(REWARD_NAMES))] == list(REWARD_NAMES)
    given = {"caps_spanish": 2, "my/rewards.py:score": -0.5}
    assert reward_choices(given) == [
        RewardChoice("caps_spanish", 2),
        RewardChoice("score", -0.5, "my/rewards.py"),
    ]
    [stored] = reward_choices("custom_job_file:file-0123456789ab:score")
    assert stored.is_stored and stored.name == "score"
    for reward in (given, list(given), "rouge_l"):
        assert training_config({**GRPO, "grpo_reward_function": reward}).loss == "grpo"


def test_the_trainer_is_told_all_of_it() -> None:
    config = training_config(
        {
            **GRPO,
            "grpo_num_generations": 4,
            "grpo_top_p": 0.9,
            "grpo_epsilon": 0.1,
            "grpo_loss_type": "dr_grpo",
            "grpo_scale_rewards": "none",
            "grpo_enable_thinking": False,
            "max_grad_norm": 0.3,
            "beta": 0.2,
        }
    )
    args = grpo_args(config)
    told = (args.num_generations, args.top_p, args.epsilon, args.loss_type, args.scale_rewards)
    assert told == (4, 0.9, 0.1, "dr_grpo", "none")
    assert (args.temperature, args.max_completion_length) == (0.9, 512)
    assert (args.max_grad_norm, args.learning_rate, args.logging_steps) == (0.3, 1e-4, 1)
    assert config.template_options == {"enable_thinking": False}, "the tokenizer has them"
    assert args.beta == 0, "the trainer is given it apart, so that trl adds no second adapter"
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (2, 8)
    with pytest.raises(OpenWeightsError, match="grpo_use_vllm: vLLM is not installed where the"):
        grpo_args(training_config({**GRPO, "grpo_use_vllm": True}))


def test_gold_responses() -> None:
    assert split_gold(ROW) == ([USER], "Because.")
    assert split_gold({"messages": [USER]}) == ([USER], None)
    assert split_gold({"messages": [USER], "gold_response": "So."}) == ([USER], "So.")


@pytest.mark.parametrize(
    ("row", "reward", "words"),
    [
        ({"text": "Once"}, "caps_spanish", "messages: is missing; conversations are needed here"),
        ({"messages": [ANSWER]}, "caps_spanish", "the turn before the answer must be from the"),
        ({"messages": [USER]}, "rouge_l", "rouge_l compares with a gold response; add"),
        ({**ROW, "gold_response": "x"}, "rouge_l", "gold_response: is given, and the last mess"),
        ({"messages": [USER], "gold_response": " "}, "rouge_l", "not empty; correct it"),
        ({"messages": [USER], "gold_response": 5}, "rouge_l", "must be a text"),
    ],
)
def test_rows_that_cannot_be_scored(row: dict[str, Any], reward: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_grpo_row(row, reward)
    check_grpo_row({"messages": [USER]}, "a.py:f")


def test_rows_are_checked_at_the_door(ow: OpenWeights, tmp_path: Path) -> None:
    path = tmp_path / "no_answers.jsonl"
    path.write_text(json.dumps({"messages": [USER], "demonstration": "So."}) + "\n")
    kind = FineTuning(ow)
    config = kind.validate({**GRPO, "training_file": str(path)})
    with pytest.raises(DatasetError, match="training_file:1: messages: the last is not from"):
        kind.check(config)


def test_a_reward_s_file_travels_with_the_job_and_is_part_of_its_id(
    ow: OpenWeights, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(SOURCE)
    kind = FineTuning(ow)

    def submitted(**params: Any) -> tuple[str, Any]:
        reward = {"mine.py:score": 0.5, "rouge_l": 1.0}
        config: Any = kind.validate(
            {**GRPO, "training_file": rows, "grpo_reward_function": reward, **params}
        )
        kind.check(config)
        return kind.compute_id(config), config.grpo_reward_function

    first, stored = submitted()
    name = next(iter(stored))
    file, _, function = name.rpartition(":")
    assert function == "score" and stored == {name: 0.5, "rouge_l": 1.0}
    assert ow.files.content(file).decode() == SOURCE
    assert submitted(grpo_reward_function=stored) == (first, stored), "as the worker reads it"
    Path("mine.py").write_text(SOURCE + "# changed\n")
    assert submitted()[0] != first
    Path("other.py").write_text(SOURCE)
    other = {"other.py:score": 0.5, "rouge_l": 1.0}
    assert submitted(grpo_reward_function=other)[0] == first, "its name does not matter"


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        ("mine.py:other", "mine.py: has no function 'other'; define it"),
        ("none.py:score", "none.py: No such file or directory; correct the path"),
        ("wrong.py:score", "wrong.py: is no Python .*line 1"),
        ("custom_job_file:file-000000000000:score", "the store has no file custom_job_file"),
    ],
)
def test_a_reward_that_is_not_there_is_refused_at_the_door(
    ow: OpenWeights,
    rows: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    reward: str,
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(SOURCE)
    Path("wrong.py").write_text("def score(:\n")
    kind = FineTuning(ow)
    with pytest.raises(ConfigError, match=words):
        kind.check(kind.validate({**GRPO, "training_file": rows, "grpo_reward_function": reward}))


@pytest.mark.parametrize(
    ("head", "words"),
    [
        ("score(completions, gold_respons)", "wants 'gold_respons', .* mean 'gold_response'?"),
        ("score(completions, *, levle)", "mean 'level'. It is given completions, .*, level$"),
        ("score(completions, zzz)", "wants 'zzz', which is not there; it is given completions"),
        ("score()", "takes nothing to score; it is given completions"),
        ("score(completions, /)", "remove the '/'"),
        ("score(completions, prompts, completion_ids, gold_response, level)", None),
        ("score(completions, limit=3, *, most=4, **others)", None),
        ("score(**given)", None),
    ],
)
@pytest.mark.parametrize("loss", ["grpo", "sdft"])
def test_a_reward_wants_only_what_it_is_given(
    ow: OpenWeights,
    tmp_path: Path,
    head: str,
    words: str | None,
    loss: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPENWEIGHTS_TRY_FUNCTIONS", "no")
    ow = OpenWeights()
    rows, mine = tmp_path / "levels.jsonl", tmp_path / "mine.py"
    rows.write_text(json.dumps(ROW) + "\n" + json.dumps({**ROW, "level": 3}) + "\n")
    mine.write_text(f"raise SystemExit('it is never run here')\ndef {head}: return []\n")
    base, field = (GRPO, "grpo_reward_function") if loss == "grpo" else (SDFT, "sdft_gate_reward")
    kind = FineTuning(ow)
    config = kind.validate({**base, "training_file": str(rows), field: f"{mine}:score"})
    if words is None:
        kind.check(config)
        return
    with pytest.raises(ConfigError, match=f"^{field}: score.*{words}"):
        kind.check(config)


def test_what_says_not_by_itself_what_it_takes_is_left_to_the_job() -> None:
    for source in (
        "@wrapped\ndef score(anything): ...",
        "score = make()",
        "def score(anything): ...\nscore = made_of(score)",
    ):
        check_arguments(source.encode(), "score", [], "suite")
    with pytest.raises(ConfigError):  # the control
        check_arguments(b"def score(anything): score = 1", "score", [], "suite")


def test_a_reward_that_is_no_name_is_told_how_to_name_it(tmp_path: Path) -> None:
    path = tmp_path / "ledger.py"
    path.write_text("import absent\ndef _own(): ...\ndef balance(completions): ...\n")
    for reward, words in (
        (str(path), "is a file; name its function: .*; it has balance$"),
        ("none.py", "name its function: 'none.py:score'$"),
        (len, "len is a function object, .* give 'file.py:len'"),
        ([len, "rouge_l"], "len is a function object"),
        ({len: 1.0}, "len is a function object"),
    ):
        with pytest.raises(ConfigError, match=words):
            training_config({**GRPO, "grpo_reward_function": reward})


def test_what_a_subclass_mounts_stays_as_it_is(
    ow: OpenWeights, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("local.py").write_text(SOURCE)

    class Mounting(FineTuning):
        mount: ClassVar[dict[str, str]] = {"local.py": "rewards/mine.py"}

    config: Any = Mounting(ow).validate(
        {**GRPO, "training_file": rows, "grpo_reward_function": "rewards/mine.py:score"}
    )
    assert config.grpo_reward_function == "rewards/mine.py:score"
