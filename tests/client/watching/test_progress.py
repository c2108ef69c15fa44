"""How far a job is, in words: from its events, and for one that waits from the queue."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from openweights.client.watching.progress import (
    Progress,
    _Bar,
    _Lines,
    _NotebookBar,
    _terminal_bar,
    duration,
    open_display,
)
from openweights.client.watching.queue import waits_in_project, waits_on_this_machine
from openweights.types import Ahead, EventRecord, JobRecord

START = datetime(2026, 1, 1, tzinfo=UTC)


def progress(*events: tuple[float, Mapping[str, Any]], run: int = 1) -> Progress:
    """After events, each with its second."""
    now = Progress()
    for number, (second, data) in enumerate(events):
        now = now.after(EventRecord(number, run, data, START + timedelta(seconds=second)))
    return now


LAST_GATE = (80.0, {"type": "stage", "doing": "trying the demonstrations", "step": 40})
ROWS = (0.0, {"type": "started", "max_steps": 4, "from_step": 0, "unit": "row"})
GATE = (2.0, {"type": "stage", "doing": "teacher gate", "part": "12/48 answers"})
ANSWERING = (5.0, {"type": "stage", "doing": "answering"})
TOLD_OF = {"step": 0, "tag": "inference", "total": 4, "tokens": 96, "tokens_per_s": 8.0}
STARTED = (0.0, {"type": "started", "max_steps": 40, "from_step": 0})
AT_HALF, AT_4_S = (0.5, {"step": 1}), (4.1, {"step": 1})


@pytest.mark.parametrize(
    ("events", "words"),
    [
        ([], ""),
        ([STARTED], "step 0/40"),
        ([(0, {"step": 3, "loss": 1.5})], "step 3 · loss 1.5"),
        # Of GRPO the loss says nothing.
        (
            [STARTED, AT_4_S, (41.0, {"step": 10, "loss": -3e-8, "reward": 0.25})],
            "step 10/40 · 4.1 s/step · 2m03s left · reward 0.25",
        ),
        (
            [STARTED, AT_4_S, (41.0, {"step": 10, "loss": 0.51})],
            "step 10/40 · 4.1 s/step · 2m03s left · loss 0.51",
        ),
        (
            [
                STARTED,
                AT_HALF,
                (10.0, {"step": 20, "total": 40, "tokens_per_s": 512.4, "tag": "inference"}),
            ],
            "step 20/40 · 2 steps/s · 10s left · 512 tokens/s",
        ),
        (
            [STARTED, AT_HALF, (10.0, {"step": 20, "total": 40, "tokens_per_s": 0.31})],
            "step 20/40 · 2 steps/s · 10s left · 0.31 tokens/s",
        ),
        (
            [STARTED, AT_HALF, (10.0, {"step": 20, "total": 40, "tokens_per_s": 0.0})],
            "step 20/40 · 2 steps/s · 10s left",
        ),
        # What is measured besides is no step of the training's, and its loss is another.
        (
            [
                STARTED,
                AT_HALF,
                (10, {"step": 20, "loss": 2.0}),
                (11, {"step": 20, "type": "x", "loss": 9}),
            ],
            "step 20/40 · 2 steps/s · 9s left · loss 2",
        ),
        # Rows that are answered are no steps; before the first, its tokens tell.
        ([ROWS, ANSWERING, (12.0, TOLD_OF)], "answering · row 0/4 · 96 tokens · 8 tokens/s"),
        (
            [ROWS, ANSWERING, (12.0, TOLD_OF), (20.0, {**TOLD_OF, "step": 1, "tokens": 160})],
            "row 1/4 · 8 tokens/s",
        ),
        (
            [ROWS, (2.0, {"step": 1}), (5.0, {"step": 3, "tokens_per_s": 0.5})],
            "row 3/4 · 1.5 s/row · 2s left · 0.5 tokens/s",
        ),
        ([ROWS, (0.1, {"step": 1}), (0.5, {"step": 3})], "row 3/4 · 5 rows/s"),
        (
            [STARTED, (113.0, {"step": 1}), (1130.0, {"step": 10})],
            "step 10/40 · 113 s/step · 56m30s left",
        ),
        ([STARTED, (1 / 120, {"step": 1}), (0.25, {"step": 30})], "step 30/40 · 120 steps/s"),
        # A single moment tells of no rate but of a whole that is over.
        ([STARTED, (41.0, {"step": 10, "loss": 0.51})], "step 10/40 · loss 0.51"),
        ([ROWS, (5.0, {"step": 3})], "row 3/4"),
        ([ROWS, (8.0, {"step": 4})], "row 4/4 · 2 s/row"),
        # It went on from step 30: those steps took this run no time.
        (
            [(0, {**STARTED[1], "from_step": 30}), (9, {"step": 31}), (17, {"step": 35})],
            "step 35/40 · 2 s/step · 10s left",
        ),
        # What is no number of steps is none.
        ([(0, {"total": "Infinity", "max_steps": "NaN", "step": 3})], "step 3"),
        ([(0, {"type": "started", "max_steps": 40, "from_step": 30})], "step 30/40"),
        ([(0, {"type": "started", "max_steps": 4, "from_step": "Infinity"})], "step 0/4"),
        ([(0, {"type": "started", "max_steps": "x", "from_step": "x"})], ""),
        (
            [STARTED, (1, {"type": "logprobs", "step": 0, "tag": "total", "total": 2.7})],
            "step 0/40",
        ),
        ([(0, {"type": "stage", "doing": "loading the model"})], "loading the model"),
        ([STARTED, GATE], "teacher gate: 12/48 answers · step 0/40"),
        ([STARTED, GATE, (9, {"type": "stage", "doing": "preparing"})], "preparing · step 0/40"),
        ([STARTED, GATE, (9, {"step": 1})], "step 1/40"),
        # The gate was no part of a step's time.
        (
            [STARTED, GATE, (9, {"step": 1}), (11, {"step": 2})],
            "step 2/40 · 2 s/step · 1m16s left",
        ),
        ([(0, {"type": "stage", "doing": "loading the model"}), STARTED], "step 0/40"),
        (
            [STARTED, (0, {"type": "stage", "doing": "measuring"}), (0, {"step": 0, "loss": 2.0})],
            "measuring · step 0/40 · loss 2",
        ),
        (
            [STARTED, (0, {"type": "stage", "doing": "measuring"}), AT_HALF, (10, {"step": 20})],
            "step 20/40 · 2 steps/s · 10s left",
        ),
        ([STARTED, (80, {"step": 40, "loss": 0.1})], "step 40/40 · 2 s/step · loss 0.1"),
        # At the end it measures: no time is left, and what it does is said until the loss comes.
        (
            [STARTED, (78, {"step": 39}), LAST_GATE],
            "trying the demonstrations · step 40/40 · 2 s/step",
        ),
        (
            [STARTED, LAST_GATE, (85, {"step": 40, "tag": "everyday", "kl_to_base": 0.1})],
            "trying the demonstrations · step 40/40 · 2 s/step",
        ),
        ([STARTED, LAST_GATE, (85, {"step": 40, "loss": 0.1})], "step 40/40 · 2 s/step · loss 0.1"),
        (
            [STARTED, (80, {"step": 40}), (80, {"type": "stage", "doing": "saving", "step": 40})],
            "saving · step 40/40 · 2 s/step",
        ),
        # A step that takes longer than its share is not over.
        (
            [STARTED, (2, {"step": 1}), (78, {"step": 39}), (81, {"type": "x"})],
            "step 39/40 · 2 s/step",
        ),
        ([STARTED, (5, {"step": True}), (5, {"step": "x", "loss": "NaN"})], "step 0/40 · loss nan"),
    ],
)
def test_words(events: list[tuple[float, Mapping[str, Any]]], words: str) -> None:
    last = max((second for second, _ in events), default=0.0)
    assert progress(*events).words(START + timedelta(seconds=last)) == words


def batches(seconds: float, size: int, total: int) -> list[tuple[float, Mapping[str, Any]]]:
    """What a job logs that answers in batches: the first answer at once, then every two seconds."""
    started = {"type": "started", "max_steps": total, "from_step": 0, "unit": "answer"}
    arrivals = [(batch + 1) * seconds for batch in range(total // size) for _ in range(size)]
    events: list[tuple[float, Mapping[str, Any]]] = [(0.0, started), (seconds, {"step": 1})]
    second = seconds
    while second < arrivals[-1]:
        second = min(second + 2.0, arrivals[-1])
        done = sum(arrival <= second for arrival in arrivals)
        reached_s = max(arrival for arrival in arrivals if arrival <= second)
        events.append((second, {"step": done, "elapsed_s": reached_s}))
    return events


@pytest.mark.parametrize(("seconds", "size"), [(5.5, 64), (17.0, 64), (5.5, 1), (3.0, 8)])
def test_time_left_of_answers_in_batches_is_about_right(seconds: float, size: int) -> None:
    total = 20 * size
    events = batches(seconds, size, total)
    foretold = 0
    for place in range(2, len(events)):
        now_s = events[place - 1][0]
        now = progress(*events[:place])
        left_s = now.left_s(START + timedelta(seconds=now_s))
        if left_s is not None:
            foretold += 1
            true_s = events[-1][0] - now_s
            assert true_s / 2.2 <= left_s <= 2.2 * true_s + seconds
    assert foretold > len(events) / 2
    # The control: as if the first answer told of the others.
    step = events[1][1]["step"]
    assert size == 1 or (total - step) * seconds / step > 7 * events[-1][0]


def test_no_time_is_left_of_answers_that_are_all_in_one_batch() -> None:
    events = batches(5.5, 64, 128)[:3]  # 64 of them, told 2 s later than the first
    assert progress(*events).words(START + timedelta(seconds=7.5)) == "answer 64/128"
    slow = [*events[:2], (11.0, {"step": 64})]  # the control: the wait was as long once more
    assert "left" in progress(*slow).words(START + timedelta(seconds=11.0))


def test_what_does_not_run_does_nothing() -> None:
    job = JobRecord(id="ftjob-1", type="fine-tuning", script="", params={}, status="in_progress")
    loading = Progress(1, doing="loading the model")
    assert loading.of(job).words() == "loading the model"
    for status in ("pending", "completed", "failed", "canceled"):
        assert loading.of(replace(job, status=status)).words() == ""


def test_a_new_run_begins_anew() -> None:
    now = progress(STARTED, (10.0, {"step": 20, "loss": 1.0}))
    again = now.after(EventRecord(9, 2, {"step": 1}, START))
    assert (again.run_id, again.step, again.total, again.figures) == (2, 1, None, {})


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.4, "59s"), (60, "1m00s"), (80, "1m20s"), (3599, "59m59s"), (3600, "1h00m")]
    + [(7500, "2h05m"), (86_399, "23h59m"), (86_400, "1d00h"), (273_600, "3d04h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def scenes() -> list[tuple[JobRecord, Progress, str]]:
    """A job that waits, begins, trains and completes."""
    job = JobRecord(id="ftjob-1", type="fine-tuning", script="", params={})
    now = datetime.now(UTC)
    began = now - timedelta(seconds=20)
    half = Progress(1, 10, 20, began_at=began, reached_at=now, figures={"loss": 0.5})
    half = replace(half, first_at=began + timedelta(seconds=2), first_step=1)
    end = replace(half, step=20, reached_at=now + timedelta(seconds=20), figures={"loss": 0.25})
    expected = "about 1m00s, reckoned from ftjob-0"
    running = replace(job, status="in_progress")
    return [
        (job, Progress(), f"behind ftjob-0 · {expected}"),
        (running, Progress(1, doing="loading the model"), expected),
        (running, Progress(1, total=20, doing="trying the demonstrations"), expected),
        (running, half, ""),
        (replace(job, status="completed"), end, ""),
    ]


TOLD = """\
ftjob-1 · pending: behind ftjob-0 · about 1m00s, reckoned from ftjob-0
ftjob-1 · in progress: about 1m00s, reckoned from ftjob-0 · loading the model
ftjob-1 · in progress: about 1m00s, reckoned from ftjob-0 · trying the demonstrations · step 0/20
ftjob-1 · in progress · step 10/20 · 2 s/step · 20s left · loss 0.5
ftjob-1 · completed · step 20/20 · 2 s/step · loss 0.25
"""


def test_where_nothing_can_be_replaced(capsys: pytest.CaptureFixture[str]) -> None:
    with open_display("ftjob-1") as display:
        for scene in scenes():
            display.show(*scene)
            display.show(*scene)  # what is known is not said again
    assert capsys.readouterr().err == TOLD


def test_lines_come_while_nothing_is_new(capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter([0, 1, 10, 12, 20, 21, 22, 40, 82, 83])
    lines = _Lines(lambda: float(next(clock)))
    waits, _, _, half, done = scenes()
    loading = (half[0], Progress(1, doing="loading the model"), "")
    for scene in (loading, loading, loading, loading, half, half, waits, waits, waits, done):
        lines.show(*scene)
    assert capsys.readouterr().err.splitlines() == [
        "ftjob-1 · in progress · loading the model",
        "ftjob-1 · in progress · loading the model · for 10s",
        "ftjob-1 · in progress · step 10/20 · 2 s/step · 20s left · loss 0.5",
        "ftjob-1 · pending: behind ftjob-0 · about 1m00s, reckoned from ftjob-0",
        "ftjob-1 · pending: behind ftjob-0 · about 1m00s, reckoned from ftjob-0 · for 1m00s",
        "ftjob-1 · completed · step 20/20 · 2 s/step · loss 0.25",
    ]


def test_in_a_notebook() -> None:
    shown: list[str] = []

    class Handle:
        def update(self, bar: Any) -> None:
            shown.append(bar._repr_html_())

    bar = _NotebookBar(lambda bar, display_id: Handle())
    for scene in scenes():
        bar.show(*scene)
        bar.show(*scene)
    progress = ["<progress>", "<progress>", '<progress value="0" max="20">']
    progress.append('<progress value="10" max="20">')
    progress.append('<progress value="20" max="20">')
    lines = zip(progress, TOLD.splitlines(), strict=True)
    assert shown == [f"{begin}</progress> {line}" for begin, line in lines]


def test_on_a_terminal() -> None:
    console = Console(file=StringIO(), width=120, color_system=None, legacy_windows=False)
    progress = _terminal_bar(console)
    bar = _Bar(progress, "ftjob-1")
    shown: list[str] = []
    for scene in scenes():
        bar.show(*scene)
        with console.capture() as printed:
            console.print(progress.get_renderable())
        shown.append(" ".join(printed.get().split()))
    told = [line.partition(" · ")[2] for line in TOLD.splitlines()]
    assert [line.partition("0:00:00 ")[2] for line in shown] == told
    assert shown[3].startswith("ftjob-1 ━━━━━━━━━━") and shown[4].count("━") == 20


@pytest.mark.parametrize("width", [120, 80, 40, 24])
def test_a_narrow_terminal_has_all_the_words(width: int) -> None:
    """Below the bar where they do not fit beside it; nothing is cut but a bar."""
    console = Console(file=StringIO(), width=width, color_system=None, legacy_windows=False)
    for name in ("ftjob-ca9019c3997e", "ftjob-ca9019c3997e-" + "seed" * 5):
        progress = _terminal_bar(console)
        bar = _Bar(progress, name)
        for job, now, note in scenes():
            bar.show(job, now, note)
            with console.capture() as printed:
                console.print(progress.get_renderable())
            lines = printed.get().splitlines()
            shown = printed.get().replace("·", "").split()
            words = str(progress.tasks[0].fields["status"]).replace("·", "").split()
            assert shown[-len(words) :] == words and "0:00:00" in lines[0]
            assert max(map(len, lines)) <= width
            if width >= len(name) + 14:
                assert lines[0].startswith(name) and ("━" in lines[0] or now.step == 0)


def test_a_job_that_was_canceled_has_no_time_left() -> None:
    now = progress(STARTED, AT_4_S, (41.0, {"step": 10, "loss": 0.51}))
    job = JobRecord("ftjob-1", "fine-tuning", "", {}, status="canceled")
    at = START + timedelta(seconds=41)
    assert now.of(job).words(at) == "step 10/40 · 4.1 s/step · loss 0.51"
    assert "2m03s left" in now.of(replace(job, status="in_progress")).words(at), "the control"


def test_what_a_job_waits_for() -> None:
    job = JobRecord(
        id="ftjob-c",
        type="fine-tuning",
        script="",
        params={"cloud_type": "ALL"},
        requires_vram_gb=24,
    )
    a, b = replace(job, id="ftjob-a", status="in_progress"), replace(job, id="ftjob-b")
    served = replace(a, id="apijob-a", type="api")
    nobody, one = Ahead(), Ahead().then(b)
    assert waits_on_this_machine(job, [], nobody) == "for its worker, which is starting"
    assert waits_on_this_machine(job, [a], nobody) == "behind ftjob-a"
    assert waits_on_this_machine(job, [a], one) == "behind ftjob-a and 1 more"
    # A script holds no worker, and a model that is served has its own.
    assert waits_on_this_machine(job, [replace(a, type="script")], one) == "behind ftjob-b"
    assert waits_on_this_machine(job, [served], nobody) == "for its worker, which is starting"
    assert waits_on_this_machine(job, [served], nobody.then(served).then(b)) == "behind ftjob-b"
    assert waits_on_this_machine(served, [a], one) == "for its worker, which is starting"
    # A question goes beside what runs where the GPU has room for both, and there always: memory of
    # the machine itself it waits for when it runs.
    asked = replace(a, id="inferencejob-a", type="inference", priority=1000, status="pending")
    assert waits_on_this_machine(asked, [a], nobody, 125.0) == "for its worker, which is starting"
    assert (
        waits_on_this_machine(asked, [a], nobody, 125.0, 48) == "for its worker, which is starting"
    )
    full = "behind ftjob-a (2m05s left): together they need 48 GB of a GPU with 47"
    assert waits_on_this_machine(asked, [a], nobody, 125.0, 47) == full
    assert (
        waits_on_this_machine(job, [a], one, 125.0, 47) == "behind ftjob-a (2m05s left) and 1 more"
    )
    other = replace(asked, id="inferencejob-b", status="in_progress", worker_id="answers-1")
    assert waits_on_this_machine(asked, [a, other], one, None, 72) == "behind inferencejob-b"
    assert waits_in_project(job, nobody) == "for a worker with 24 GB of GPU memory (ALL)"
    named = replace(job, allowed_hardware=("1x H200", "2x H100S"))
    assert waits_in_project(named, one) == "for 1x H200 or 2x H100S (ALL), 1 before it"
