"""One template in everything that a job does; what it loses is told before a model is loaded."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, TrainerCallback

from openweights import OpenWeights
from openweights.errors import ConfigError, DatasetError
from openweights.jobs.unsloth import FineTuning
from openweights.jobs.unsloth.training import train
from openweights.models.load import load_trained
from openweights.models.templates.rendering import prompt_token_ids
from openweights.models.tokens import eos_token_ids
from tests.chat_templates import QWEN_3, WITHOUT_SYSTEM
from tests.tiny_model import EOS, SECOND_EOS, make_tiny_model

OWN = {"repetition_penalty": 9.0, "min_new_tokens": 7, "suppress_tokens": [5]}
QUESTION = {"role": "user", "content": "q"}
ROW = {"messages": [QUESTION, {"role": "assistant", "content": "gold"}]}


def model_with(folder: Path, template: str, **generation: Any) -> Path:
    make_tiny_model(folder)
    (folder / "chat_template.jinja").write_text(template)
    settings = GenerationConfig.from_pretrained(folder)
    settings.update(**generation)
    settings.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_with(tmp_path_factory.mktemp("thinking"), QWEN_3, **OWN)


def settings(model: Path, rows: list[dict[str, Any]], folder: Path, **changes: Any) -> Any:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model": str(model),
        "training_file": str(path),
        "loss": "sft",
        "max_steps": 1,
        "warmup_steps": 0,
        "push_to_hub": False,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "template_options": {"enable_thinking": False},
        **changes,
    }


class Watch(TrainerCallback):
    """Keeps every row of tokens that the model reads."""

    def __init__(self) -> None:
        self.rows: list[list[int]] = []

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        def keep(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            self.rows.extend(inputs[0].tolist())

        kwargs["model"].get_input_embeddings().register_forward_pre_hook(keep)


GRPO = {
    "loss": "grpo",
    "grpo_reward_function": "caps_spanish",
    # So many that their rewards differ, whatever is drawn.
    "per_device_train_batch_size": 8,
    "grpo_num_generations": 8,
    "grpo_max_completion_length": 16,
}


@pytest.mark.parametrize("changes", [{"loss": "sft"}, GRPO], ids=["sft", "grpo"])
def test_everything_reads_the_same_prompt(
    thinking: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    callbacks = [{"dataset": str(tmp_path / "rows.jsonl"), "max_tokens": 2}]
    config = settings(thinking, [ROW] * 2, tmp_path, **changes, sampling_callbacks=callbacks)
    watch = Watch()
    trainer = train(config, extra_callbacks=[watch])
    tokenizer: Any = trainer.processing_class
    prompt = prompt_token_ids(tokenizer, [QUESTION])
    assert tokenizer.decode(prompt).endswith("assistant\n<think>\n\n</think>\n\n")
    rows = [[token for token in row if token != tokenizer.pad_token_id] for row in watch.rows]
    whole = [row for row in rows if len(row) >= len(prompt)]
    assert len(whole) >= 4 and all(row[: len(prompt)] == prompt for row in whole)
    # The result says the same, wherever it is loaded.
    _, loaded = load_trained("uploads/adapter")
    assert prompt_token_ids(loaded, [QUESTION]) == prompt


def test_nothing_of_the_models_own_generation_config_is_used(
    thinking: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.INFO):
        trainer = train(settings(thinking, [ROW] * 2, tmp_path, **GRPO))
    assert "own generation settings are not used: {" in caplog.text
    assert all(f"'{name}'" in caplog.text for name in OWN)
    for module in trainer.model.modules():  # type: ignore[union-attr]
        held = getattr(module, "generation_config", None)
        assert held is None or not OWN.keys() & held.to_diff_dict().keys()


def test_an_end_that_only_the_template_knows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = model_with(tmp_path / "base", QWEN_3, eos_token_id=0)
    tokens = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**tokens, "eos_token": SECOND_EOS}))
    with caplog.at_level(logging.WARNING):
        model, tokenizer = load_trained(str(folder))
    assert tokenizer.convert_ids_to_tokens(eos_token_ids(model, tokenizer)) == [SECOND_EOS, EOS]
    assert f"ends a turn with '{EOS}', which neither the tokenizer ('{SECOND_EOS}')" in caplog.text
    assert model.generation_config.eos_token_id == [0, 2]  # type: ignore[union-attr]


def test_what_is_lost_in_every_row_is_told_at_the_door(tmp_path: Path) -> None:
    folder = model_with(tmp_path / "model", WITHOUT_SYSTEM)
    told = {"messages": [{"role": "system", "content": "Be brief."}, *ROW["messages"]]}
    kind = FineTuning(OpenWeights())
    lossy = settings(folder, [told] * 3, tmp_path, template_options={})
    with pytest.raises(DatasetError, match=r"^training_file: every row: messages\[0\]: .* system"):
        kind.check(kind.validate(lossy))
    with pytest.raises(ConfigError, match="template_options: the chat template reads no 'enable"):
        kind.check(kind.validate(settings(folder, [ROW], tmp_path)))
    kind.check(kind.validate(settings(folder, [ROW], tmp_path, template_options={})))


def test_jobs_that_score_or_answer_are_checked_at_the_door_too(tmp_path: Path) -> None:
    ow, folder = OpenWeights(), model_with(tmp_path / "model", WITHOUT_SYSTEM)
    told = {"messages": [{"role": "system", "content": "Be brief."}, *ROW["messages"]]}
    ending = {"messages": [QUESTION, {"role": "assistant", "content": f"a{EOS}"}]}
    question = {"question": "What?", "choices": ["a", f"b{EOS}"], "answer": 0}
    lost, control = r"messages\[0\]: .* system text", "holds '<.im_end.>', a control token"
    for kind, purpose, row, words in (
        ("weighted_sft", "conversations", told, lost),
        ("logprob", "conversations", told, lost),
        ("logprob", "conversations", ending, control),
        ("inference", "conversations", told, lost),
        ("multiple_choice", "multiple_choice", question, rf"choices\[1\]: {control}"),
        ("multiple_choice", "multiple_choice", {**question, "question": EOS}, control),
    ):
        file = ow.files.upload([row] * 2, purpose)["id"]  # type: ignore[arg-type]
        named = {"weighted_sft": "training_file", "inference": "input_file_id"}.get(kind, "dataset")
        with pytest.raises(DatasetError, match=f"{named}: every row: .*{words}"):
            getattr(ow, kind).create(model=str(folder), **{named: file})
    file = ow.files.upload([ROW], "conversations")["id"]
    for kind, named in (("logprob", "dataset"), ("inference", "input_file_id")):
        asked = {named: file, "template_options": {"enable_thinking": False}}
        with pytest.raises(ConfigError, match="the chat template reads no 'enable_thinking'"):
            getattr(ow, kind).create(model=str(folder), **asked)
    assert ow.jobs.list() == [], "nothing was queued"


def test_the_worker_tells_it_before_it_loads_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model_with(tmp_path / "model", WITHOUT_SYSTEM)
    (folder / "model.safetensors").write_bytes(b"no weights")
    monkeypatch.chdir(tmp_path)
    told = {"messages": [{"role": "system", "content": "Be brief."}, *ROW["messages"]]}
    with pytest.raises(DatasetError, match="training_file: every row: "):
        train(settings(folder, [told] * 3, tmp_path, template_options={}))
    with pytest.raises(ConfigError, match="cannot be loaded"):
        train(settings(folder, [ROW], tmp_path, template_options={}))
