"""DPO and ORPO against the papers' formulas in float64, and as jobs: reload, resume, options."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from transformers import AutoModelForCausalLM, TrainerCallback

from openweights.errors import DatasetError
from openweights.jobs.unsloth.config.rows import check_rows
from openweights.jobs.unsloth.dpo_ft import dpo_loss, summed_dpo_loss
from openweights.jobs.unsloth.orpo_ft import log_odds, orpo_loss, summed_orpo_loss
from openweights.jobs.unsloth.preference.data import PreferenceCollator, preference_examples
from openweights.jobs.unsloth.preference.trainer import preference_train
from openweights.jobs.unsloth.training import train
from openweights.jobs.unsloth.validate import training_config
from openweights.models.load import load_model
from openweights.models.tokens import IGNORED, eos_token_ids
from openweights.models.weights import Reference
from tests.jobs.unsloth.malformed_configs import DPO
from tests.rounding import assert_sums_equal, terms_of
from tests.tiny_model import EOS, make_tokenizer

TOKENIZER: Any = make_tokenizer()


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


ROWS: list[dict[str, Any]] = [
    {
        "prompt": [user("Count to " + "x" * i)],
        "chosen": [assistant("one two" + " three" * (i % 3))],
        "rejected": [assistant("no" + " never" * (i % 4))],
    }
    for i in range(7)
]
# An answer of several messages.
ROWS[2]["chosen"] = [assistant("one"), user("And then?"), assistant("two")]


def config(tiny: Path, out: Path, **changes: Any) -> Any:
    small = {"learning_rate": 1e-2, "warmup_steps": 0, "max_steps": 2}
    files = {"model": str(tiny), "output_dir": str(out), "lr_scheduler_type": "constant"}
    return training_config({**DPO, **small, **files, **changes})


def learned(pair: dict[str, list[int]], side: str) -> list[str]:
    """The scored stretches of an answer, decoded."""
    texts: list[list[int]] = [[]]
    for label in pair[f"{side}_labels"]:
        if label != IGNORED:
            texts[-1].append(label)
        elif texts[-1]:
            texts.append([])
    return [TOKENIZER.decode(text) for text in texts if text]


# ---- rows


def test_the_whole_answer_counts_and_only_the_answer(tiny: Path, tmp_path: Path) -> None:
    before = [user("a"), assistant("earlier answer"), user("b")]
    row = {**ROWS[2], "prompt": before}
    [pair] = preference_examples(config(tiny, tmp_path), TOKENIZER, [row], ends=[2, 0])
    assert learned(pair, "chosen") == [f"one{EOS}", f"two{EOS}"]
    assert learned(pair, "rejected") == [f"no never never{EOS}"]
    whole = TOKENIZER.apply_chat_template([*before, *row["chosen"]], tokenize=False)
    assert TOKENIZER.decode(pair["chosen_input_ids"]) == whole


def test_long_pairs_are_cut_or_dropped_and_counted(
    tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = {"prompt": [user("x" * 60)], "chosen": [assistant("a")], "rejected": [assistant("b")]}
    later = {"prompt": [user("Hi")], "chosen": [assistant("z" * 99)], "rejected": [assistant("b")]}
    settings = config(tiny, tmp_path, max_seq_length=60)
    with caplog.at_level(logging.WARNING):
        [kept] = preference_examples(settings, TOKENIZER, [long, later], ends=[2])
    assert len(kept["chosen_input_ids"]) == 60 and learned(kept, "rejected") == [f"b{EOS}"]
    assert "2 of 2 rows (100%) are longer than max_seq_length=60 and lose their end" in caplog.text
    assert "1 of 2 rows dropped: nothing to compare is left" in caplog.text
    with pytest.raises(DatasetError, match="nothing to compare is left of any row"):
        preference_examples(settings, TOKENIZER, [long], ends=[2])


def test_rows_are_checked(tiny: Path, tmp_path: Path) -> None:
    block = {"type": "text", "text": "x", "weight": 2}
    rows = [
        (1, ROWS[0]),
        (2, {"prompt": [user("a")], "chosen": [assistant("a")]}),
        (3, {**ROWS[0], "rejected": [assistant("a"), user("b")]}),
        (4, {**ROWS[0], "chosen": [{"role": "assistant", "content": [block]}]}),
    ]
    settings = config(tiny, tmp_path)
    with pytest.raises(DatasetError) as caught:
        check_rows(rows, settings, settings.datasets()[0])
    said = [line.split(": ", 2)[:2] for line in str(caught.value).splitlines()]
    assert said == [
        ["training_file:2", "rejected"],
        ["training_file:3", "rejected[1].role"],
        ["training_file:4", "chosen[0]"],
    ]


# ---- losses


_log_p = st.floats(-30, -1e-5)


@given(*[_log_p] * 2, st.floats(0.01, 2))
def test_orpo_is_equation_6(chosen: float, rejected: float, beta: float) -> None:
    def odds(log_p: float) -> float:
        return math.exp(log_p) / -math.expm1(log_p)

    ratio = odds(chosen) / odds(rejected)
    expected = -chosen - beta * -math.log1p(1 / ratio)
    tensors = (torch.tensor([value], dtype=torch.float64) for value in (chosen, rejected))
    assert float(orpo_loss(*tensors, beta)) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@given(st.floats(-50, 50), st.floats(-50, 50))
def test_dpo_is_equation_7(chosen: float, rejected: float) -> None:
    expected = -math.log(1 / (1 + math.exp(rejected - chosen)))
    tensors = (torch.tensor([value], dtype=torch.float64) for value in (chosen, rejected))
    assert float(dpo_loss(*tensors)) == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_certain_answers_give_finite_losses_and_gradients() -> None:
    log_p = torch.tensor([0.0, -1e-9, -1e-4, -0.7, -100.0, -1e4], requires_grad=True)
    log_odds(log_p).sum().backward()
    assert log_p.grad is not None and torch.isfinite(log_p.grad).all()
    assert torch.isfinite(log_odds(log_p)).all()


def perturbed(model: Any) -> Any:
    """An adapter that does something, so that policy and reference differ."""
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return model


@torch.no_grad()
def slow_losses(model: Any, pairs: list[dict[str, list[int]]], beta: float) -> tuple[float, float]:
    """Means of DPO and ORPO over pairs, from full logits in float64, one answer at a time."""

    def log_probs(ids: list[int], labels: list[int]) -> list[float]:
        p = model(torch.tensor([ids])).logits[0].double().softmax(-1)
        return [math.log(p[t - 1, x]) for t, x in enumerate(labels) if x != IGNORED]

    dpo = orpo = 0.0
    for pair in pairs:
        scores, means = [], []
        for side in ("chosen", "rejected"):
            ids, labels = pair[f"{side}_input_ids"], pair[f"{side}_labels"]
            own = log_probs(ids, labels)
            with model.disable_adapter():
                reference = log_probs(ids, labels)
            scores.append(beta * (sum(own) - sum(reference)))
            means.append(sum(own) / len(own))
        dpo += math.log1p(math.exp(scores[1] - scores[0]))
        chosen, rejected = (math.log(math.exp(m) / (1 - math.exp(m))) for m in means)
        orpo += -means[0] + beta * math.log1p(math.exp(rejected - chosen))
    return dpo / len(pairs), orpo / len(pairs)


def terms_in(model: Any, tokenizer: Any, settings: Any, *, steps: int = 1) -> int:
    """Of a loss over all pairs."""
    pairs = preference_examples(settings, tokenizer, ROWS, ends=[2, 0])
    sides = ("chosen_input_ids", "rejected_input_ids")
    return terms_of(model, sum(len(pair[side]) for pair in pairs for side in sides), steps=steps)


def test_batches_equal_the_slow_losses(tiny: Path, tmp_path: Path) -> None:
    settings = config(tiny, tmp_path)
    model, tokenizer = load_model(settings)
    base = Reference(model)
    model = perturbed(model).double().eval()
    pairs = preference_examples(settings, tokenizer, ROWS, ends=eos_token_ids(model, tokenizer))
    batch = PreferenceCollator(3)(pairs)
    dpo, orpo = slow_losses(model, pairs, 0.3)
    with torch.no_grad():
        found = [
            float(summed_dpo_loss(model, batch, beta=0.3, reference=base).total),
            float(summed_orpo_loss(model, batch, beta=0.3).total),
        ]
    assert [value / len(pairs) for value in found] == pytest.approx([dpo, orpo], rel=1e-6)
    # At its start a fresh adapter is its own reference.
    fresh, _ = load_model(settings)
    with torch.no_grad():
        start = summed_dpo_loss(fresh, batch, beta=0.3, reference=Reference(fresh))
    assert_sums_equal(start.total, len(pairs) * math.log(2), 64)
    assert start.metrics["rewards/margins"] == 0


@pytest.mark.parametrize("loss", ["dpo", "orpo"])
def test_a_step_is_the_same_however_it_is_split(loss: str, tiny: Path, tmp_path: Path) -> None:
    """Seven pairs as 7, and as 3 + 3 + 1, where a mean of means would be another number."""
    results = []
    for batch, accumulation in ((7, 1), (3, 3)):
        settings = config(
            tiny, tmp_path, loss=loss, per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation, test_file=DPO["training_file"], optim="sgd",
        )  # fmt: skip
        model, tokenizer = load_model(settings)
        log = preference_train(
            settings, perturbed(model), tokenizer, ROWS, ROWS[:3]
        ).state.log_history
        adapter = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        results.append(([e for e in log if "loss" in e], adapter))
        assert [e for e in log if "eval_rewards/accuracies" in e and "eval_loss" in e]
    (whole, adapter), (split, other) = results
    terms = terms_in(model, tokenizer, settings, steps=2)
    # A margin is what is left of log-probabilities of whole answers.
    size = max(abs(e[f"logps/{side}"]) for e in whole for side in ("chosen", "rejected"))
    for key in ("loss", "rewards/margins", "logps/chosen", "rewards/accuracies", "learning_rate"):
        ours, theirs = [e[key] for e in split], [e[key] for e in whole]
        assert_sums_equal(ours, theirs, terms, size=size if "margins" in key else None, about=key)
    assert_sums_equal(other, adapter, terms)
    assert whole[0]["learning_rate"] == 1e-2 and whole[1]["loss"] < whole[0]["loss"]


# ---- as jobs


class StopAt(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("loss", ["dpo", "orpo"])
def test_a_stopped_run_goes_on_and_its_adapter_is_plain_peft(
    loss: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    params = {
        "model": str(tiny), "training_file": str(data), "loss": loss, "max_steps": 4,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "beta": 0.5,
        "learning_rate": "1e-2 / 2", "warmup_steps": 2, "lora_dropout": 0.1,
        "holdout_fraction": 0.2,
    }  # fmt: skip
    logs = {}
    for name, callbacks in (("whole", []), ("stopped", [StopAt()])):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        if callbacks:
            with pytest.raises(SystemExit):
                train(params, extra_callbacks=callbacks)
        model = train(params).model
        events = map(json.loads, Path("uploads/events.jsonl").read_text().splitlines())
        logs[name] = {e["step"]: e for e in events if "loss" in e}
    whole, stopped = logs["whole"], logs["stopped"]
    assert list(whole) == list(stopped) == [1, 2, 3, 4]
    for step in whole:
        assert stopped[step]["loss"] == whole[step]["loss"] and math.isfinite(whole[step]["loss"])
    assert whole[2]["learning_rate"] == pytest.approx(2.5e-3, rel=1e-9), "it warms up"
    ids = torch.tensor([TOKENIZER("How many?")["input_ids"]])
    base = AutoModelForCausalLM.from_pretrained(tiny)
    with torch.no_grad():
        before, own = base(ids).logits, model.eval()(ids).logits  # type: ignore[union-attr]
        tuned = PeftModel.from_pretrained(base, "uploads/adapter")(ids).logits
    assert_sums_equal(tuned, own, terms_of(model, ids.numel()))
    assert float((before - own).abs().max()) > 1e-3
