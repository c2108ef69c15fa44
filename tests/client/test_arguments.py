"""Whatever is passed to a method of the client: an answer, or a sentence that says what to pass."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from openweights import OpenWeights, register
from openweights.client.jobs import Job
from openweights.client.runs import Run
from openweights.client.serving.sampling import sample
from openweights.errors import InvalidInputError, NotFoundError, OpenWeightsError
from tests.cli.conftest import claim, submit

NONSENSE: list[Any] = [
    *(None, "", 42, -1, 0, 1.5, math.nan, math.inf, 10**30, True, b"x", [], [1], ["nojob"], {}),
    *({"a": 1}, object(), "x" * 100_000, "\udcff", "a\0b", abs, Path("/no/such"), {1, 2}, int),
]
JOB = "ftjob-000000000001"
GOOD: dict[str, Any] = {
    **{"job_id": JOB, "jobs": [JOB], "model": "org/model", "models": ["org/model"]},
    **{"purpose": "custom_job_file", "file": b"x", "data": {"a": 1}, "values": {}, "name": "x"},
    **{"status": "completed", "seconds": 5, "timeout": 5, "prompts": ["Hi"]},
}
# What only this package calls, what ends what others need, and what waits as it was asked to.
LEFT_OUT = {"bundle_file", "close", "ensure_worker", "iterate_log", "pause", "resume"} | {
    *("flush", "sample", "wait"),
}


def objects(ow: OpenWeights) -> dict[str, Any]:
    run = ow.backend.list_runs(job_id=JOB)[0]
    return {
        "ow": ow,
        **{name: getattr(ow, name) for name in ("files", "jobs", "runs", "events", "secrets")},
        "job": ow.jobs.retrieve(JOB),
        "run": ow.runs.retrieve(run.id),
    }


def arguments_of(method: Callable[..., Any]) -> list[inspect.Parameter]:
    named = inspect.signature(method).parameters.values()
    return [p for p in named if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]


def calls(ow: OpenWeights, folder: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Each method of the client, with one argument that is nonsense."""
    good = {**GOOD, "path": str(folder / "file"), "target_dir": str(folder), "run_id": 1}
    good["file_id"] = ow.files.create(b"x", "custom_job_file")["id"]
    for owner, thing in objects(ow).items():
        for name in sorted(vars(type(thing))):
            method = getattr(thing, name) if name[0] != "_" and name not in LEFT_OUT else None
            if not inspect.ismethod(method):
                continue
            known = arguments_of(method)
            needed = {p.name: good.get(p.name, "x") for p in known if p.default is p.empty}
            if owner == "events" and name != "latest":
                needed["job_id"] = JOB
            for argument in known:
                for value in NONSENSE:
                    given = {**needed, argument.name: value}
                    if argument.name == "run_id" and owner == "events":
                        given.pop("job_id", None)
                    words = f"{owner}.{name}({argument.name}={value!r:.30})"
                    yield words, lambda method=method, given=given: method(**given)


@pytest.fixture
def ow(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> OpenWeights:
    monkeypatch.chdir(tmp_path)
    client = OpenWeights()
    run = claim(client.backend, JOB).run
    client.backend.finish_run(run.id, run.attempt, "failed", error="to be followed to its end")
    return client


def test_nonsense_gets_a_sentence(ow: OpenWeights, tmp_path: Path) -> None:
    count, wrong = 0, list[str]()
    for words, call in calls(ow, tmp_path / "out"):
        count += 1
        try:
            answer = call()
            if hasattr(answer, "__next__"):
                list(answer)
        except OpenWeightsError as error:
            said = str(error)
            if len(said) > 700 or "Error binding" in said or "datatype" in said or "None\n" in said:
                wrong.append(f"{words}: {said:.200}")
        except Exception as error:  # noqa: BLE001 - it is what is looked for
            wrong.append(f"{words}: {type(error).__name__}: {error}")
    assert count > 1000
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("value", [None, "", 42, [], {}, b"x", "two words"])
def test_what_is_no_job_id_says_where_ids_are(ow: OpenWeights, value: Any) -> None:
    for method in (ow.jobs.retrieve, ow.jobs.cancel, ow.fine_tuning.retrieve):
        with pytest.raises(InvalidInputError, match="is not a job id; `ow ls` lists them"):
            method(value)


def test_an_id_of_something_else_says_what_it_is(ow: OpenWeights) -> None:
    file = ow.files.create(b"x", "custom_job_file")["id"]
    with pytest.raises(InvalidInputError, match=f"that of a file: `ow fetch {file}`"):
        ow.jobs.retrieve(file)
    with pytest.raises(InvalidInputError, match="it is a job already; its `id` is one"):
        ow.jobs.retrieve(ow.jobs.retrieve(JOB))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("ftjob-00000000001", JOB),
        ("ftjob-000000000O01", JOB),
        ("ftjbo-0000", JOB),
        ("sftjob-00ab12cd34ef", "ftjob-00ab12cd34ef-seed-2"),
        ("00ab12", "ftjob-00ab12cd34ef-seed-2"),
        ("seed-2", "ftjob-00ab12cd34ef-seed-2"),
    ],
)
def test_a_slip_in_an_id_is_answered_with_what_was_meant(
    ow: OpenWeights, typed: str, meant: str
) -> None:
    submit(ow.backend, "ftjob-00ab12cd34ef-seed-2")
    with pytest.raises(NotFoundError, match=rf"no job {typed}; did you mean {meant}\?"):
        ow.jobs.retrieve(typed)
    with pytest.raises(NotFoundError, match="no job inferencejob; `ow ls` lists them"):
        ow.jobs.retrieve("inferencejob")


def test_one_job_and_one_name_are_taken_for_a_list_of_one(ow: OpenWeights) -> None:
    job = ow.jobs.retrieve(JOB)
    for jobs in (JOB, "ftjob", job, [job], (JOB,)):
        assert [row["id"] for row in ow.compare(jobs, as_dataframe=False)] == [JOB]
    with pytest.raises(InvalidInputError, match="jobs: 42 is no list of jobs; give jobs, or their"):
        ow.compare(cast("Any", 42))


def test_fields_are_read_like_those_of_a_dict(ow: OpenWeights) -> None:
    job: Job = ow.jobs.retrieve(JOB)
    run: Run = job.runs[0]
    assert (
        job["id"] == job.get("id") == JOB
        and job.get(cast("Any", 42), "no") == job.get("no", "no") == "no"
    )
    for thing, key in ((job, 42), (job, "no"), (job, "__class__"), (run, 42), (run, None)):
        with pytest.raises(KeyError):
            thing[key]  # type: ignore[index]


@pytest.mark.parametrize("argument", ["timeout", "poll_s", "on_event"])
@pytest.mark.parametrize("value", ["", "5", -1, math.nan, True, [], object()])
def test_what_cannot_be_waited_for(ow: OpenWeights, argument: str, value: Any) -> None:
    with pytest.raises(InvalidInputError, match=f"{argument}: .* is no (number|function)"):
        ow.jobs.retrieve(JOB).wait(**{"timeout": 0, argument: value})


@pytest.mark.parametrize("prompts", [None, 42, "Hi", [], [42], {"a": 1}, object()])
def test_prompts_are_a_list(ow: OpenWeights, prompts: Any) -> None:
    with pytest.raises(InvalidInputError, match="prompts: give a list of questions"):
        sample(ow, ow.jobs.retrieve(JOB), prompts, base=True, params={})


def test_kinds_and_deployments(ow: OpenWeights) -> None:
    for name in (None, 42, "", "two words", "files"):
        with pytest.raises(InvalidInputError):
            register(name)  # type: ignore[arg-type]
    for kind in (None, 42, int, "x"):
        with pytest.raises(InvalidInputError, match="is no job kind; make it a subclass of Jobs"):
            register("mine")(kind)  # type: ignore[type-var]
    for model in NONSENSE:
        if model == ["nojob"]:
            continue
        with pytest.raises(OpenWeightsError, match=r"^(model|models)\b|job"):
            ow.api.deploy(model)
        if model not in ([], {}):
            with pytest.raises(OpenWeightsError):
                ow.api.multi_deploy(model)


def test_objects_say_what_they_are_and_complete(ow: OpenWeights, home: Path) -> None:
    job = ow.jobs.retrieve(JOB)
    assert repr(ow) == f"OpenWeights(this machine, {home})"
    assert repr(job) == f"Job({JOB}, failed)"
    assert {"status", "params", "created_at", "wait", "download"} <= set(dir(job))
    assert {"status", "attempt", "error", "log_bytes", "download"} <= set(dir(job.runs[0]))
    assert {"fine_tuning", "inference", "files"} <= set(dir(ow))


@pytest.mark.parametrize("kind", ["fine_tuning", "inference", "evaluate", "exec", "api"])
def test_help_of_create_says_what_each_argument_means(ow: OpenWeights, kind: str) -> None:
    create = getattr(ow, kind).create
    said = inspect.getdoc(create) or ""
    for name, argument in inspect.signature(create).parameters.items():
        assert f"\n    {name}: " in said, name
        assert "Annotated" not in str(argument) and "BeforeValidator" not in str(argument)
    assert "**params" not in said and "Raises:\n    ConfigError" in said
