"""Deployments that are waited for by several, given up, ended and asked again while they come up.

The test plays the worker's part; a small server of its own answers for the model.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import openai
import pytest

from openweights.client.serving.chat import is_openai
from openweights.errors import (
    ConfigError,
    ConfigurationError,
    InvalidInputError,
    InvalidStateError,
    NotFoundError,
    PlatformError,
    WaitTimeoutError,
)
from openweights.models.names import model_reference
from openweights.types import Claim, JobSpec, WorkerSpec
from tests.client.conftest import QuietClient, append
from tests.waiting import HANGS_S, NEVER_S, wait_until

HELLO: Any = [{"role": "user", "content": "Hello"}]
GONE = "was ended before it was up"


class _Model(BaseHTTPRequestHandler):
    """Answers with how often it was asked, as the adapter that `server.adapter` names."""

    protocol_version = "HTTP/1.1"
    server: Any

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._send({"object": "list", "data": []})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.server.asked += 1
        message = {"role": "assistant", "content": str(self.server.asked)}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        head = {"id": "x", "object": "chat.completion", "created": 1, "model": "m"}
        self._send({**head, "choices": [choice], "system_fingerprint": self.server.adapter})

    def _send(self, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def server() -> Iterator[Any]:
    listening: Any = ThreadingHTTPServer(("127.0.0.1", 0), _Model)
    listening.asked, listening.adapter, listening.daemon_threads = 0, None, True
    threading.Thread(target=listening.serve_forever, args=(0.01,), daemon=True).start()
    yield listening
    listening.shutdown()
    listening.server_close()


@pytest.fixture
def ow(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[QuietClient]:
    monkeypatch.setattr("openweights.client.serving.chat.GROUP_S", 0.02)
    monkeypatch.setattr("openweights.client.serving.temporary_api.POLL_S", 0.01)
    client = QuietClient()
    yield client
    client.close()


def take(ow: QuietClient) -> Claim:
    """Takes the next job, as a new worker."""
    worker = ow.backend.register_worker(WorkerSpec(id=f"worker-{time.monotonic_ns()}"))
    return wait_until(lambda: ow.backend.claim_job(worker.id))


def serve(ow: QuietClient, server: Any) -> None:
    """Takes the next job and says that it serves."""
    claim = take(ow)
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    append(ow.backend, claim.run.id, {"type": "served", "base_url": url, "models": ["m"]})


def model_folder(tmp_path: Path, name: str = "model") -> str:
    (tmp_path / name).mkdir()
    (tmp_path / name / "config.json").write_text("{}")
    return str(tmp_path / name)


def test_one_who_waits_no_more_leaves_the_model_to_the_others(
    ow: QuietClient, server: Any, tmp_path: Path
) -> None:
    model = model_folder(tmp_path)

    async def ask(timeout: float) -> Any:
        create = ow.async_chat.completions.create
        return await asyncio.wait_for(create(model=model, messages=HELLO), timeout)

    async def several() -> Any:
        patient = asyncio.create_task(ask(20))
        with pytest.raises(TimeoutError):
            await ask(0.1)
        await asyncio.to_thread(serve, ow, server)
        return await patient

    assert asyncio.run(several()).choices[0].message.content == "1"
    assert asyncio.run(ask(20)).choices[0].message.content == "2"
    assert ow.sync_chat.completions.create(model=model, messages=HELLO).choices


@pytest.mark.parametrize("moment", ["before", "loading"])
@pytest.mark.parametrize("end", ["close", "kill"])
def test_what_is_ended_while_it_comes_up_leaves_nothing(
    ow: QuietClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, end: str
) -> None:
    if moment == "before":
        monkeypatch.setattr("openweights.client.serving.chat.GROUP_S", 0.5)
    model = model_folder(tmp_path)
    with ThreadPoolExecutor() as threads:
        before = threading.active_count()
        asked = threads.submit(ow.chat.completions.create, model=model, messages=HELLO)
        if moment == "loading":
            wait_until(ow.jobs.list)
        else:
            wait_until(lambda: threading.active_count() > before + 1)
        if end == "close":
            ow.close()
        else:
            ow.chat.kill(model)
        with pytest.raises(InvalidStateError, match=GONE):
            asked.result(HANGS_S)
    wait_until(lambda: threading.active_count() <= before)
    left = QuietClient()
    assert [job.status for job in left.jobs.list()] == ["canceled"] * (moment == "loading")
    if end == "kill":
        with pytest.raises(NotFoundError, match="has no deployment here"):
            ow.chat.kill(model)
    else:
        with pytest.raises(InvalidStateError, match="the client is closed"):
            ow.chat.completions.create(model=model, messages=HELLO)
    left.close()


def test_down_ends_one_that_another_thread_waits_for(ow: QuietClient, tmp_path: Path) -> None:
    api = ow.api.deploy(model_folder(tmp_path))
    take(ow)  # it is in progress already, and so may be restarted once
    with ThreadPoolExecutor() as threads:
        coming = threads.submit(api.up)
        wait_until(coming.running)
        time.sleep(0.1)
        api.down()
        with pytest.raises(InvalidStateError, match=GONE):
            coming.result(HANGS_S)
    assert ow.jobs.retrieve(api.job_id).status == "canceled"
    with pytest.raises(WaitTimeoutError):  # after its end it can be deployed again
        api.up(timeout=0)
    assert ow.jobs.retrieve(api.job_id).status == "pending"


def test_a_program_does_not_wait_for_what_it_has_given_up(ow: QuietClient, tmp_path: Path) -> None:
    api = ow.api.deploy(model_folder(tmp_path))

    async def give_up() -> None:
        await asyncio.wait_for(api.async_up(timeout=NEVER_S), 0.1)

    begun = time.monotonic()
    with pytest.raises(TimeoutError):
        asyncio.run(give_up())
    assert time.monotonic() - begun < HANGS_S, "the end of the loop waits for its threads"
    assert ow.jobs.retrieve(api.job_id).status == "pending", "it goes on"


def test_down_of_one_that_ends_by_itself(ow: QuietClient, server: Any, tmp_path: Path) -> None:
    api = ow.api.deploy(model_folder(tmp_path))
    run = take(ow).run
    looked = ow.jobs.retrieve(api.job_id)
    ow.backend.finish_run(run.id, run.attempt, "failed", error="no memory")
    with pytest.raises(InvalidStateError):
        looked.cancel()
    ow.jobs.retrieve = lambda *_: looked  # type: ignore[method-assign]
    api.down()
    assert ow.backend.get_job(api.job_id).status == "failed"


def test_connections_are_released_with_the_deployment(
    ow: QuietClient, server: Any, tmp_path: Path
) -> None:
    model = model_folder(tmp_path)
    threading.Thread(target=serve, args=(ow, server)).start()

    async def ask() -> None:
        await ow.async_chat.completions.create(model=model, messages=HELLO)
        api = ow.api.deploy(model)
        client = await api.async_up()
        await asyncio.to_thread(api.forget)
        await asyncio.sleep(0.05)
        assert client.is_closed()

    asyncio.run(ask())


def test_answers_of_a_job_that_trains_are_kept_by_its_checkpoint(
    ow: QuietClient, server: Any, tmp_path: Path
) -> None:
    model = model_folder(tmp_path)
    spec = JobSpec("ftjob-0123456789ab", "fine-tuning", "true", {}, model=model)
    ow.backend.submit_job(spec)
    claim = take(ow)
    threading.Thread(target=serve, args=(ow, server)).start()

    def ask() -> str:
        create = ow.chat.completions.create
        answer = create(model=spec.id, messages=HELLO, cache=tmp_path / "cache")
        return str(answer.choices[0].message.content)

    def save(step: int) -> None:
        append(ow.backend, claim.run.id, {"type": "checkpoint", "step": step, "file": "gone"})

    save(1)
    server.adapter = f"{spec.id}/checkpoint-1"
    assert [ask(), ask()] == ["1", "1"]
    save(2)
    assert [ask(), ask()] == ["2", "3"], "the server has not got the second checkpoint yet"
    server.adapter = f"{spec.id}/checkpoint-2"
    assert [ask(), ask()] == ["4", "4"]


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        *(("openai/gpt-4o", True), ("gpt-4.1-mini", True), ("o3", True), ("chatgpt-x", True)),
        *(("openai/gpt-oss-20b", False), ("openai/gpt-oss-120b", False), ("gpt-oss-20b", False)),
        *(("openai/whisper-tiny", False), ("org/gpt-4", False), ("openai-community/gpt2", False)),
    ],
)
def test_which_models_are_asked_at_openai(model: str, expected: bool) -> None:
    assert is_openai(model) is expected
    if "/" in model:
        assert (model_reference(model).kind == "openai") is expected


class _Refusing(_Model):
    """Answers every request with a status and OpenAI's words for it."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        body = json.dumps({"error": {"message": "it says why."}}).encode()
        self.send_response(self.server.status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.mark.parametrize(
    ("status", "kind", "words"),
    [
        (400, InvalidInputError, "does not take the request: it says why$"),
        (401, ConfigurationError, r"the key \(it says why\); set OPENAI_API_KEY to a valid one"),
        (404, NotFoundError, "it says why; correct the name of the model"),
        (429, PlatformError, r"too many requests, .* \(it says why\); ask later"),
        (500, PlatformError, r"failed, with status 500 \(it says why\); ask again"),
    ],
)
@pytest.mark.parametrize("how", ["sync", "async", "stream"])
def test_what_openai_refuses_is_said_in_our_words(
    ow: QuietClient,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    kind: type[Exception],
    words: str,
    how: str,
) -> None:
    listening: Any = ThreadingHTTPServer(("127.0.0.1", 0), _Refusing)
    listening.status, listening.daemon_threads = status, True
    threading.Thread(target=listening.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{listening.server_address[1]}/v1")
    monkeypatch.setattr("openweights.client.serving.chat.OPENAI_RETRIES", 0)
    asked: dict[str, Any] = {"model": "gpt-4.1", "messages": HELLO, "stream": how == "stream"}
    with pytest.raises(kind, match=f"^gpt-4.1: .*{words}") as caught:
        if how == "async":
            asyncio.run(ow.async_chat.completions.create(**asked))
        else:
            ow.sync_chat.completions.create(**asked)
    assert isinstance(caught.value.__cause__, openai.OpenAIError), "what it was is kept"
    listening.shutdown()
    listening.server_close()


def test_an_openai_that_is_not_there(ow: QuietClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    monkeypatch.setattr("openweights.client.serving.chat.OPENAI_RETRIES", 0)
    with pytest.raises(PlatformError, match=r"cannot be reached \(.*refused.*OPENAI_BASE_URL"):
        ow.sync_chat.completions.create(model="gpt-4.1", messages=HELLO)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"messages": "Hello"}, "messages: must be a list, not 'Hello'; write "),
        ({}, "messages: are missing; write "),
        ({"messages": [{"content": "x"}]}, r"messages\[0\]: has no role"),
        ({"messages": HELLO, "temprature": 0}, "temprature: .* did you mean 'temperature'"),
        ({"messages": HELLO, "max_tokens": 0}, "max_tokens: must be a whole number of at least 1"),
        ({"messages": HELLO, "n": "two"}, "n: must be a whole number"),
        ({"messages": HELLO, "temperature": -1}, "temperature: must be a number, at least 0"),
        ({"messages": HELLO, "top_p": 7}, "top_p: must be a number, from 0 to 1, not 7"),
        ({"messages": HELLO, "cache": 3}, "cache: 3 is neither True nor a folder"),
        ({"messages": HELLO, "model": 3}, "model: 3 is no string"),
    ],
)
def test_a_wrong_request_deploys_nothing(
    ow: QuietClient, tmp_path: Path, given: dict[str, Any], words: str
) -> None:
    asked = {"model": model_folder(tmp_path), **given}
    with pytest.raises(InvalidInputError, match=words):
        ow.sync_chat.completions.create(**asked)
    with pytest.raises(InvalidInputError, match=words):
        asyncio.run(ow.async_chat.completions.create(**asked))
    with pytest.raises(ConfigError, match="prompt: is missing"):
        ow.completions.create(model="org/model")
    time.sleep(0.1)
    assert ow.jobs.list() == []
