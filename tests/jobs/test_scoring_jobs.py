"""`ow.weighted_sft`, `ow.logprob`, `ow.multiple_choice`: what they refuse, and through a worker."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from openweights import OpenWeights
from openweights.errors import ConfigError, DatasetError, InvalidInputError
from openweights.jobs.unsloth.validate import training_config
from openweights.jobs.weighted_sft import WeightedSFT
from openweights.models.load import load_trained
from tests.rounding import assert_sums_equal, terms_of
from tests.waiting import HANGS_S

QUESTION = {"role": "user", "content": "Hi"}
ANSWER = [
    {"type": "text", "text": "Hello", "weight": 1.5, "tag": "good"},
    {"type": "text", "text": " you", "weight": -0.5},
]
TALK = {"messages": [QUESTION, {"role": "assistant", "content": ANSWER}]}
PLAIN = {"messages": [QUESTION, {"role": "assistant", "content": "Hello you"}]}
ASKED = {"question": "What is it?", "choices": ["the moon", "a"], "answer": "a"}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def ow(home: Path) -> OpenWeights:
    return OpenWeights()


def test_weighted_sft_has_defaults_of_its_own(ow: OpenWeights, tmp_path: Path, tiny: Path) -> None:
    file = ow.files.upload(write(tmp_path / "a.jsonl", TALK), "conversations")["id"]
    kind = ow.weighted_sft
    assert isinstance(kind, WeightedSFT) and kind.requires_vram_gb == 60
    given = {"model": str(tiny), "training_file": file}
    config = kind.validate({**given, "sampling_callbacks": [{"dataset": file}]})
    kind.check(config)
    assert (config.loss, config.optim, config.eval_every_n_steps) == ("sft", "adamw_torch", "log")
    stored = json.loads(json.dumps(config.model_dump(mode="json")))
    read = training_config(stored)
    assert read.model_dump() == config.model_dump() and read.optim == "adamw_torch"
    assert [s.eval_steps for s in read.sampling_callbacks or []] == ["log"]
    job_id = kind.compute_id(kind.validate({**given, "ft_id_suffix": "mine"}))
    assert job_id.startswith("sftjob-") and job_id.endswith("-mine")
    assert job_id == kind.compute_id(kind.validate({**given, "job_id_suffix": "mine"}))
    for wrong, words in (
        ({"loss": "dpo"}, "loss: must be 'sft', not 'dpo'"),
        ({"sdft_ema_alpha": 0.1}, "sdft_ema_alpha: belongs to loss='sdft'"),
        ({"ft_id_suffix": "a", "job_id_suffix": "b"}, "ft_id_suffix: is not a parameter"),
    ):
        with pytest.raises(ConfigError, match=words):
            kind.validate({**given, **wrong})


def test_what_scoring_jobs_refuse(ow: OpenWeights, tmp_path: Path, tiny: Path) -> None:
    talk = ow.files.upload(write(tmp_path / "a.jsonl", TALK), "conversations")["id"]
    asked = write(tmp_path / "b.jsonl", ASKED)
    unanswered = {"messages": [QUESTION], "demonstration": "x"}
    silent = ow.files.upload(write(tmp_path / "c.jsonl", unanswered), "conversations")["id"]
    model = str(tiny)
    for kind, params, words in (
        (ow.logprob, {"model": model, "dataset": "nothing"}, "dataset: 'nothing' is neither"),
        (ow.logprob, {"model": "./none", "dataset": talk}, "model: there is no folder ./none"),
        (ow.logprob, {"model": model, "dataset": talk[:-1]}, "dataset: the store has no file"),
        (ow.logprob, {"model": model, "dataset": silent}, "dataset:1: messages: none is from"),
        (
            ow.logprob,
            {"model": "ftjob-000000000000", "dataset": talk},
            "the store has no job ftjob",
        ),
        (ow.logprob, {"model": model, "dataset": talk, "batch": 1}, "batch: is not a parameter"),
        (ow.multiple_choice, {"model": model, "dataset": talk}, "dataset: .* is neither a file id"),
        (
            ow.multiple_choice,
            {"model": model, "dataset": str(asked), "batch_size": 0},
            "batch_size",
        ),
    ):
        with pytest.raises(InvalidInputError, match=words):
            kind.create(**params)
    with pytest.raises(DatasetError, match="answer: is neither one of the choices nor a position"):
        wrong = write(tmp_path / "d.jsonl", {**ASKED, "answer": "b"})
        ow.multiple_choice.create(model=model, dataset=str(wrong))
    assert ow.jobs.list() == []


@pytest.mark.usefixtures("warm_jobs")
def test_through_a_worker(
    ow: OpenWeights, tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    trained = ow.weighted_sft.create(
        model=str(tiny),
        training_file=str(write(tmp_path / "a.jsonl", TALK, PLAIN)),
        logp_callback_datasets={"seen": str(write(tmp_path / "p.jsonl", PLAIN))},
        max_steps=1,
        warmup_steps=0,
        learning_rate=1e-2,
        allowed_hardware=["1x H200"],
        cloud_type="ALL",
    )
    talk, asked = write(tmp_path / "t.jsonl", TALK, PLAIN), write(tmp_path / "q.jsonl", ASKED)
    assert trained.wait(timeout=HANGS_S).status == "completed", "".join(trained.logs())
    tracked = [e for e in trained.events() if e.data.get("type") == "logprobs"]
    assert [(e.data["step"], e.data["tag"]) for e in tracked] == [(0, "seen"), (1, "seen")]
    scored = ow.logprob.create(model=trained.id, dataset=str(talk), batch_size=1, cloud_type="ALL")
    picked = ow.multiple_choice.create(model=str(tiny), dataset=str(asked), requires_vram_gb=8)
    assert scored.id.startswith("lpjob-") and picked.id.startswith("mcjob-")
    assert picked.wait(timeout=HANGS_S).status == scored.wait(timeout=HANGS_S).status == "completed"
    scored.download(tmp_path / "scored")
    first, second = map(json.loads, (tmp_path / "scored/logprobs.jsonl").read_text().splitlines())
    assert [len(b["logprobs"]) > 0 for b in first["messages"][1]["content"]] == [True, True]
    assert second == PLAIN and scored.outputs is not None and scored.outputs["loss"] > 0
    blocks = [e.data for e in scored.events() if e.data.get("type") == "logprob_block"]
    assert [b["tag"] for b in blocks] == ["good"]
    # The job's model is the base with the adapter that the first job has left.
    trained.download(tmp_path / "trained")
    base, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tiny),
        AutoTokenizer.from_pretrained(tiny),
    )
    model = PeftModel.from_pretrained(base, str(tmp_path / "trained/adapter")).double().eval()
    ids = tokenizer(tokenizer.apply_chat_template(PLAIN["messages"], tokenize=False))["input_ids"]
    with torch.no_grad():
        logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    start = next(i for i in range(len(ids)) if tokenizer.decode(ids[i:]).startswith("Hello"))
    found = [v for b in first["messages"][1]["content"] for v in b["logprobs"]]
    expected = [float(logps[i - 1, ids[i]]) for i in range(start, start + len(found))]
    assert_sums_equal(found, expected, terms_of(model, len(ids)))
    assert picked.outputs is not None and picked.outputs["questions"] == 1
    assert picked.outputs["accuracy"] in (0, 1) and 0 < picked.outputs["probability"] < 1
    assert picked.outputs["record"]["versions"]["transformers"]


def test_an_adapter_is_loaded_with_its_base(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no folder"):
        load_trained(str(tmp_path / "none"))
    model, tokenizer = load_trained(str(tiny), chat_template="{{ messages }}")
    assert tokenizer.chat_template == "{{ messages }}" and not model.training
