"""The real `openai` client against `/v1`."""

from __future__ import annotations

import json
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from openweights.dashboard.openai_api import training_params
from openweights.errors import InvalidInputError
from tests.dashboard.conftest import API_KEY, Served
from tests.test_readme import ROOT, code
from tests.tiny_model import make_tiny_model

ROW = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
PREFERENCE = {
    "prompt": [{"role": "user", "content": "q"}],
    "chosen": [{"role": "assistant", "content": "good"}],
    "rejected": [{"role": "assistant", "content": "bad"}],
}


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key=API_KEY, max_retries=0) as client:
        yield client


def _upload(client: openai.OpenAI, *rows: Any) -> Any:
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    return client.files.create(file=("rows.jsonl", content), purpose="fine-tune")


def test_files(client: openai.OpenAI, served: Served) -> None:
    stored = _upload(client, ROW)
    assert stored.id.startswith("conversations:file-") and stored.status == "processed"
    assert _upload(client, PREFERENCE).id.startswith("preference:file-")
    assert client.files.retrieve(stored.id).filename == "rows.jsonl"
    assert json.loads(client.files.content(stored.id).read()) == ROW
    assert len(list(client.files.list(purpose="fine-tune"))) == 2
    assert client.files.delete(stored.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(stored.id)


def test_a_wrong_file_is_refused_by_line(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"rows\.jsonl:2: messages"):
        _upload(client, ROW, {"message": []})


def test_wrong_key(served: Served) -> None:
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        client.files.list()


def test_a_job_from_submission_to_cancelling(client: openai.OpenAI, served: Served) -> None:
    file = _upload(client, ROW).id
    job = client.fine_tuning.jobs.create(
        model="org/model",
        training_file=file,
        suffix="mine",
        seed=7,
        metadata={"sweep": "a"},
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}},
        extra_body={"loss": "sdft", "sdft_ema_alpha": 0.05, "learning_rate": 2e-5},
    )
    stored = served.ow.jobs.retrieve(job.id)
    params = stored.params["validated_params"]
    assert (params["loss"], params["sdft_ema_alpha"], params["epochs"]) == ("sdft", 0.05, 2)
    assert (params["learning_rate"], params["meta"]) == (2e-5, {"sweep": "a"})
    assert job.id.endswith("-mine") and job.status in ("queued", "running")
    assert job.training_file == file and job.seed == 7
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    assert client.fine_tuning.jobs.retrieve(job.id).status == "cancelled"


def test_the_lines_of_the_page_are_run(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they stand in docs/page.md, but for the address and the key."""
    served.ow.jobs.pause()  # it is not run here
    (source,) = code((ROOT / "docs/page.md").read_text(encoding="utf-8"), "python")
    known = source.replace("http://127.0.0.1:8500", served.url).replace("sk-ow-…", API_KEY)
    assert served.url in known and API_KEY in known
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").write_text(json.dumps(ROW) + "\n")
    (tmp_path / "lines.py").write_text(known.replace('open("train.jsonl", "rb")', "content"))
    assert "file=content" in (tmp_path / "lines.py").read_text()
    with open("train.jsonl", "rb") as content:
        made = runpy.run_path("lines.py", {"content": content})
    made["client"].close()
    params = served.ow.jobs.retrieve(made["job"].id).params["validated_params"]
    assert (params["loss"], params["learning_rate"]) == ("sdft", 2e-5)
    assert made["job"].id.endswith("-first")
    served.ow.jobs.cancel(made["job"].id)


def test_unknown_fields_are_said_as_in_python(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="learning_rat"):
        client.fine_tuning.jobs.create(
            model="org/model", training_file="x", extra_body={"learning_rat": 1}
        )


def test_what_a_completion_needs_is_said(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="prompt: is missing"):
        client.completions.create(model="org/model", prompt="")
    with pytest.raises(openai.BadRequestError, match="messages: is missing"):
        client.chat.completions.create(model="org/model", messages=[])


def test_lists_come_in_pages(client: openai.OpenAI, run_job: Any) -> None:
    names = [f"ftjob-{number:02}" for number in range(25)]
    for name in names:
        run_job(name, [])
    first = client.fine_tuning.jobs.list(limit=10)
    assert len(first.data) == 10 and first.has_more
    assert [job.id for job in client.fine_tuning.jobs.list(limit=10)] == names[::-1]
    files = [_upload(client, *[ROW] * (number + 1)).id for number in range(5)]
    assert sorted(file.id for file in client.files.list(limit=2)) == sorted(files)
    with pytest.raises(openai.NotFoundError, match="after"):
        client.files.list(after="conversations:file-none")
    events = [{"step": step, "loss": 1.0 / step} for step in range(1, 46)]
    run_job("ftjob-long", events)
    listed = client.fine_tuning.jobs.list_events("ftjob-long", limit=20)
    steps = [event.data["step"] for event in listed if isinstance(event.data, dict)]
    assert steps == list(range(45, 0, -1))


def test_events_checkpoints_and_models(client: openai.OpenAI, run_job: Any) -> None:
    run_job(
        "ftjob-done",
        [
            {"step": 1, "loss": 0.5},
            {"type": "checkpoint", "step": 1, "file": "checkpoint:file-x"},
            {"step": 2, "loss": 0.25},
        ],
    )
    run_job("ftjob-bad", [], status="failed", error="out of memory")
    newest, older = client.fine_tuning.jobs.list_events("ftjob-done").data
    assert newest.data == {"step": 2, "tag": "train", "loss": 0.25}
    assert "loss 0.5" in older.message
    (checkpoint,) = client.fine_tuning.jobs.checkpoints.list("ftjob-done").data
    assert checkpoint.fine_tuned_model_checkpoint == "ftjob-done/checkpoint-1"
    done = client.fine_tuning.jobs.retrieve("ftjob-done")
    assert (done.status, done.fine_tuned_model) == ("succeeded", "ftjob-done")
    bad = client.fine_tuning.jobs.retrieve("ftjob-bad")
    assert bad.status == "failed" and bad.error and bad.error.message == "out of memory"
    assert [model.id for model in client.models.list()] == ["ftjob-done"]


@pytest.mark.slow
def test_upload_train_and_chat(
    client: openai.OpenAI, served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole way, with the real client, on the tiny model."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    tiny = str(make_tiny_model(tmp_path / "tiny"))
    job = client.fine_tuning.jobs.create(
        model=tiny,
        training_file=_upload(client, *[ROW] * 4).id,
        extra_body={
            "loss": "sdft",
            "sdft_gate": "off",
            "sdft_max_new_tokens": 4,
            "max_steps": 2,
            "max_seq_length": 400,
        },
    )
    assert served.ow.jobs.retrieve(job.id).wait(timeout=300).status == "completed"
    assert client.fine_tuning.jobs.retrieve(job.id).fine_tuned_model == job.id
    ask: Any = {"model": job.id, "messages": [{"role": "user", "content": "q"}], "max_tokens": 5}
    whole = client.chat.completions.create(**ask, temperature=0)
    assert whole.usage and whole.usage.completion_tokens <= 5
    pieces = client.chat.completions.create(**ask, temperature=0, stream=True)
    said = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert said == (whole.choices[0].message.content or "")
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(**{**ask, "messages": [{"role": "nobody"}]})
    text: Any = {"model": job.id, "prompt": "q", "max_tokens": 5, "temperature": 0}
    went_on = client.completions.create(**text, n=2)
    assert len(went_on.choices) == 2 and went_on.usage and went_on.usage.completion_tokens <= 10
    parts = client.completions.create(**text, stream=True)
    assert "".join(part.choices[0].text for part in parts) == went_on.choices[0].text
    served.ow.chat.kill(job.id)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"hyperparameters": {"n_epochs": "auto"}}, {}),
        (
            {"hyperparameters": {"batch_size": 4}},
            {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1},
        ),
        ({"hyperparameters": {"learning_rate_multiplier": 2}}, {"learning_rate": 2e-4}),
        (
            {"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2}}}},
            {"loss": "dpo", "beta": 0.2},
        ),
        ({"method": {"type": "reinforcement"}, "loss": "grpo"}, {"loss": "grpo"}),
        (
            {
                "method": {
                    "type": "reinforcement",
                    "reinforcement": {
                        "grader": {"type": "text_similarity", "evaluation_metric": "rouge_l"},
                        "hyperparameters": {"n_epochs": 3},
                    },
                }
            },
            {"loss": "grpo", "grpo_reward_function": "rouge_l", "epochs": 3},
        ),
        ({"validation_file": "v", "suffix": None}, {"test_file": "v"}),
    ],
)
def test_openais_words_for_our_fields(body: dict[str, Any], expected: dict[str, Any]) -> None:
    needed = {"model": "m", "training_file": "f"}
    assert training_params(needed | body) == {"loss": "sft"} | needed | expected


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"method": {"type": "magic"}},
        {"method": 1},
        {"hyperparameters": []} | {"x": 1},
        {"method": {"type": "dpo", "dpo": {"grader": {}}}},
        {"method": {"type": "reinforcement", "reinforcement": {"grader": {"type": "python"}}}},
    ],
)
def test_what_cannot_be_read_is_refused(body: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError):
        training_params(body)
