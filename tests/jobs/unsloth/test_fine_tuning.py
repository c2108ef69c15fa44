"""`ow.fine_tuning`: what is submitted, and what is refused before it is."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from openweights import OpenWeights
from openweights.errors import ConfigError, DatasetError
from openweights.jobs.unsloth import FineTuning
from openweights.jobs.unsloth.config.rows import prompts_in_step, run_steps
from openweights.jobs.unsloth.validate import training_config
from openweights.models.checkpoint import DEFAULT_TARGET_MODULES
from openweights.settings import Settings
from openweights.types import JobSpec
from tests.jobs.unsloth.malformed_configs import FILE, GOOD, GRPO

ROW = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Bye"}]}


@pytest.fixture
def ow(home: Path) -> OpenWeights:
    return OpenWeights(settings=Settings(home=home))


def upload(ow: OpenWeights, tmp_path: Path, *rows: dict[str, Any]) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ow.files.upload(path, "conversations")["id"]


@pytest.fixture
def silent_about_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is said of models that are none."""
    monkeypatch.setattr(logging.getLogger("openweights.jobs.known_models"), "disabled", True)


def checked(ow: OpenWeights, **params: Any) -> Any:
    kind = FineTuning(ow)
    config = kind.validate({**GOOD, **params})
    kind.check(config)
    return config


def test_ids_depend_on_what_is_trained(ow: OpenWeights, tmp_path: Path) -> None:
    kind, file = ow.fine_tuning, upload(ow, tmp_path, ROW)
    assert isinstance(kind, FineTuning)

    def job_id(**params: Any) -> str:
        return kind.compute_id(kind.validate({**GOOD, "training_file": file, **params}))

    plain = job_id()
    assert plain.startswith("ftjob-") and len(plain) == len("ftjob-") + 12
    assert job_id(epochs=1, learning_rate="2e-4 / 2", packing=True) == plain
    assert job_id(epochs=2) != plain and job_id(loss="sdft") != plain
    assert job_id(job_id_suffix="mine").endswith("-mine")
    # A local dataset is uploaded: what counts is its content.
    local = tmp_path / "copy.jsonl"
    local.write_text(json.dumps(ROW) + "\n")
    assert job_id(training_file=str(local)) == plain
    assert job_id(sampling_callbacks=[{"dataset": str(local)}]) == job_id(
        sampling_callbacks=[{"dataset": file}]
    )
    script = kind.get_entrypoint(kind.validate(GOOD))
    assert script == "python -m openweights.jobs.unsloth.training {job_id}"


def test_a_model_folder_is_stored_in_full(
    ow: OpenWeights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job runs elsewhere than in the folder in which it was submitted."""
    folder = tmp_path / "models" / "tiny"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    kind = FineTuning(ow)
    for model in ("models/tiny", "./models/tiny", "~/models/tiny", "models/../models/tiny"):
        assert kind.validate({**GOOD, "model": model}).model == str(folder.resolve())
    assert kind.validate({**GOOD, "model": "models/other"}).model == "models/other"
    for model in ("./models/other", "../tiny", "/no/model", "~/tiny", "~nobody-of-that-name/x"):
        with pytest.raises(ConfigError, match=f"^model: there is no folder {model} .*; correct"):
            kind.validate({**GOOD, "model": model})


def test_refuses_what_the_store_shows_to_be_wrong(ow: OpenWeights, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="training_file: the store has no file"):
        checked(ow)
    good = upload(ow, tmp_path, ROW)
    with pytest.raises(ConfigError, match="test_file: the store has no file"):
        checked(ow, training_file=good, test_file=FILE)
    with pytest.raises(ConfigError, match="push_to_hub: True needs a Hugging Face token"):
        checked(ow, training_file=good, push_to_hub=True)
    assert checked(ow, training_file=good, push_to_hub=False).push_to_hub is False
    richer = OpenWeights(settings=replace(ow.settings, hf_token="hf_secret"))
    assert checked(richer, training_file=good, push_to_hub=True).push_to_hub is True
    text = upload(ow, tmp_path, ROW, {"text": "once"})
    assert checked(ow, training_file=text)
    with pytest.raises(DatasetError, match="training_file:2: .*plain text"):
        checked(ow, training_file=text, loss="sdft")
    with pytest.raises(DatasetError, match=r"sampling_callbacks\[0\].dataset:2: messages"):
        checked(ow, training_file=good, sampling_callbacks=[{"dataset": text}])
    shown = upload(ow, tmp_path, {"messages": ROW["messages"][:1], "demonstration": "Bye"})
    assert checked(ow, training_file=shown, loss="sdft")
    with pytest.raises(DatasetError, match="training_file:1: messages: none is from the assistant"):
        checked(ow, training_file=shown)


def saved_model(folder: Path, *names: str, dims: int = 2) -> str:
    """A folder with the header of weights of these names, as safetensors begin; no weights."""
    tensor = {"dtype": "BF16", "shape": [4] * dims, "data_offsets": [0, 0]}
    header = json.dumps({"__metadata__": {}} | dict.fromkeys(names, tensor)).encode()
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    return str(folder)


def test_a_quantised_checkpoint_is_not_spread(ow: OpenWeights, home: Path, tmp_path: Path) -> None:
    data = upload(ow, tmp_path, ROW)
    model = saved_model(tmp_path / "small", "layers.0.q_proj.weight")
    assert checked(ow, training_file=data, model=model, parallel="fsdp"), "the control: it is dense"
    saved = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (Path(model) / "config.json").write_text(json.dumps(saved))
    with pytest.raises(ConfigError, match=r"parallel: 'fsdp' cannot spread .*quantised \(gptq\)"):
        checked(ow, training_file=data, model=model, parallel="fsdp")
    for parallel in ("auto", "ddp"):
        assert checked(ow, training_file=data, model=model, parallel=parallel)


def test_modules_that_a_local_model_lacks(ow: OpenWeights, home: Path, tmp_path: Path) -> None:
    data = upload(ow, tmp_path, ROW)
    gpt = saved_model(tmp_path / "gpt", "h.0.attn.c_attn.weight", "h.0.ln.bias", "wte.weight")
    with pytest.raises(ConfigError, match="target_modules: .*gpt has no q_proj, .*it has c_attn"):
        checked(ow, training_file=data, model=gpt)
    assert checked(ow, training_file=data, model=gpt, target_modules=["c_attn", "lm_head"])
    # Of the default modules one is enough; what somebody has named must be there.
    half = saved_model(tmp_path / "half", "layers.0.q_proj.weight", "lm_head.weight")
    assert checked(ow, training_file=data, model=half)
    with pytest.raises(ConfigError, match="target_modules: .*half has no k_prj; it has lm_head"):
        checked(ow, training_file=data, model=half, target_modules=["q_proj", "k_prj"])
    # GPT-NeoX saves its head under another name than it is loaded with; others keep the name.
    for family, there, absent in (
        ("gpt_neox", "lm_head", "embed_out"),
        ("gpt_neox_japanese", "embed_out", "lm_head"),
    ):
        names = (f"{family}.embed_in.weight", "embed_out.weight")
        neox = saved_model(tmp_path / family, *names)
        assert checked(ow, training_file=data, model=neox, target_modules=[there])
        with pytest.raises(ConfigError, match=f"no {absent}; it has .*{there}"):
            checked(ow, training_file=data, model=neox, target_modules=[absent])
    # A known id whose model lies below the home; an adapter on it; a file that is no model.
    kept = saved_model(home / "models" / "org" / "name", "h.0.c_attn.weight")
    with pytest.raises(ConfigError, match="target_modules: org/name has no q_proj"):
        checked(ow, training_file=data)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    lora = {"base_model_name_or_path": kept, "peft_type": "LORA", "r": 16, "lora_alpha": 16}
    (adapter / "adapter_config.json").write_text(json.dumps(lora))
    with pytest.raises(ConfigError, match="target_modules: .*adapter has no q_proj"):
        checked(ow, training_file=data, model=str(adapter))
    (Path(half) / "model.safetensors").write_bytes(b"\xff" * 20)
    assert checked(ow, training_file=data, model=half, target_modules=["k_prj"])
    experts = saved_model(tmp_path / "experts", "layers.0.experts.0.w1.weight")
    assert checked(ow, training_file=data, model=experts), "they are loaded under other names"


@pytest.mark.usefixtures("silent_about_models")
@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"learning_rate": 1}, "1 is likely too high for a LoRA: usual are 1e-5 to 5e-4"),
        ({"learning_rate": "1/2"}, "0.5 is likely too high for a LoRA"),
        ({"learning_rate": 1e-2}, None),
        ({"learning_rate": 0.5, "optim": "sgd"}, None),
        ({"learning_rate": 2e-3, "is_peft": False}, "0.002 is likely too high for full"),
        ({"learning_rate": 1e-3, "is_peft": False}, None),
    ],
)
def test_a_learning_rate_that_is_likely_too_high_is_said(
    ow: OpenWeights,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    params: dict[str, Any],
    said: str | None,
) -> None:
    checked(ow, training_file=upload(ow, tmp_path, *[ROW] * 33), **params)
    assert f"learning_rate: {said}" in caplog.text if said else caplog.text == ""


@pytest.mark.usefixtures("silent_about_models")
def test_what_is_likely_not_meant_is_said(
    ow: OpenWeights, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = upload(ow, tmp_path, *[ROW] * 33)
    checked(ow, training_file=data)
    assert caplog.text == ""
    odd = {"warmup_steps": 9, "logging_steps": 5, "lr_scheduler_type": "constant"}
    odd |= {"test_file": data, "test_file_eval_strategy": "steps", "test_file_eval_steps": 8}
    checked(ow, training_file=data, **odd)
    assert [record.getMessage().partition(";")[0] for record in caplog.records] == [
        "test_file: all 33 rows stand in training_file, too, so that its loss does not tell what "
        "was learned from what is only remembered",
        "warmup_steps: is 9 of 3 steps, so that learning_rate would never be reached",
        "warmup_steps: lr_scheduler_type='constant' has none",
        "logging_steps: is 5 of 3 steps, so that no loss is logged",
        "test_file_eval_steps: is 8 of 3 steps, so that nothing is tested",
    ]
    caplog.clear()
    checked(ow, training_file=data, max_steps=20, warmup_steps=5)
    assert "warmup_steps: is 5, the default, which is at most a tenth of the 20 steps: 2" in (
        caplog.text
    )
    caplog.clear()
    checked(ow, training_file=data, max_steps=20, warmup_steps=6)
    checked(ow, training_file=data, max_steps=50, warmup_steps=5)
    assert caplog.text == ""


@pytest.mark.parametrize(("rows", "steps"), [(1, 1), (2, 1), (5, 2), (6, 3), (7, 3)])
def test_steps_of_grpo_leave_out_what_fills_none(rows: int, steps: int) -> None:
    small = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    grpo = training_config({**GRPO, **small, "grpo_num_generations": 4})
    assert prompts_in_step(grpo) == 2 and run_steps(grpo, rows) == steps


SHAPE = {"r": 4, "lora_alpha": 8, "use_rslora": False, "target_modules": ["v_proj", "q_proj"]}
OTHER_SHAPES = [
    ({"r": 16}, "^r: is 16, but the adapter in .* has 4; give r=4 to go on from it$"),
    ({"lora_alpha": 4}, "^lora_alpha: is 4, but the adapter"),
    ({"use_rslora": True}, "^use_rslora: is True, but the adapter"),
    ({"lora_bias": "all"}, "^lora_bias: is all, but the adapter"),
    ({"target_modules": ["q_proj"]}, r"^target_modules: is \['q_proj'\], but the adapter"),
    ({"r": 8, "lora_alpha": 8, "use_rslora": True}, "^r: is 8, .*\nuse_rslora: is True, .*it$"),
    ({"is_peft": False}, "^is_peft: False trains all weights of a whole model, and this one is"),
    ({"engine": "unsloth"}, "^engine: 'unsloth' cannot go on from an adapter"),
]


def store_job(ow: OpenWeights, job_id: str, **params: Any) -> str:
    """A fine-tuning job that nothing has run."""
    given = {**GOOD, **params}
    spec = JobSpec(
        id=job_id,
        type="fine-tuning",
        script="true",
        params={"validated_params": training_config(given).model_dump()},
        model=given["model"],
    )
    return ow.backend.submit_job(spec).id


@pytest.mark.parametrize(("change", "words"), OTHER_SHAPES)
def test_another_shape_than_the_adapter_s_is_refused_before_it_is_queued(
    ow: OpenWeights, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    data = upload(ow, tmp_path, ROW)
    base = saved_model(tmp_path / "base", *(f"layers.0.{n}_proj.weight" for n in "qkv"))
    job = store_job(ow, "ftjob-000000000001", model=base, **SHAPE)
    folder = tmp_path / "adapter"
    folder.mkdir()
    lora = {"base_model_name_or_path": base, "peft_type": "LORA", **SHAPE}
    (folder / "adapter_config.json").write_text(json.dumps(lora))
    for model in (job, str(folder)):
        go_on = {"training_file": data, "model": model}
        assert checked(ow, **go_on).r == 4, "which need not be said"
        assert checked(ow, **go_on, **{**SHAPE, "target_modules": ["q_proj", "v_proj"]})
        with pytest.raises(ConfigError, match=words):
            checked(ow, **go_on, **change)
    # A job that goes on from that one keeps its shape; one that trains all weights leaves none.
    second = store_job(ow, "ftjob-000000000002", model=job, **SHAPE)
    with pytest.raises(ConfigError, match=words):
        checked(ow, training_file=data, model=second, **change)
    whole = store_job(ow, "ftjob-000000000003", model=base, is_peft=False)
    assert checked(ow, training_file=data, model=whole, **change)


def test_the_default_modules_are_those_that_the_model_has(ow: OpenWeights, tmp_path: Path) -> None:
    data, two = upload(ow, tmp_path, ROW), ["q_proj", "v_proj"]
    base = saved_model(tmp_path / "base", *(f"layers.0.{name}.weight" for name in two))
    default = store_job(ow, "ftjob-000000000001", model=base)
    assert checked(ow, training_file=data, model=default, target_modules=two)
    with pytest.raises(ConfigError, match=r"^target_modules: is \['q_proj'\], but"):
        checked(ow, training_file=data, model=default, target_modules=["q_proj"])
    named = store_job(ow, "ftjob-000000000002", model=base, target_modules=two)
    assert checked(ow, training_file=data, model=named, target_modules=DEFAULT_TARGET_MODULES)
    # Of a model that is elsewhere nobody can say here which it has; but what is none of them is.
    away = store_job(ow, "ftjob-000000000003")
    assert checked(ow, training_file=data, model=away, target_modules=two)
    with pytest.raises(ConfigError, match=r"^target_modules: is \['lm_head'\], but"):
        checked(ow, training_file=data, model=away, target_modules=["lm_head"])


def test_an_adapter_of_the_hub_that_was_read_before(
    ow: OpenWeights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = upload(ow, tmp_path, ROW)
    commit = tmp_path / "models--org--adapter" / "snapshots" / "1234"
    commit.mkdir(parents=True)
    (commit.parents[1] / "refs").mkdir()
    (commit.parents[1] / "refs" / "main").write_text("1234")
    lora = {"base_model_name_or_path": "org/name", "peft_type": "LORA", **SHAPE}
    (commit / "adapter_config.json").write_text(json.dumps(lora))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert checked(ow, training_file=data, model="org/adapter").r == 4
    with pytest.raises(ConfigError, match="^r: is 16, but the adapter in org/adapter has 4"):
        checked(ow, training_file=data, model="org/adapter", r=16)


def test_rows_that_cannot_be_used_are_said_with_their_file(ow: OpenWeights, tmp_path: Path) -> None:
    good = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    rows = [good, {"messages": good["messages"][:1]}, good]
    path = tmp_path / "orders.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DatasetError) as caught:
        ow.fine_tuning.create(model="org/model", training_file=str(path), loss="sft")
    first, last = str(caught.value).splitlines()
    assert first.startswith("training_file:2: messages")
    assert last == "(1 of 3 rows of orders.jsonl cannot be used)"


def test_a_model_of_openai_is_not_trained(ow: OpenWeights, tmp_path: Path) -> None:
    given = {"model": "openai/gpt-4.1", "training_file": "conversations:file-1", "loss": "sft"}
    with pytest.raises(ConfigError, match="model: openai/gpt-4.1 is OpenAI's, .* open weights"):
        ow.fine_tuning.create(**given)
    with pytest.raises(ConfigError, match="model: openai/gpt-4.1 is OpenAI's, .* open weights"):
        ow.logprob.create(model="openai/gpt-4.1", dataset="conversations:file-1")


def test_fields_and_functions_that_are_wrong_are_told_together(
    ow: OpenWeights, tmp_path: Path
) -> None:
    (tmp_path / "own.py").write_text("def score(completions): return [1.0] * len(completions)\n")
    functions = {f"{tmp_path}/none.py:score": 1.0, f"{tmp_path}/own.py:absent": 1.0}
    batch = {"per_device_train_batch_size": 4, "grpo_num_generations": 8}
    gated = {"loss": "sdft", "sdft_gate_reward": f"{tmp_path}/none.py:score", "epochs": 0}
    for params, words in (
        (
            {**GRPO, **batch, "gradient_accumulation_steps": 1, "grpo_reward_function": functions},
            ("grpo_num_generations: is 8", "none.py: No such file", "has no function 'absent'"),
        ),
        ({**GOOD, **gated}, ("epochs: must be at least 1", "sdft_gate_reward: ", "No such file")),
        (
            {**GRPO, "grpo_reward_function": list(functions), "training_file": "no/such.jsonl"},
            ("training_file: ", "none.py: No such file", "has no function 'absent'"),
        ),
    ):
        with pytest.raises(ConfigError) as refused:
            ow.fine_tuning.create(**params)
        assert all(word in str(refused.value) for word in words), refused.value
    with pytest.raises(ConfigError) as refused:
        ow.evaluate.create(models="org/name", suite=list(functions))
    for word in ("none.py: No such file", "has no function 'absent'", "prompts: score scores"):
        assert word in str(refused.value)


def test_functions_that_fail_are_told_with_the_fields_that_are_wrong(
    ow: OpenWeights, tmp_path: Path
) -> None:
    rows, own = tmp_path / "rows.jsonl", tmp_path / "own.py"
    said = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    rows.write_text((json.dumps({"messages": said}) + "\n") * 8)
    own.write_text(
        "def few(completions): return []\n"
        "def wants(completions, colour): return [1.0] * len(completions)\n"
        "def fails(completions): return 1 / 0\n"
    )
    functions = [f"{own}:{name}" for name in ("few", "wants", "fails")]
    told = ("few", "wants 'colour'", "ZeroDivisionError")
    good: dict[str, Any] = {"model": "org/model", "loss": "grpo", "training_file": str(rows)}
    good |= {"grpo_reward_function": functions}
    for params, words in (
        (good, told),
        ({**good, "epochs": 0}, (*told, "epochs: must be at least 1")),
        # What nobody can read says nothing of a function.
        ({**good, "epochs": 0, "training_file": str(own)}, ("epochs: must be at least 1",)),
    ):
        with pytest.raises(ConfigError) as refused:
            ow.fine_tuning.create(**params)
        assert all(word in str(refused.value) for word in words), refused.value
        assert len(str(refused.value).splitlines()) == len(words)
    asked: dict[str, Any] = {"models": "org/name", "suite": functions, "prompts": str(rows)}
    for params, words in ((asked, told), ({**asked, "top_p": 7.0}, (*told, "top_p: "))):
        with pytest.raises(ConfigError) as refused:
            ow.evaluate.create(**params)
        assert all(word in str(refused.value) for word in words), refused.value
