"""Figures call models and files what people call them, and show first what is asked first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest

from openweights import OpenWeights
from openweights.client import Job
from openweights.client.watching.model_names import model_names
from openweights.client.watching.panels import Line, gate_bars, metric_panels
from openweights.client.watching.plot import draw_gate, draw_panels, draw_scores, plot_title
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


ASKED: dict[str, Any] = {
    "type": "teacher_gate",
    "step": 0,
    "rows": 16,
    **{"turns_rouge_l": 0.31, "turns_exact": 0.0, "turns_format": 0.0},
    **{"template_rouge_l": 0.3, "template_exact": 0.0, "template_format": 0.0},
    **{"turns_2_rouge_l": 0.3, "turns_2_exact": 0.06, "turns_2_format": 0.12},
    **{"student_rouge_l": 0.3, "student_exact": 0.0, "student_format": 0.0},
    **{"student": 0.3, "teacher": 0.31, "same_format": 1.0, "measure": "rouge_l"},
    **{"margin": 0.05, "placement": "turns", "repeats": 1, "passed": False, "examples": []},
}


def asked(ow: OpenWeights, job_id: str, *events: dict[str, Any], gate: str = "stop") -> Job:
    """A job of SDFT which has logged these events."""
    params = {"model": BASE, "loss": "sdft", "learning_rate": 1e-4, "sdft_gate": gate}
    ow.backend.submit_job(
        JobSpec(job_id, "fine-tuning", "true", {"validated_params": params}, model=BASE)
    )
    ow.backend.register_worker(WorkerSpec(id="worker"))
    claim = ow.backend.claim_job("worker")
    assert claim is not None
    append(ow.backend, claim.run.id, *events)
    ow.backend.finish_run(claim.run.id, claim.run.attempt, "failed")
    return ow.jobs.retrieve(job_id)


def test_of_a_run_that_its_gate_stopped_the_gate_is_drawn(ow: OpenWeights, tmp_path: Path) -> None:
    """Not a panel with a point for each of its numbers."""
    figure = asked(ow, FIRST, ASKED).plot(tmp_path / "stopped.png")
    title = f"stopped by the teacher gate\ntiny-model · sdft · learning rate 1e-4 · {FIRST}"
    assert figure.get_suptitle() == title
    first, *others = figure.axes
    assert [axes.get_title() for axes in figure.axes] == [
        "rouge_l, which decided",
        "exact",
        "format",
    ]
    called = [label.get_text() for label in first.get_yticklabels()]
    assert called == ["student", "template", "turns, chosen", "turns_2"]
    widths = [[bar.get_width() for bar in cast("list[Any]", axes.patches)] for axes in figure.axes]
    assert widths == [[0.3, 0.3, 0.31, 0.3], [0, 0, 0, 0.06], [0, 0, 0, 0.12]]
    [needed] = first.get_lines()
    assert list(cast("Any", needed.get_xdata())) == pytest.approx([0.35, 0.35])
    assert not any(axes.get_lines() for axes in others), "the margin is of what decided"
    assert "16 prompts" in figure.get_supxlabel()
    assert (tmp_path / "stopped.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("passed", "gate", "verdict"),
    [(True, "stop", "passed"), (False, "warn", "warned by"), (False, "stop", "stopped by")],
)
def test_the_title_says_what_the_gate_did(
    ow: OpenWeights, passed: bool, gate: str, verdict: str
) -> None:
    job = asked(ow, FIRST, {**ASKED, "passed": passed}, gate=gate)
    assert job.plot().get_suptitle().startswith(f"{verdict} the teacher gate\n")


def test_a_reward_decides_where_there_is_one_whatever_its_scale() -> None:
    names = ("student", "template")
    rewards = {"student_reward": -2.0, "template_reward": "NaN", "student": -2.0, "margin": 0.5}
    others = {f"{name}_{measure}": 0.5 for name in names for measure in ("rouge_l", "exact")}
    bars = gate_bars({**others, **rewards, "measure": "reward", "passed": False}, "stop")
    assert bars is not None and list(bars.scores) == ["reward", "rouge_l", "exact"]
    assert bars.needed == -1.5
    first, *_ = draw_gate(bars, title="t", path=None).axes
    low, high = first.get_xlim()
    assert low < -2 and high > 1
    assert gate_bars({"rows": 16, "logp_with": -7.0}, "stop") is None, "of an older version"


def test_once_there_are_steps_the_curves_are_drawn(ow: OpenWeights) -> None:
    curve = [{"step": n, "loss": 1 / n} for n in (1, 2)]
    figure = asked(ow, FIRST, {**ASKED, "passed": True}, *curve).plot()
    assert [axes.get_title() for axes in figure.axes] == ["loss"]
    figure = asked(ow, SECOND, {**ASKED, "passed": True}, curve[0]).plot()
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["loss", "teacher gate"], "not what only the table has room for"


def test_points_that_are_alike_are_all_seen_at_a_whole_step() -> None:
    lines = [Line(label, [0], [0.5]) for label in ("student", "teacher", "other")]
    lines.append(Line("apart", [0], [0.7]))
    figure = draw_panels({"gate": lines, "kl": lines[:1]}, title="t", path=None)
    drawn = figure.axes[0].get_lines()
    sizes = [line.get_markersize() for line in drawn]
    assert sizes[0] < sizes[1] < sizes[2] and sizes[3] == sizes[0]
    assert [line.get_fillstyle() for line in drawn] == ["full", "none", "none", "full"]
    for axes in figure.axes:
        low, high = axes.get_xlim()
        assert [tick for tick in axes.get_xticks() if low <= tick <= high] == [0]


def test_of_grpo_the_spread_of_the_reward_is_seen_before_what_explains_it() -> None:
    """With one reward its spread has two names, of which the one that is drawn is kept; that all
    groups earn alike is said by a line that stands still.
    """
    names = ("sampling_kl", "learning_rate", "completions/mean_length", "entropy", "grad_norm")
    rows: list[dict[str, Any]] = [
        {"step": n, "tag": "train", "loss": 0.0, "frac_reward_zero_std": 1.0, "constant": 1.0}
        | {"reward": 0.1 * n, "rewards/own/mean": 0.1 * n}
        | {"reward_std": 0.2 / n, "rewards/own/std": 0.2 / n}
        | {name: 0.01 * place * n for place, name in enumerate(names, 1)}
        for n in (1, 2, 3)
    ]
    panels = list(metric_panels(rows))
    assert panels[:4] == ["reward", "reward_std", "frac_reward_zero_std", "loss"]
    assert set(panels[4:]) == set(names)
    assert not {"rewards/own/mean", "constant"} & set(panels), "the control"
    for row in rows:
        row["reward"] = 0.5
    assert list(metric_panels(rows))[0] == "reward", "one that does not climb, too"
