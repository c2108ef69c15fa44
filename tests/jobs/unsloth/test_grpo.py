"""The GRPO trainer on a tiny random model: advantages, failed rewards, scoring, and a resume."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig, TrainerCallback
from trl import GRPOTrainer

from openweights.errors import DatasetError, JobFailedError
from openweights.generation.transformers_engine import TransformersEngine
from openweights.jobs.unsloth.callbacks import StepSeed
from openweights.jobs.unsloth.grpo.advantages import (
    FailedRewards,
    Scale,
    group_advantages,
    has_signal,
)
from openweights.jobs.unsloth.grpo.completion_logps import completion_logps
from openweights.jobs.unsloth.grpo.data import grpo_rows
from openweights.jobs.unsloth.grpo.reward_functions import (
    RewardFunctions,
    reasoning_part,
    reasoning_reward,
)
from openweights.jobs.unsloth.grpo.trainer import (
    RewardTrainer,
    SkipEmptySteps,
    by_length,
    sampling_kl,
)
from openweights.jobs.unsloth.grpo_ft import grpo_args, grpo_train
from openweights.jobs.unsloth.rewards import Reward, Samples
from openweights.jobs.unsloth.rollout import grpo_sampling_params
from openweights.jobs.unsloth.validate import TrainingConfig
from openweights.models.forward import base_model
from openweights.models.log_probs import mean_target_log_probs
from openweights.models.packing import may_pack
from openweights.models.templates.rendering import prompt_token_ids
from tests.jobs.unsloth.test_sdft import load, perturb
from tests.rounding import assert_equal_in_float64, assert_sums_equal, terms_of

ROWS = [
    {
        "messages": [
            {"role": "user", "content": "count to " + "x" * (1 + 5 * (i % 4))},
            {"role": "assistant", "content": f"one two {i}"},
        ],
        "level": i if i % 2 else str(i),
    }
    for i in range(8)
]
NAN = math.nan


def config(tmp_path: Path, **changes: Any) -> TrainingConfig:
    data = tmp_path / "rows.jsonl"
    data.touch()
    values: dict[str, Any] = {
        "model": "tiny/model",
        "training_file": str(data),
        "loss": "grpo",
        "max_seq_length": 256,
        "grpo_num_generations": 4,
        "grpo_max_completion_length": 5,
        "grpo_reward_function": "caps_spanish",
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "lr_scheduler_type": "constant",
        "output_dir": str(tmp_path / "out"),
    }
    return TrainingConfig(**{**values, **changes})


def lengths(samples: Samples) -> list[float]:
    return [float(len(text)) for text in samples.completions]


def make_trainer(
    tiny: Path, tmp_path: Path, *rewards: Reward, model: Any = None, **changes: Any
) -> RewardTrainer:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    made = config(tmp_path, **changes)
    rows = grpo_rows(made, tokenizer, ROWS)
    given = list(rewards) or [Reward("length", 1.0, lengths)]
    model = load(tiny) if model is None else model
    engine = TransformersEngine(model, tokenizer)
    return RewardTrainer(
        model,
        grpo_args(made, "transformers"),
        beta=made.beta,
        functions=RewardFunctions(given, limit_s=5),
        prompts=rows.prompts,
        rows=rows.rows,
        failed=FailedRewards(given, made.grpo_max_failed_reward_fraction),
        think_end_tag="</think>",
        packed=may_pack(model, [{"input_ids": prompt.ids} for prompt in rows.prompts]),
        engine=engine,
        sampling=grpo_sampling_params(made, tokenizer, engine.end_token_ids),
        log_event=lambda event: None,
        train_dataset=rows.dataset,
        processing_class=tokenizer,
    )


def weights(model: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


class Watch(TrainerCallback):
    """The weights after each step."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.weights.append(weights(kwargs["model"]))


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    return any(not torch.equal(before[name], after[name]) for name in before)


# ---- advantages

REWARDS = st.lists(
    st.none() | st.floats(-3, 3, width=32) | st.sampled_from([0.0, 0.1, 1.0]),
    min_size=4,
    max_size=4,
)


def advantages(groups: Sequence[Sequence[float | None]], scale: Scale) -> Tensor:
    flat = [NAN if value is None else value for group in groups for value in group]
    return group_advantages(torch.tensor(flat), len(groups[0]), scale).view(len(groups), -1)


@given(group=REWARDS, others=REWARDS, scale=st.sampled_from(["group", "none"]))
def test_siblings_of_a_failed_row_are_as_if_it_had_not_been(
    group: list[float | None], others: list[float | None], scale: Scale
) -> None:
    with_failed = advantages([group, others], scale)[0]
    valid = [value for value in group if value is not None]
    places = [i for i, value in enumerate(group) if value is not None]
    assert all(with_failed[i] == 0 for i in range(4) if i not in places)
    if len(valid) < 2:
        assert not with_failed.any(), "one alone has nothing to be compared with"
    else:
        alone = advantages([valid], scale)[0]
        assert_sums_equal(with_failed[places], alone, 16)


@given(
    group=st.lists(st.floats(-3, 3, width=32), min_size=4, max_size=4),
    other=st.lists(st.floats(-3, 3, width=32), min_size=4, max_size=4),
)
def test_advantages_are_those_of_the_formula(group: list[float], other: list[float]) -> None:
    given_rewards = torch.tensor([group, other], dtype=torch.float64)
    centred = given_rewards - given_rewards.mean(1, keepdim=True)
    for scale, divisor in {
        "group": given_rewards.std(1, keepdim=True) + 1e-4,
        "batch": given_rewards.std() + 1e-4,
        "none": torch.tensor(1.0),
    }.items():
        found = group_advantages(given_rewards.flatten(), 4, scale)  # type: ignore[arg-type]
        size = float(given_rewards.abs().max() / divisor.min()) + 1
        assert_equal_in_float64(found.view(2, 4), centred / divisor, size=size)


def test_advantages_of_equal_rewards_are_exactly_zero() -> None:
    assert not advantages([[0.1, 0.1, 0.1, 0.1], [0.3, 0.3, None, 0.3]], "group").any()
    # The control: in float32 as in trl, rounding is divided by next to nothing.
    equal = torch.full((7,), 0.1)
    assert ((equal - equal.mean()) / (equal.std() + 1e-4)).any()


def test_batch_scale_leaves_failed_rows_out() -> None:
    found = advantages([[1.0, 3.0, None], [5.0, 9.0, 1.0]], "batch")
    deviation = torch.tensor([1.0, 3.0, 5.0, 9.0, 1.0]).std() + 1e-4
    expected = torch.tensor([[-1.0, 1.0, 0.0], [0.0, 4.0, -4.0]]) / deviation
    assert_sums_equal(found, expected, 16)


def test_signal() -> None:
    assert not has_signal(torch.tensor([NAN, 1.0, NAN, 2.0]), 2)
    assert has_signal(torch.tensor([NAN, 1.0, 2.0, 2.0]), 2)


# ---- the trainer's own path

SCORED: dict[str, list[float | None]] = {}


@pytest.fixture(scope="module")
def scoring(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> RewardTrainer:
    """A trainer that scores completions of one token, with the rewards in `SCORED`."""
    path = tmp_path_factory.mktemp("scoring")
    trainer = make_trainer(tiny, path, Reward("set", 1.0, lambda given: SCORED["set"]), beta=0)

    def one_token(prompt_ids: list[list[int]], *rest: Any) -> Any:
        return [[5, 2] for _ in prompt_ids], None

    trainer._generate_single_turn = one_token  # type: ignore[method-assign]
    trainer._failed.record = lambda *numbers: None  # type: ignore[method-assign]
    return trainer


@settings(max_examples=40)
@given(group=REWARDS)
def test_the_trainer_uses_these_advantages(
    scoring: RewardTrainer, group: list[float | None]
) -> None:
    inputs = [scoring.train_dataset[i // 4] for i in range(8)]  # type: ignore[index]
    SCORED["set"] = [*group, 0.0, 1.0, 2.0, 3.0]
    output = scoring._generate_and_score_completions(inputs)  # type: ignore[arg-type]
    expected = advantages([group, [0.0, 1.0, 2.0, 3.0]], "group")
    assert_sums_equal(output["advantages"].view(2, 4), expected, 16)


def test_large_rewards_that_differ_by_little_do_differ(scoring: RewardTrainer) -> None:
    inputs = [scoring.train_dataset[i // 4] for i in range(8)]  # type: ignore[index]
    group = [1e9, 1e9 + 1, 1e9 + 2, 1e9 + 3]  # of which 32 bits make one number
    SCORED["set"] = [*group, *group]
    output = scoring._generate_and_score_completions(inputs)  # type: ignore[arg-type]
    expected = advantages([[0.0, 1.0, 2.0, 3.0]] * 2, "group")
    assert_sums_equal(output["advantages"].view(2, 4), expected, 16)


def test_one_failed_part_fails_the_whole_row(tiny: Path, tmp_path: Path) -> None:
    parts = [
        Reward("first", 2.0, lambda given: [1.0, 2.0, 3.0, 4.0] * 2),
        Reward("second", -1.0, lambda given: [None, 5.0, 6.0, 8.0] * 2),
    ]
    trainer = make_trainer(tiny, tmp_path, *parts, beta=0)
    inputs = [trainer.train_dataset[i // 4] for i in range(8)]  # type: ignore[index]
    output = trainer._generate_and_score_completions(inputs)  # type: ignore[arg-type]
    expected = advantages([[None, -1.0, 0.0, 0.0]] * 2, "group")
    assert_sums_equal(output["advantages"].view(2, 4), expected, 16)
    assert trainer._metrics["train"]["failed_fraction"] == [0.25]
    assert trainer._metrics["train"]["rewards/first/mean"] == [3.0], "of the rows that count"


@pytest.mark.parametrize("skips", [True, False])
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_a_step_without_rewards_changes_nothing(
    tiny: Path, tmp_path: Path, beta: float, skips: bool
) -> None:
    calls: list[int] = []

    def failing_later(samples: Samples) -> list[float | None]:
        calls.append(len(samples.completions))
        return [None] * 8 if len(calls) > 2 else list(lengths(samples))

    reward = Reward("failing", 1.0, failing_later)
    trainer = make_trainer(
        tiny, tmp_path, reward, beta=beta, max_steps=4, weight_decay=0.5, optim="adamw_torch"
    )
    if not skips:
        trainer.remove_callback(SkipEmptySteps)
    watch = Watch()
    trainer.add_callback(watch)
    trainer.train()
    start, second, *failed = watch.weights
    assert moved(start, second)
    # The control: momentum and weight decay move the weights though there is no reward.
    assert [moved(second, after) for after in failed] == [not skips] * 2
    steps = {float(s["step"]) for s in trainer.optimizer.state.values()}  # type: ignore[union-attr]
    assert steps == {2.0 if skips else 4.0}, "nor does the optimizer's own clock go on"
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert rewards[2:] == [None, None] and None not in rewards[:2]


def test_rewards_that_keep_failing_end_the_run(tiny: Path, tmp_path: Path) -> None:
    def half(samples: Samples) -> list[float | None]:
        reward.causes["the sky is blue"] += 1
        return [1.0, None] * 4

    reward = Reward("half", 1.0, half)
    trainer = make_trainer(tiny, tmp_path, reward, max_steps=9, grpo_max_failed_reward_fraction=0.4)
    words = "4 of 8 completions got no reward.*last 3 steps.*fraction=0.4 .*half: the sky is blue"
    with pytest.raises(JobFailedError, match=words):
        trainer.train()
    assert trainer.state.global_step == 2, "during the third"
    # The control: half is not more than half.
    trainer = make_trainer(tiny, tmp_path, Reward("half", 1.0, half), max_steps=4)
    trainer.train()
    assert trainer.state.global_step == 4


def test_log_probs_equal_those_of_trl(tiny: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny, tmp_path, grpo_temperature=0.7)
    perturb(trainer._policy, 3)
    prompts = [[30, 31, 32, 33, 34, 35], [40, 41], [50, 51, 52]]
    completions = [[60, 61, 2], [70, 71, 72, 73], [2]]
    ids = torch.tensor(
        [
            [3] * (6 - len(p)) + p + c + [3] * (4 - len(c))
            for p, c in zip(prompts, completions, strict=True)
        ]
    )
    seen = torch.tensor(
        [
            [0] * (6 - len(p)) + [1] * (len(p) + len(c)) + [0] * (4 - len(c))
            for p, c in zip(prompts, completions, strict=True)
        ]
    )
    mask = seen[:, -4:]
    found = []
    for kind in (RewardTrainer, GRPOTrainer):
        trainer.model.zero_grad()  # type: ignore[union-attr]
        logps, entropies, _ = kind._get_per_token_logps_and_entropies(
            trainer, trainer.model, ids, seen, 4, compute_entropy=True
        )
        (logps * mask).sum().backward()
        gradients = [p.grad.clone() for p in trainer.model.parameters() if p.grad is not None]  # type: ignore[union-attr]
        found.append([logps * mask, entropies * mask, *gradients])
    assert len(found[0]) > 4
    ours, theirs = found
    assert_sums_equal(ours, theirs, terms_of(trainer._policy, ids.numel()))
    # Each row alone, where passes are as wide as that row.
    alone, entropies, _ = trainer._get_per_token_logps_and_entropies(
        trainer.model, ids, seen, 4, batch_size=1, compute_entropy=True
    )
    assert alone.shape == entropies.shape == mask.shape
    assert_sums_equal([alone * mask, entropies * mask], theirs[:2], terms_of(trainer._policy, 40))


def test_rows_of_a_step_come_the_longest_first() -> None:
    masks = {
        "prompt_mask": torch.tensor([[0, 1], [1, 1], [1, 1]]),
        "completion_mask": torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1]]),
    }
    step = by_length(
        {**masks, "advantages": torch.arange(3.0), "num_items_in_batch": torch.ones(())}
    )
    assert step["advantages"].tolist() == [2.0, 0.0, 1.0] and step["num_items_in_batch"] == 1
    assert step["completion_mask"].sum(1).tolist() == [3, 2, 1]


def test_the_decoder_reads_no_padding_and_logits_of_a_batch_are_never_made(
    tiny: Path, tmp_path: Path
) -> None:
    """However far apart prompts are in length."""
    trainer = make_trainer(tiny, tmp_path)
    ids = torch.full((2, 40), 5)
    seen = torch.ones_like(ids)
    seen[0, :30] = 0  # a prompt of 6 tokens beside one of 36; completions have 4
    read: list[tuple[str, torch.Size]] = []
    base = base_model(trainer._policy)
    base.get_decoder().register_forward_hook(
        lambda module, given, out: read.append(("decoder", out.last_hidden_state.shape))
    )
    base.get_output_embeddings().register_forward_hook(
        lambda module, given, out: read.append(("head", out.shape))
    )
    logps, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, seen, 4)
    assert logps.shape == (2, 4)
    assert [(name, *shape[:2]) for name, shape in read] == [("decoder", 1, 10 + 40)]
    read.clear()
    trainer.model(input_ids=ids, attention_mask=seen)  # type: ignore[misc]
    assert [name for name, _ in read] == ["decoder", "head"], "the control: it is seen"


def test_rows_and_too_few_prompts(tiny: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    prompts = [prompt_token_ids(tokenizer, row["messages"][:1]) for row in ROWS]  # type: ignore[index]
    room = max(map(len, prompts)) - 1 + 5
    rows = grpo_rows(config(tmp_path, max_seq_length=room), tokenizer, ROWS)
    assert len(rows.rows) == 6, "prompts without room for a completion are dropped"
    assert rows.rows[1] == {"level": 1, "gold_response": "one two 1"}
    assert rows.prompts[1].messages == ROWS[1]["messages"][:1]
    assert rows.prompts[1].ids == prompts[1] and rows.dataset[1]["row"] == 1
    with pytest.raises(DatasetError, match="no row fits: rows have up to .* raise max_seq_len"):
        grpo_rows(config(tmp_path, max_seq_length=10), tokenizer, ROWS)
    few = config(tmp_path, gradient_accumulation_steps=9)
    with pytest.raises(DatasetError, match="has 8 usable rows, but a step takes 9 prompts"):
        grpo_train(
            few, load(tiny), tokenizer, ROWS, None, fetch=lambda f, t: t, log_event=lambda e: None
        )


def test_a_resumed_run_equals_the_uninterrupted_one(tiny: Path, tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = control.should_save = state.global_step == 2

    def run(name: str, *callbacks: TrainerCallback, resume: str | None = None) -> dict[str, Tensor]:
        model = load(tiny, dropout=0.2)
        place = str(tmp_path / name)
        trainer = make_trainer(tiny, tmp_path, model=model, max_steps=5, output_dir=place)
        for callback in (StepSeed(), *callbacks):
            trainer.add_callback(callback)
        trainer.train(resume_from_checkpoint=resume)
        return weights(model)

    whole = run("whole")
    half = run("half", Stop())
    assert moved(half, whole)
    assert not (tmp_path / "half" / "README.md").exists(), "the result has a card, of ours"
    resumed = run("half", resume=str(tmp_path / "half" / "checkpoint-2"))
    for name, expected in whole.items():
        assert torch.equal(resumed[name], expected), name


# ---- the policy as its own judge


def test_reasoning_reward_is_the_mean_log_prob_of_a_plain_forward(tiny: Path) -> None:
    model, tokenizer = load(tiny), AutoTokenizer.from_pretrained(tiny)
    perturb(model, 2)
    contexts, targets = [[30, 31, 32, 33], [40]], [[50, 51], [60, 61, 62]]
    pairs = list(zip(contexts, targets, strict=True))
    found, terms = mean_target_log_probs(model, pairs, 3, batch_size=2), terms_of(model, 6)
    for mean, context, target in zip(found, contexts, targets, strict=True):
        logps = model(torch.tensor([context + target])).logits[0].detach().log_softmax(-1)
        places = range(len(context) - 1, len(context) + len(target) - 1)
        expected = [float(logps[p, token]) for p, token in zip(places, target, strict=True)]
        assert_sums_equal(mean, sum(expected) / len(target), terms)
    reward = reasoning_reward(
        model, tokenizer, 1.0, prompt_ids=lambda prompt: [30, 31], batch_size=2
    )
    texts = ["so</think>abc", "so</think>other", "sn</think>abc"]
    prompts = [[{"role": "user", "content": "?"}]] * 3
    rows = [{"gold_response": "yes"}] * 3
    first, second, third = reward.score(Samples(prompts, texts, [[1]] * 3, rows))  # type: ignore[misc]
    assert_sums_equal(first, second, terms, about="what follows the reasoning")
    assert abs(first - third) > 1e-3 and max(first, third) < 0  # type: ignore[operator]


def test_reasoning_ends_with_its_tag() -> None:
    assert reasoning_part("a</think>b</think>c", "</think>") == "a</think>"
    assert reasoning_part("no tag here \n", "</think>") == "no tag here"


# ---- how completions are drawn


def drawn(trainer: RewardTrainer, count: int = 8) -> Any:
    """What a step makes of so many completions of the first prompts."""
    inputs = [trainer.train_dataset[i // 4] for i in range(count)]  # type: ignore[index]
    trainer._policy.train()
    return trainer._generate_and_score_completions(inputs)  # type: ignore[arg-type]


def test_sampling_tells_the_old_policys_log_probabilities(tiny: Path, tmp_path: Path) -> None:
    """At the temperature of the loss; without a forward of their own, and exactly on policy."""
    trainer = make_trainer(tiny, tmp_path, grpo_temperature=0.6, beta=0)
    output = drawn(trainer)
    assert "old_per_token_logps" not in output, "the ratio is 1, to the bit"
    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], 1)
    mask = torch.cat([output["prompt_mask"], output["completion_mask"]], 1)
    width = output["completion_ids"].shape[1]
    with torch.no_grad():
        own, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, width)
    counted = output["completion_mask"].bool()
    sampled = output["sampling_per_token_logps"]
    assert float((own - sampled)[counted].abs().max()) < 1e-5
    assert sampling_kl(sampled, own, counted) < 1e-9
    assert sampling_kl(sampled - 0.1, own, counted) > 1e-3, "the control"


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("packed", [True, False])
def test_log_probabilities_of_completions_and_their_gradients_are_those_of_rows_alone(
    tiny: Path, packed: bool, temperature: float
) -> None:
    """Rows of unequal prompts; one's completion is masked, as a truncated one's can be."""
    model = load(tiny)
    perturb(model, 3)
    model.double().eval()
    base, draw = base_model(model), torch.Generator().manual_seed(torch.seed() % 2**31)
    prompts, completions, width, tokens = [2, 9, 5, 12], [6, 1, 0, 4], 12, 6
    ids = torch.randint(3, 200, (4, width + tokens), generator=draw)
    places = torch.arange(width + tokens) - width
    begins, ends = (torch.tensor(sizes)[:, None] for sizes in (prompts, completions))
    mask = ((places >= -begins) & (places < ends)).long()
    if packed:
        assert may_pack(model, [{"input_ids": row.tolist()} for row in ids])

    def alone() -> Iterator[tuple[Tensor, Tensor]]:
        for row, present, count in zip(ids, mask.bool(), completions, strict=True):
            logits = base(input_ids=row[present][None]).logits[0] / temperature
            log_p = logits[-count - 1 : -1].log_softmax(-1) if count else logits[:0]
            chosen = row[width : width + count, None]
            yield log_p.gather(-1, chosen)[:, 0], -(log_p.exp() * log_p).sum(-1)

    def gradients(values: Tensor) -> list[Tensor]:
        model.zero_grad()
        (values * factors).sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    factors = torch.randn(sum(completions), dtype=torch.float64, generator=draw)
    logps, entropies = completion_logps(
        base, ids, mask, tokens, temperature=temperature, packed=packed
    )
    counted = mask[:, width:].bool()
    expected, expected_entropies = map(torch.cat, zip(*alone(), strict=True))
    assert_equal_in_float64(logps[counted], expected)
    assert_equal_in_float64(entropies[counted], expected_entropies)
    assert not logps[~counted].any() and not entropies[~counted].any()
    own, wanted = gradients(logps[counted]), gradients(expected)
    assert len(own) == len(wanted) > 5
    for gradient, other in zip(own, wanted, strict=True):
        assert_equal_in_float64(gradient, other)
    with pytest.raises(AssertionError):  # the control: a token of a prompt is another
        ids[3, 2] += 1
        changed, _ = completion_logps(
            base, ids, mask, tokens, temperature=temperature, packed=packed
        )
        assert_equal_in_float64(changed[counted], expected)


def test_a_mixture_of_experts_is_scored_as_others_are(tiny: Path, tmp_path: Path) -> None:
    """Also beside a reference; its routers have no loss of their own."""
    vocabulary = len(AutoTokenizer.from_pretrained(tiny))
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(
        Qwen3MoeConfig(
            vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=4,
            num_experts_per_tok=2, moe_intermediate_size=16,
        )
    )  # fmt: skip
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    trainer = make_trainer(tiny, tmp_path, model=model, beta=0.1, max_steps=2)
    trainer.train()
    first, second = trainer.state.log_history[:2]
    assert first["sampling_kl"] < 1e-6 and second["sampling_kl"] < 1e-6
    assert second["grad_norm"] > 0 and math.isfinite(second["loss"]), "the control: it trains"


def test_an_engine_with_other_weights_makes_the_ratio_an_importance_weight(
    tiny: Path, tmp_path: Path
) -> None:
    trainer = make_trainer(tiny, tmp_path, beta=0, max_steps=1)
    trainer._engine.is_exact = False
    output = drawn(trainer)
    assert torch.equal(output["old_per_token_logps"], output["sampling_per_token_logps"])
    trainer.train()
    assert trainer.state.log_history[0]["sampling_kl"] < 1e-6


def test_stop_texts_and_special_tokens_end_completions_and_rewards_see_what_they_ask_for(
    tiny: Path, tmp_path: Path
) -> None:
    texts: list[str] = []

    def keep(samples: Samples) -> list[float]:
        texts.extend(samples.completions)
        return lengths(samples)

    changes: dict[str, Any] = {"grpo_max_completion_length": 30, "grpo_temperature": 2.0}
    stop = {"grpo_stop": ["<|im_start|>", "e", "t"], "grpo_keep_special_tokens": True}
    trainer = make_trainer(tiny, tmp_path, Reward("keep", 1.0, keep), beta=0, **changes, **stop)
    params = trainer._sampling
    assert params.stop == ("e", "t") and set(params.stop_token_ids or ()) == {0, 1, 2}
    output = drawn(trainer, 32)
    assert any(text.endswith(("e", "t")) for text in texts), "a stop text is part of the tokens"
    assert any(text.endswith(("<|im_start|>", "<|im_end|>", "<|endoftext|>")) for text in texts)
    plain = [re.sub(r"<\|\w+\|>", "", text) for text in texts]
    assert all(not set(text[:-3]) & {"e", "t"} for text in plain), "nothing follows a stop text"
    ended = [bool(set(p) & {"e", "t"}) or p != text for p, text in zip(plain, texts, strict=True)]
    [share] = trainer._metrics["train"]["truncated_share"]
    assert 0 < share == 1 - sum(ended) / len(ended)
    full = output["completion_mask"].sum(1) == 30
    assert share <= float(full.float().mean()) < 1
