"""Figures call models and files what people call them, and show first what is asked first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from openweights import OpenWeights
from openweights.client.watching.model_names import model_names
from openweights.client.watching.panels import metric_panels
from openweights.client.watching.plot import draw_scores, plot_title
from openweights.types import Claim, JobSpec, WorkerSpec
from tests.client.conftest import append

pytest.importorskip("matplotlib")
FIRST, SECOND, OTHER = (f"ftjob-{digit * 12}" for digit in "123")
BASE = "org/tiny-model"


def trained(ow: OpenWeights, job_id: str, model: str, **params: Any) -> Claim:
    validated = {"model": model, "loss": "sft", "learning_rate": 1e-4, **params}
    stored = {"validated_params": validated}
    ow.backend.submit_job(JobSpec(job_id, "fine-tuning", "true", stored, model=model))
    ow.backend.register_worker(WorkerSpec(id="worker"))
    claim = ow.backend.claim_job("worker")
    assert claim is not None
    append(ow.backend, claim.run.id, *({"step": n, "loss": 1 / n} for n in (1, 2)))
    ow.backend.finish_run(claim.run.id, claim.run.attempt, "completed")
    return claim


def test_a_model_that_a_job_has_trained_is_called_by_what_was_done(ow: OpenWeights) -> None:
    trained(ow, FIRST, BASE)
    trained(ow, SECOND, f"{FIRST}/checkpoint-20", loss="sdft")
    asked = [BASE, FIRST, SECOND, f"{SECOND}/checkpoint-8", "ftjob-444444444444"]
    assert model_names(ow.backend, asked) == {
        FIRST: "tiny-model after sft",
        SECOND: "tiny-model after step 20 of sft, sdft",
        f"{SECOND}/checkpoint-8": "tiny-model after step 20 of sft, step 8 of sdft",
    }


def test_models_that_were_made_alike_are_told_apart(ow: OpenWeights) -> None:
    trained(ow, FIRST, BASE)
    trained(ow, SECOND, BASE, learning_rate=1e-3)
    names = model_names(ow.backend, [FIRST, SECOND])
    assert [*names.values()] == [
        "tiny-model after sft (learning_rate=1e-4)",
        "tiny-model after sft (learning_rate=0.001)",
    ]
    trained(ow, OTHER, BASE, training_file="a name of a file that is too long to be said here")
    assert model_names(ow.backend, [FIRST, OTHER]) == {
        job: f"tiny-model after sft ({job})" for job in (FIRST, OTHER)
    }


def test_titles_bars_and_lines_name_what_was_gone_on_from(ow: OpenWeights, tmp_path: Path) -> None:
    trained(ow, FIRST, BASE)
    trained(ow, SECOND, BASE, loss="dpo")
    trained(ow, OTHER, FIRST)
    job = ow.jobs.retrieve(OTHER)
    title = "tiny-model after sft · sft · learning rate 1e-4"
    assert job.plot().get_suptitle() == f"{title} · {OTHER}"
    assert plot_title([job.record], {}).startswith(FIRST), "the control"
    trained(ow, "ftjob-" + "5" * 12, SECOND)
    figure = ow.plot([job, "ftjob-" + "5" * 12])
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "model=tiny-model after sft",
        "model=tiny-model after dpo",
    ]
    scores = [
        {"task": task, "model": model, "score": 0.5, "low": 0.4, "high": 0.6}
        for task in ("orders", "arithmetic")
        for model in (BASE, FIRST, SECOND)
    ]
    names = model_names(ow.backend, [BASE, FIRST, SECOND])
    first, second = draw_scores(scores, tmp_path / "scores.png", names).axes
    words = [label.get_text().replace("\n", " ") for label in first.get_yticklabels()]
    assert words == ["tiny-model", "tiny-model after sft", "tiny-model after dpo"]
    assert {label.get_text() for label in second.get_yticklabels()} == {""}


def test_lines_call_files_by_their_names(ow: OpenWeights, tmp_path: Path) -> None:
    for job, name in ((FIRST, "cats"), (SECOND, "dogs")):
        path = tmp_path / f"{name}.jsonl"
        said = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": name}]
        path.write_text(json.dumps({"messages": said}))
        file = ow.files.upload(path, purpose="conversations")["id"]
        trained(ow, job, BASE, training_file=file)
    (legend,) = ow.plot([FIRST, SECOND]).legends
    words = [text.get_text() for text in legend.get_texts()]
    assert words == ["training_file=cats.jsonl", "training_file=dogs.jsonl"]


def test_what_is_measured_twice_comes_behind_the_curves_that_it_explains() -> None:
    """As of a run of SDFT, whose gate and distance from the base were measured before all else."""
    twice: list[dict[str, Any]] = [
        {"step": step, "tag": tag, **measured}
        for step in (0, 3)
        for tag, measured in (
            ("everyday", {"kl_to_base": 0.1 * step}),
            ("train", {"teacher_gate/student": 0.2 + 0.1 * step, "teacher_gate/teacher": 0.8}),
        )
    ]
    names = ("grad_norm", "teacher_drift", "entropy", "divergence", "agreement", "loss")
    curves = [
        {"step": n, "tag": "train", **{m: k / n for k, m in enumerate(names, 1)}} for n in (1, 2, 3)
    ]
    for row in curves:
        row["agreement"] = 1 - 0.1 * row["step"]
    assert list(metric_panels(twice + curves)) == [
        *("loss", "agreement", "divergence", "kl_to_base", "teacher gate"),
        *("entropy", "teacher_drift", "grad_norm"),
    ]
