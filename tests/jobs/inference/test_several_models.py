"""Several models asked by one job: what they have in common is loaded once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from openweights import OpenWeights
from openweights.client.jobs import Job
from openweights.client.serving.sampling import LABEL
from openweights.errors import ConfigError
from tests.cli.conftest import Ow, ow  # noqa: F401 - a fixture
from tests.client.conftest import QuietClient
from tests.tiny_model import make_tiny_model
from tests.waiting import HANGS_S

ASK = {"role": "user", "content": "Hello, what is it?"}
ROWS = [{"messages": [ASK], "id": 1}, {"text": "Once there was", "id": 2}]


@pytest.fixture
def tiny(home: Path) -> Path:
    """A model whose id names it on this machine."""
    return make_tiny_model(home / "models" / "org" / "tiny")


@pytest.fixture
def adapter(tiny: Path, tmp_path: Path) -> Path:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    peft: Any = get_peft_model(model, lora)
    peft.peft_config["default"].base_model_name_or_path = "org/tiny"
    peft.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    return tmp_path / "adapter"


@pytest.fixture
def rows(tmp_path: Path) -> str:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def results(client: OpenWeights, job: Job) -> list[dict[str, Any]]:
    job.wait(timeout=HANGS_S)
    assert job.outputs is not None
    return [json.loads(line) for line in client.files.content(job.outputs["file"]).splitlines()]


def loads(job: Job) -> list[str]:
    """What the job has said that it loads."""
    said = (str(event.data["doing"]) for event in job.events(type="stage"))
    return [doing for doing in said if doing.startswith("loading")]


@pytest.mark.usefixtures("warm_jobs")
def test_each_answers_as_if_asked_alone_and_a_base_is_loaded_once(
    home: Path, tiny: Path, adapter: Path, rows: str, tmp_path: Path
) -> None:
    client = OpenWeights()
    other = str(make_tiny_model(tmp_path / "other", seed=1))
    models = [str(adapter), "org/tiny", other]
    given: dict[str, Any] = {"input_file_id": rows, "max_tokens": 8, "seed": 3}
    alone = [results(client, client.inference.create(model=model, **given)) for model in models]
    job = client.inference.create(model=models[0], other_models=models[1:], **given)
    assert results(client, job) == [
        {**row, "model": model}
        for model, own in zip(models, alone, strict=True)
        for row in own
    ]  # fmt: skip
    assert alone[0] != alone[1], "the adapter was asked, and not its base again"
    assert loads(job) == ["loading the model", "loading tiny, once for 2 models", "loading other"]
    (started,) = job.events(type="started")
    assert (started.data["max_steps"], started.data["unit"]) == (6, "answer")
    client.close()


@pytest.mark.usefixtures("warm_jobs")
def test_before_and_after_are_one_job_with_one_load(home: Path, tiny: Path, tmp_path: Path) -> None:
    client = OpenWeights()
    answered = {"messages": [ASK, {"role": "assistant", "content": "Yes."}]}
    (tmp_path / "train.jsonl").write_text(json.dumps(answered) + "\n")
    trained = client.fine_tuning.create(
        model="org/tiny",
        training_file=str(tmp_path / "train.jsonl"),
        loss="sft",
        max_steps=2,
        learning_rate=0.05,
        requires_vram_gb=0,
    )
    trained.wait(timeout=300)
    prompts = ["Hello, what is it?", [ASK]]
    samples = trained.sample(prompts, max_tokens=6, temperature=0)
    (job,) = [job for job in client.jobs.list() if job.label == LABEL]
    assert loads(job) == ["loading the model", "loading tiny, once for 2 models"]
    assert [sample["prompt"] for sample in samples] == prompts
    assert [s["base"] for s in samples] == [samples[0]["base"]] * 2, "the same question"
    assert samples[0]["base"] != samples[0]["answer"]
    only = trained.sample(prompts, base=False, max_tokens=6, temperature=0)
    assert [(s["base"], s["answer"]) for s in only] == [(None, s["answer"]) for s in samples]
    client.close()


@pytest.mark.usefixtures("warm_jobs")
def test_the_command_asks_several(
    ow: Ow,  # noqa: F811 - the fixture
    tiny: Path,
    adapter: Path,
    rows: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    answer = ow("infer", "org/tiny", str(adapter), rows, "--max-tokens", "4")
    assert answer.exit_code == 0, answer.output
    found = [json.loads(line) for line in answer.stdout.splitlines()]
    assert [(row["model"], row["id"]) for row in found] == [
        (model, number) for model in ("org/tiny", str(adapter)) for number in (1, 2)
    ]
    assert "org/tiny and 1 more" in ow("ls").stdout
    assert ow("infer", rows).exit_code == 2, "a model is missing"


def test_what_is_refused_and_what_is_waited_for(
    home: Path, tiny: Path, rows: str, tmp_path: Path
) -> None:
    client = QuietClient()
    given: dict[str, Any] = {"model": "org/tiny", "input_file_id": rows}
    for others, words in (
        (["org/tiny"], "other_models: org/tiny is named twice"),
        (["a b"], r"other_models.*'a b' is neither"),
        (["ftjob-000000000000"], "the store has no job ftjob-000000000000"),
    ):
        with pytest.raises(ConfigError, match=words):
            client.inference.create(**given, other_models=others)
    one = client.inference.create(**given)
    same = client.inference.create(**given, other_models=[])
    assert one.id == same.id, "a parameter that is not used changes no id"
    (tmp_path / "train.jsonl").write_text(
        json.dumps({"messages": [ASK, {"role": "assistant", "content": "Yes."}]}) + "\n"
    )
    training = client.fine_tuning.create(
        model=str(tiny), training_file=str(tmp_path / "train.jsonl"), loss="sft", max_steps=1
    )
    both = client.inference.create(**given, other_models=training.id)
    assert list(both.after) == [training.id], "it begins when both models are there"
    larger = client.inference.create(**given, other_models=["org/Llama-3-70B"])
    assert larger.requires_vram_gb == 134
    client.close()
