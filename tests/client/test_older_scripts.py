"""Scripts that were written for the older runner of the same name: their calls, on this store."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import BaseModel

from openweights import InvalidInputError, Jobs, NotFoundError, OpenWeights
from openweights.client import Job
from openweights.client.decorators import openai_retry, supabase_retry
from openweights.client.utils import (
    get_adapter_config,
    get_lora_rank,
    group_models_or_adapters_by_model,
    guess_model_size,
    model_exists,
    resolve_lora_model,
)
from openweights.errors import ConfigError
from openweights.jobs.unsloth.validate import training_config
from openweights.types import Claim
from tests.client.conftest import QuietClient, append
from tests.client.kinds import Echo

ROWS = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]


@pytest.fixture
def ran(ow: QuietClient, claim: Callable[[], Claim]) -> Job:
    """A job that has logged and ended."""
    job = Echo(ow).create(text="a")
    run = claim().run
    append(ow.backend, run.id, {"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "tag": "eval"})
    ow.backend.append_log(run.id, 0, b"what it printed\n")
    ow.backend.finish_run(run.id, run.attempt, "completed")
    return job


def test_a_poll_loop_that_reads_events_and_the_log(ran: Job, ow: QuietClient) -> None:
    while ran.refresh().status in ("pending", "in_progress"):
        time.sleep(0.1)
    losses = []
    for event in ow.events.list(run_id=ran.runs[-1].id):
        data = event["data"] if isinstance(event, dict) else {}
        losses.append((data.get("step"), event.get("data", {}).get("loss")))
    assert losses == [(1, 2.0), (2, 1.0)]
    assert event.data is event["data"] and event.get("nothing") is None
    log = ow.files.content(ran.runs[-1].log_file).decode()
    assert log == "what it printed\n"
    assert ow.files.download(ran.runs[-1].log_file, ow.settings.home / "log").read_text() == log
    assert ran.get("outputs", {})["loss"] == 1.0 and ran.get("nothing", 3) == 3


def test_the_collection_of_a_kind(ran: Job, ow: QuietClient) -> None:
    kind = Echo(ow)
    assert [job.id for job in kind.list()] == [ran.id]
    assert kind.list(status="failed") == [] == ow.fine_tuning.list()
    assert kind.retrieve(ran.id[:10]).id == ran.id
    waiting = kind.create(text="b")
    assert kind.cancel(waiting.id).status == "canceled"
    with pytest.raises(NotFoundError, match="no job nothing"):
        ow.jobs.retrieve("nothing")
    with pytest.raises(InvalidInputError, match="begins 2 job ids"):
        ow.jobs.retrieve("echo-")


class Params(BaseModel):
    text: str


class Older(Jobs):
    """A kind as the older runner's users wrote them."""

    params = Params
    requires_vram_gb = None
    mount = {}

    @property
    def id_predix(self) -> str:
        return "older"

    def get_entrypoint(self, validated_params: BaseModel) -> str:
        return "true"

    def submit(self, text: str) -> Job:
        params = {"validated_params": {"text": text}}
        data: dict[str, Any] = {
            "type": "custom",
            "params": {**params, "mounted_files": self._upload_mounted_files()},
            "status": "pending",
            "docker_image": self.base_image,
            "script": self.get_entrypoint(Params(text=text)),
            "allowed_hardware": ["1x h100s"],
        }
        data["id"] = self.compute_id(data)
        return self.get_or_create_or_reset(data)


def test_hooks_of_custom_jobs(ow: QuietClient, caplog: pytest.LogCaptureFixture) -> None:
    job = Older(ow).submit("a")
    assert job.id.startswith("older-") and job.status == "pending"
    assert job.allowed_hardware == ("1x H100S",) and job.requires_vram_gb == 0
    assert job.params["validated_params"] == {"text": "a"}
    assert Older(ow).submit("a").id == job.id != Older(ow).submit("b").id
    assert "Older: id_predix is called id_prefix now" in caplog.messages
    assert Older(ow).create(text="c", requires_vram_gb="guess").requires_vram_gb == 0


def test_whole_numbers_that_are_floats() -> None:
    given = {"model": "a/b", "training_file": "conversations:file-1", "loss": "sft"}
    config = training_config({**given, "r": 8.0, "epochs": 1.0, "max_steps": 4.0, "seed": 3.0})
    assert (config.r, config.epochs, config.max_steps) == (8, 1, 4)
    assert isinstance(config.r, int)


class Dataset(list[dict[str, Any]]):
    """What is known of a `datasets.Dataset`: columns, and rows when it is iterated."""

    column_names = ("messages",)


@pytest.mark.parametrize("rows", [ROWS, tuple(ROWS), Dataset(ROWS)])
def test_rows_are_uploaded_as_they_are(ow: OpenWeights, rows: Any) -> None:
    file = ow.files.upload(rows, purpose="conversations")
    assert file["filename"] == "rows.jsonl"
    assert ow.files.content(file["id"]).count(b"\n") == 1


def test_purposes(ow: OpenWeights) -> None:
    older = ow.files.create(b"{}", "custom_job_file")
    assert older["purpose"] == "custom_job_file"
    assert ow.files.upload(ROWS, "fine-tune")["purpose"] == "conversations"
    pair = {"prompt": ROWS[0]["messages"][:1], "chosen": [ROWS[0]["messages"][1]]}
    rows = [{**pair, "rejected": [{"role": "assistant", "content": "c"}]}]
    assert ow.files.upload(rows, "preferences")["purpose"] == "preference"
    with pytest.raises(InvalidInputError, match="nothing reads 'conversation'; did you mean"):
        ow.files.create(b"{}", "conversation")
    splits = type("Splits", (dict,), {"column_names": ()})(train=ROWS)
    with pytest.raises(InvalidInputError, match="pass one of 'train'"):
        ow.files.create(splits, "conversations")


# ---- names of its modules


def adapter(folder: Path, **config: Any) -> str:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder)


def test_helpers_about_models(tmp_path: Path) -> None:
    sizes = ("Qwen/Qwen3-0.8B", "a/b-1.5B", "a/phi-4-bnb-4bit", "a/Mistral-Small-3", "a/b-8x7b")
    assert [guess_model_size(name) for name in sizes] == [0.8, 1.5, 32, 22, 56]
    one = adapter(tmp_path / "one", base_model_name_or_path="org/base", r=8)
    two = adapter(tmp_path / "two", base_model_name_or_path="org/base", r=16)
    (tmp_path / "plain").mkdir()
    plain = str(tmp_path / "plain")
    assert resolve_lora_model(one) == ("org/base", one)
    assert resolve_lora_model(plain) == (plain, None)
    assert get_lora_rank(two) == 16 and get_adapter_config(one)["r"] == 8
    grouped = group_models_or_adapters_by_model([one, plain, two])
    assert grouped == {"org/base": [one, two], plain: []}
    assert model_exists(plain)
    with pytest.raises(ConfigError, match="is no adapter: it has no adapter_config.json"):
        get_lora_rank(plain)


class Flaky:
    """Fails so many times, and then answers."""

    def __init__(self, failures: int, error: Exception) -> None:
        self.failures, self.error, self.calls = failures, error, 0

    def __call__(self) -> str:
        self.calls += 1
        if self.calls <= self.failures:
            raise self.error
        return "done"


def test_retrying_decorators() -> None:
    away = httpx.ConnectError("away")
    flaky = Flaky(2, away)
    assert supabase_retry(base=0.001)(lambda: flaky())() == "done" and flaky.calls == 3
    gone = Flaky(9, away)
    with pytest.raises(httpx.ConnectError):
        supabase_retry(base=0.001, max_tries=3)(lambda: gone())()
    assert gone.calls == 3
    assert (
        supabase_retry(base=0.001, max_tries=2, return_on_exhaustion=None)(Flaky(9, away))() is None
    )
    wrong = Flaky(9, ValueError("no"))
    with pytest.raises(ValueError, match="no"):
        openai_retry(interval=0.001)(lambda: wrong())()
    assert wrong.calls == 1, "what does not pass is not tried again"
    assert openai_retry(interval=0.001, extra_exceptions=(ValueError,))(lambda: Flaky(0, away)())()
    later = Flaky(1, away)

    @openai_retry(interval=0.001)
    async def ask() -> str:
        return later()

    assert asyncio.run(ask()) == "done"


def test_the_name_of_the_organization(ow: OpenWeights) -> None:
    assert ow.org_name
