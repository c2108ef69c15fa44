"""The whole demo on a tiny random model: client, worker, adapters, table and picture."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from openweights import ConfigurationError, OpenWeights
from openweights.cli import main
from openweights.cli.demo.study import DATA, QUICK, check_installation, methods
from tests.tiny_model import make_tiny_model
from tests.waiting import HANGS_S


def run_demo(model: Path, figure: Path, *options: str) -> Result:
    arguments = ["demo", "--quick", "--model", str(model), "--figure", str(figure), *options]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


@pytest.mark.usefixtures("warm_jobs")
def test_demo_trains_measures_and_draws_and_the_second_time_reuses(
    tmp_path: Path, home: Path
) -> None:
    model, figure = make_tiny_model(tmp_path / "tiny"), tmp_path / "out.png"
    first = run_demo(model, figure).output
    jobs = OpenWeights().jobs.list()
    labels = [method.label for method in methods(QUICK)]
    trained = [job for job in jobs if job.id.startswith("ftjob-")]
    assert [job.status for job in jobs] == ["completed"] * (2 * len(labels) + 1)
    assert len(trained) == len(labels)
    for job in jobs:
        assert job.id in first
    for job in trained:
        assert (home / "demo" / job.id / "adapter" / "adapter_config.json").is_file()
        assert sum("loss" in row for row in job.metrics(as_dataframe=False)) == QUICK.steps
    # The base comes first, then each method with its progress, then the table with all of them.
    places = [first.index("The base model"), *(first.index(f"\n{label}: job") for label in labels)]
    assert places == sorted(places)
    assert first.count(f"step   2/{QUICK.steps}") == len(labels)
    assert first.count("teacher gate: correct ") == 2
    assert "agreement" in first and "before" in first and "after" in first
    table = first[first.index("KL, everyday", places[-1]) :]
    assert all(label in table for label in labels) and "One seed" in table
    data = figure.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert width > 1000 and height > 400

    figure.unlink()
    second = run_demo(model, figure).output
    assert second.count("has completed before") == len(jobs)
    assert "  step " not in second and figure.is_file()
    assert {job.id for job in OpenWeights().jobs.list()} == {job.id for job in jobs}
    # All that was found, to the last figure, without a run more.
    assert table_of(second) == table_of(first)
    assert len(OpenWeights().runs.list(limit=None)) == len(jobs)


@pytest.mark.usefixtures("warm_jobs")
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_demo_that_is_ended_says_what_goes_on(
    tmp_path: Path, home: Path, signum: signal.Signals
) -> None:
    model = make_tiny_model(tmp_path / "tiny")
    command = [sys.executable, "-m", "openweights.cli", "demo", "--quick", "--model", str(model)]
    env = {**os.environ, "OPENWEIGHTS_HOME": str(home)}
    with subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert any("The base model: job" in line for line in process.stdout)
        process.send_signal(signum)
        said = process.stderr.read()
        assert process.wait(timeout=HANGS_S) == 130
    assert "run it again, and their jobs go on" in said and "Traceback" not in said
    assert OpenWeights().backend.list_workers(statuses=["active"]) == []


def table_of(output: str) -> str:
    return output[output.index("SFT and SDFT on the same rows") :]


def test_methods_differ_in_nothing_but_the_loss() -> None:
    sft, reverse, forward = (method.params for method in methods(QUICK))
    assert sft == {"loss": "sft", "kl_to_base_steps": QUICK.steps}  # as SDFT measures it unasked
    assert {**reverse, "sdft_divergence": "forward_kl"} == forward
    assert len({method.key for method in methods(QUICK)}) == 3


def test_missing_data_is_said_before_anything_is_done(tmp_path: Path) -> None:
    check_installation(DATA)
    with pytest.raises(ConfigurationError, match="--data"):
        check_installation(tmp_path)
    result = CliRunner().invoke(main, ["demo", "--data", str(tmp_path)])
    assert result.exit_code == 1 and "Traceback" not in result.output
    assert "run the demo from a clone" in result.output
