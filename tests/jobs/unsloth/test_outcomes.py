"""A run that has taught nothing does not complete, and what a run says of itself is so."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerState, get_scheduler

from openweights import OpenWeights
from openweights.errors import DatasetError, JobFailedError
from openweights.jobs.unsloth import FineTuning
from openweights.jobs.unsloth.callbacks import AdapterMovement
from openweights.jobs.unsloth.grpo.reward_functions import RewardFunctions, own_reward
from openweights.jobs.unsloth.rewards import Reward, Samples
from openweights.jobs.unsloth.runtime.reporting import FolderReporter
from openweights.jobs.unsloth.trainer_args import trainer_args, warmup_steps
from openweights.jobs.unsloth.training import train
from openweights.jobs.unsloth.validate import TrainingConfig, training_config
from tests.jobs.unsloth.lost_runs import LoseAt, Lost
from tests.jobs.unsloth.malformed_configs import GOOD

SCHEDULE = "lr_scheduler_type"


def turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def talk(number: int, weight: float | None = None) -> dict[str, Any]:
    answer: Any = f"It is {number}."
    if weight is not None:
        answer = [{"type": "text", "text": answer, "weight": weight}]
    return {"messages": [turn("user", f"What is {number}?"), turn("assistant", answer)]}


@pytest.fixture
def params(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    return {
        "model": str(tiny),
        "loss": "sft",
        "training_file": write(tmp_path / "rows.jsonl", [talk(i) for i in range(4)]),
        "max_seq_length": 128,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-2,
    }


@pytest.fixture
def grpo(params: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "reward.py").write_text(
        "def same(completions):\n    return [1.0] * len(completions)\n"
        "def distinct(completions, prompts):\n"
        "    with open('seen.txt', 'a') as seen:\n"
        "        print(*[p[-1]['content'] for p in prompts[::2]], sep=' ', file=seen)\n"
        "    return [len(set(text)) for text in completions]\n"
    )
    return {
        **params,
        "loss": "grpo",
        "grpo_num_generations": 2,
        "grpo_max_completion_length": 6,
        "grpo_reward_function": "reward.py:distinct",
        "beta": 0.0,
    }


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def events(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "uploads" / "events.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


# ---- warm-up


@pytest.mark.parametrize(
    ("asked", "steps", "taken"),
    [(5, 1, 0), (5, 10, 1), (5, 49, 4), (5, 50, 5), (3, 4, 3), (0, 1, 0), (2, 1, 0)],
)
def test_warm_up(asked: int, steps: int, taken: int) -> None:
    assert warmup_steps(asked, steps) == taken


def test_warm_up_that_would_last_for_ever_is_bounded(caplog: pytest.LogCaptureFixture) -> None:
    assert warmup_steps(60, 60) == 6
    assert "warmup_steps=60 is not less than the 60 steps of this run" in caplog.text
    assert "it is 6 instead" in caplog.text


@pytest.mark.parametrize("kind", list(get_args(TrainingConfig.model_fields[SCHEDULE].annotation)))
@pytest.mark.parametrize("rate", [1e-12, 1e-7, 1.0])
def test_every_schedule_goes_with_every_rate(
    params: dict[str, Any], kind: str, rate: float
) -> None:
    config = training_config({**params, SCHEDULE: kind, "learning_rate": rate})
    args = trainer_args(config)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=rate)
    own: Any = args.lr_scheduler_kwargs
    schedule = get_scheduler(kind, optimizer, 2, 6, own)
    rates = []
    for _ in range(6):
        optimizer.step()
        schedule.step()
        rates += schedule.get_last_lr()
    assert max(rates) == rate and min(rates) >= 0
    assert rates[-1] < rate or kind.startswith("constant")


def test_the_defaults_train_on_a_short_file(params: dict[str, Any], tmp_path: Path) -> None:
    """One step: with a warm-up of five its rate would be 0."""
    train(params)
    rates = [event["learning_rate"] for event in events(tmp_path) if "learning_rate" in event]
    assert rates == [pytest.approx(1e-2, rel=1e-9)]
    adapter = load_file(tmp_path / "uploads/adapter/adapter_model.safetensors")
    assert all(bool(value.any()) for name, value in adapter.items() if "lora_B" in name)
    [moved] = [event for event in events(tmp_path) if event.get("type") == "adapter_moved"]
    assert moved["weight_difference_norm"] > 0 and moved["step"] == 1


def test_reward_functions_change_nothing_of_ours(tmp_path: Path) -> None:
    (tmp_path / "disturbing.py").write_text("""
import os, tempfile, torch
torch.set_grad_enabled(False)
os.chdir(tempfile.gettempdir())

def score(completions, prompts, completion_ids, note):
    os.chdir(tempfile.gettempdir())
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    prompts[0].append({"role": "assistant", "content": completions[0]})
    completion_ids[0].clear()
    note[0]["seen"] = True
    completions.clear()
    return [1.0, 2.0]
""")

    def samples() -> Samples:
        prompts: Any = [[turn("user", "Say it.")], [turn("user", "Say it.")]]
        return Samples(prompts, ["a", "b"], [[7], [8]], [{"note": {}}, {"note": {}}])

    given, folder, numbers = samples(), Path.cwd(), torch.get_rng_state().tolist()
    reward = own_reward(tmp_path / "disturbing.py", "score", 1.0)
    assert RewardFunctions([reward], limit_s=5).score(given) == [[1.0, 2.0]]
    assert given == samples()
    assert (Path.cwd(), torch.get_default_dtype()) == (folder, torch.float32)
    assert torch.is_grad_enabled() and torch.get_rng_state().tolist() == numbers


# ---- nothing to learn


def test_weights_that_are_all_zero(params: dict[str, Any], tmp_path: Path) -> None:
    """Weight decay moves the adapter all the same; a control learns."""
    file = write(tmp_path / "zero.jsonl", [talk(i, 0) for i in range(4)])
    settings = {**params, "warmup_steps": 0, "weight_decay": 0.5, "max_steps": 2}
    with pytest.raises(DatasetError, match="training_file: every weight is 0"):
        train({**settings, "training_file": file})
    assert not (tmp_path / "uploads" / "adapter").exists()
    file = write(tmp_path / "one.jsonl", [talk(i, float(i == 3)) for i in range(4)])
    train({**settings, "training_file": file})


@pytest.mark.parametrize("log", [[{"step": 1, "grad_norm": 0.5}], [{"step": 1}]])
def test_a_resumed_run_of_sgd_has_learned_what_its_log_says(
    log: list[dict[str, Any]], tmp_path: Path
) -> None:
    """sgd keeps nothing of its gradients; the control's log has none, so that decay moved it."""
    model = torch.nn.Linear(2, 2)
    reporter = FolderReporter(tmp_path, training_config(GOOD))
    movement = AdapterMovement(reporter, "nothing was learned")
    given: Any = (None, TrainerState(global_step=2, max_steps=2, log_history=log), None)
    movement.on_init_end(*given, model=model)
    with torch.no_grad():
        model.weight.mul_(0.5)
    movement.on_train_begin(*given, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    if "grad_norm" in log[0]:
        movement.on_train_end(*given)
        return
    with pytest.raises(JobFailedError, match="nothing was learned"):
        movement.on_train_end(*given)


@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_averages_of_8_bits_tell_by_their_scales(scale: float, tmp_path: Path) -> None:
    """As bitsandbytes keeps them: codes, a table of what they mean, and a scale for each block."""
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model.weight] = {
        "step": 2,
        "state1": torch.full((2, 2), 127, dtype=torch.uint8),
        "qmap1": torch.linspace(-1, 1, 256),
        "absmax1": torch.tensor([scale]),
    }
    movement = AdapterMovement(FolderReporter(tmp_path, training_config(GOOD)), "nothing learned")
    given: Any = (None, TrainerState(global_step=2, max_steps=2), None)
    movement.on_init_end(*given, model=model)
    with torch.no_grad():
        model.weight.mul_(0.5)  # decay
    movement.on_train_begin(*given, optimizer=optimizer)
    if scale:
        movement.on_train_end(*given)
        return
    with pytest.raises(JobFailedError, match="nothing learned"):
        movement.on_train_end(*given)


def test_rewards_that_are_all_equal(grpo: dict[str, Any], tmp_path: Path) -> None:
    same = {**grpo, "grpo_reward_function": "reward.py:same", "max_steps": 2, "beta": 0.1}
    with pytest.raises(JobFailedError, match="after 2 steps: in no step did the rewards of a prom"):
        train(same)


def test_measures_without_a_token_are_absent(params: dict[str, Any], tmp_path: Path) -> None:
    file = write(tmp_path / "mixed.jsonl", [talk(i, 0.5) for i in range(4)])
    zero = write(tmp_path / "zero.jsonl", [talk(i, 0) for i in range(3)])
    long = {"messages": [turn("user", "x" * 200), turn("assistant", "y")]}
    cut = write(tmp_path / "cut.jsonl", [long])
    tests = {"test_file": zero, "logp_callback_datasets": {"cut": cut, "seen": file}}
    train({**params, **tests, "training_file": file})
    logged = events(tmp_path)
    [tested] = [event for event in logged if event.get("tag") == "eval"]
    assert "eval_loss" not in tested
    assert not [event for event in logged if "cut" in event]
    assert len([event for event in logged if "seen" in event]) == 2


def test_local_files_are_checked_as_uploaded_ones(params: dict[str, Any], tmp_path: Path) -> None:
    """What no JSON can hold does not reach the files of samples either."""
    odd = tmp_path / "odd.jsonl"
    odd.write_text(json.dumps(talk(1))[:-1] + ', "score": 1e999}\n')
    for field in ({"training_file": str(odd)}, {"sampling_callbacks": [{"dataset": str(odd)}]}):
        with pytest.raises(DatasetError, match="odd.jsonl:1: score: is larger than a float can"):
            train({**params, **field})


def test_prompts_without_an_answer(grpo: dict[str, Any], params: dict[str, Any]) -> None:
    """They are uploaded, sampled from and rewarded; where there is nothing to learn is told."""
    ow = OpenWeights()
    kind, talking = FineTuning(ow), [turn("user", "Say something.")]
    rows = [{"messages": talking, "gold_response": "Something."}, {"messages": talking}]
    with_gold, bare = (ow.files.upload([row] * 4, "conversations")["id"] for row in rows)
    rewarded = {**grpo, "grpo_reward_function": "rouge_l"}
    kind.check(kind.validate({**rewarded, "training_file": with_gold}))
    kind.check(kind.validate({**grpo, "training_file": bare}))
    kind.check(kind.validate({**params, "sampling_callbacks": [{"dataset": bare}]}))
    for settings, words in (
        (rewarded, "and rouge_l compares with a gold response; add the answer"),
        (params, "none is from the assistant, so there is nothing to learn"),
        (
            {**params, "loss": "sdft", "sdft_max_new_tokens": 8},
            "demonstration: is missing, and the last message",
        ),
    ):
        with pytest.raises(DatasetError, match=f"training_file: every row: .*{words}"):
            kind.check(kind.validate({**settings, "training_file": bare}))


# ---- prompts and steps of GRPO


def test_too_few_prompts_are_refused_at_the_door(
    grpo: dict[str, Any],
) -> None:
    kind = FineTuning(OpenWeights())
    config = kind.validate({**grpo, "per_device_train_batch_size": 10})
    with pytest.raises(DatasetError, match="has 4 usable rows, but a step takes 5 prompts"):
        kind.check(config)
    kind.check(kind.validate(grpo))


def test_prompts_that_fill_no_step_are_counted(
    grpo: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write(tmp_path / "five.jsonl", [talk(i) for i in range(5)])
    with caplog.at_level(logging.WARNING):
        train({**grpo, "training_file": file})
    assert "5 prompts in steps of 2: 1 of them, others in each epoch, fill no step" in caplog.text


def test_a_run_lost_in_a_later_epoch_goes_on_with_the_rows_that_come(
    grpo: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps an epoch; lost in the third epoch, and taken up within it."""
    settings = {**grpo, "training_file": str(Path(grpo["training_file"]).resolve())}
    settings |= {"grpo_reward_function": f"{tmp_path}/reward.py:distinct"}
    settings |= {"max_steps": 8, "save_steps": 1, "weight_decay": 0.1, "lora_dropout": 0.2}
    whole, part = tmp_path / "whole", tmp_path / "part"
    for folder in (whole, part):
        folder.mkdir()
    monkeypatch.chdir(whole)
    train(settings)
    monkeypatch.chdir(part)
    with pytest.raises(Lost):
        train(settings, extra_callbacks=[LoseAt(5)])
    (part / "seen.txt").unlink()
    train(settings)
    seen = (whole / "seen.txt").read_text().splitlines()
    assert (part / "seen.txt").read_text().splitlines() == seen[5:]
    assert seen[:2] != seen[2:4], "the control: epochs differ in their order"
    ours, theirs = (
        load_file(folder / "uploads/adapter/adapter_model.safetensors") for folder in (part, whole)
    )
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


# ---- what rewards may return


def scored(result: Any) -> list[float]:
    given = Samples([[]] * 3, ["a", "b", "c"], [[1]] * 3, [{}] * 3)
    [values] = RewardFunctions([Reward("mine", 1.0, lambda _: result)], limit_s=5).score(given)
    return values


@pytest.mark.parametrize(
    "result",
    [
        torch.tensor([1.0, 2.0, 3.0]),
        torch.tensor([[1], [2], [3]]),
        torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16, requires_grad=True),
        torch.tensor([1.0, 2.0, 3.0]).numpy(),
        (1, 2, 3),
        [torch.tensor(1.0), torch.ones(1, dtype=torch.float64).numpy()[0] + 1, True + 2],
        [{"score": 1}, {"reward": 2.0}, [3]],
        iter([1, 2, 3]),
    ],
)
def test_whatever_means_three_numbers_is_taken(result: Any) -> None:
    assert scored(result) == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    "result",
    ["123", b"123", {"a": 1, "b": 2, "c": 3}, {1.0, 2.0, 3.0}, 5, None, torch.tensor(3.0), [1, 2]]
    + [torch.ones(3, 2), ["1", " 2.0", "3e0"], [1, 2, b"3"], [1, 2, ["3"]], [1, 2, {"score": "3"}]]
    + [[1, 2, "8/10"], [1, 2, {"a": 1, "b": 2}], [1, 2, [1, 2]], [1, 2, 10**400]],
)
def test_whatever_else_is_one_sentence(result: Any) -> None:
    with pytest.raises(JobFailedError, match="^reward mine: (must return a list|gave) ") as caught:
        scored(result)
    assert "\n" not in str(caught.value)
