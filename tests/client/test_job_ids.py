"""A job's id says what the job does: nothing else changes it, and all of that does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from openweights import ConfigError, Jobs, OpenWeights
from openweights.backends.local.backend import LocalBackend
from openweights.client import Job
from openweights.client.job_kinds import find_kind, kind_name, kind_names
from openweights.settings import Settings
from tests.client.conftest import QuietClient
from tests.client.kinds import BuiltInEcho, Echo, EchoParams, Shout
from tests.client.malformed_datasets import GOOD, lines


@pytest.fixture
def store() -> str:
    """The one whose organization the ids below are of."""
    return "local"


TEXT = st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=8)
PARAMS = st.fixed_dictionaries(
    {"text": TEXT},
    optional={
        "times": st.integers(1, 9),
        "rate": st.sampled_from([0.25, 0.5, 1]),
        "style": st.none() | TEXT,
        "tags": st.lists(TEXT, max_size=2),
        "meta": st.dictionaries(TEXT, st.integers() | TEXT, max_size=3),
    },
)
CONTROLS = st.fixed_dictionaries(
    {},
    optional={
        "cloud_type": st.sampled_from(["SECURE", "COMMUNITY", "ALL"]),
        "allowed_hardware": st.sampled_from([["1x H100S"], "2x a100", ["H200", "4x L40"]]),
        "docker_image": TEXT,
        "requires_vram_gb": st.integers(0, 80),
        "priority": st.integers(-3, 3),
        "max_attempts": st.integers(1, 5),
    },
)
QUICK = settings(
    max_examples=20,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


def _create(
    ow: OpenWeights, params: dict[str, Any], kind: type[Jobs] = Echo, **controls: Any
) -> Job:
    return kind(ow).create(**controls, **params)


@given(params=PARAMS, controls=CONTROLS, data=st.data())
@QUICK
def test_what_a_job_does_not_do_is_not_in_its_id(
    ow: QuietClient, params: dict[str, Any], controls: dict[str, Any], data: st.DataObject
) -> None:
    plain = _create(ow, params)
    shuffled = dict(data.draw(st.permutations(list(params.items()))))
    spelled = EchoParams(**params).model_dump()
    assert _create(ow, shuffled).id == plain.id
    assert _create(ow, spelled).id == plain.id
    assert _create(ow, params, **controls).id == plain.id
    assert plain.id.startswith("echo-") and len(plain.id) == len("echo-") + 12


@given(one=PARAMS, other=PARAMS)
@QUICK
def test_other_parameters_give_another_id(
    ow: QuietClient, one: dict[str, Any], other: dict[str, Any]
) -> None:
    same = EchoParams(**one) == EchoParams(**other)
    assert (_create(ow, one).id == _create(ow, other).id) is same


def test_a_kind_may_have_ids_of_its_own(ow: QuietClient) -> None:
    class Named(Echo):
        def compute_id(self, validated: Any, mounted_files: Any = None, script: str = "") -> str:
            return f"{super().compute_id(validated, mounted_files, script)}-{validated.text}"

    assert _create(ow, {"text": "a"}, Named).id.endswith("-a")


@given(params=PARAMS)
@QUICK
def test_kind_and_organization_are_in_the_id(ow: QuietClient, params: dict[str, Any]) -> None:
    validated = Echo(ow).validate(params)
    elsewhere = QuietClient(settings=ow.settings)
    elsewhere._backend = LocalBackend(ow.settings.home, organization_id="other")  # pyright: ignore[reportPrivateUsage]
    ids = {
        Echo(ow).compute_id(validated),
        Shout(ow).compute_id(validated),
        BuiltInEcho(ow).compute_id(validated),
        Echo(elsewhere).compute_id(validated),
    }
    assert len(ids) == 4
    elsewhere.close()


class _WithFile(Echo):
    mount: ClassVar[dict[str, str]] = {"script.py": "main.py"}


class _BuiltInWithFile(BuiltInEcho):
    mount: ClassVar[dict[str, str]] = {"script.py": "main.py"}


class _OtherCommand(Echo):
    def get_entrypoint(self, validated_params: BaseModel) -> str:
        return "echo something else"


_OtherCommand.__name__ = "Echo"


def test_command_and_mounted_files_are_in_the_id_of_custom_jobs(
    ow: QuietClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    params = {"text": "a"}
    ids: dict[type[Jobs], list[str]] = {_WithFile: [], _BuiltInWithFile: []}
    for source in ("print(1)", "print(2)", "print(1)"):
        Path("script.py").write_text(source)
        for kind, found in ids.items():
            found.append(_create(ow, params, kind).id)
    for first, changed, again in ids.values():
        assert first == again != changed
    assert _create(ow, params, _OtherCommand).id != _create(ow, params).id
    # A built-in kind's command comes from the parameters, and may change with the version.
    validated = BuiltInEcho(ow).validate(params)
    assert BuiltInEcho(ow).compute_id(validated, {}, "one") == BuiltInEcho(ow).compute_id(
        validated, {}, "two"
    )


def test_subclass_of_a_built_in_kind_that_runs_something_else(
    ow: QuietClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from openweights.jobs.exec import Exec
    from openweights.jobs.unsloth import FineTuning

    class Command(FineTuning):
        def get_entrypoint(self, validated_params: BaseModel) -> str:
            return "python my_training.py {job_id}"

    class Files(FineTuning):
        def mounted_paths(self) -> dict[str, Path]:
            return {"openweights/jobs/unsloth/training.py": tmp_path / "mine.py"}

    Command.__name__ = Files.__name__ = "FineTuning"
    file = ow.files.create(lines(GOOD), "conversations")["id"]
    params = {"model": "org/tiny", "training_file": file, "loss": "sdft"}
    found = [_create(ow, params, FineTuning).id, _create(ow, params, Command).id]
    for source in ("print(1)", "print(2)"):
        (tmp_path / "mine.py").write_text(source)
        found.append(_create(ow, params, Files).id)
    assert len(set(found)) == 4
    # Those of the built-in kinds stay as they are, whatever the version.
    params["training_file"] = "conversations:file-0123456789ab"
    built_in = FineTuning(ow)
    validated = built_in.validate(params)
    assert built_in.compute_id(validated, {}, "one") == "ftjob-d6c027c0a09a"
    assert built_in.compute_id(validated, {}, "two") == "ftjob-d6c027c0a09a"
    executed = Exec(ow).validate({"command": "true"})
    assert Exec(ow).compute_id(executed, {"a": "b"}, "true") == "execjob-225e55b33ae3"


def test_suffix_ends_the_id(ow: QuietClient) -> None:
    job = _create(ow, {"text": "a", "job_id_suffix": "sweep-3"})
    assert job.id.startswith("echo-") and job.id.endswith("-sweep-3")
    assert job.id.removesuffix("-sweep-3") != _create(ow, {"text": "a"}).id
    with pytest.raises(ConfigError, match=r"^job_id_suffix: 'a/b' "):
        _create(ow, {"text": "a", "job_id_suffix": "a/b"})


def test_script_knows_the_id(ow: QuietClient) -> None:
    job = _create(ow, {"text": "hi"})
    assert job.script == f"echo hi of {job.id} in ${{HOME}}"


def test_parameter_that_a_later_version_adds_changes_no_id(ow: QuietClient) -> None:
    class LaterParams(EchoParams):
        added: int = 7

    class Later(Echo):
        params = LaterParams

    Later.__name__ = "Echo"
    assert Later(ow).compute_id(Later(ow).validate({"text": "a"})) == Echo(ow).compute_id(
        Echo(ow).validate({"text": "a"})
    )
    assert Later(ow).validate({"text": "a"}).model_dump()["added"] == 7


def test_resubmission_syncs_what_is_not_in_the_id(ow: QuietClient) -> None:
    first = _create(ow, {"text": "a"}, cloud_type="SECURE", requires_vram_gb=8)
    again = _create(
        ow, {"text": "a"}, cloud_type="ALL", requires_vram_gb=16, allowed_hardware="h100s"
    )
    assert again.id == first.id
    assert again.params["cloud_type"] == "ALL"
    assert (again.requires_vram_gb, again.allowed_hardware) == (16, ("1x H100S",))
    assert [job.id for job in ow.jobs.list()] == [first.id]
    again.cancel()
    assert _create(ow, {"text": "a"}).status == "pending"


def test_settings_do_not_change_the_id(ow: QuietClient, home: Path) -> None:
    other = QuietClient(settings=replace(Settings(home=home), lease_s=5.0, hf_org="someone"))
    assert _create(other, {"text": "a"}).id == _create(ow, {"text": "a"}).id
    other.close()


@given(
    params=st.fixed_dictionaries(
        {"loss": st.sampled_from(["sft", "sdft"])},
        optional={
            "r": st.integers(1, 32),
            "learning_rate": st.sampled_from([1e-4, "1e-4", "2e-4 / 2", -4]),
            "epochs": st.integers(1, 3),
            "meta": st.dictionaries(TEXT, st.integers(), max_size=2),
        },
    ),
    controls=CONTROLS,
    data=st.data(),
)
@QUICK
def test_ids_of_fine_tuning(
    ow: QuietClient, params: dict[str, Any], controls: dict[str, Any], data: st.DataObject
) -> None:
    file = ow.files.create(lines(GOOD), "conversations")["id"]
    params = {"model": "org/tiny", "training_file": file, **params}
    plain = ow.fine_tuning.create(**params)
    shuffled = dict(data.draw(st.permutations(list(params.items()))))
    assert ow.fine_tuning.create(**shuffled).id == plain.id
    assert ow.fine_tuning.create(**params, **controls).id == plain.id
    # All that is stored, defaults and all, spells the same job.
    assert ow.fine_tuning.create(**plain.params["validated_params"]).id == plain.id
    assert plain.id.startswith("ftjob-") and plain.type == "fine-tuning"
    assert plain.script.endswith(f" {plain.id}")
    other = {**params, "r": params.get("r", 16) + 1}
    assert ow.fine_tuning.create(**other).id != plain.id


def test_one_learning_rate_has_one_id(ow: QuietClient) -> None:
    file = ow.files.create(lines(GOOD), "conversations")["id"]
    params = {"model": "org/tiny", "training_file": file, "loss": "sdft"}
    rates = [1e-4, "1e-4", "2e-4 / 2", -4]
    ids = {ow.fine_tuning.create(**params, learning_rate=rate).id for rate in rates}
    assert ids == {ow.fine_tuning.create(**params).id}


def test_an_id_tells_the_kind_of_this_package(ow: QuietClient) -> None:
    kinds = {name: kind for name in kind_names() if (kind := find_kind(name)) is not None}
    own = {n: k for n, k in kinds.items() if k.__module__.startswith("openweights.jobs.")}
    assert len(own) > 8, "the control: they are found"
    assert {name: kind_name(f"{kind(ow).id_prefix}-0") for name, kind in own.items()} == {
        name: name for name in own
    }
