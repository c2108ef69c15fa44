"""Judges: a language model behind an OpenAI-like API grades completions. The only importer of
openai here.

A judge may fail; the run must not hang because of it. Calls run side by side up to a limit, each
has a time limit of its own and is tried again when that may help, and all of a step together end at
one deadline, which is below the lease of a worker. What has no answer by then is NaN. Errors are
told in our own words: the text of a server's answer may hold a piece of the key.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections import Counter
from typing import Any

import openai

from openweights.errors import ConfigurationError
from openweights.jobs.unsloth.grpo.judge_parsing import (
    JudgeKind,
    JudgeLimits,
    JudgeQuestion,
    judge_messages,
    parse_score,
    retry_after_s,
)
from openweights.jobs.unsloth.rewards import Reward, Samples

CACHED_SCORES = 50_000
# These take no temperature; all others are asked for their likeliest answer.
_REASONING_MODELS = ("o1", "o3", "o4", "gpt-5")


class Judge:
    """Grades the answers of a step; `reward` makes it a reward function.

    Scores are kept by prompt and completion, so that nothing is asked twice.
    """

    def __init__(self, asked: JudgeQuestion | JudgeKind, model: str, limits: JudgeLimits) -> None:
        self._asked = asked if isinstance(asked, JudgeQuestion) else JudgeQuestion(asked)
        self._model = model
        self._limits = limits
        self._scores: dict[str, float] = {}
        self._causes: Counter[str] = Counter()
        self._client: openai.AsyncOpenAI | None = None

    def reward(self, weight: float) -> Reward:
        """The judge as a reward.

        Raises:
            ConfigurationError: There is no key for the judge's API.
        """
        try:
            self._client = openai.AsyncOpenAI(max_retries=0, timeout=self._limits.call_s)
        except openai.OpenAIError:
            raise ConfigurationError(
                f"grpo_reward_function: {self._asked.kind} needs OPENAI_API_KEY where the job runs "
                "(and OPENAI_BASE_URL for another server than OpenAI's); set it there"
            ) from None
        return Reward(self._asked.kind, weight, self.score, self._causes)

    async def score(self, samples: Samples) -> list[float]:
        """A grade from 0 to 1 for each answer, NaN where there is none; ends by the deadline."""
        questions = [
            judge_messages(self._asked, *row)
            for row in zip(samples.prompts, samples.answers, samples.golds, strict=True)
        ]
        keys = [json.dumps(question) for question in questions]
        gate = asyncio.Semaphore(self._limits.concurrency)
        end = asyncio.get_running_loop().time() + self._limits.total_s
        calls = [
            asyncio.create_task(self._grade(key, question, gate, end))
            for key, question in dict(zip(keys, questions, strict=True)).items()
            if key not in self._scores
        ]
        if calls:
            _, late = await asyncio.wait(calls, timeout=self._limits.total_s)
            for call in late:
                call.cancel()
                self._causes[f"no answer within {self._limits.total_s:g} s"] += 1
        scores = [self._scores.get(key, math.nan) for key in keys]
        while len(self._scores) > CACHED_SCORES:
            del self._scores[next(iter(self._scores))]
        return scores

    async def _grade(
        self, key: str, question: list[dict[str, str]], gate: asyncio.Semaphore, end: float
    ) -> None:
        """Ask until there is an answer, and keep its score; or count why there is none."""
        loop = asyncio.get_running_loop()
        for attempt in range(1, self._limits.attempts + 1):
            try:
                async with gate, asyncio.timeout(self._limits.call_s):
                    answer = await self._ask(question)
            except (openai.OpenAIError, TimeoutError, ValueError) as error:
                cause, wait_s = self._explain(error, attempt)
                if (
                    wait_s is None
                    or attempt == self._limits.attempts
                    or loop.time() + wait_s >= end
                ):
                    self._causes[cause] += 1
                    return
                await asyncio.sleep(wait_s)
                continue
            score = parse_score(answer, self._asked.best)
            if score is None:
                self._causes[f"its answer is not one number from 0 to {self._asked.best:g}"] += 1
            else:
                self._scores[key] = score
            return

    async def _ask(self, question: list[dict[str, str]]) -> str | None:
        assert self._client is not None
        options: dict[str, Any] = {}
        if not self._model.startswith(_REASONING_MODELS):
            options["temperature"] = 0
        answer: Any = await self._client.chat.completions.create(
            model=self._model,
            messages=question,  # type: ignore[arg-type]
            **options,
        )
        try:
            return answer.choices[0].message.content
        except (AttributeError, IndexError, TypeError):
            # Valid JSON of another shape, as a proxy in between may send.
            raise ValueError("no chat completion") from None

    def _explain(self, error: Exception, attempt: int) -> tuple[str, float | None]:
        """Why a call failed, and seconds to wait before the next; None where none would help."""
        wait_s = self._limits.first_wait_s * 2 ** (attempt - 1) * random.uniform(0.75, 1.25)
        if isinstance(error, TimeoutError | openai.APITimeoutError):
            return f"no answer to a call within {self._limits.call_s:g} s", wait_s
        if isinstance(error, openai.APIStatusError):
            status = error.status_code
            cause = f"HTTP {status}{_code(error)}"
            asked = retry_after_s(error.response.headers, time.time())
            helps = status in (408, 409, 429) or status >= 500  # noqa: PLR2004 - HTTP
            helps = helps and error.code != "insufficient_quota"
            return cause, (wait_s if asked is None else asked) if helps else None
        if isinstance(error, openai.APIConnectionError):
            host = self._client.base_url.netloc.decode() if self._client else "it"
            return f"{host.rpartition('@')[2]} cannot be reached", wait_s
        return "its answer is no JSON of a chat completion", None


def _code(error: openai.APIStatusError) -> str:
    """The error's short name, where the server gives one."""
    code = error.code
    known = isinstance(code, str) and code.replace("_", "").isalnum() and len(code) < 40  # noqa: PLR2004
    return f" {code}" if known else ""
