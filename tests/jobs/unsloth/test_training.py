"""The worker entry as a process of its own: its result, a kill and a resume, a stop, and its
errors.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from openweights import OpenWeights
from openweights.errors import (
    ConfigError,
    JobFailedError,
    NotFoundError,
    OpenWeightsError,
)
from openweights.jobs.unsloth.callbacks import StopOnSignal
from openweights.jobs.unsloth.training import load_config, train
from openweights.worker.results import drop_checkpoints
from tests.tiny_model import make_tiny_model
from tests.waiting import HANGS_S, wait_until

ROOT = Path(__file__).parents[3]
ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"What is {i} and {i}?"},
            {"role": "assistant", "content": f"That is {2 * i}."},
        ]
    }
    for i in range(10)
]


@pytest.fixture(scope="module")
def params(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    data = tmp_path_factory.mktemp("data") / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return {
        "model": str(tiny),
        "training_file": str(data),
        "loss": "sft",
        "lora_dropout": 0.1,  # random numbers must go on, too
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "save_steps": 4,
        "max_steps": 14,
    }


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """As the processes below have: sums in another order are other sums."""
    torch.set_num_threads(1)


def environment() -> dict[str, str]:
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return {"PYTHONPATH": str(ROOT), **os.environ, **quiet}


def start(folder: Path, params: dict[str, Any]) -> subprocess.Popen[str]:
    (folder / "config.json").write_text(json.dumps(params))
    return subprocess.Popen(
        [sys.executable, "-m", "openweights.jobs.unsloth.training", "config.json"],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=HANGS_S)
    return process.returncode, output


def events(folder: Path) -> list[dict[str, Any]]:
    path = folder / "uploads" / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def losses(folder: Path) -> dict[int, float]:
    """Loss by step; of a step that was repeated, the last."""
    return {e["step"]: e["loss"] for e in events(folder) if "loss" in e}


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "uploads" / "adapter" / "adapter_model.safetensors")


def slow(params: dict[str, Any]) -> dict[str, Any]:
    """The same training, with sampling that leaves time to be hit by a signal."""
    sampling = {"dataset": params["training_file"], "eval_steps": 1, "max_tokens": 40}
    return {**params, "sampling_callbacks": [sampling]}


@pytest.fixture(scope="module")
def whole(params: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run that nobody disturbed, in a process that imports all by itself, and its log."""
    folder = tmp_path_factory.mktemp("whole")
    code, log = finish(start(folder, {**params, "test_file": params["training_file"]}))
    assert code == 0, log
    return folder, log


def test_result_events_and_log(whole: tuple[Path, str], params: dict[str, Any], tiny: Path) -> None:
    folder, log = whole
    assert list(losses(folder)) == list(range(1, 15)), "each step once"
    kinds = [e.get("type") or e.get("tag") or "train" for e in events(folder)]
    # Ten rows are two and a half optimizer steps: three an epoch, and the stop in the middle of the
    # fifth.
    assert kinds.count("eval") == 5 and kinds.count("checkpoint") == 3
    stages = [e["doing"] for e in events(folder) if e.get("type") == "stage"]
    preparing = ["starting", "fetching the model", "reading the rows", "loading the model"]
    measuring = ["measuring the test set"] * 5
    assert stages == [*preparing, "preparing the rows", *measuring, "saving the result"]
    [started] = [e for e in events(folder) if e.get("type") == "started"][:1]
    assert started == {"type": "started", "max_steps": 14, "from_step": 0}
    base = AutoModelForCausalLM.from_pretrained(tiny)
    tokenizer = AutoTokenizer.from_pretrained(folder / "uploads" / "adapter")
    ids = tokenizer(tokenizer.apply_chat_template(ROWS[0]["messages"], tokenize=False))["input_ids"]
    with torch.no_grad():
        before = base(torch.tensor([ids])).logits
        tuned = PeftModel.from_pretrained(base, str(folder / "uploads" / "adapter"))
        after = tuned(torch.tensor([ids])).logits
    assert float((before - after).abs().max()) > 0.1
    config = json.loads((folder / "uploads" / "config.json").read_text())
    assert config["model"] == str(tiny) and config["max_steps"] == 14
    record = json.loads((folder / "uploads" / "reproducibility.json").read_text())
    card = (folder / "uploads" / "adapter" / "README.md").read_text()
    assert (
        record["data"]["training_file"]["sha256"] in card and "| `learning_rate` | `0.01` |" in card
    )
    assert record["steps"] == 14 and record["seed"] == 3407 and record["versions"]["trl"]
    assert len(record["data"]["training_file"]["sha256"]) == 64
    assert "step 14/14: loss" in log and "done: the adapter is in uploads/adapter" in log
    assert "it/s" not in log and "%|" not in log and "{'loss'" not in log


@pytest.mark.usefixtures("warm_jobs")
def test_killed_and_resumed_equals_undisturbed(
    whole: tuple[Path, str],
    params: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    params = {**params, "test_file": params["training_file"]}
    slowed = slow(params)
    process = start(tmp_path, slowed)
    # Step 6 lies between the checkpoints of 4 and 8.

    def has_come() -> bool:
        assert process.poll() is None, process.communicate()[0]
        return 6 in losses(tmp_path)

    wait_until(has_come)
    process.kill()
    finish(process)
    assert not (tmp_path / "uploads" / "adapter").exists() and 14 not in losses(tmp_path)
    monkeypatch.chdir(tmp_path)
    train(slowed)
    resumed = [e for e in events(tmp_path) if e.get("type") == "started"][1]
    assert resumed["from_step"] >= 4
    assert losses(tmp_path) == losses(whole[0])
    expected = adapter(whole[0])
    assert all(torch.equal(tensor, expected[name]) for name, tensor in adapter(tmp_path).items())
    # Control: another seed is another run.
    other = train({**params, "seed": 1, "max_steps": 1, "output_dir": "other"})
    assert other.state.log_history[0]["loss"] != losses(whole[0])[1]


class StopAt(TrainerCallback):
    """Sends this process the signal that a worker sends when it stops a job."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("step", [2, 3], ids=["within an epoch", "at its end"])
def test_terminated_saves_and_goes_on(
    step: int,
    whole: tuple[Path, str],
    params: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    params = slow({**params, "test_file": params["training_file"], "save_steps": 1000})
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        train(params, extra_callbacks=[StopAt(step)])
    assert stopped.value.code == 143 and not (tmp_path / "uploads" / "adapter").exists()
    assert signal.getsignal(signal.SIGTERM) == before
    assert max(losses(tmp_path)) in (step, step + 1), "after the step, or the one after it"
    train(params)
    assert losses(tmp_path) == losses(whole[0])
    samples = [e for e in events(tmp_path) if e.get("type") == "samples"]
    assert [e["step"] for e in samples] == list(range(15)), "each once, also over the stop"
    tests = [e["eval_loss"] for e in events(tmp_path) if e.get("tag") == "eval"]
    assert tests == [e["eval_loss"] for e in events(whole[0]) if e.get("tag") == "eval"]


def test_terminated_before_training_ends_at_once() -> None:
    with pytest.raises(SystemExit) as stopped, StopOnSignal():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert stopped.value.code == 143


def test_in_a_job_of_the_store(
    params: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ow = OpenWeights()
    data = ow.files.upload(params["training_file"], "conversations")["id"]
    sampling = {"dataset": data, "eval_steps": 4, "max_tokens": 4, "tag": "a/b"}
    small = {**params, "training_file": data, "save_steps": 2, "max_steps": 6}

    def run_in(name: str, *callbacks: TrainerCallback) -> list[dict[str, Any]]:
        """Each run has an empty disk, and finds what it needs in the store."""
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        train({**small, "sampling_callbacks": [sampling]}, run=ow.run, extra_callbacks=callbacks)
        return logged()

    def logged() -> list[dict[str, Any]]:
        ow.run.flush()
        return [event.data for event in ow.events.list(job_id=ow.run.job_id)]

    with pytest.raises(SystemExit):
        run_in("first", StopAt(4))
    saved = [e for e in logged() if e.get("type") == "checkpoint"]
    assert [e["step"] for e in saved] == [2, 4, 5]
    assert [is_stored(ow, e["file"]) for e in saved] == [False, False, True], "the last alone"
    done = run_in("second")
    assert [e["step"] for e in done if "loss" in e] == [1, 2, 3, 4, 5, 6]
    assert is_stored(ow, saved[-1]["file"]), "until the worker has stored the result"
    drop_checkpoints(ow.backend, ow.run.job_id)
    assert not [e for e in done if e.get("type") == "checkpoint" and is_stored(ow, e["file"])]
    # Events name checkpoints that are gone: whoever runs the job again starts anew.
    again = run_in("third")
    assert [e["from_step"] for e in again if e.get("type") == "started"] == [0, 5, 0]
    second, third = adapter(tmp_path / "second"), adapter(tmp_path / "third")
    assert all(torch.equal(tensor, third[name]) for name, tensor in second.items())
    ow.run.update("completed")
    target = tmp_path / "download"
    ow.jobs.retrieve(ow.run.job_id).download(target)
    assert sorted(path.name for path in (target / "samples").iterdir()) == [
        f"a_b-{step}.jsonl" for step in (0, 4, 6)
    ]
    assert "completion" in json.loads((target / "samples/a_b-6.jsonl").read_text().splitlines()[0])


def is_stored(ow: OpenWeights, file: str) -> bool:
    try:
        return ow.files.retrieve(file)["id"] == file
    except NotFoundError:
        return False


class Spoil(TrainerCallback):
    """Leaves the base model's weights unreadable once training is over, before they are merged."""

    def __init__(self, folder: Path) -> None:
        self.weights = folder / "model.safetensors"

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.weights.unlink()
        self.weights.write_bytes(b"no tensors")


def test_a_push_that_fails_does_not_fail_the_job(
    params: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    monkeypatch.setenv("HF_ORG", "me")
    base = make_tiny_model(tmp_path / "base")
    train({**params, "model": str(base), "max_steps": 1}, extra_callbacks=[Spoil(base)])
    assert adapter(tmp_path)
    pushed = [e for e in events(tmp_path) if e.get("type") == "push"]
    assert [list(e) for e in pushed] == [["type", "push_error"]]
    assert pushed[0]["push_error"].startswith("SafetensorError: ")
    assert "not pushed to the hub; the result is kept" in caplog.text
    assert "Traceback" in caplog.text, "to find out why"


def test_a_push_that_was_asked_for_must_work(
    params: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = make_tiny_model(tmp_path / "base")
    asked = {**params, "model": str(base), "max_steps": 1, "push_to_hub": True}
    with pytest.raises(ConfigError, match="push_to_hub: HF_TOKEN is not set where the job runs"):
        train(asked)
    assert not events(tmp_path), "said before anything costs time"
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    monkeypatch.setenv("HF_ORG", "me")
    with pytest.raises(JobFailedError, match="not pushed to the hub as push_to_hub=True asks"):
        train(asked, extra_callbacks=[Spoil(base)])
    assert adapter(tmp_path), "the result is kept"


@pytest.mark.usefixtures("warm_jobs")
def test_wrong_input_ends_in_one_line(params: dict[str, Any], tmp_path: Path) -> None:
    code, log = finish(start(tmp_path, {**params, "model": "/no/such/model"}))
    last = log.strip().splitlines()[-1]
    assert code == 1 and "ERROR model: there is no folder /no/such/model" in last
    assert "Traceback" not in log


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"training_file": "conversations:file-0"}, "needs local paths"),
        ({"epochs": "many"}, "epochs: must be a whole number, not 'many'"),
        ({"max_seq_length": 3}, "nothing to learn is left of any row"),
    ],
)
def test_what_train_raises(
    change: dict[str, Any],
    words: str,
    params: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OpenWeightsError, match=words):
        train({**params, **change})


def test_a_loss_that_is_no_number_ends_the_job(
    params: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = make_tiny_model(tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][8:] = float("nan")  # the first ones are looked at before
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(JobFailedError, match="the loss is nan at step 1"):
        train({**params, "model": str(folder)})
    assert events(tmp_path)[-1]["loss"] == "NaN"


class Overflow(TrainerCallback):
    """Gives the last step a gradient that the weights cannot follow."""

    def __init__(self, value: float) -> None:
        self.value = value

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        for parameter in kwargs["model"].parameters():
            if parameter.grad is not None:
                parameter.grad.fill_(self.value)


@pytest.mark.parametrize("gradient", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_end_the_job(
    params: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gradient: float
) -> None:
    """The loss of the last step was a number."""
    monkeypatch.chdir(tmp_path)
    last = {**params, "max_steps": 1, "optim": "sgd"}
    with pytest.raises(JobFailedError, match="holds numbers that are none after 1 steps; lower"):
        train(last, extra_callbacks=[Overflow(gradient)])
    assert not (tmp_path / "uploads/adapter").exists()


def test_load_config(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ConfigError, match="none.json: cannot be read as JSON"):
        load_config("none.json")
    with pytest.raises(ConfigError, match="must hold one JSON object"):
        load_config(str(tmp_path / "list.json"))
    with pytest.raises(NotFoundError, match="ftjob-000000000000"):
        load_config("ftjob-000000000000")
