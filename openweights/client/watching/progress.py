"""How far a run has come, and showing it: a bar on a terminal, a bar in a notebook, and elsewhere a
line every few seconds.
"""

from __future__ import annotations

import html
import math
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from textwrap import wrap
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary

from openweights.client.event_json import as_number
from openweights.client.watching.metrics import EVAL, LEADING, TOTALS, TRAIN, leading_words
from openweights.client.watching.notes import notebook_display
from openweights.events import BlockwiseLogProbs, LogProbs, Stage, Started
from openweights.types import ENDED, EventRecord, JobRecord

if TYPE_CHECKING:
    from openweights.backends.base import Backend

_LINE_EVERY_S = 10.0
_PENDING_EVERY_S = 60.0
_BAR, _LEAST_BAR = 20, 5  # characters
_TIME = len("0:00:00")
_DOT = " · "
_STEP = "step"  # of training: they come one by one
_WHOLE = 10.0  # rates from there on are told without decimals
_MOST_KNOWN = 1000  # first steps of runs
# Of each store, by run, start and the start's moment.
_FIRST_STEPS: WeakKeyDictionary[Backend, dict[tuple[int, int, datetime], EventRecord]] = (
    WeakKeyDictionary()
)
# Keys of these are names of sets.
_NAMED_BY_USERS = (LogProbs.type, BlockwiseLogProbs.type)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run has come, as its events tell.

    Attributes:
        total: Steps in all, once an event names them.
        from_step: Where it began: above 0 when it went on from a checkpoint.
        began_at: When the first of its steps began.
        first_step, first_at: The first step that it was heard to reach, and when it did.
        reached_at: When `step` was reached.
        figures: The last of each measure that can lead.
        unit: What a step is.
        tokens: Of the answers of a model, so far.
        tokens_per_s: Of a model that answers.
        doing: What it does while it makes no step.
        part: How much of that is done, where that is counted.
        has_ended: Nothing is left to do, whether all was done or not.
    """

    run_id: int = 0
    step: int = 0
    total: int | None = None
    from_step: int = 0
    began_at: datetime | None = None
    first_step: int = 0
    first_at: datetime | None = None
    reached_at: datetime | None = None
    figures: Mapping[str, float] = field(default_factory=dict[str, float])
    unit: str = _STEP
    tokens: int = 0
    tokens_per_s: float | None = None
    doing: str = ""
    part: str = ""
    has_ended: bool = False

    def after(self, event: EventRecord) -> Progress:
        """With what one more event says."""
        now = self if event.run_id == self.run_id else Progress(event.run_id)
        data, changes = event.data, dict[str, Any]()
        for key in () if data.get("type") in _NAMED_BY_USERS else TOTALS:
            if (total := _finite(data.get(key))) > 0:
                changes["total"] = int(total)
        if data.get("type") == Started.type:
            from_step = int(_finite(data.get("from_step")))
            reached = max(now.step, from_step)
            changes |= {"from_step": from_step, "step": reached, "began_at": event.created_at}
            changes |= {"first_step": 0, "first_at": None}
            changes |= {"doing": "", "unit": str(data.get("unit") or _STEP)}
        step = data.get("step")
        if isinstance(step, int) and not isinstance(step, bool) and step >= now.step:
            if step > now.step:
                changes |= {"step": step, "doing": "", **now._arrival(step, event)}
            elif step and _is_of_training(data):
                changes["doing"] = ""
        if data.get("type") == Stage.type:
            changes |= {name: str(data.get(name) or "") for name in ("doing", "part")}
        if "type" not in data:
            logged = ((name, as_number(data.get(name))) for name in LEADING)
            told = {name: float(number) for name, number in logged if number is not None}
            changes["figures"] = {**now.figures, **told}
        if (rate := as_number(data.get("tokens_per_s"))) is not None:
            changes |= {"tokens_per_s": float(rate), "tokens": int(_finite(data.get("tokens")))}
        return replace(now, **changes)

    def of(self, job: JobRecord) -> Progress:
        """As far as it concerns the job as it stands: one that does not run does nothing, and one
        that waits has yet to begin.
        """
        if job.status == "pending":
            return Progress()
        return self if job.status == "in_progress" else replace(self, doing="", has_ended=True)

    def _arrival(self, step: int, event: EventRecord) -> dict[str, Any]:
        """When `step` was reached: as the job has it, else when it was told of."""
        elapsed_s = _finite(event.data.get("elapsed_s"))
        at = event.created_at
        if self.began_at is not None and elapsed_s:
            at = self.began_at + timedelta(seconds=elapsed_s)
        first = {} if self.first_at else {"first_step": step, "first_at": at}
        return {"reached_at": at, **first}

    @property
    def seconds_per_step(self) -> float | None:
        """Between the first step that was heard of and the last: what came before the first was
        measuring, too, and warming up. None while that is a single moment, unless it is the end,
        and as long as answers may all be of one batch, whose next takes as long as the first.
        """
        if self.began_at is None or self.reached_at is None or self.first_at is None:
            return None
        waited_s = (self.first_at - self.began_at).total_seconds()
        since_s = (self.reached_at - self.first_at).total_seconds()
        done = self.step - self.first_step
        if done > 0 and since_s >= 0 and (self.unit == _STEP or since_s >= waited_s):
            return since_s / done
        done = self.step - self.from_step
        is_over = self.total is not None and self.step >= self.total
        return max(0.0, waited_s + since_s) / done if is_over and done > 0 else None

    def left_s(self, now: datetime | None = None) -> float | None:
        """Seconds to the last step, if it goes on at this rate; None when nobody can tell, as
        before the second step is heard of, behind the last, in one that takes longer than the
        others, because it measures, and when it has ended before.
        """
        if (
            self.has_ended
            or self.total is None
            or not self.seconds_per_step
            or self.reached_at is None
        ):
            return None
        left = (self.total - self.step) * self.seconds_per_step
        since_s = ((now or datetime.now(UTC)) - self.reached_at).total_seconds()
        return left - since_s if round(left - since_s) > 0 else None

    def words(self, now: datetime | None = None) -> str:
        """As in `step 12/32 · 4.1 s/step · 1m20s left · loss 0.52`, with the reward in place of
        the loss where there is one, or, while it makes no step, `loading the model` or `teacher
        gate: 12/48 answers`; empty when nothing is known.
        """
        of = f"/{self.total}" if self.total else ""
        parts = [": ".join(filter(None, (self.doing, self.part)))] if self.doing else []
        parts += [f"{self.unit} {self.step}{of}"] if self.step or of else []
        if rate := self.seconds_per_step:
            is_slow = rate >= 1
            per = f"s/{self.unit}" if is_slow else f"{self.unit}s/s"
            parts.append(f"{figure(rate if is_slow else 1 / rate)} {per}")
        left_s = self.left_s(now)
        if left_s is not None and self.total and self.step < self.total:
            parts.append(f"{duration(left_s)} left")
        if self.tokens and not self.step:  # before the first answer they alone tell
            parts.append(f"{self.tokens} token{'' if self.tokens == 1 else 's'}")
        if self.tokens_per_s:  # 0 where every answer was there already
            parts.append(f"{figure(self.tokens_per_s)} tokens/s")
        return _DOT.join(filter(None, (*parts, leading_words(self.figures))))


def _is_of_training(data: Mapping[str, Any]) -> bool:
    """Whether a trainer has logged it of its own sets: what else is measured at a step comes before
    its loss.
    """
    return "type" not in data and data.get("tag", TRAIN) in (TRAIN, EVAL)


def figure(rate: float) -> str:
    """A rate for people."""
    return f"{rate:.0f}" if rate >= _WHOLE else f"{rate:.2g}"


def _finite(value: object) -> float:
    number = as_number(value)
    return number if number is not None and math.isfinite(number) else 0


def duration(seconds: float) -> str:
    """In its two largest units: `42s`, `1m20s`, `2h05m`, `3d04h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    minutes, hours, days = whole // 60, whole // 3600, whole // 86_400
    if hours == 0:
        return f"{minutes}m{whole % 60:02d}s"
    if days == 0:
        return f"{hours}h{minutes % 60:02d}m"
    return f"{days}d{hours % 24:02d}h"


def read_progress(backend: Backend, job: JobRecord) -> Progress:
    """How far the last run of a job has come, without reading its whole history."""
    if job.status == "pending":
        return Progress()
    runs = backend.list_runs(job_id=job.id, limit=1)
    if not runs:
        return Progress()
    run = runs[-1]
    progress = Progress(run.id)
    kinds = (Started.type, Stage.type)
    told = [event for kind in kinds for event in backend.list_events(run_id=run.id, type=kind)]
    told += _first_of_the_steps(backend, run.id, told)
    at = 0
    for event in sorted(told, key=lambda event: event.id):
        progress, at = progress.after(event), event.id
    keys = ["step", *LEADING, "tokens", "tokens_per_s", "elapsed_s", *TOTALS]
    last = backend.latest_values(keys, run_id=run.id)
    moment = run.ended_at or datetime.now(UTC)
    now = progress.after(EventRecord(0, run.id, last, moment))
    # A step behind its stage has ended that; at the step itself the events between them tell.
    doing = "" if now.step > progress.step else _still_doing(backend, progress, at)
    return replace(now, doing=doing).of(job)


def _first_of_the_steps(
    backend: Backend, run_id: int, told: Sequence[EventRecord]
) -> list[EventRecord]:
    """The event of the first step behind the last start of the work, if there is one. It stays what
    it is: whoever looks at a run again and again reads its history for that once.
    """
    starts = [event for event in told if event.data.get("type") == Started.type]
    if not starts:
        return []
    known = _FIRST_STEPS.setdefault(backend, {})
    key = (run_id, starts[-1].id, starts[-1].created_at)
    if key in known:
        return [known[key]]
    progress = Progress().after(starts[-1])
    for event in backend.list_events(run_id=run_id, after=starts[-1].id):
        if progress.after(event).first_at:
            if len(known) >= _MOST_KNOWN:
                known.clear()
            known[key] = event
            return [event]
    return []


def _still_doing(backend: Backend, progress: Progress, at: int) -> str:
    """What the run does since its last stage, the event `at`."""
    later = iter(backend.list_events(run_id=progress.run_id, after=at) if progress.doing else ())
    while progress.doing and (event := next(later, None)):
        progress = progress.after(event)
    return progress.doing


class Display(Protocol):
    """What shows a job that is waited for."""

    def show(self, job: JobRecord, progress: Progress, note: str) -> None:
        """The job as it stands; `note` says what keeps it, or what is expected of it."""
        ...


def status_word(job: JobRecord) -> str:
    """A job's status for people. A model that was served has not failed to complete when its users
    leave: it was there for as long as it was wanted, and has ended.
    """
    was_served = job.id.startswith("apijob-") and job.attempts > 0
    return "ended" if was_served and job.status == "canceled" else job.status


def _status(job: JobRecord, note: str) -> str:
    words = status_word(job).replace("_", " ")
    return f"{words}: {note}" if note else words


class _Bar:
    """On a terminal."""

    def __init__(self, bar: Any, job_id: str) -> None:
        self._bar = bar
        self._task = bar.add_task(job_id, total=None, status="pending")

    def show(self, job: JobRecord, progress: Progress, note: str) -> None:
        words = _DOT.join(filter(None, (_status(job, note), progress.words())))
        # Without a total the bar pulses; there is none for a job that nobody knows the length of.
        self._bar.update(self._task, completed=progress.step, total=progress.total, status=words)


class _NotebookBar:
    """In a notebook: one output that is replaced, in HTML, without a terminal's codes."""

    def __init__(self, display: Any) -> None:
        self._text = ""
        self._progress = Progress()
        self._handle = display(self, display_id=True)

    def show(self, job: JobRecord, progress: Progress, note: str) -> None:
        words = (job.id, _status(job, note), progress.words())
        text = _DOT.join(filter(None, words))
        if text != self._text:
            self._text, self._progress = text, progress
            self._handle.update(self)

    def __repr__(self) -> str:
        return self._text

    def _repr_html_(self) -> str:
        step, total = self._progress.step, self._progress.total
        values = f' value="{min(step, total)}" max="{total}"' if total else ""
        return f"<progress{values}></progress> {html.escape(self._text)}"


class _Lines:
    """Where nothing can be replaced, such as a file: a line when the status or what the job does
    changes, and every few seconds while it runs; where nothing is new, how long that has lasted.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._told = self._line = ""
        self._since = self._due_at = 0.0

    def show(self, job: JobRecord, progress: Progress, note: str) -> None:
        status = _status(job, note)
        state = f"{job.status} {progress.run_id} {progress.doing}"
        line = _DOT.join(filter(None, (job.id, status, progress.words())))
        if not self._told and job.status in ENDED:
            return  # there was nothing to wait for
        now = self._clock()
        if state == self._told and now < self._due_at:
            return
        if line != self._line:
            self._line, self._since = line, now
            said = line
        else:
            said = f"{line} · for {duration(now - self._since)}"
        self._told = state
        self._due_at = now + (_LINE_EVERY_S if job.status == "in_progress" else _PENDING_EVERY_S)
        sys.stderr.write(f"{said}\n")
        sys.stderr.flush()


@contextmanager
def open_display(job_id: str) -> Generator[Display]:
    """What can be shown here."""
    display = notebook_display()
    if display is not None:
        yield _NotebookBar(display)
    elif not sys.stderr.isatty():
        yield _Lines()
    else:
        from rich.console import Console

        with _terminal_bar(Console(stderr=True)) as bar:
            yield _Bar(bar, job_id)


def _terminal_bar(console: Any) -> Any:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Column
    from rich.text import Text

    class _Fitting(Progress):
        """As `bar_layout` says, anew for each frame: the window may change."""

        def get_renderables(self) -> Any:
            for task in self.tasks:
                words = str(task.fields["status"])
                width, lines = bar_layout(self.console.width, task.description, words)
                bar = [BarColumn(bar_width=width)] if width else []
                beside = [] if lines else [TextColumn("{task.fields[status]}", markup=False)]
                cut = Column(max_width=self.console.width - _TIME - 1, no_wrap=True)
                name = TextColumn("{task.description}", markup=False, table_column=cut)
                self.columns = (name, *bar, TimeElapsedColumn(), *beside)
                yield self.make_tasks_table([task])
                yield from map(Text, lines)

    return _Fitting(console=console)


def bar_layout(room: int, name: str, words: str) -> tuple[int, list[str]]:
    """How wide a bar is between `name` and the time, and the lines of words that have no place
    beside them: none where all fits.

    Args:
        room: Characters of a line of the terminal.
    """
    left = room - len(name) - _TIME - 2
    if _BAR + 1 + len(words) <= left:
        return _BAR, []
    width = min(_BAR, left)
    lines: list[str] = []
    for part in (line for told in words.split(_DOT) for line in wrap(told, room)):
        if lines and len(lines[-1]) + len(_DOT) + len(part) <= room:
            lines[-1] += _DOT + part
        else:
            lines.append(part)
    return (width if width >= _LEAST_BAR else 0), lines
