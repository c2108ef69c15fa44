"""`ow.api` and `ow.chat` on this machine: real servers in processes of their own."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from openweights import OpenWeights
from openweights.errors import (
    ConfigError,
    InvalidStateError,
    JobFailedError,
    NotFoundError,
    PlatformError,
)
from openweights.models.memory import wait_for_memory
from tests.client.conftest import QuietClient
from tests.jobs.api.processes import is_free, running
from tests.tiny_model import make_tiny_model
from tests.waiting import wait_until

HELLO: Any = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_model(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def ow(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenWeights]:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    client = OpenWeights()
    yield client
    client.close()


@pytest.mark.usefixtures("warm_jobs")
def test_a_deployment_beside_a_job_and_its_end(ow: OpenWeights, tiny: str) -> None:
    training = ow.exec.create(command="while true; do date; sleep 0.1; done", requires_vram_gb=0)
    wait_until(lambda: training.refresh().status == "in_progress")
    api = ow.api.deploy(tiny, max_model_len=100)
    with pytest.raises(InvalidStateError, match="not up"):
        _ = api.sync_client
    with api as client:
        answer = client.chat.completions.create(model=tiny, messages=HELLO, max_tokens=5)
        assert answer.usage is not None and answer.usage.completion_tokens <= 5
        assert api.base_url is not None and api.base_url.startswith("http://127.0.0.1:")
        assert api.models == (tiny,) and api.pod_id is None and api.sem._value == 100
        url, key = api.base_url, str(api.api_key)
        assert len(key) > 20 and httpx.get(f"{url}/models").status_code == 401
        with pytest.raises(openai.BadRequestError, match="the context 100"):
            long = [{"role": "user", "content": "x" * 120}]
            client.chat.completions.create(model=tiny, messages=long)  # type: ignore[arg-type]
        assert training.refresh().status == "in_progress", "it goes on beside the server"
        again = ow.api.deploy(tiny, max_model_len=100)
        assert again.job_id == api.job_id and again.up() and again.api_key == key
        again.forget()
        job = ow.jobs.retrieve(api.job_id)
        assert key not in job.logs()
    assert not [t for t in threading.enumerate() if t.name == api.job_id]
    assert ow.jobs.retrieve(api.job_id).status == "canceled"
    wait_until(lambda: not running("openweights.jobs.api.serve") and is_free(url))
    training.cancel()


@pytest.mark.usefixtures("warm_jobs")
def test_a_server_that_is_killed(ow: OpenWeights, tiny: str) -> None:
    chat = ow.chat.completions
    assert chat.create(model=tiny, messages=HELLO, max_tokens=3).choices
    told: list[str] = []
    for chunk in chat.create(model=tiny, messages=HELLO, max_tokens=3, stream=True):
        told.append(chunk.choices[0].delta.content or "")
    assert told

    async def ask() -> list[Any]:
        create = ow.async_chat.completions.create
        given: Any = {"model": tiny, "messages": HELLO, "max_tokens": 3, "temperature": 0}
        return list(await asyncio.gather(*[create(**given) for _ in range(10)]))

    for _ in range(2):  # two event loops, one after the other
        texts = {answer.choices[0].message.content for answer in asyncio.run(ask())}
        assert len(texts) == 1
    kept = chat.create(model=tiny, messages=HELLO, max_tokens=8, cache=True)
    assert chat.create(model=tiny, messages=HELLO, max_tokens=8, cache=True) == kept
    with pytest.raises(ConfigError, match="cache: a streamed answer is not kept"):
        chat.create(model=tiny, messages=HELLO, cache=True, stream=True)
    (job,) = ow.jobs.list()
    url = job.events(type="served")[-1].data["base_url"]
    (worker,) = running("openweights.worker.main")
    worker.kill()
    wait_until(lambda: not running("openweights.jobs.api.serve") and is_free(url))
    with pytest.raises(PlatformError, match="its deployment does not answer; its job apijob-"):
        chat.create(model=tiny, messages=HELLO, max_tokens=3)
    assert chat.create(model=tiny, messages=HELLO, max_tokens=3).choices, "it is deployed anew"
    ow.chat.kill(tiny)
    with pytest.raises(NotFoundError, match="has no deployment here"):
        ow.chat.kill(tiny)
    wait_until(lambda: not running("openweights.jobs.api.serve"))


@pytest.mark.usefixtures("warm_jobs")
def test_one_that_nobody_uses_ends_and_comes_back(ow: OpenWeights, tiny: str) -> None:
    api = ow.api.deploy(tiny, idle_timeout=1.0, api_key="my-own-key-123")
    assert api.up() and api.api_key == "my-own-key-123"
    job = ow.jobs.retrieve(api.job_id)
    wait_until(lambda: job.refresh().status == "canceled")
    assert "nobody has asked for anything" in job.logs()
    api.forget()
    # An end that has passed does not end it again.
    ow.backend.set_timeout(job.id, datetime.now(UTC) - timedelta(minutes=1))
    assert api.up().models.list().data[0].id == tiny
    assert job.refresh().timeout_at is None
    api.down()
    timed = ow.api.deploy(tiny, idle_timeout=1.0, api_key="my-own-key-123", timeout=3600)
    ends_at = ow.jobs.retrieve(timed.job_id).timeout_at
    assert ends_at is not None and 3000 < (ends_at - datetime.now(UTC)).total_seconds() <= 3600
    timed.down()


@pytest.mark.usefixtures("warm_jobs")
def test_a_model_that_cannot_be_served(ow: OpenWeights, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text("{}")
    api = ow.api.deploy(str(empty))
    with pytest.raises(JobFailedError, match="model: .*empty"):
        api.up()
    assert ow.jobs.retrieve(api.job_id).attempts == 1
    with pytest.raises(JobFailedError, match="model: .*empty"):
        ow.chat.completions.create(model=str(empty), messages=HELLO)


def test_what_deploying_refuses_and_how_models_are_grouped(
    home: Path, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ow = QuietClient()
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": tiny}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    for params, words in (
        ({"model": "openai/gpt-4o"}, "is OpenAI's; ask it through ow.chat"),
        ({"model": "ftjob-000000000000"}, "the store has no job ftjob-000000000000"),
        ({"model": tiny, "lora_adapters": ["./none"]}, "there is no folder ./none"),
        ({"model": tiny, "api_key": "short"}, "api_key"),
        ({"model": tiny, "max_lora_rank": 0}, "max_lora_rank"),
    ):
        with pytest.raises(ConfigError, match=words):
            ow.api.deploy(**params)
    apis = ow.api.multi_deploy([tiny, str(adapter), "org/other"], max_model_len=64)
    assert list(apis) == [tiny, str(adapter), "org/other"]
    assert apis[tiny] is apis[str(adapter)] is not apis["org/other"]
    job = ow.jobs.retrieve(apis[tiny].job_id)
    params = job.params["validated_params"]
    assert params["model"] == tiny and params["lora_adapters"] == [str(adapter)]
    assert job.id.startswith("apijob-") and (job.type, job.max_attempts) == ("api", 1)
    assert ow.api.deploy(str(adapter), max_model_len=64).job_id == job.id
    # However a folder is written, it is the same one.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tiny)
    linked = ow.api.multi_deploy(["link", "./adapter"], max_model_len=64)
    assert list(linked) == ["link", "./adapter"]
    assert linked["link"].job_id == linked["./adapter"].job_id == job.id
    other = ow.jobs.retrieve(apis["org/other"].job_id).params["validated_params"]
    assert other["api_key"] != params["api_key"]
    ow.close()


def test_it_says_what_it_waits_for(caplog: pytest.LogCaptureFixture) -> None:
    frees = iter([(1, 10), (2, 10), (5, 10)])
    pauses: list[float] = []
    wait_for_memory("org/model", 4, lambda: next(frees), pauses.append)
    assert len(pauses) == 2 and caplog.text.count("org/model waits for memory") == 1
    with pytest.raises(Exception, match="this machine has"):
        wait_for_memory("org/model", 11, lambda: (1, 10), pauses.append)
