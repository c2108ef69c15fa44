"""What the page asks for, over HTTP, of a store with real records."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import pytest

from openweights.dashboard.details import job_details
from openweights.settings import Settings
from openweights.types import JobSpec, WorkerSpec
from tests.client.conftest import QuietClient
from tests.dashboard.conftest import Served
from tests.tiny_model import make_tiny_model

ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"What is {number}?"},
            {"role": "assistant", "content": "n" * (number + 1)},
        ]
    }
    for number in range(30)
]


def _lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def test_a_job_with_its_differences_from_the_defaults(served: Served, browser: Any) -> None:
    file = served.ow.files.create(_lines(ROWS), "conversations")["id"]
    body = {
        "kind": "fine_tuning",
        "params": {"model": "org/model", "training_file": file, "loss": "sdft", "seed": 7},
    }
    assert browser.post("/api/jobs/check", json=body).json() == {"problems": []}
    job_id = browser.post("/api/jobs", json=body).json()["id"]
    served.ow.jobs.cancel(job_id)
    job = browser.get(f"/api/jobs/{job_id}").json()
    differs = {row["name"] for row in job["params"] if row["differs"]}
    assert {"model", "training_file", "loss", "seed"} <= differs
    assert not {"epochs", "r", "learning_rate"} & differs


@pytest.mark.parametrize("kind", ["fine_tuning", "exec"])
def test_the_command_makes_the_same_job_again(home: Path, tmp_path: Path, kind: str) -> None:
    """Run in a shell, for a job with settings of every sort and for one with files of its own."""
    ow = QuietClient(settings=Settings(home=home))
    if kind == "exec":
        folder = ow.exec.folder = tmp_path / "folder"
        (folder / "sub").mkdir(parents=True)
        (folder / "run.py").write_text("print('EOF')\n")
        (folder / "sub" / "it's.txt").write_text("x")
        job = ow.exec.create(command="python run.py 'EOF' \"$HOME\"", priority=3)
    else:
        file = ow.files.create(_lines(ROWS), "conversations")["id"]
        job = ow.fine_tuning.create(
            model="org/model",
            training_file=file,
            loss="sdft",
            meta={"note": 'it\'s "so"\n$x', "n": None},
            learning_rate="2e-4 / 3",
            job_id_suffix="mine",
            allowed_hardware=["1x H200"],
            requires_vram_gb=77,
        )
    ow.backend.register_worker(WorkerSpec(id="worker"))
    claim = ow.backend.claim_job("worker")
    assert claim is not None
    ow.backend.finish_run(claim.run.id, 1, "completed")
    command = job_details(ow, ow.backend.get_job(job.id))["command"]
    # A copy that is changed must not be pushed under this job's name.
    assert "finetuned_model_id" not in command and "job-" not in command
    ow.close()
    shell = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", command], env=shell, capture_output=True, text=True)
    assert done.stdout.strip() == job.id, done.stderr
    # A model of this name is not here, and there is no hub in tests.
    said = "model: org/model is not on this machine" if kind == "fine_tuning" else ""
    assert done.stderr.startswith(said) and done.stderr.count("\n") == bool(said)


def test_a_copy_waits_for_what_the_model_does_not_say(home: Path) -> None:
    """For the job that trains the model each waits by itself."""
    ow = QuietClient(settings=Settings(home=home))
    file = ow.files.create(_lines(ROWS), "conversations")["id"]
    rows: dict[str, Any] = {"training_file": file, "loss": "sft"}
    first, other = (ow.fine_tuning.create(model="org/model", seed=n, **rows) for n in (1, 2))
    waiting = [
        ow.evaluate.create(models=["org/model", first.id], suite="rouge_l", prompts=file),
        ow.fine_tuning.create(model=first.id, **rows),
        ow.inference.create(model=first.id, input_file_id=file, after=[other]),
    ]
    found = [job_details(ow, ow.backend.get_job(job.id)) for job in waiting]
    assert [one["after"] for one in found] == [[first.id], [first.id], [other.id, first.id]]
    assert ["after=" in one["python"] for one in found] == [False, False, True]
    assert f"after=['{other.id}']" in found[2]["python"]
    assert [one["models"][-1] for one in found] == [first.id] * 3
    ow.close()


def test_an_inference_has_a_page_for_whoever_has_not_submitted_it(home: Path) -> None:
    ow = QuietClient(settings=Settings(home=home))
    file = ow.files.create(_lines(ROWS), "conversations")["id"]
    job = ow.inference.create(model="org/model", input_file_id=file)
    ow.close()
    other = QuietClient(settings=Settings(home=home))
    details = job_details(other, other.backend.get_job(job.id))
    assert "requires_vram_gb" not in details["python"] and details["made_by"] == "inference"
    other.close()


def test_files_are_shown_with_their_names(home: Path) -> None:
    """What a copy of the job is made with stays the id."""
    ow = QuietClient(settings=Settings(home=home))
    file = ow.files.create(_lines(ROWS), "conversations", name="animals.jsonl")["id"]
    job = ow.fine_tuning.create(model="org/model", training_file=file, loss="sft")
    details = job_details(ow, job.record)
    (row,) = [row for row in details["params"] if row["name"] == "training_file"]
    assert (row["value"], row["shown"]) == (file, f"animals.jsonl ({file})")
    assert f"training_file={file!r},  # animals.jsonl\n" in details["python"]
    ow.close()


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"model": "org/model"}, "training_file"),
        ({"model": "org/model", "training_file": "x", "loss": "ppo"}, "loss"),
        ({"model": "org/model", "training_file": "x", "learning_rat": 1}, "learning_rat"),
    ],
)
def test_the_form_says_what_python_says(
    served: Served, browser: Any, params: dict[str, Any], says: str
) -> None:
    body = {"kind": "fine_tuning", "params": params}
    problems = browser.post("/api/jobs/check", json=body).json()["problems"]
    assert any(line.startswith(says) for line in problems)
    refused = browser.post("/api/jobs", json=body)
    assert refused.status_code == 400
    assert refused.json()["error"].splitlines() == problems


def test_every_kind_has_a_schema(browser: Any) -> None:
    kinds = browser.get("/api/kinds").json()
    assert {"fine_tuning", "exec", "weighted_sft"} <= set(kinds)
    assert kinds["fine_tuning"]["defaults"]["epochs"] == 1
    assert kinds["fine_tuning"]["meanings"]["test_file"].startswith("Rows to evaluate on")
    assert "training_file" in kinds["fine_tuning"]["schema"]["properties"]


def test_series_of_several_jobs(browser: Any, run_job: Any) -> None:
    for name in ("ftjob-a", "ftjob-b"):
        run_job(name, [{"step": step, "loss": 1.0 / step} for step in range(1, 3001)])
    found = browser.get("/api/series?jobs=ftjob-a,ftjob-b&names=loss&points=50").json()
    for name in ("ftjob-a", "ftjob-b"):
        series = found[name]["series"]["loss"]
        assert found[name]["complete"] and len(series["step"]) <= 200
        assert series["value"][0] == 1.0 and series["step"][-1] == 3000
    assert browser.get("/api/series?jobs=ftjob-none").status_code == 404


def test_the_jobs_page_has_the_panels_of_the_figures(browser: Any, run_job: Any) -> None:
    events = [{"step": n, "loss": 1 / n, "rollout_s": n, "eval_loss": 2 / n} for n in (1, 2)]
    run_job("ftjob-a", [*events, {"step": 2, "once": 3}], loss="sdft")
    found = browser.get("/api/series?jobs=ftjob-a").json()["ftjob-a"]["layout"]
    assert found == {
        "panels": [["loss", [["train", "loss"]]], ["eval_loss", [["eval", "eval_loss"]]]],
        "more": [["rollout_s", [["train", "rollout_s"]]]],
        "still": [["once", [["train", "once"]]]],
    }


def test_where_a_job_is(browser: Any, run_job: Any, served: Served) -> None:
    begun = {"type": "started", "max_steps": 8, "from_step": 0}
    run = run_job("ftjob-a", [begun, {"step": 2, "loss": 1.5}], status=None).run
    found = browser.get("/api/jobs/ftjob-a").json()["progress"]
    assert (found["step"], found["total"]) == (2, 8)
    assert found["words"].startswith("step 2/8 · ") and found["words"].endswith(" · loss 1.5")
    served.ow.backend.submit_job(JobSpec("custom-b", "custom", "true", {}, after=("ftjob-a",)))
    waits = browser.get("/api/jobs/custom-b").json()["progress"]["words"]
    assert waits.startswith("for ftjob-a")
    served.ow.backend.finish_run(run.id, run.attempt, "completed")


def test_jobs_are_told_apart_by_few_words_and_one_may_be_gone(browser: Any, run_job: Any) -> None:
    for name, rate in (("ftjob-a", 1e-4), ("ftjob-b", 1e-3)):
        run_job(name, [], learning_rate=rate, meta={"rate": rate}, note=str(rate) * 9)
    found = browser.get("/api/compare?jobs=ftjob-a,ftjob-gone,ftjob-b").json()
    assert found["headings"]["learning_rate"] == "params.learning_rate", "not as the measure"
    assert found["headings"]["meta.rate"] == "meta.rate"
    assert found["telling"] == ["learning_rate"] and found["missing"] == ["ftjob-gone"]
    assert [job["id"] for job in found["jobs"]] == ["ftjob-a", "ftjob-b"]


def test_a_function_in_a_file_has_its_values_beside_its_name(
    browser: Any, run_job: Any, served: Any
) -> None:
    file = served.ow.files.create(b"x = 1", "custom_job_file", name="r.py")["id"]
    for name, weight in (("ftjob-a", 1.0), ("ftjob-b", 0.5)):
        run_job(name, [], grpo_reward_function={f"{file}:f": weight})
    found = browser.get("/api/compare?jobs=ftjob-a,ftjob-b").json()
    assert found["differing"] == ["grpo_reward_function.r.py:f"]
    assert [job["params"][found["differing"][0]] for job in found["jobs"]] == [1.0, 0.5]


def test_scores_of_evaluations_stand_with_the_jobs_they_are_of(browser: Any, run_job: Any) -> None:
    def score(model: str, score: float, difference: list[float] | None) -> dict[str, Any]:
        own = {"low": score - 0.1, "high": score + 0.1, "problems": 20, "difference": difference}
        return {"type": "evaluation", "task": "humaneval", "model": model, "score": score} | own

    for name in ("ftjob-a", "ftjob-b"):
        run_job(name, [])
    models = ["org/base", "ftjob-a", "ftjob-b/checkpoint-4"]
    asked = [score(models[0], 0.5, None), score(models[1], 0.45, [-0.05, -0.2, 0.1])]
    asked.append(score(models[2], 0.2, [-0.3, -0.5, -0.1]))
    run_job("evaljob-1", asked, models=models)
    run_job("evaljob-2", [score("ftjob-c", 0.9, None)], models=["ftjob-c"])

    def found(about: str) -> list[tuple[str, float]]:
        rows = browser.get("/api/scores", params={"jobs": about}).json()
        return [(row["job"], row["score"]) for row in rows]

    assert found("ftjob-a,ftjob-b") == [("ftjob-a", 0.45), ("ftjob-b", 0.2)]
    assert [score for _, score in found("evaljob-1")] == [0.5, 0.45, 0.2]
    assert found("ftjob-none") == []


def test_answers_by_step(served: Served, browser: Any, run_job: Any) -> None:
    rows = [{"messages": ROWS[0]["messages"], "completion": "said"}]
    file = served.ow.files.create(_lines(rows), "result")["id"]
    said = {"completion": "c", "rewards": {"rouge_l": 0.5}}
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    completions = [{"prompt": "p", **said}, {"prompt": "rendered", "messages": asked, **said}]
    run_job(
        "ftjob-a",
        [
            {"type": "completions", "step": 1, "completions": completions},
            {
                "type": "samples",
                "step": 2,
                "tag": "mine",
                "file": file,
                "path": "samples/m-2.jsonl",
            },
            {"type": "samples", "step": 3, "tag": "mine", "file": "result:file-gone", "path": "x"},
        ],
    )
    steps = browser.get("/api/jobs/ftjob-a/answers").json()
    rows = [browser.get(f"/api/jobs/ftjob-a/answers/{step['event']}").json() for step in steps]
    assert [(s["source"], s["step"], len(r)) for s, r in zip(steps, rows, strict=True)] == [
        ("mine", 2, 1),
        ("mine", 3, 0),
        ("training prompts", 1, 2),
    ]
    (of_a_file,) = rows[0]
    assert of_a_file == {"prompt": "What is 0?", "completion": "said", "reference": "n"} | {
        "messages": [{"role": "user", "text": "What is 0?"}]
    }
    # What was logged before conversations were is shown as it is.
    older, newer = rows[2]
    assert older == {"prompt": "p", "messages": [{"role": "prompt", "text": "p"}], **said}
    told = [{"role": "system", "text": "Be brief."}, {"role": "user", "text": "Why?"}]
    assert newer == {"prompt": "system: Be brief.\nuser: Why?", "messages": told, **said}


def test_tokens_of_both_formats(served: Served, browser: Any, run_job: Any) -> None:
    plain = [{"tokens": ["a", "b"], "logprobs": [None, -0.5], "is_answer": [False, True]}]
    blocks = [
        {
            "messages": [
                {"role": "user", "content": "q"},
                {
                    "role": "assistant",
                    "content": [
                        {
                            "text": "x",
                            "tag": "t",
                            "weight": 0.5,
                            "tokens": ["x"],
                            "logprobs": [-1.5],
                        }
                    ],
                },
            ]
        }
    ]
    files = [served.ow.files.create(_lines(rows), "result")["id"] for rows in (plain, blocks)]
    kinds = ("logprobs", "logprobs_blockwise")
    run_job(
        "ftjob-a",
        [
            {"type": kind, "step": at, "tag": "set", "file": file, "path": f"{at}"}
            for at, (kind, file) in enumerate(zip(kinds, files, strict=True))
        ],
    )
    steps = browser.get("/api/jobs/ftjob-a/tokens").json()
    assert [step["step"] for step in steps] == [0, 1]
    first, second = (
        browser.get(f"/api/jobs/ftjob-a/tokens/{step['event']}").json() for step in steps
    )
    assert first[0][1] == {"text": "b", "logprob": -0.5, "answer": True}
    assert second[0][-2:] == [
        {"block": {"tag": "t", "weight": 0.5}},
        {"text": "x", "logprob": -1.5, "answer": True},
    ]
    assert browser.get("/api/jobs/ftjob-a/tokens/99999").status_code == 404


@pytest.mark.parametrize("cut", range(1, 5))
def test_the_log_in_pieces_is_the_log(browser: Any, run_job: Any, cut: int) -> None:
    text = "ä€😀x\n" * 50
    claim = run_job("ftjob-a", [], log=text)
    offset, read = 0, ""
    while True:
        piece = browser.get(
            f"/api/runs/{claim.run.id}/log", params={"offset": offset, "limit": 6 + cut}
        ).json()
        if not piece["text"]:
            break
        read, offset = read + piece["text"], piece["next"]
    assert read == text and piece["ended"]


def test_searching_the_log(browser: Any, run_job: Any) -> None:
    lines = [f"line {number}" for number in range(100_000)]
    claim = run_job("ftjob-a", [], log="\n".join(lines))
    address = f"/api/runs/{claim.run.id}/log/search"
    (found,) = browser.get(address, params={"text": "LINE 77777"}).json()["lines"]
    assert found["line"] == "line 77777"
    piece = browser.get(f"/api/runs/{claim.run.id}/log", params={"offset": found["offset"]}).json()
    assert piece["text"].startswith("line 77777\n")
    last = browser.get(address, params={"text": "line 99999"}).json()
    assert [one["line"] for one in last["lines"]] == ["line 99999"] and not last["more"]
    first = browser.get(address, params={"text": "7777"}).json()
    after = first["lines"][-1]["offset"] + 1
    rest = browser.get(address, params={"text": "7777", "after": after}).json()
    both = [one["line"] for one in first["lines"] + rest["lines"]]
    assert first["more"] is (len(first["lines"]) == 200)
    assert both == [line for line in lines if "7777" in line][: len(both)]
    assert browser.get(address).status_code == 400


@pytest.mark.parametrize("verb", ["cancel", "restart", "delete"])
def test_a_job_is_changed_by_its_whole_id(
    served: Served, browser: Any, run_job: Any, verb: str
) -> None:
    status = None if verb == "cancel" else "failed"
    run_job("ftjob-a", [], status=status)
    assert browser.post(f"/api/jobs/ftjob/{verb}").status_code == 404
    assert served.ow.jobs.retrieve("ftjob-a").status == (status or "in_progress")


def test_a_dataset_and_what_would_be_refused(served: Served, browser: Any) -> None:
    upload = {"file": ("rows.jsonl", _lines(ROWS))}
    stored = browser.post("/api/files", files=upload, data={"purpose": "conversations"}).json()
    assert stored["filename"] == "rows.jsonl"
    page = browser.get(f"/api/files/{stored['id']}/rows?offset=20&limit=5").json()
    assert [row["line"] for row in page["rows"]] == [21, 22, 23, 24, 25] and page["more"]
    assert [part["learned"] for part in page["rows"][0]["parts"]] == [False, True]
    summary = browser.get(f"/api/files/{stored['id']}/summary").json()
    assert summary["rows"] == 30 and sum(summary["lengths"]["counts"]) == 30
    assert summary["problems"] == []
    bad = {"file": ("bad.jsonl", b'{"messages": []}\nnot json\n')}
    refused = browser.post("/api/files", files=bad, data={"purpose": "conversations"})
    assert refused.status_code == 400
    assert refused.json()["error"].splitlines()[1].startswith("bad.jsonl:2:")


def test_calls_and_thinking_of_a_dataset_are_shown(served: Served, browser: Any) -> None:
    function = {"name": "rain", "arguments": '{"city": "Ålesund"}'}
    called = {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}
    thought = {"role": "assistant", "content": "4", "reasoning_content": "2 + 2"}
    rows = [{"messages": [ROWS[0]["messages"][0], answer]} for answer in (called, thought)]
    file = served.ow.files.create(_lines(rows), "conversations")["id"]
    first, second = browser.get(f"/api/files/{file}/rows").json()["rows"]
    said = [[(part["role"], part["text"]) for part in row["parts"][1:]] for row in (first, second)]
    assert said[0] == [("assistant, calls", 'rain {"city": "Ålesund"}')]
    assert said[1] == [("assistant, thinking", "2 + 2"), ("assistant", "4")]
    assert all(part["learned"] for row in (first, second) for part in row["parts"][1:])


@pytest.mark.parametrize("loss", ["sft", "sdft"])
def test_a_dataset_as_a_job_reads_it(
    served: Served, browser: Any, tmp_path: Path, loss: str
) -> None:
    tiny = str(make_tiny_model(tmp_path / "tiny"))
    weighted = [
        {"type": "text", "text": "half ", "weight": 0.5, "tag": "t"},
        {"type": "text", "text": "none", "weight": 0.0},
    ]
    last = {
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": weighted}]
    }
    refused = {"messages": [{"role": "user", "content": "<|im_end|>"}, ROWS[0]["messages"][1]]}
    rows = [ROWS[0], refused, *([last] if loss == "sft" else [])]
    file = served.ow.files.create(_lines(rows), "conversations")["id"]
    given = {"model": tiny, "loss": loss}
    found = browser.get(f"/api/files/{file}/rows", params=given).json()["rows"]
    texts = found[0]["texts"]
    assert "What is 0?" in texts[0]["stretches"][0][0]
    assert "control token" in found[1]["problem"]
    summary = browser.get(f"/api/files/{file}/summary", params=given).json()
    assert summary["unit"] == "tokens" and summary["counted"] == len(rows) - 1
    assert "control token" in summary["problems"][0]
    if loss == "sft":
        learned = [(text, weight) for text, weight in texts[0]["stretches"] if weight]
        assert learned[0][0].startswith("n") and learned[0][1] == 1.0
        assert ["half ", 0.5] in found[2]["texts"][0]["stretches"]
    else:
        assert [text["title"].split()[2] for text in texts] == ["the", "the"]
        assert all(weight is None for text in texts for _, weight in text["stretches"])
    unknown = browser.get(f"/api/files/{file}/rows", params={"model": "org/none"})
    assert unknown.status_code == 400 and "tokenizer" in unknown.json()["error"]


def test_files_come_in_pages_by_their_purpose(served: Served, browser: Any) -> None:
    ids = [served.ow.files.create(f"{n}".encode(), "result")["id"] for n in range(5)]
    served.ow.files.create(_lines(ROWS), "conversations")
    given = {"purpose": "result", "limit": 2}
    pages = [browser.get("/api/files", params={**given, "offset": at}).json() for at in (0, 2, 4)]
    assert [file["id"] for page in pages for file in page] == ids[::-1]
    assert len(browser.get("/api/files").json()) == 6


def test_files_are_grouped_by_what_jobs_read_them_as(
    served: Served, browser: Any, run_job: Any
) -> None:
    def put(text: str, purpose: str = "conversations") -> str:
        row = {"messages": [{"role": "user", "content": text}, ROWS[0]["messages"][1]]}
        return served.ow.backend.put_file(BytesIO(_lines([row])), purpose, f"{text}.jsonl").id

    train, test, both, asked, unused = map(put, ("train", "test", "both", "asked", "unused"))
    quiz, script = put("quiz", "multiple_choice"), put("script", "custom_job_file")
    sampled = [{"dataset": asked, "eval_steps": 5}]
    run_job("ftjob-a", [], training_file=train, test_file=both, sampling_callbacks=sampled)
    run_job("ftjob-b", [], training_file=both, logp_callback_datasets={"x": test})
    run_job("inferencejob-c", [], input_file_id=asked)

    def found(group: str, **given: int) -> dict[str, dict[str, int]]:
        files = browser.get("/api/files", params={"group": group, **given}).json()
        return {file["id"]: file["uses"] for file in files}

    reads = {"test": 1, "training": 1}
    assert found("training") == {train: {"training": 1}, both: reads, unused: {}}
    assert found("evaluation") == {both: reads, test: {"log-probabilities": 1}, quiz: {}}
    assert found("prompts") == {asked: {"sampling": 1, "inference": 1}}
    assert found("custom") == {script: {}} and found("results") == {}
    assert list(found("training", offset=1, limit=1)) == list(found("training"))[1:2]
    refused = browser.get("/api/files", params={"group": "x"})
    assert refused.status_code == 400 and "'x'" in refused.json()["error"]


def test_files_come_as_downloads(served: Served, browser: Any) -> None:
    stored = served.ow.files.create(b"<script>alert(1)</script>", "result")["id"]
    response = browser.get(f"/api/files/{stored}/content")
    assert response.headers["content-disposition"].startswith("attachment")
    assert response.headers["content-type"] == "application/octet-stream"
    assert response.headers["x-content-type-options"] == "nosniff"


def test_changes_come_as_they_happen(served: Served, browser: Any, run_job: Any) -> None:
    run_job("ftjob-a", [], status=None)
    since = browser.get("/api/jobs").json()["as_of"]
    with browser.stream("GET", "/api/jobs/stream", params={"since": since}, timeout=20) as stream:
        lines = stream.iter_lines()
        next(line for line in lines if line.startswith("retry"))
        served.ow.jobs.cancel("ftjob-a")
        data = next(line for line in lines if line.startswith("data"))
    (row,) = json.loads(data.removeprefix("data: "))
    assert row["id"] == "ftjob-a" and row["status"] == "canceled"


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/api/jobs/none", 404),
        ("/api/jobs?sort=nonsense", 400),
        ("/api/jobs?offset=x", 400),
        ("/api/runs/99/log", 404),
        ("/api/files/none/rows", 404),
    ],
)
def test_what_is_not_there_is_said(browser: httpx.Client, path: str, status: int) -> None:
    response = browser.get(path)
    assert response.status_code == status and response.json()["error"]


def test_a_job_that_another_failed_says_so(served: Served, browser: Any) -> None:
    """And not why it had failed itself once, before it was to come after that one."""
    backend = served.ow.backend
    spec = JobSpec("custom-late", "custom", "true", {"validated_params": {}})
    backend.register_worker(WorkerSpec("w"))

    def fail(error: str) -> None:
        held = backend.claim_job("w")
        assert held is not None
        backend.finish_run(held.run.id, held.run.attempt, "failed", error=error)

    backend.submit_job(spec)
    fail("exit code 9: its own")
    backend.submit_job(dataclasses.replace(spec, id="custom-first", priority=1))
    backend.submit_job(dataclasses.replace(spec, after=("custom-first",)))
    fail("exit code 3: of the first")
    reason = "it was to come after job custom-first, which has failed"
    rows = {row["id"]: row["last"] for row in browser.get("/api/jobs").json()["rows"]}
    assert reason in rows["custom-late"] and rows["custom-first"] == "exit code 3: of the first"
    assert reason in browser.get("/api/jobs/custom-late").json()["error"]
    compared = browser.get("/api/compare", params={"jobs": "custom-late,custom-first"}).json()
    assert [reason in job["error"] for job in compared["jobs"]] == [True, False]
