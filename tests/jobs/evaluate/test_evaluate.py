"""`ow.evaluate` and `ow eval`: what they refuse, and models side by side on this machine."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from openweights import OpenWeights
from openweights.errors import ConfigError, DatasetError
from openweights.events import Evaluation
from openweights.jobs.evaluate import EvaluateConfig
from openweights.jobs.evaluate.run import asked_of
from openweights.jobs.evaluate.tasks import open_tasks
from openweights.jobs.inference.answers import given_answers
from openweights.types import WorkerSpec
from tests.cli.conftest import Ow, ow  # noqa: F401 - a fixture
from tests.client.conftest import QuietClient, append
from tests.openai_double import KEY, OpenAIDouble
from tests.tiny_model import make_tiny_model
from tests.waiting import HANGS_S

SCORE = '''
def score(completions, prompts, gold_response, want, **_):
    """Whether the answer has the letter that its row wants; None for a row that wants nothing."""
    assert all(prompt[-1]["role"] == "user" for prompt in prompts)
    asked, tried = ["Yes.", "Yes.", None, None, None, None], ["Yes.", None]
    assert gold_response in (asked, tried)  # by the job, and before it is submitted
    return [None if w is None else float(w in c) for c, w in zip(completions, want)]
'''
ASK = {"role": "user", "content": "Hello"}
ROWS = [
    {"messages": [ASK, {"role": "assistant", "content": "Yes."}], "want": ""},
    {"messages": [ASK], "want": "no answer has this"},
    {"messages": [ASK], "want": None},
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="module")
def adapter(tiny: Path) -> Path:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    folder = tiny.parent / "adapter"
    get_peft_model(model, lora).save_pretrained(folder)
    return folder


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    """The rows, and the function that scores answers to them."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "my_eval.py").write_text(SCORE)
    return str(tmp_path / "rows.jsonl"), f"{tmp_path / 'my_eval.py'}:score"


def answered(folder: Path) -> str:
    """Rows that can be trained on."""
    path = folder / "answered.jsonl"
    path.write_text(json.dumps(ROWS[0] | {"want": "x"}) + "\n")
    return str(path)


@pytest.mark.usefixtures("warm_jobs")
def test_models_side_by_side(
    home: Path, tiny: Path, adapter: Path, files: tuple[str, str], tmp_path: Path
) -> None:
    client = OpenWeights()
    models = [str(tiny), str(adapter)]
    prompts, score = files
    job = client.evaluate.create(
        models=models,
        suite=[score, "caps_spanish"],
        prompts=prompts,
        samples=2,
        temperature=1.0,
        max_tokens=8,
    )
    assert job.id.startswith("evaljob-")
    job.wait(timeout=HANGS_S)
    events = [event.data for event in job.events(type="evaluation")]
    assert [(e["task"], e["model"]) for e in events] == [
        (task, model) for task in ("score", "caps_spanish") for model in models
    ]
    for event in events[:2]:
        assert (event["score"], event["problems"], event["unscored"]) == (0.5, 2, 1)
        assert 0 < event["low"] < 0.5 < event["high"] < 1
    assert "difference" not in events[0]
    change, low, high = events[1]["difference"]
    assert change == 0 and low < -0.5 and high > 0.5  # of two problems
    job.download(tmp_path / "out")
    folder = tmp_path / "out" / "evaluation"
    with (folder / "scores.csv").open() as table:
        lines = list(csv.DictReader(table))
    assert [float(line["score"]) for line in lines] == [event["score"] for event in events]
    assert (folder / "scores.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in folder.iterdir()} == {
        *("scores.csv", "scores.png", "score.jsonl", "caps_spanish.jsonl")
    }
    both = [json.loads(line) for line in (folder / "score.jsonl").read_text().splitlines()]
    assert [row["model"] for row in both] == [model for model in models for _ in range(6)]
    rows = both[6:]
    assert [row["score"] for row in rows] == [1, 1, 0, 0, None, None]
    assert len({row["completion"] for row in rows}) == 6, "each sample is another one"
    assert rows[4]["note"] == "not scored" and rows[0]["messages"] == [ASK]
    said = [row["completion"] for row in both]
    assert said[:6] != said[6:], "the adapter was asked, too"
    other = (folder / "caps_spanish.jsonl").read_text().splitlines()
    assert [json.loads(line)["completion"] for line in other] == said, "both score the same answers"
    [started] = job.events(type="started")
    assert started.data["max_steps"] == len(ROWS) * len(models), "both ask once"
    assert client.evaluate.create(
        suite=[score, "caps_spanish"],
        models=models,
        prompts=prompts,
        samples=2,
        temperature=1,
        max_tokens=8,
    ).id == (job.id)
    client.close()


def test_a_judge_grades_answers_and_models_of_openai_give_them(
    home: Path, files: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a job writes into its folder
    with OpenAIDouble() as double:
        monkeypatch.setenv("OPENAI_BASE_URL", double.url)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        client = QuietClient()
        models = ["openai/gpt-4.1-mini", "openai/gpt-4.1"]
        prompts = client.files.upload(files[0], "conversations")["id"]
        config = EvaluateConfig(
            models=models, suite=["llm_judge"], prompts=prompts, judge="gpt-4.1", max_tokens=9
        )
        [task] = open_tasks(client, config)
        total = range(2 * len(task.rows))
        asked = [asked_of(config, model) for model in models]
        answers = given_answers(client, asked, task.rows, total, "suite")
        found = {i: r["completion"] for i, r, _ in answers if r is not None}
        assert found == dict.fromkeys(total, "HELLO")
        assert {body["model"] for body in double.bodies} == {"gpt-4.1-mini", "gpt-4.1"}
        assert {body["max_completion_tokens"] for body in double.bodies} == {9}
        double.bodies.clear()
        double.reply = lambda text: "2" if "HELLO" in text else "no number"
        grades = task.grade(task.rows, ["HELLO", "Bye", "HELLO"])
        assert [grade.score for grade in grades[::2]] == [0.2, 0.2] and math.isnan(grades[1].score)
        told = [body["messages"][-1]["content"] for body in double.bodies]
        assert any("<reference>\nYes." in text for text in told)
        client.close()


@pytest.mark.usefixtures("warm_jobs")
def test_the_command_prints_a_table(
    ow: Ow,  # noqa: F811 - the fixture
    tiny: Path,
    files: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    prompts, _ = files
    asked = ("eval", str(tiny), "--suite", "caps_spanish", "--prompts", prompts, "--limit", "2")
    answer = ow(*asked, "--max-tokens", "4", "-o", str(tmp_path / "out"))
    assert answer.exit_code == 0, answer.output
    assert "caps_spanish" in answer.output and " to " in answer.output
    names = {
        path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*")
    }
    assert names == {
        "log.txt",
        "metrics.jsonl",
        "evaluation/scores.csv",
        "evaluation/scores.png",
        "evaluation/caps_spanish.jsonl",
    }
    again = json.loads(ow(*asked, "--max-tokens", "4", "--json").stdout)
    assert again[0]["problems"] == 2
    wrong = ow("eval", str(tiny), "--suite", "humanevil")
    assert wrong.exit_code == 1 and "did you mean 'humaneval'?" in wrong.output


def test_what_it_refuses(
    home: Path,
    tiny: Path,
    files: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    client = QuietClient()
    prompts, score = files
    good: dict[str, Any] = {"models": [str(tiny)], "suite": [score], "prompts": prompts}
    (tmp_path / "asking.py").write_text("def wanting(completions, colour): return []\n")
    asking = f"{tmp_path}/asking.py:wanting"
    (tmp_path / "other.py").write_text("def f(): pass\n")
    for change, words in (
        ({"models": []}, "models"),
        ({"models": ["a b"]}, "models.*'a b' is neither"),
        ({"models": [str(tiny), str(tiny)]}, "models: .* is named twice"),
        ({"models": ["ftjob-000000000000"]}, "the store has no job ftjob-000000000000"),
        ({"suite": ["gsm9k"]}, "'gsm9k' is no evaluation; did you mean 'gsm8k'"),
        ({"suite": ["gsm8k", "gsm8k"]}, "names 'gsm8k' twice"),
        ({"suite": ["reasoning_logprob"]}, "'reasoning_logprob' is no evaluation"),
        ({"suite": [f"{tmp_path}/other.py:score"]}, "has no function 'score'"),
        ({"suite": ["./none.py:score"]}, "none.py: No such file"),
        ({"suite": ["gsm8k"]}, "prompts: nothing in suite reads them"),
        ({"prompts": None}, "prompts: score scores answers to rows of yours"),
        ({"prompts": "nothing"}, "prompts: 'nothing' is neither a file id"),
        ({"prompts": "conversations:file-0"}, "prompts: the store has no file"),
        ({"samples": 2}, "samples: at temperature 0 all would be the same"),
        ({"limit": 0}, "limit: must be at least 1"),
        ({"judge": "gpt-4.1"}, "judge: nothing in suite asks one; add 'similarity_judge'"),
        ({"judge": " "}, "judge: .* empty or padded"),
        ({"template_options": {"a b": 1}}, "template_options: 'a b' is no option"),
        ({"suite": [asking]}, r"suite: wanting\(completions, colour\) wants 'colour'"),
        ({"temperature": -1.0}, "temperature"),
    ):
        with pytest.raises(ConfigError, match=words):
            client.evaluate.create(**{**good, **change})
    with pytest.raises(DatasetError, match="prompts:2: messages: the last is not from the assis"):
        client.evaluate.create(**{**good, "suite": ["rouge_l"]})
    assert client.jobs.list() == []
    job = client.evaluate.create(models="org/Llama-3-8B", suite="gsm8k")
    larger = client.evaluate.create(
        models=["openai/gpt-4.1-mini", "org/Llama-3-70B"], suite=["gsm8k", "tool_use"]
    )
    training = client.fine_tuning.create(
        model=str(tiny), training_file=answered(tmp_path), loss="sft", max_steps=1
    ).id
    waits = client.evaluate.create(models=[str(tiny), training], suite=["gsm8k"])
    assert waits.params["validated_params"]["models"][1] == training
    assert list(waits["after"]) == [training], "it begins when the model is there"
    assert (job.requires_vram_gb, larger.requires_vram_gb) == (29, 147)
    client.close()


def test_the_table_names_models_by_what_was_done_to_them(
    ow: Ow,  # noqa: F811
    home: Path,
    tiny: Path,
    tmp_path: Path,
) -> None:
    client = QuietClient()
    file = client.files.upload(answered(tmp_path), "conversations")["id"]
    training = client.fine_tuning.create(
        model=str(tiny), training_file=file, loss="sft", max_steps=1
    )
    models = [str(tiny), training.id]
    job = client.evaluate.create(models=models, suite=["rouge_l"], prompts=file)
    for id in (training.id, job.id):
        worker = client.backend.register_worker(WorkerSpec(id=f"worker-{id}"))
        claimed = client.backend.claim_job(worker.id)
        assert claimed is not None and claimed.job.id == id
        if id == job.id:
            figures: Any = {"task": "rouge_l", "score": 0.5, "low": 0.4, "high": 0.6, "problems": 8}
            found = [Evaluation(model=model, **figures) for model in models]
            append(client.backend, claimed.run.id, *(one.data() for one in found))
        client.backend.finish_run(claimed.run.id, claimed.run.attempt, "completed")
    asked = ("eval", *models, "--suite", "rouge_l", "--prompts", file)
    table = ow(*asked).stdout.splitlines()
    assert table[1].split()[1] == str(tiny) and "base after sft" in table[2]
    assert training.id not in table[2]
    assert [one["model"] for one in json.loads(ow(*asked, "--json").stdout)] == models
    client.close()
