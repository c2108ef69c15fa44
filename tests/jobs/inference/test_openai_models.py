"""`ow.inference` with `openai/<name>`: parallel requests and batches, against OpenAI's double."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from openweights import OpenWeights
from openweights.errors import JobFailedError
from openweights.jobs.inference import InferenceConfig
from openweights.jobs.inference.openai_models import PARALLEL, openai_answers
from tests.client.conftest import QuietClient
from tests.jobs.inference.result_reader import read_results
from tests.openai_double import KEY, OpenAIDouble
from tests.waiting import HANGS_S

MODEL = "openai/gpt-4.1-mini"


@pytest.fixture
def double(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenAIDouble]:
    with OpenAIDouble() as double:
        monkeypatch.setenv("OPENAI_BASE_URL", double.url)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        yield double


def rows(count: int) -> list[dict[str, Any]]:
    return [{"messages": [{"role": "user", "content": f"row {n}"}], "id": n} for n in range(count)]


def written(folder: Path, asked: list[dict[str, Any]]) -> str:
    path = folder / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in asked))
    return str(path)


class Asking:
    """A job whose run this process is, so that the route is taken without a worker's start."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, **params: Any) -> None:
        self.ow = QuietClient()
        self.rows = rows(params.pop("count", 3))
        file = self.ow.files.upload(written(folder, self.rows), "conversations")["id"]
        job = self.ow.inference.create(model=MODEL, input_file_id=file, **params)
        worker = self.ow.backend.register_worker(_spec())
        claim = self.ow.backend.claim_job(worker.id)
        assert claim is not None and claim.job.id == job.id
        monkeypatch.setenv("OPENWEIGHTS_RUN_ID", str(claim.run.id))
        self.ow.close()
        self.ow = QuietClient()
        self.config = InferenceConfig(**job.params["validated_params"])

    def answers(self) -> dict[int, Any]:
        left = range(len(self.rows))
        found = openai_answers(self.ow, self.config, self.rows, left)
        return {index: result for index, result, _ in found}


def _spec() -> Any:
    from openweights.types import WorkerSpec

    return WorkerSpec(id="worker-of-the-test")


def test_parallel_requests(
    double: OpenAIDouble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    double.faults = [429, 500]
    params: dict[str, Any] = {"max_tokens": 7, "stop": "x", "logprobs": 2, "prefill": "It is"}
    asking = Asking(
        tmp_path, monkeypatch, use_batch=False, count=60, n_completions_per_prompt=2, **params
    )
    found = asking.answers()
    assert sorted(found) == list(range(60))
    # The prefix is the last message, and so what the double answers to.
    assert all(result["completion"] == ["IT IS", "IT IS!"] for result in found.values())
    assert found[7]["logprobs"][1][0]["logprob"] == -0.5
    assert 1 < double.most_at_once <= PARALLEL
    body = next(b for b in double.bodies if b["messages"][0]["content"] == "row 7")
    assert body["model"] == "gpt-4.1-mini" and body["stop"] == ["x"] and body["n"] == 2
    assert (body["max_completion_tokens"], body["top_logprobs"]) == (7, 2)
    assert len(double.bodies) == 60, "what failed was asked for again, and nothing else"
    asking.ow.close()


def test_a_batch_is_asked_for_once(
    double: OpenAIDouble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asking = Asking(tmp_path, monkeypatch)
    answers = asking.answers()
    assert {n: a["completion"] for n, a in answers.items()} == {n: f"ROW {n}" for n in range(3)}
    # The next attempt takes the batch that is there.
    assert asking.answers() == answers and len(double.batches) == 1
    (batch,) = double.batches.values()
    batch["status"] = "expired"
    assert asking.answers() == answers and len(double.batches) == 2, "that one is lost"
    double.lines_to_lose = {"1"}
    for other in double.batches.values():
        other["status"] = "failed"
    with pytest.raises(JobFailedError, match="1 rows have no answer; .* use_batch=False"):
        asking.answers()
    asking.ow.close()


def test_what_the_service_refuses_is_told_in_its_words(
    double: OpenAIDouble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for use_batch in (False, True):
        monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong")
        asking = Asking(tmp_path, monkeypatch, use_batch=use_batch, job_id_suffix=str(use_batch))
        with pytest.raises(JobFailedError, match="OpenAI: .*Incorrect API key") as told:
            asking.answers()
        assert "sk-wrong" not in str(told.value)
        asking.ow.close()
        monkeypatch.delenv("OPENWEIGHTS_RUN_ID")
        asking.ow = QuietClient()
        [job] = asking.ow.jobs.list(status="in_progress")
        asking.ow.backend.cancel_job(job.id)
        asking.ow.close()


def test_a_job_with_a_model_of_openai(double: OpenAIDouble, tmp_path: Path) -> None:
    ow = OpenWeights()
    asked = [*rows(4), {"text": "and text", "id": 4, "max_tokens": 3, "temperature": 0.5}]
    file = written(tmp_path, asked)
    job = ow.inference.create(
        model=MODEL, input_file_id=file, use_batch=False, n_completions_per_prompt=2, logprobs=1
    )
    assert job.requires_vram_gb == 0
    job.wait(timeout=HANGS_S)
    assert job.outputs is not None
    found = read_results(ow.files.content(job.outputs["file"]), asked, n=2, logprobs=1)
    said = [*[f"ROW {n}" for n in range(4)], "AND TEXT"]
    assert [row["completion"] for row in found] == [[text, f"{text}!"] for text in said]
    body = next(b for b in double.bodies if b["messages"][0]["content"] == "and text")
    assert (body["max_completion_tokens"], body["temperature"]) == (3, 0.5)
    assert KEY not in job.logs()
    ow.close()
