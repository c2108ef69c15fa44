"""Submitting a job: what is stored, what is refused and in which words, and finding it again."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, model_validator

from openweights import (
    ConfigError,
    ConfigurationError,
    InvalidInputError,
    JobFailedError,
    Jobs,
    OpenWeights,
    register,
)
from openweights.client.mounts import expand_mounts
from openweights.settings import Settings
from openweights.types import Claim
from tests.client.conftest import QuietClient
from tests.client.kinds import Echo
from tests.waiting import HANGS_S


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")
    size: int = 1


class StrictParams(BaseModel):
    """One field for each kind of mistake."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    learning_rate: float = Field(default=0.1, gt=0)
    steps: int = Field(default=1, ge=1, le=10)
    style: Literal["plain", "bold"] = "plain"
    inner: list[Inner] = Field(default_factory=list[Inner])

    @model_validator(mode="after")
    def _bold_is_short(self) -> StrictParams:
        if self.style == "bold" and self.steps > 5:
            raise ValueError("steps: bold text ends after 5; lower steps or use style='plain'")
        return self


class Strict(Jobs):
    params = StrictParams

    def get_entrypoint(self, validated_params: BaseModel) -> str:
        return "true"


def test_stored_job(ow: QuietClient, tmp_path: Path) -> None:
    class Mounting(Strict):
        mount = {str(tmp_path / "code"): "src", str(tmp_path / "data.txt"): "in/data.txt"}
        base_image = "me/image:1"

    (tmp_path / "code" / "sub" / "__pycache__").mkdir(parents=True)
    (tmp_path / "code" / "main.py").write_text("print(1)")
    (tmp_path / "code" / "sub" / "part.py").write_text("")
    (tmp_path / "code" / "sub" / "__pycache__" / "part.pyc").write_text("")
    (tmp_path / "data.txt").write_text("data")
    job = Mounting(ow).create(
        model="org/tiny", allowed_hardware=["2X h100s", "h100S"], cloud_type="ALL", priority=3
    )
    assert job.params.keys() == {"validated_params", "mounted_files", "cloud_type"}
    assert job.params["validated_params"] == {
        "model": "org/tiny",
        "learning_rate": 0.1,
        "steps": 1,
        "style": "plain",
        "inner": [],
    }
    mounted = job.params["mounted_files"]
    assert set(mounted) == {"src/main.py", "src/sub/part.py", "in/data.txt"}
    assert ow.files.content(mounted["in/data.txt"]) == b"data"
    assert ow.files.retrieve(mounted["in/data.txt"])["purpose"] == "custom_job_file"
    assert job["params"]["cloud_type"] == "ALL"
    assert (job.status, job.type, job.model) == ("pending", "custom", "org/tiny")
    assert (job.docker_image, job.requires_vram_gb, job.priority) == ("me/image:1", 0, 3)
    assert job.allowed_hardware == ("2x H100S", "1x H100S")
    assert job.bundle_file is not None
    assert ow.files.retrieve(job.bundle_file)["purpose"] == "source"
    assert repr(job) == f"Job({job.id}, pending)"
    with pytest.raises(AttributeError, match="a job has no 'nonsense'"):
        _ = job.nonsense
    with pytest.raises(KeyError):
        _ = job["nonsense"]


MISTAKES: list[tuple[dict[str, Any], list[str]]] = [
    ({}, ["model: is required; pass it"]),
    ({"model": 3}, ["model: must be a string, not 3"]),
    ({"model": "a", "step": 3}, ["step: is not a parameter; did you mean 'steps'?"]),
    (
        {"model": "a", "zzz": 3},
        ["zzz: is not a parameter; there are model, learning_rate, steps, style, inner"],
    ),
    (
        {"model": "a", "inner": [{"zzz": 1}]},
        ["inner[0].zzz: is not a parameter; there is only size"],
    ),
    ({"model": "a", "learning_rate": "fast"}, ["learning_rate: must be a number, not 'fast'"]),
    ({"model": "a", "learning_rate": 0}, ["learning_rate: must be greater than 0.0, not 0"]),
    ({"model": "a", "steps": 1.5}, ["steps: must be a whole number, not 1.5"]),
    ({"model": "a", "steps": True}, ["steps: must be a whole number, not True"]),
    ({"model": "a", "style": "thin"}, ["style: must be 'plain' or 'bold', not 'thin'"]),
    ({"model": "a", "inner": [{"size": "x"}]}, ["inner[0].size: must be a whole number, not 'x'"]),
    (
        {"model": "a", "inner": [{"sizes": 1}]},
        ["inner[0].sizes: is not a parameter; did you mean 'size'?"],
    ),
    ({"model": "a", "inner": "x" * 100}, ["inner: must be a list, not 'xxx"]),
    (
        {"model": "a", "style": "bold", "steps": 9},
        ["steps: bold text ends after 5; lower steps or use style='plain'"],
    ),
    (
        {"steps": 0, "style": "thin"},
        ["model: is required; pass it", "steps: must be at least 1, not 0", "style: must be"],
    ),
]


@pytest.mark.parametrize(("params", "expected"), MISTAKES)
def test_each_wrong_parameter_has_a_line(
    ow: QuietClient, params: dict[str, Any], expected: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        Strict(ow).create(**params)
    found = str(caught.value).splitlines()
    assert len(found) == len(expected)
    for line, start in zip(found, expected, strict=True):
        assert line.startswith(start)
        assert len(line) < 150
    assert ow.jobs.list() == []


def test_parameter_that_would_be_ignored_is_refused(ow: QuietClient) -> None:
    class Lenient(Strict):
        class params(BaseModel):  # noqa: N801 - as users write it
            a: float
            rate: float = 1

    assert Lenient(ow).create(a=5).params["validated_params"] == {"a": 5.0, "rate": 1.0}
    with pytest.raises(ConfigError) as caught:
        Lenient(ow).create(a="x", rates=2)
    assert str(caught.value).splitlines() == [
        "rates: is not a parameter; did you mean 'rate'?",
        "a: must be a number, not 'x'",
    ]


CONTROLS: list[tuple[dict[str, Any], str]] = [
    ({"cloud_type": "secure"}, "cloud_type: must be 'SECURE', 'COMMUNITY' or 'ALL', not 'secure'"),
    ({"cloud_type": None}, "cloud_type: must be"),
    ({"requires_vram_gb": -1}, "requires_vram_gb: must be at least 0 or 'guess', not -1"),
    ({"requires_vram_gb": "80"}, "requires_vram_gb: must be a whole number or 'guess', not '80'"),
    ({"priority": 1.5}, "priority: must be a whole number, not 1.5"),
    ({"max_attempts": 0}, "max_attempts: must be at least 1, not 0"),
    ({"max_attempts": True}, "max_attempts: must be a whole number, not True"),
    ({"allowed_hardware": []}, "allowed_hardware: is empty"),
    ({"allowed_hardware": ["0x H100S"]}, "allowed_hardware: '0x H100S' is not hardware"),
    ({"allowed_hardware": [""]}, "allowed_hardware: '' is not hardware"),
    ({"allowed_hardware": [3]}, "allowed_hardware: 3 is not hardware"),
    ({"allowed_hardware": ["2x"]}, "allowed_hardware: '2x' is not hardware"),
    ({"allowed_hardware": ["2x 4 X"]}, "allowed_hardware: '2x 4 X' is not hardware"),
    ({"allowed_hardware": ["2x; rm"]}, "allowed_hardware: '2x; rm' is not hardware"),
]


def test_a_gpu_that_is_in_no_catalogue_is_named(
    ow: QuietClient, caplog: pytest.LogCaptureFixture
) -> None:
    for name, meant in (("1x H1000", "did you mean H100"), ("ZZZ", "`ow gpus` lists")):
        caplog.clear()
        job = Echo(ow).create(text=name, allowed_hardware=[name, "1x H200"])
        assert job.allowed_hardware is not None and len(job.allowed_hardware) == 2
        (line,) = caplog.messages
        assert "not in the catalogue of GPUs" in line and meant in line
    caplog.clear()
    Echo(ow).create(text="known", allowed_hardware=["2x NVIDIA H100 NVL", "a100"])
    assert not caplog.messages


def test_a_job_that_was_there_before_is_told(
    ow: QuietClient, claim: Callable[[], Claim], caplog: pytest.LogCaptureFixture
) -> None:
    """What is returned in place of a new one is said to be so."""
    caplog.set_level(logging.INFO, "openweights.client.job_kinds")

    def told(kind: type[Jobs] = Echo) -> str:
        caplog.clear()
        job = kind(ow).create(text="again")
        return "\n".join(line for line in caplog.messages if line.startswith(job.id))

    assert told() == "" and told() == "", "it waits for its first run, whoever submitted it"
    run = claim().run
    assert "is running already: the same parameters are the same job" in told()
    ow.backend.finish_run(run.id, run.attempt, "failed")
    assert "was there before, and goes on with attempt 2" in told()
    run = claim().run
    ow.backend.finish_run(run.id, run.attempt, "completed")
    done = told()
    assert "has completed already: the same parameters are the same job, and nothing is run" in done
    assert done.endswith("; give a job_id_suffix for another")


@pytest.mark.parametrize(("controls", "expected"), CONTROLS)
def test_wrong_controls(ow: QuietClient, controls: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Echo(ow).create(text="a", **controls)
    assert str(caught.value).startswith(expected)


@pytest.mark.parametrize(
    ("mount", "says"),
    [
        ({"missing.py": "a.py"}, "there is no file or folder 'missing.py'"),
        ({"empty": "a"}, "the folder 'empty' holds no files"),
        ({"here.txt": "/etc/a"}, "leaves the job's folder"),
        ({"here.txt": "../a"}, "leaves the job's folder"),
        ({"here.txt": "a/../../b"}, "leaves the job's folder"),
        ({"here.txt": "."}, "leaves the job's folder"),
        ({"here.txt": ""}, "leaves the job's folder"),
        ({"here.txt": "a", "there.txt": "./a"}, "both go to 'a'"),
    ],
)
def test_wrong_mounts(
    mount: dict[str, str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("here.txt").write_text("x")
    Path("there.txt").write_text("y")
    with pytest.raises(InvalidInputError) as caught:
        expand_mounts(mount)
    assert says in str(caught.value)


def test_folder_can_be_mounted_as_the_jobs_folder(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.txt").write_text("x")
    assert expand_mounts({str(tmp_path): "."}) == {"a/b.txt": tmp_path / "a" / "b.txt"}


def test_file_name_that_is_no_text(ow: QuietClient, tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("x")

    class Mounting(Echo):
        mount = {str(tmp_path): "."}

    with pytest.raises(InvalidInputError, match=r"cannot mount .*udce9.*: rename it, in UTF-8"):
        Mounting(ow).create(text="a")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_mount(ow: QuietClient, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("x")
    secret.chmod(0)

    class Mounting(Echo):
        mount = {str(secret): "a"}

    with pytest.raises(InvalidInputError, match="cannot mount"):
        Mounting(ow).create(text="a")


def test_check_comes_before_anything_is_stored(ow: QuietClient) -> None:
    class Checking(Echo):
        def check(self, validated: BaseModel) -> None:
            raise InvalidInputError("text: the store has no such text")

    with pytest.raises(InvalidInputError, match="no such text"):
        Checking(ow).create(text="a")
    assert ow.files.list() == [] and ow.jobs.list() == []


def test_find(ow: QuietClient) -> None:
    one = Echo(ow).create(text="a", meta={"sweep": 1, "seed": 3}, cloud_type="ALL")
    two = Echo(ow).create(text="a", times=2, meta={"sweep": 1, "seed": 4})
    three = Strict(ow).create(model="org/tiny")

    def found(**params: Any) -> set[str]:
        return {job.id for job in ow.jobs.find(**params)}

    assert found(meta={"sweep": 1}) == {one.id, two.id}
    assert found(meta={"seed": 4}) == {two.id}
    assert found(text="a", times=1) == {one.id}
    assert found(model="org/tiny") == {three.id}
    assert found(cloud_type="ALL") == {one.id}
    assert found(cloud_type="SECURE", meta={"sweep": 1}) == {two.id}
    assert found(validated_params={"times": 2}) == {two.id}
    assert found(validated_params={"text": "a"}, times=2) == {two.id}
    assert found(text="b") == found(nonsense=1) == set()
    assert found() == {one.id, two.id, three.id}
    four = Echo(ow).create(text="a", times=4, label="sweep")
    assert found(label="sweep") == found(label="sweep", text="a") == {four.id}
    assert found(label="sweep", times=2) == found(label="swee") == set()
    with pytest.raises(InvalidInputError, match="label"):
        found(label=3)


def test_list_and_retrieve(ow: QuietClient) -> None:
    jobs = [Echo(ow).create(text=f"a{number}") for number in range(4)]
    jobs[1].cancel()
    assert [job.id for job in ow.jobs.list(limit=2)] == [jobs[1].id, jobs[3].id]
    assert [job.id for job in ow.jobs.list(limit=1, status="canceled")] == [jobs[1].id]
    assert len(ow.jobs.list(status="pending")) == 3
    assert ow.jobs.retrieve(jobs[0].id).status == "pending"
    assert ow.jobs.cancel(jobs[0].id).status == "canceled"
    assert ow.jobs.restart(jobs[0].id).status == "pending"
    with pytest.raises(InvalidInputError, match=r"status: 'done' is none of pending"):
        ow.jobs.list(status="done")  # pyright: ignore[reportArgumentType]
    with pytest.raises(LookupError, match="ftjob-000000000000"):
        ow.jobs.retrieve("ftjob-000000000000")


def test_the_default_image_is_a_variable(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class OwnImage(Echo):
        base_image = "me/own:1"

    monkeypatch.setenv("OPENWEIGHTS_IMAGE", "me/train:1")
    monkeypatch.setenv("OPENWEIGHTS_VLLM_IMAGE", "me/serve:1")
    ow = QuietClient()
    assert Echo(ow).create(text="a").docker_image == "me/train:1"
    assert Echo(ow).create(text="b", docker_image="me/image:1").docker_image == "me/image:1"
    assert OwnImage(ow).create(text="a").docker_image == "me/own:1"
    assert ow.api.image == "me/serve:1"


def test_register(ow: QuietClient) -> None:
    @register("echo_for_test")
    class Mine(Echo):
        pass

    # Also a client that is older than the kind has it.
    assert isinstance(ow.echo_for_test, Mine)
    assert ow.echo_for_test is ow.echo_for_test
    assert "echo_for_test" in dir(ow)
    assert ow.echo_for_test.create(text="a").id.startswith("mine-")
    with pytest.raises(AttributeError, match="job kinds are api, echo_for_test, evaluate, exec"):
        _ = ow.nonsense
    for name in ("files", "run", "create job", "_x", "close"):
        with pytest.raises(InvalidInputError):
            register(name)
    with pytest.raises(InvalidInputError, match="int is no job kind"):
        register("other")(int)  # pyright: ignore[reportArgumentType]


def test_building_a_client_does_no_io(home: Path) -> None:
    ow = OpenWeights(organization_id="local")
    assert ow.organization_id == "local" and ow.hf_org is None
    assert not home.exists()
    ow.close()


def test_organization_that_the_store_does_not_have(home: Path) -> None:
    ow = OpenWeights(organization_id="mine")
    for use in (lambda: ow.organization_id, ow.jobs.list, lambda: ow.run):
        with pytest.raises(ConfigurationError, match="'local', not 'mine'"):
            use()
    ow.close()


def test_secrets_are_not_shown() -> None:
    secrets = {"OPENWEIGHTS_API_KEY": "ow_1", "HF_TOKEN": "hf_2", "SUPABASE_ANON_KEY": "anon_3"}
    settings = Settings.from_env(secrets)
    assert (settings.api_key, settings.hf_token) == ("ow_1", "hf_2")
    assert not [value for value in secrets.values() if value in f"{settings!r} {settings}"]


def test_lease_must_last() -> None:
    with pytest.raises(ConfigurationError, match="OPENWEIGHTS_LEASE_S must be greater than 0"):
        Settings.from_env({"OPENWEIGHTS_LEASE_S": "0"})
    assert Settings.from_env({"OPENWEIGHTS_LEASE_S": ""}).lease_s == 60


class _Scalar:
    """As numpy's and torch's are."""

    def __init__(self, *values: float) -> None:
        self._values = values

    def item(self) -> float:
        if len(self._values) != 1:
            raise ValueError("can only convert an array of size 1")
        return self._values[0]


def test_scalars_in_meta_become_numbers(ow: QuietClient) -> None:
    plain = Echo(ow).create(text="a", meta={"seed": 3, "rates": [0.5, {"x": True}]})
    job = Echo(ow).create(
        text="a", meta={"seed": _Scalar(3), "rates": [_Scalar(0.5), {"x": _Scalar(True)}]}
    )
    assert job.id == plain.id
    assert Echo(ow).create(text="a", times=_Scalar(2)).params["validated_params"]["times"] == 2


@pytest.mark.parametrize("value", [object(), _Scalar(1, 2), [{1, object()}], {"a": {"b": len}}])
def test_meta_that_is_no_json(ow: QuietClient, value: object) -> None:
    with pytest.raises(ConfigError, match=r"^meta: is not JSON \(.*\); use numbers"):
        Echo(ow).create(text="a", meta={"x": value})


def test_meta_that_holds_itself(ow: QuietClient) -> None:
    meta: dict[str, Any] = {}
    meta["x"] = [meta]
    with pytest.raises(ConfigError, match=r"^meta: is nested too deeply, or holds itself$"):
        Echo(ow).create(text="a", meta=meta)


@pytest.mark.parametrize("name", ["timeout", "max_cost_usd"])
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), True, "10"])
def test_limits_that_make_no_sense(ow: OpenWeights, name: str, value: object) -> None:
    wanted = f"{name}: must be (a number|greater than 0.0|a finite number), not"
    with pytest.raises(ConfigError, match=wanted):
        ow.exec.create(command="true", **{name: value})


def test_a_job_is_stopped_in_time() -> None:
    ow = OpenWeights()
    before = datetime.now(UTC)
    job = ow.exec.create(command="sleep 9999", timeout=1.0)
    assert job.timeout_at is not None and job.timeout_at - before > timedelta(seconds=1)
    with pytest.raises(JobFailedError, match="time"):
        job.wait(timeout=HANGS_S)
    assert ow.exec.create(command="true").set_timeout(60).set_timeout(None).timeout_at is None


def test_help_shows_the_arguments_of_create(ow: OpenWeights) -> None:
    shown = inspect.signature(ow.fine_tuning.create).parameters
    assert shown["loss"].default is inspect.Parameter.empty
    assert shown["r"].default == 16 and shown["cloud_type"].default == "SECURE"
    assert "self" not in shown and "text" not in shown
    assert list(inspect.signature(Echo(ow).create).parameters)[0] == "text"


def test_parameters_of_a_stored_job_give_that_job(tmp_path: Path) -> None:
    ow = QuietClient()
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    file = ow.files.upload(rows, "conversations")["id"]
    job = ow.fine_tuning.create(model="org/tiny", training_file=file, loss="sft")
    stored = job.params["validated_params"]
    assert stored["finetuned_model_id"] == f"{{org_id}}/tiny-{job.id}"
    assert ow.fine_tuning.create(**stored).id == job.id
    named = ow.fine_tuning.create(**{**stored, "finetuned_model_id": "me/mine"})
    assert (
        named.id != job.id and named.params["validated_params"]["finetuned_model_id"] == "me/mine"
    )
