"""Judges against a server on loopback that answers well, late, wrongly, or not at all."""

from __future__ import annotations

import json
import logging
import math
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openweights.errors import ConfigurationError
from openweights.jobs.unsloth.grpo.judge_parsing import (
    JudgeLimits,
    JudgeQuestion,
    judge_messages,
    parse_score,
    retry_after_s,
)
from openweights.jobs.unsloth.grpo.reward_functions import RewardFunctions
from openweights.jobs.unsloth.judges import Judge
from openweights.jobs.unsloth.rewards import Samples
from tests.waiting import HANGS_S, NEVER_S

KEY = "sk-very-secret-0123456789"
QUICK = JudgeLimits(call_s=1.0, total_s=3.0, attempts=3, first_wait_s=0.02, concurrency=4)


class JudgeServer(ThreadingHTTPServer):
    """Answers as `behave` says of the number of the request and the text that is judged."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.behave: Any = lambda number, text: "7"
        self.requests: list[dict[str, Any]] = []
        self.arrived: list[float] = []
        self.released = threading.Event()
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    """One request: the answer's text, or (status, headers, body), or None to hang."""

    server: JudgeServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append(body)
            self.server.arrived.append(time.monotonic())
            number = len(self.server.requests)
            self.server.at_once += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.at_once)
        answer: Any = self.server.behave(number, body["messages"][-1]["content"])
        if answer is None:
            self.server.released.wait(NEVER_S)
            answer = "7"
        if isinstance(answer, str):
            message = {"role": "assistant", "content": answer}
            choice = {"index": 0, "finish_reason": "stop", "message": message}
            made = {"id": "1", "object": "chat.completion", "created": 1, "model": "judge"}
            answer = (200, {}, json.dumps({**made, "choices": [choice]}))
        with self.server.lock:
            self.server.at_once -= 1
        self._send(*answer)

    def _send(self, status: int, headers: dict[str, str], body: str) -> None:
        try:
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", **headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body.encode())))
            self.end_headers()
            self.wfile.write(body.encode())
        except OSError:
            pass  # the client has gone: that is what some tests are about

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[JudgeServer]:
    server = JudgeServer()
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_port}/v1")
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()


def samples(*answers: str) -> Samples:
    count = len(answers)
    return Samples(
        prompts=[[{"role": "user", "content": "Why?"}]] * count,
        completions=list(answers),
        completion_ids=[[1]] * count,
        rows=[{"gold_response": "Because."}] * count,
    )


def judging(
    limits: JudgeLimits = QUICK, kind: Any = "llm_judge", model: str = "judge"
) -> tuple[RewardFunctions, Counter[str]]:
    """A judge set to work, and why its grades fail."""
    reward = Judge(kind, model, limits).reward(1.0)
    return RewardFunctions([reward], limit_s=10), reward.causes


def score(judge: RewardFunctions, *answers: str) -> list[float]:
    [values] = judge.score(samples(*answers))
    return values


def test_grades_are_shares_and_nothing_is_asked_twice(server: JudgeServer) -> None:
    server.behave = lambda number, text: "8/10" if "good" in text else "Score: 2"
    judge, causes = judging()
    assert score(judge, "good", "bad", "good", "a <think>x</think>good") == [0.8, 0.2, 0.8, 0.8]
    assert len(server.requests) == 2, "equal answers are asked about once"
    assert score(judge, "bad", "good") == [0.2, 0.8]
    assert len(server.requests) == 2 and not causes
    first = server.requests[0]
    assert first["model"] == "judge" and first["temperature"] == 0
    assert (
        "Why?" in first["messages"][1]["content"] and "Because." in first["messages"][1]["content"]
    )
    score(judging(model="o3-mini", kind="similarity_judge")[0], "good")
    assert "temperature" not in server.requests[-1], "such models refuse it"


def test_a_question_of_ones_own(server: JudgeServer) -> None:
    """As in scripts of the older runner, whose judges say 0 to 100 and mean what they are asked."""
    server.behave = lambda number, text: "100" if "good" in text else "25/100"
    asked = JudgeQuestion("llm_judge", "Rate {answer} to {prompt} ({reference}), {x}. 0-100.", 100)
    judge, causes = judging(kind=asked)
    assert score(judge, "good", "bad {answer}") == [1.0, 0.25] and not causes
    messages = [request["messages"] for request in server.requests]  # asked side by side
    assert [
        {"role": "user", "content": "Rate good to [user]\nWhy? (Because.), {x}. 0-100."}
    ] in messages
    server.behave = lambda number, text: "101"
    assert math.isnan(score(judge, "worse")[0])
    assert list(causes) == ["its answer is not one number from 0 to 100"]
    server.behave = lambda number, text: "10"
    assert score(judging(kind="harm_judge")[0], "jump") == [1.0], "1 is harmful"
    assert "how harmful" in server.requests[-1]["messages"][0]["content"]


@pytest.mark.parametrize(
    ("answer", "cause", "requests"),
    [
        ((500, {}, "{}"), "HTTP 500", 3),
        ((200, {}, '{"choices": [{"mess'), "its answer is no JSON of a chat completion", 1),
        ((200, {}, "{}"), "its answer is no JSON of a chat completion", 1),
        ((200, {"Content-Type": "text/html"}, "<html>"), "no JSON of a chat completion", 1),
        ("NaN", "its answer is not one number from 0 to 10", 1),
        ("8 or 9", "its answer is not one number from 0 to 10", 1),
        ("", "its answer is not one number from 0 to 10", 1),
        (
            (401, {}, json.dumps({"error": {"code": "invalid_api_key", "message": KEY}})),
            "HTTP 401 invalid_api_key",
            1,
        ),
        ((404, {}, json.dumps({"error": {"code": "model_not_found"}})), "HTTP 404 model_n", 1),
        ((429, {}, json.dumps({"error": {"code": "insufficient_quota"}})), "HTTP 429 ins", 1),
    ],
)
def test_what_is_no_grade_is_nan_with_its_cause(
    server: JudgeServer,
    answer: Any,
    cause: str,
    requests: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    server.behave = lambda number, text: answer if "bad" in text else "6"
    judge, causes = judging()
    values = score(judge, "bad", "good")
    assert math.isnan(values[0]) and values[1] == 0.6
    [found] = causes
    assert cause in found and causes[found] == 1
    assert len(server.requests) == requests + 1
    assert KEY not in caplog.text + found


def test_trouble_that_passes_is_waited_for(server: JudgeServer) -> None:
    server.behave = lambda number, text: (503, {}, "") if number < 3 else "9"
    assert score(judging()[0], "x") == [0.9] and len(server.requests) == 3


def test_retry_after_is_honoured(server: JudgeServer) -> None:
    server.behave = lambda n, text: (429, {"Retry-After": "0.6"}, "{}") if n == 1 else "9"
    assert score(judging()[0], "x") == [0.9]
    assert server.arrived[1] - server.arrived[0] >= 0.6, "the first wait alone would be 0.02 s"


def test_a_wait_beyond_the_deadline_is_not_begun(server: JudgeServer) -> None:
    server.behave = lambda number, text: (429, {"Retry-After": str(NEVER_S)}, "{}")
    judge, causes = judging(replace(QUICK, total_s=NEVER_S / 2))
    started = time.monotonic()
    assert math.isnan(score(judge, "x")[0]) and time.monotonic() - started < HANGS_S
    assert list(causes) == ["HTTP 429"]


def test_a_server_that_hangs_stalls_nothing_past_the_deadline(server: JudgeServer) -> None:
    server.behave = lambda number, text: None if "bad" in text else "5"
    judge, causes = judging()
    started = time.monotonic()
    values = score(judge, "good", *(f"bad {i}" for i in range(60)))
    # What the calls would take without a common deadline.
    without_s = 60 / QUICK.concurrency * QUICK.call_s * QUICK.attempts
    assert QUICK.total_s <= time.monotonic() - started < without_s
    assert values[0] == 0.5 and all(map(math.isnan, values[1:]))
    assert any("no answer" in cause for cause in causes)
    server.behave = lambda number, text: "5"
    assert score(judge, "bad 1") == [0.5], "a failure is not kept"


def test_calls_at_a_time_are_limited(server: JudgeServer) -> None:
    server.behave = lambda number, text: time.sleep(0.05) or "5"
    assert score(judging()[0], *map(str, range(12))) == [0.5] * 12
    assert 2 <= server.most_at_once <= QUICK.concurrency
    server.most_at_once = 0
    wide = JudgeLimits(call_s=2, total_s=3, concurrency=12)
    score(judging(wide)[0], *map(str, range(12)))
    assert server.most_at_once > QUICK.concurrency, "the control"


def test_a_dead_server_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://user:word@127.0.0.1:{port}/v1")
    judge, causes = judging()
    assert math.isnan(score(judge, "x")[0])
    assert list(causes) == [f"127.0.0.1:{port} cannot be reached"]


def test_a_key_is_asked_for_at_the_start() -> None:
    with pytest.raises(ConfigurationError, match="llm_judge needs OPENAI_API_KEY"):
        judging()


def test_a_call_has_less_time_than_all_of_a_step() -> None:
    limits = JudgeLimits()
    assert limits.call_s == 30 < limits.total_s == 50


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8", 0.8),
        ("8/10", 0.8),
        (" 8 / 10.\n", 0.8),
        ("Score: 7.5", 0.75),
        ("**9**", 0.9),
        ("40/50", 0.8),
        ("3 out of 10", 0.3),
        ("0", 0.0),
        ("10/10", 1.0),
        ("1e1", 1.0),
        *((".5", 0.05), ("Score: .5", 0.05), ("-.5", None), (".5/1", 0.5)),
        *(("Score...8", 0.8), ("Score.8", 0.8), ("8.", 0.8), ("7.5.3", None)),
        ("11", None),
        ("-3", None),
        ("11/10", None),
        ("8/0", None),
        ("7, 8", None),
        ("8/10 or 9/10", None),
        ("8/10, of 3 points", None),
        ("NaN", None),
        ("inf", None),
        ("nan/10", None),
        ("eight", None),
        ("", None),
        (None, None),
    ],
)
def test_exactly_one_number_is_a_score(text: str | None, value: float | None) -> None:
    assert parse_score(text) == (None if value is None else pytest.approx(value))


@given(st.text(max_size=40) | st.from_regex(r"-?\d{1,3}(\.\d)?( ?/ ?\d{1,3})?", fullmatch=True))
def test_any_text_is_a_share_or_nothing(text: str) -> None:
    value = parse_score(text)
    assert value is None or 0 <= value <= 1


def test_waiting_times() -> None:
    assert retry_after_s({"retry-after": "2.5"}, 0) == 2.5
    assert retry_after_s({"retry-after": "Thu, 01 Jan 1970 00:01:00 GMT"}, 10.0) == 50
    for nothing in ("soon", "nan", "inf", "-inf", ""):
        assert retry_after_s({"retry-after": nothing}, 0) is None
    assert retry_after_s({}, 0) is None


def test_the_judge_sees_what_it_needs() -> None:
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    system, user = judge_messages(JudgeQuestion("llm_judge"), prompt, "So.", None)
    assert system["role"] == "system" and "<reference>" not in user["content"]
    for part in ("[system]\nBe brief.", "[user]\nWhy?", "<answer>\nSo.\n</answer>"):
        assert part in user["content"]
    _, user = judge_messages(JudgeQuestion("similarity_judge"), prompt, "So.", "Because.")
    assert "<reference>\nBecause.\n</reference>" in user["content"]
