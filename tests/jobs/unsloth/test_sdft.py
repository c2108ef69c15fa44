"""The SDFT trainer on a tiny random model: loss, invariances, teacher, and an exact resume."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed

from openweights.errors import DatasetError
from openweights.generation.params import (
    Completion,
    GenerationRequest,
    SamplingParams,
    derived_seed,
)
from openweights.jobs.unsloth.divergence import Divergence, divergence_from_logits
from openweights.jobs.unsloth.sdft import SDFTTrainer, sdft_train
from openweights.jobs.unsloth.sdft_data import (
    on_policy_dataset,
    places_in_completions,
    scoring_rows,
    sdft_examples,
    token_weights,
)
from openweights.jobs.unsloth.trainer_args import trainer_args
from openweights.jobs.unsloth.validate import TrainingConfig
from openweights.models.forward import base_model, frozen_head
from openweights.models.packing import last_hidden, use_packed_attention
from tests.jobs.unsloth.test_teacher import averages_of
from tests.rounding import assert_equal_in_float64, assert_sums_equal, terms_of

ROWS = [
    {
        "messages": [
            {"role": "user", "content": "count to " + "x" * (1 + 3 * i)},
            {"role": "assistant", "content": "one two " + "y" * i},
        ]
    }
    for i in range(8)
]


def load(
    tiny: Path, *, dropout: float = 0.0, modules: Sequence[str] = ("q_proj", "up_proj")
) -> Any:
    set_seed(1)
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=list(modules))
    return get_peft_model(base, lora)


def perturb(model: nn.Module, seed: int, scale: float = 0.2) -> None:
    """Adapters that do something, so that student and teacher differ."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


def config(tmp_path: Path, **changes: Any) -> TrainingConfig:
    data = tmp_path / "rows.jsonl"
    data.touch()
    values: dict[str, Any] = {
        "model": "tiny/model",
        "training_file": str(data),
        "loss": "sdft",
        "max_seq_length": 512,
        "sdft_max_new_tokens": 6,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "output_dir": str(tmp_path / "out"),
        "sdft_gate": "off",
    }
    return TrainingConfig(**{**values, **changes})


class EchoEngine:
    """Completions that are a function of the prompt alone, whatever the batch."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def generate(self, requests: Sequence[GenerationRequest]) -> list[list[Completion]]:
        self.calls.append(sum(request.params.n for request in requests))
        return [[self._echo(list(r.prompt_ids))] * r.params.n for r in requests]

    def _echo(self, prompt: list[int]) -> Completion:
        first = 5 + sum(prompt) % 7
        return Completion([*range(first, first + 2 + len(prompt) % 5), 2], "", "stop")


def make_trainer(model: Any, tiny: Path, tmp_path: Path, **changes: Any) -> SDFTTrainer:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    keys = ("divergence", "top_k", "ema_alpha", "skip_tokens", "engine", "callbacks",
            "micro_batch_tokens")  # fmt: skip
    own = {key: changes.pop(key) for key in keys if key in changes}
    settings = config(tmp_path, **changes)
    examples = sdft_examples(settings, tokenizer, ROWS)
    return SDFTTrainer(
        model,
        trainer_args(settings),
        processing_class=tokenizer,
        train_dataset=on_policy_dataset(examples),
        sampling=SamplingParams(max_new_tokens=6, stop_token_ids=(2, 0)),
        **own,
    )


def scoring_batch(trainer: SDFTTrainer, rows: Sequence[int], extra: int = 0) -> dict[str, Tensor]:
    """A micro-batch of these rows with completions of other lengths; `extra` more pad columns."""
    examples = [trainer.train_dataset[i] for i in rows]
    completions = [[9 + i, 30, 31 + i, 40, 41][: 2 + i % 4] + [2] for i in rows]
    pairs = [(e["prompt_ids"], e["teacher_prompt_ids"]) for e in examples]
    batch = trainer._scoring_batch([(*p, c) for p, c in zip(pairs, completions, strict=True)])
    pad = trainer._pad_token_id
    fill = {"input_ids": pad, "attention_mask": 0, "loss_mask": False}
    return {
        name: nn.functional.pad(value, (0, extra), value=fill[name.removeprefix("teacher_")])
        for name, value in batch.items()
    }


def slow_loss(
    trainer: SDFTTrainer, batch: dict[str, Tensor], kind: Divergence, top_k: int | None
) -> Tensor:
    """The loss by its definition: one sequence at a time, no padding, full logits."""
    per_sequence = []
    for i in range(len(batch["input_ids"])):
        scored = []
        for prefix in ("", "teacher_"):
            length = int(batch[f"{prefix}attention_mask"][i].sum())
            ids = batch[f"{prefix}input_ids"][i : i + 1, :length]
            logits = trainer.model(input_ids=ids).logits[0, :-1]
            scored.append((ids[0, 1:], logits))
            if prefix == "":
                with torch.no_grad(), trainer.teacher.acting():
                    length = int(batch["teacher_attention_mask"][i].sum())
                    teacher_ids = batch["teacher_input_ids"][i : i + 1, :length]
                    teacher_logits = trainer.model(input_ids=teacher_ids).logits[0, :-1]
        count = int(batch["loss_mask"][i].sum())
        student_logits = scored[0][1][-count:]
        per_token = divergence_from_logits(student_logits, teacher_logits[-count:], kind, top_k)
        per_sequence.append(per_token.mean())
    return torch.stack(per_sequence).mean()


def grads(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def adapters(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """To the bit."""
    assert a.keys() == b.keys() and a
    assert not [name for name in a if not torch.equal(a[name], b[name])]


def test_scored_logits_equal_a_plain_forward(tiny: Path, tmp_path: Path) -> None:
    trainer = make_trainer(load(tiny), tiny, tmp_path)
    perturb(trainer.model, 1)
    batch = scoring_batch(trainer, [0, 3, 6])
    base = trainer.model.get_base_model()
    head = frozen_head(base)
    for prefix in ("", "teacher_"):
        with torch.no_grad():
            hidden = last_hidden(base, batch, prefix)[batch[f"{prefix}loss_mask"]]
            scored = head.logits(hidden)
            plain = trainer.model(
                input_ids=batch[f"{prefix}input_ids"],
                attention_mask=batch[f"{prefix}attention_mask"],
            ).logits[batch[f"{prefix}loss_mask"]]
        assert_sums_equal(scored, plain, terms_of(base, plain.shape[0]))
    scored = batch["input_ids"][:, 1:][batch["loss_mask"][:, :-1]]
    teacher_scored = batch["teacher_input_ids"][:, 1:][batch["teacher_loss_mask"][:, :-1]]
    assert torch.equal(scored, teacher_scored), "both score the same completion tokens"
    assert (scored == 2).sum() == 3, "the end token of each row is in the loss"


@pytest.mark.parametrize("top_k", [None, 9])
@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd"])
@pytest.mark.parametrize("modules", [("q_proj", "up_proj"), ("q_proj", "lm_head")])
def test_loss_and_gradients_equal_the_definition(
    tiny: Path, tmp_path: Path, kind: Divergence, modules: tuple[str, ...], top_k: int | None
) -> None:
    """Also when the head itself is trained, so that student and teacher do not share it."""
    trainer = make_trainer(
        load(tiny, modules=modules), tiny, tmp_path, divergence=kind, top_k=top_k
    )
    perturb(trainer.model, 1)
    trainer.teacher.update()
    perturb(trainer.model, 2)
    batch = scoring_batch(trainer, [0, 3, 6, 5])
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1

    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=4)
    loss.backward()
    fast = grads(trainer.model)
    trainer.model.zero_grad()
    slow = slow_loss(trainer, batch, kind, top_k)
    slow.backward()

    assert loss > 0.01
    terms = terms_of(trainer.model, int(batch["teacher_attention_mask"].sum()))
    assert_sums_equal(loss, slow, terms)
    assert_sums_equal(fast, grads(trainer.model), terms)
    # The control: with one token less of one row, the loss and every gradient are others.
    trainer.model.zero_grad()
    for prefix in ("", "teacher_"):
        mask = batch[f"{prefix}loss_mask"]
        mask[0, int(mask[0].nonzero()[-1])] = False
    wrong = trainer.compute_loss(trainer.model, batch, num_items_in_batch=4)
    wrong.backward()
    for name, other in {"loss": wrong, **grads(trainer.model)}.items():
        with pytest.raises(AssertionError, match="differs by"):
            assert_sums_equal(other, slow if name == "loss" else fast[name], terms)


def test_padding_and_order_do_not_change_the_loss(tiny: Path, tmp_path: Path) -> None:
    trainer = make_trainer(load(tiny), tiny, tmp_path)
    perturb(trainer.model, 1)

    def total(*batches: dict[str, Tensor]) -> float:
        losses = [trainer.compute_loss(trainer.model, b, num_items_in_batch=4) for b in batches]
        return sum(loss.item() for loss in losses)

    trainer.current_gradient_accumulation_steps = 1
    batch = scoring_batch(trainer, [0, 1, 2, 7])
    expected, terms = total(batch), terms_of(trainer.model, batch["teacher_input_ids"].numel())
    for batches in (
        [scoring_batch(trainer, [7, 2, 0, 1])],
        [scoring_batch(trainer, [0, 1, 2, 7], extra=9)],
        [scoring_batch(trainer, [i]) for i in (0, 1, 2, 7)],
    ):
        assert_sums_equal(total(*batches), expected, terms)
    # The control: another row in the place of one.
    with pytest.raises(AssertionError, match="differs by"):
        assert_sums_equal(total(scoring_batch(trainer, [0, 1, 2, 6])), expected, terms)


def test_one_call_generates_for_a_step_however_it_is_split(tiny: Path, tmp_path: Path) -> None:
    """Accumulation, also with an uneven last micro-batch, gives the update of one big batch."""
    results = []
    for batch_size, accumulation in ((6, 1), (2, 3), (4, 2)):
        model, engine = load(tiny), EchoEngine()
        out = tmp_path / str(batch_size)
        out.mkdir()
        trainer = make_trainer(
            model,
            tiny,
            out,
            engine=engine,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            optim="sgd",
            learning_rate=1.0,
        )
        trainer.train_dataset = trainer.train_dataset.select(range(6))
        perturb(model, 1)
        trainer.train()
        assert engine.calls == [6]
        results.append([adapters(model), trainer.state.log_history[0]["loss"]])
    terms = terms_of(model, 6 * 100)
    for other in results[1:]:
        assert_sums_equal(other, results[0], terms)


class Recorder(TrainerCallback):
    """The student's adapters after every step."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.history = model, [adapters(model)]

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.history.append(adapters(self.model))


@pytest.mark.parametrize("alpha", [0.0, 0.1, 1.0])
def test_teacher_follows_the_training_run(tiny: Path, tmp_path: Path, alpha: float) -> None:
    model = load(tiny)
    base_before = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    recorder = Recorder(model)
    trainer = make_trainer(
        model, tiny, tmp_path, ema_alpha=alpha, callbacks=[recorder], max_steps=4
    )
    trainer.train()
    student, teacher = recorder.history[-1], averages_of(trainer.teacher)
    assert not torch.equal(
        *[
            h["base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight"]
            for h in (recorder.history[0], student)
        ]
    ), "the student moved"
    expected = {n: v.double() for n, v in recorder.history[0].items()}
    for weights in recorder.history[1:]:
        expected = {n: alpha * weights[n].double() + (1 - alpha) * v for n, v in expected.items()}
    if alpha in (0.0, 1.0):
        assert_same({n: v.double() for n, v in teacher.items()}, expected)
    assert_sums_equal(teacher, expected, 3 * len(recorder.history))
    assert_same({n: p for n, p in model.named_parameters() if n in base_before}, base_before)


def test_a_resumed_run_equals_the_uninterrupted_one(tiny: Path, tmp_path: Path) -> None:
    """With dropout and sampling: adapters, teacher, losses and completions, bit for bit."""

    def run(name: str, resume: bool) -> tuple[SDFTTrainer, list[dict[str, Any]]]:
        events: list[dict[str, Any]] = []
        settings = config(
            tmp_path, max_steps=7, save_steps=3, output_dir=str(tmp_path / name), epochs=9,
            sdft_ema_alpha=0.2,
        )  # fmt: skip
        checkpoint = str(tmp_path / "whole" / "checkpoint-3") if resume else None
        model, tokenizer = load(tiny, dropout=0.2), AutoTokenizer.from_pretrained(tiny)
        callbacks = [] if resume else [KeepCheckpoints()]
        trainer = sdft_train(
            settings, model, tokenizer, ROWS, None,
            callbacks=callbacks, resume_from=checkpoint, log_event=events.append,
        )  # fmt: skip
        return trainer, events

    whole, _ = run("whole", resume=False)
    assert not (tmp_path / "whole" / "README.md").exists(), "the result has a card, of ours"
    resumed, events = run("resumed", resume=True)
    assert_same(adapters(whole.model), adapters(resumed.model))
    assert_same(averages_of(whole.teacher), averages_of(resumed.teacher))
    assert whole.teacher.step == resumed.teacher.step == 7
    assert not any(e["type"] == "teacher_gate" for e in events), "the gate is measured once"
    keys = ("loss", "divergence", "entropy", "completion_length", "grad_norm", "teacher_drift")
    logs = [
        [{k: entry[k] for k in keys} for entry in t.state.log_history if "loss" in entry][3:]
        for t in (whole, resumed)
    ]
    assert len(logs[0]) == 4 and logs[0] == logs[1]


class KeepCheckpoints(TrainerCallback):
    """Lets all checkpoints stay, so that an early one can be resumed from."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        args.save_total_limit = None


def test_training_moves_the_student_towards_its_teacher(tiny: Path, tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    settings = config(
        tmp_path, max_steps=60, learning_rate=1e-2, sdft_ema_alpha=0.0, sdft_gate="warn"
    )
    trainer = sdft_train(
        settings,
        load(tiny, modules=("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")),
        AutoTokenizer.from_pretrained(tiny),
        ROWS,
        ROWS[:2],
        log_event=events.append,
    )
    logs = [entry for entry in trainer.state.log_history if "divergence" in entry]
    assert len(logs) == 60
    first, last = (sum(e["divergence"] for e in part) for part in (logs[:5], logs[-5:]))
    assert last < 0.7 * first
    expected = {
        "loss", "grad_norm", "learning_rate", "divergence", "entropy", "agreement", "eos_share",
        "completion_length", "truncated_share", "teacher_drift", "rollout_s", "teacher_s",
        "student_s", "rollout_tokens_per_s",
    }  # fmt: skip
    assert expected <= logs[0].keys()
    assert all(
        0 <= e["agreement"] <= 1 and e["eos_share"] + e["truncated_share"] == 1 for e in logs
    )
    gate, first_completions = (
        next(event for event in events if event.get("type") == kind)
        for kind in ("teacher_gate", "completions")
    )
    assert gate["type"] == "teacher_gate" and gate["rows"] == 8 and gate["step"] == 0
    assert not gate["passed"] and gate["student_exact"] == 0, "a random model answers nothing"
    assert first_completions["step"] == 1 and len(first_completions["completions"]) == 4
    assert [m["role"] for m in first_completions["completions"][0]["messages"]][-1] == "user"
    assert "eval_loss" in trainer.evaluate(), "a test set is scored by cross-entropy"


def test_batches_with_labels_get_the_sft_cross_entropy(tiny: Path, tmp_path: Path) -> None:
    trainer = make_trainer(load(tiny), tiny, tmp_path)
    perturb(trainer.model, 1)
    rows = [
        {"input_ids": [5, 6, 7, 8, 2], "labels": [-100, -100, 7, 8, 2]},
        {"input_ids": [5, 9, 2], "labels": [-100, 9, 2]},
    ]
    batch = trainer.data_collator(rows)
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, dict(batch))
        losses = []
        for row in rows:
            logits = trainer.model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
            target = torch.tensor(row["labels"][1:])
            losses.append(
                nn.functional.cross_entropy(logits, target, reduction="none")[target != -100]
            )
    assert_sums_equal(loss, torch.cat(losses).mean(), terms_of(trainer.model, 8))


@pytest.mark.parametrize("packed", [False, True])
def test_skipped_tokens_and_truncated_rows(packed: bool) -> None:
    prompts = [[5, 6], [7], [8, 9, 10]]
    completions = [[20, 21, 22, 2], [20], [20, 21, 22, 23, 24, 25]]
    batch = scoring_rows(prompts, completions, skip_tokens=2, pad_token_id=3, packed=packed)
    targets = batch["input_ids"].roll(-1, -1)[batch["loss_mask"]].tolist()
    assert targets == [22, 2, 22, 23, 24, 25], "nothing of the second row"
    weights = token_weights(batch["loss_mask"], batch.get("cu_seq_lens_q"), 3)
    assert_sums_equal(weights, torch.tensor([1 / 6] * 2 + [1 / 12] * 4), 4)
    places = places_in_completions(batch["loss_mask"], batch.get("cu_seq_lens_q"))
    assert places.tolist() == [0, 1, 0, 1, 2, 3], "they begin anew in each row"


class InFloat64:
    """Trainers of one model in float64, whose rows are packed or padded."""

    def __init__(self, tiny: Path, tmp_path: Path) -> None:
        self._folder, self._tmp_path = tiny, tmp_path

    def trainer(self, name: str, micro_batch_tokens: int | None, **changes: Any) -> SDFTTrainer:
        model = load(self._folder).double()
        if micro_batch_tokens is not None:
            assert use_packed_attention(base_model(model))
        out = self._tmp_path / name
        out.mkdir()
        own: dict[str, Any] = {"engine": EchoEngine(), "micro_batch_tokens": micro_batch_tokens}
        trainer = make_trainer(model, self._folder, out, **own, **changes)
        perturb(model, 1, 0.05)
        return trainer


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd"])
def test_packed_rows_have_the_loss_and_gradients_of_padded_ones(
    tiny: Path, tmp_path: Path, kind: Divergence
) -> None:
    found = []
    for name, tokens in (("padded", None), ("packed", 4_096)):
        trainer = InFloat64(tiny, tmp_path).trainer(name, tokens, divergence=kind, skip_tokens=1)
        trainer.teacher.update()
        perturb(trainer.model, 2, 0.05)
        trainer.current_gradient_accumulation_steps = 1
        examples = [trainer.train_dataset[i] for i in (0, 3, 6, 5)]
        completions = [[9 + i, 30, 31 + i, 40, 41][: 2 + i % 4] + [2] for i in range(4)]
        rows = [
            (e["prompt_ids"], e["teacher_prompt_ids"], c)
            for e, c in zip(examples, completions, strict=True)
        ]
        batch = trainer._scoring_batch(rows)
        assert (len(batch["input_ids"]) == 1) == (tokens is not None)
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=4)
        loss.backward()
        found.append({"loss": loss, **grads(trainer.model)})
    assert found[0]["loss"] > 1e-3
    assert_equal_in_float64(found[1], found[0])


def test_thirty_packed_steps_are_thirty_padded_ones(tiny: Path, tmp_path: Path) -> None:
    """However the rows of a step are divided; with fewer micro-batches than were asked for."""
    logs, passes = [], []
    for name, tokens in (("padded", None), ("packed", 600)):
        trainer = InFloat64(tiny, tmp_path).trainer(
            name, tokens, per_device_train_batch_size=1, gradient_accumulation_steps=4,
            max_steps=30, ema_alpha=0.1, learning_rate=1e-3, save_steps=1_000,
        )  # fmt: skip
        counts: list[int] = []
        decoder = base_model(trainer.model).get_decoder()
        decoder.register_forward_hook(lambda *_, counts=counts: counts.append(1))
        trainer.train()
        passes.append(len(counts))
        logs.append([entry for entry in trainer.state.log_history if "divergence" in entry])
    padded, packed = logs
    assert len(padded) == len(packed) == 30
    for key in ("divergence", "entropy", "agreement", "grad_norm", "teacher_drift", "loss"):
        values = [[entry[key] for entry in log] for log in logs]
        if key == "loss":  # which the Trainer adds up in float32
            assert_sums_equal(values[1], values[0], 8)
        else:
            assert_equal_in_float64(values[1], values[0])
    assert abs(padded[0]["loss"] - padded[-1]["loss"]) > 1e-3 * padded[0]["loss"], "it learns"
    assert passes[1] < 0.7 * passes[0], passes


def test_rows_that_do_not_fit_are_dropped_and_counted_never_cut(
    tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    everything = sdft_examples(config(tmp_path), tokenizer, ROWS)
    lengths = [len(e.teacher_prompt_ids) for e in everything]
    limit = sorted(lengths)[4]
    some = sdft_examples(config(tmp_path, max_seq_length=limit + 6), tokenizer, ROWS)
    assert [*some] == [e for e in everything if len(e.teacher_prompt_ids) <= limit]
    assert f"{8 - len(some)} of 8 rows dropped" in caplog.text and str(max(lengths)) in caplog.text
    with pytest.raises(DatasetError, match=f"raise max_seq_length to {max(lengths) + 6}"):
        sdft_examples(config(tmp_path, max_seq_length=20), tokenizer, ROWS)
    with pytest.raises(DatasetError, match="training_file:2: demonstration: is missing"):
        bad = {"messages": [{"role": "user", "content": "hi"}]}
        sdft_examples(config(tmp_path), tokenizer, [ROWS[0], bad])


def test_rollout_seeds_differ_by_seed_step_and_row() -> None:
    seeds = {derived_seed(s, t, r) for s in range(3) for t in range(20) for r in range(4)}
    assert len(seeds) == 240 and derived_seed(1, 2, 3) == derived_seed(1, 2, 3)
