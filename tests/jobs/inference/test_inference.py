"""`ow.inference`: what it refuses, what it gives back, and that a lost worker costs no row."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from openweights import OpenWeights
from openweights.client.watching.progress import read_progress
from openweights.errors import ConfigError, DatasetError, JobFailedError
from openweights.jobs.inference.parts import Parts, Result
from openweights.jobs.inference.run import keep_answers
from openweights.jobs.inference.vram import AT_ONCE, needed_gb, tokens_at_once
from openweights.models.shape import usual_shape
from tests.client.conftest import QuietClient
from tests.jobs.inference.result_reader import read_results
from tests.waiting import HANGS_S, wait_until

HELLO = {"messages": [{"role": "user", "content": "Hello, what is it?"}]}


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def ow(home: Path) -> OpenWeights:
    return OpenWeights()


def results(ow: OpenWeights, job: Any) -> list[dict[str, Any]]:
    content = ow.files.content(job.outputs["file"])
    return [json.loads(line) for line in content.splitlines()]


def greedy(folder: Path, text: str, count: int) -> str:
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**ids, do_sample=False, max_new_tokens=count)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def chat_text(folder: Path, messages: list[dict[str, str]]) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def test_loading_is_no_part_of_the_time_of_an_answer(ow: OpenWeights, tmp_path: Path) -> None:
    def answers() -> Iterator[tuple[int, Result | None, int]]:
        time.sleep(2.0)  # loading
        yield 0, None, 0
        for index in range(2):
            time.sleep(0.1)
            yield index, {"completion": "x"}, 8

    assert keep_answers(answers(), Parts(ow, ow.run), ow, 2)
    ow.run.flush()
    job = ow.backend.list_jobs()[0]
    rate = read_progress(ow.backend, job).seconds_per_step
    assert rate is not None and 0.1 <= rate < 0.8
    told = [
        event.data["tokens_per_s"]
        for event in ow.backend.list_events(job_id=job.id)
        if "tokens_per_s" in event.data
    ]
    assert told and min(told) > 10, "16 tokens in 0.2 s; with the loading it were 7 a second"


@pytest.mark.usefixtures("warm_jobs")
def test_rows_come_back_whole_in_order_and_greedy_equals_generate(
    ow: OpenWeights, tmp_path: Path, tiny: Path
) -> None:
    begun = [*HELLO["messages"], {"role": "assistant", "content": "It is the"}]
    rows = [
        {**HELLO, "id": 7, "nested": {"ä": [1, None]}},
        {"messages": begun, "id": 8},
        {"text": "Once there was", "id": 9},
        {**HELLO, "id": 10, "max_tokens": 3},
    ]
    job = ow.inference.create(
        model=str(tiny),
        input_file_id=write(tmp_path / "in.jsonl", *rows),
        max_tokens=12,
        temperature=0,
    )
    assert job.id.startswith("inferencejob-") and job.type == "inference"
    job.wait(timeout=HANGS_S)
    found = read_results(ow.files.content(job.outputs["file"]), rows)
    assert ow.files.get_by_id(job.outputs["file"])["purpose"] == "result"
    prompt = chat_text(tiny, HELLO["messages"])
    assert found[0]["completion"] == greedy(tiny, prompt, 12)
    assert found[1]["completion"] == greedy(tiny, prompt + "It is the", 12)
    assert found[2]["completion"] == greedy(tiny, "Once there was", 12)
    assert found[3]["completion"] == greedy(tiny, prompt, 3)
    job.download(tmp_path / "out")
    stored = ow.files.content(job.outputs["file"])
    assert (tmp_path / "out/completions.jsonl").read_bytes() == stored
    assert ow.files.list(purpose="checkpoint") == [], "parts are dropped with the result"


def test_what_it_refuses(ow: OpenWeights, tmp_path: Path, tiny: Path) -> None:
    good = write(tmp_path / "good.jsonl", HELLO)
    model = str(tiny)
    given = {"model": model, "input_file_id": good}
    for params, words in (
        ({"model": model, "input_file_id": "nothing"}, "input_file_id: 'nothing' is neither"),
        ({**given, "min_tokens": 9, "max_tokens": 4}, "min_tokens: is 9, more than max_tokens=4"),
        ({**given, "template_options": {"a b": 1}}, "template_options: .a b. is no option"),
        ({"model": model, "input_file_id": "conversations:file-0"}, "the store has no file"),
        ({"model": "./none", "input_file_id": good}, "model: there is no folder ./none"),
        ({"model": "a b", "input_file_id": good}, "model: 'a b' is neither"),
        ({"model": str(tmp_path), "input_file_id": good}, "has neither config.json nor adapter_c"),
        ({"model": "..", "input_file_id": good}, "model: the folder .* holds no model"),
        ({"model": "ftjob-000000000000", "input_file_id": good}, "the store has no job ftjob"),
        ({"model": model, "input_file_id": good, "max_token": 1}, "max_token: .*max_tokens"),
        ({"model": model, "input_file_id": good, "top_p": 0}, "top_p: must be at least 1e-06"),
        ({"model": model, "input_file_id": good, "stop": [""]}, "stop"),
        ({"model": model, "input_file_id": good, "logprobs": 21}, "logprobs: must be at most 20"),
        ({"model": model, "input_file_id": good, "engine": "x"}, "engine: must be 'auto'"),
    ):
        with pytest.raises(ConfigError, match=words):
            ow.inference.create(**params)
    for row, words in (
        ({**HELLO, "max_tokens": 0}, "input_file_id:2: max_tokens: is 0; give a whole number"),
        ({**HELLO, "temperature": -1}, "input_file_id:2: temperature: is -1; give a number"),
        ({"messages": [{"role": "user"}]}, "wrong.jsonl:2: messages\\[0\\].content: is missing"),
        ({"prompt": "x"}, "wrong.jsonl:2: messages: is missing"),
    ):
        with pytest.raises(DatasetError, match=words):
            wrong = write(tmp_path / "wrong.jsonl", HELLO, row)
            ow.inference.create(model=model, input_file_id=wrong)
    assert ow.jobs.list() == []


def test_equal_jobs_are_one_and_defaults_change_no_id(tmp_path: Path, tiny: Path) -> None:
    ow = QuietClient()
    file = ow.files.upload(write(tmp_path / "a.jsonl", HELLO), "conversations")["id"]
    job = ow.inference.create(model=str(tiny), input_file_id=file)
    again = ow.inference.create(input_file_id=file, model=str(tiny), max_tokens=600, stop=[])
    assert again.id == job.id
    other = ow.inference.create(model=str(tiny), input_file_id=file, stop="x", job_id_suffix="b")
    assert other.id != job.id and other.id.endswith("-b")
    assert other.params["validated_params"]["stop"] == ["x"]
    ow.close()


@pytest.mark.parametrize(
    ("model", "vram"),
    [
        ("Qwen/Qwen3.5-0.8B", 4),
        ("Qwen/Qwen2.5-1.5B-Instruct", 5),
        ("org/Llama-3-70B-bnb-4bit", 39),
        ("org/nameless", 80),
        ("openai/gpt-4.1-mini", 0),
    ],
)
def test_memory_is_reckoned_from_the_shape_and_the_rows(
    model: str, vram: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    ow = QuietClient()
    file = ow.files.upload(write(tmp_path / "a.jsonl", HELLO), "conversations")["id"]
    assert ow.inference.create(model=model, input_file_id=file).requires_vram_gb == vram
    many = ow.files.upload(write(tmp_path / "b.jsonl", *[HELLO] * 200), "conversations")["id"]
    params = {"model": model, "input_file_id": many, "max_tokens": 2000}
    more = ow.inference.create(**params).requires_vram_gb
    assert more == vram if vram in (0, 80) else vram + 3 <= more <= vram + 14
    ow.close()


def test_what_waits_at_a_time_is_bounded() -> None:
    one = tokens_at_once(1, 20, 600, 1)
    assert one == 620 and tokens_at_once(0, 0, 600, 1) == 0
    assert tokens_at_once(10, 200, 600, 3) == 30 * 620
    assert tokens_at_once(10**6, 2e7, 600, 3) == AT_ONCE * 620
    shape = usual_shape(8.0)
    assert needed_gb(shape, 10**9) == needed_gb(shape, 10**6), "an engine does with less"
    weights_gb = 2 * shape.parameters / 2**30
    assert weights_gb < needed_gb(shape, one) < weights_gb + 3


@pytest.mark.usefixtures("warm_jobs")
def test_a_model_that_cannot_be_loaded_fails_at_once(ow: OpenWeights, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text("{}")
    file = write(tmp_path / "in.jsonl", HELLO)
    job = ow.inference.create(model=str(empty), input_file_id=file)
    with pytest.raises(JobFailedError, match="model: .*empty"):
        job.wait(timeout=HANGS_S)
    assert job.refresh().attempts == 1


@pytest.mark.slow
def test_2000_rows_and_a_worker_that_is_killed_three_times(
    ow: OpenWeights, tmp_path: Path, tiny: Path
) -> None:
    rows = [{"text": f"{number}: ", "id": number} for number in range(2000)]
    job = ow.inference.create(
        model=str(tiny),
        input_file_id=write(tmp_path / "in.jsonl", *rows),
        max_tokens=30,
        min_tokens=30,
        max_attempts=9,
    )
    for kill in range(3):

        def has_parts(wanted: int = 2 * kill) -> bool:
            ow.ensure_worker()  # as `job.wait` does
            return len(job.events(type="part")) > wanted

        wait_until(has_parts)
        kill_worker()
    job.wait(timeout=600)
    assert job.attempts == 4
    starts = [event.data["from_step"] for event in job.events(type="started")]
    assert starts == sorted(set(starts)) and starts[0] == 0 < starts[1]
    found = results(ow, job)
    assert [row["id"] for row in found] == list(range(2000))
    # An uninterrupted run gives the same.
    again = ow.inference.create(
        model=str(tiny),
        input_file_id=write(tmp_path / "few.jsonl", *rows[:200]),
        max_tokens=30,
        min_tokens=30,
    )
    again.wait(timeout=300)
    assert results(ow, again) == found[:200]


def kill_worker() -> None:
    """SIGKILL to the worker process of this test's store."""
    home = f"OPENWEIGHTS_HOME={os.environ['OPENWEIGHTS_HOME']}".encode()
    for process in psutil.process_iter(["cmdline"]):
        with contextlib.suppress(psutil.Error, OSError):
            is_worker = "openweights.worker.main" in (process.info["cmdline"] or ())
            if is_worker and home in Path(f"/proc/{process.pid}/environ").read_bytes():
                process.kill()
                process.wait()
