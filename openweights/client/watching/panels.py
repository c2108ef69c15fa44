"""Which of a job's measures are drawn, in which order, and which stand in one panel: for figures
and for the page alike. Nothing here draws.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from openweights import events
from openweights.client.event_json import as_number
from openweights.client.watching.meaning import plain_name
from openweights.client.watching.metrics import EVAL, TRAIN, Row, series
from openweights.types import JobRecord

_ROUNDING = 1e-9  # what differs by no more than this, as `sampling_kl` of one engine, is constant
# What a study looks at first comes first; names that match nothing stand between the last two.
_ORDER = [
    re.compile(pattern, re.DOTALL)
    for pattern in (
        r"reward",
        # Where completions earn the same, a reward that climbs teaches nothing more.
        r"reward_std",
        r"frac_reward_zero_std",
        r"loss",
        r"eval_loss",
        r"rewards/(accuracies|margins)",
        r"rewards/.*",
        r"multiple_choice/.*",
        r"logprobs/.*",
        r"logprob_block/.*",
        # Is the student where its teacher is, how far from the base, and what was it to gain?
        r"agreement",
        r"divergence",
        r"kl_to_base",
        r"teacher gate|everyday/.*",
        r"kl.*|entropy|mean_token_accuracy",
        r"teacher_drift",
        r"agreement by token",
        r"logps/.*|nll_loss|log_odds.*",
        r"reward.*|failed_fraction|frac_.*",
        r"comp.*length|.*_share|.*_ratio",
        r"(?!(?:grad_norm|learning_rate)\Z).*",
        r"grad_norm|learning_rate",
    )
]
# Measures of one panel, which its name for the event's type says, with a line for each.
_PANELS = {events.TeacherGate.type: "teacher gate", events.Agreement.type: "agreement by token"}
_TOGETHER = re.compile(
    rf"({events.TeacherGate.type}(?=/(?:student|teacher|same_format)$)|{events.Agreement.type})/(.+)"
)
# By the answers' first and last characters; which format a skill has, the gate does not know.
_LABELS = {"same_format": "begins and ends as teacher's"}
# Timings, counts and extremes are left to the table.
_TABLE_ONLY = re.compile(
    r"epoch|total|max_steps|total_\w+|(eval_)?((num_)?tokens|runtime)|step_time|.*(_s|_per_second)"
    r"|.*/(questions|rows|std|\w*(min|max|terminated)_\w*|\w+_(min|max))|teacher_gate/.*"
)

# What says by standing still that nothing is learned.
_SEEN_STILL = re.compile(r"loss|reward|reward_std|frac_reward_zero_std")

# What explains a loss, a reward or a score; where jobs are compared it comes after these.
_EXPLAINS = re.compile(
    r"agreement.*|divergence|kl|sampling_kl|teacher_drift|entropy|mean_token_accuracy"
    r"|rewards/(chosen|rejected|\w+_reward/.*)|logps/.*|nll_loss|log_odds.*|logits/.*"
    r"|reward_.*|failed_fraction|frac_.*|comp.*length|.*_share|.*_ratio|.*ratio/.*"
    r"|grad_norm|learning_rate|adapter_moved/weight_norm"
)

Curves = Mapping[str, tuple[Sequence[float], Sequence[float]]]  # of each measure steps and values


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a panel.

    Attributes:
        low, high: Edges of a band around it, value by value; empty for none.
        name: Of the measure, as `series_name` calls it.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    name: str = ""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a job's measures go; none is in two of these, and of equal ones there is one.

    Attributes:
        panels: What is drawn, by title, in order.
        more: What changes, too, but is mostly looked up: timings, counts, extremes.
        still: What was measured once, or never changes: no line shows more than its value.
    """

    panels: dict[str, list[Line]] = field(default_factory=dict[str, list[Line]])
    more: dict[str, list[Line]] = field(default_factory=dict[str, list[Line]])
    still: dict[str, list[Line]] = field(default_factory=dict[str, list[Line]])


@dataclass(frozen=True, slots=True)
class GateBars:
    """What the teacher gate of SDFT found before the first step.

    Attributes:
        verdict: What it did with the job, in words for a title.
        scores: Of each measure, the one that decided first, what each who answered has: the student
            first, then by where the demonstration stood.
        chosen: Whose figures count as the teacher's.
        needed: What that teacher has to reach of the measure that decided.
        rows: How many prompts were answered.
    """

    verdict: str
    scores: dict[str, dict[str, float]]
    chosen: str
    needed: float
    rows: int


_GATE_MEASURES = ("reward", "rouge_l", "exact", "format")


def gate_bars(data: Mapping[str, Any], mode: str) -> GateBars | None:
    """What a `TeacherGate` of step 0 says; None where it names no measure that decided.

    Args:
        mode: The job's `sdft_gate`.
    """
    decided = str(data.get("measure"))
    student, margin = (as_number(data.get(name)) for name in ("student", "margin"))
    readers = [key.removesuffix(f"_{decided}") for key in data if key.endswith(f"_{decided}")]
    if decided not in _GATE_MEASURES or student is None or margin is None:
        return None
    scores: dict[str, dict[str, float]] = {}
    for measure in sorted(_GATE_MEASURES, key=lambda name: name != decided):
        known = ((who, as_number(data.get(f"{who}_{measure}"))) for who in sorted(readers))
        own = {who: value for who, value in known if value is not None}
        if own:
            scores[measure] = dict(sorted(own.items(), key=lambda one: one[0] != "student"))
    repeats = data.get("repeats", 1)
    chosen = f"{data.get('placement')}" + (f"_{repeats}" if repeats != 1 else "")
    verdict = _verdict(passed=bool(data.get("passed")), mode=mode)
    return GateBars(verdict, scores, chosen, student + margin, int(data.get("rows") or 0))


def _verdict(*, passed: bool, mode: str) -> str:
    if passed:
        return "passed the teacher gate"
    return "stopped by the teacher gate" if mode == "stop" else "warned by the teacher gate"


def is_gate_alone(rows: Sequence[Row]) -> bool:
    """Whether the gate has measured something, and no step was made."""
    asked = any(name.startswith(f"{events.TeacherGate.type}/") for row in rows for name in row)
    return asked and all(row["step"] == 0 for row in rows)


def shares_loss(job: JobRecord) -> bool:
    """Whether a job's test set is measured by the loss that it trains: SDFT's has no teacher."""
    return job.validated_params.get("loss") != "sdft"


def layout(curves: Curves, *, shares_loss: bool = True) -> Layout:
    """A panel for each measure, train and eval together, a line for each tag.

    Args:
        shares_loss: Whether the loss of the test set is the one that is trained.
    """
    panels: dict[str, list[Line]] = {}
    for name, (steps, values) in curves.items():
        title, label = _place(name, shares_loss)
        panels.setdefault(title, []).append(Line(label, steps, values, name=name))
    ordered = {title: panels[title] for title in sorted(panels, key=rank_of)}
    found = Layout()
    for title, lines in _without_copies(ordered).items():
        kind = found.more if _TABLE_ONLY.fullmatch(title) else found.panels
        kind = kind if _has_a_line(title, lines) else found.still
        kind[title] = sorted(lines, key=_rank_in_panel(title))
    return found


def _place(key: str, shares_loss: bool) -> tuple[str, str]:
    """Title of the measure's panel, and what its line is called there."""
    name, _, tag = key.removesuffix("]").partition("[")
    if name.startswith("eval_"):
        is_other = name == "eval_loss" and not shares_loss
        return name if is_other else name.removeprefix("eval_"), EVAL
    if together := _TOGETHER.fullmatch(name):
        return _PANELS[together[1]], _LABELS.get(together[2], together[2])
    return name, tag or TRAIN


def _rank_in_panel(title: str) -> Callable[[Line], int]:
    """Places along a completion by their number, all else as it was first measured."""
    if title != _PANELS[events.Agreement.type]:
        return lambda line: 0
    return lambda line: int(re.match(r"\d*", line.label)[0] or 0)  # type: ignore[index]


def _has_a_line(title: str, lines: Sequence[Line]) -> bool:
    """A loss that stays where it is is worth seeing, too."""
    is_seen = _SEEN_STILL.fullmatch(title) and any(len(line.x) > 1 for line in lines)
    return bool(is_seen) or any(map(_moves, lines))


def _moves(line: Line) -> bool:
    """Whether it has two points of which one is not as the other."""
    values = [value for value in line.y if math.isfinite(value)]
    return len(values) > 1 and max(values) - min(values) > _ROUNDING


def metric_panels(rows: Sequence[Row], *, shares_loss: bool = True) -> dict[str, list[Line]]:
    """What of the table is drawn in a figure: `Layout.panels`; where that is nothing, all else, and
    of it what no figure shows otherwise only where there is no more.
    """
    curves: dict[str, tuple[Sequence[float], Sequence[float]]] = {}
    for name, points in series(rows).items():
        curves[name] = ([step for step, _ in points], [value for _, value in points])
    found = layout(curves, shares_loss=shares_loss)
    told = {t: lines for t, lines in found.still.items() if not _TABLE_ONLY.fullmatch(t)}
    return found.panels or told or found.more or found.still


def rank_of(measure: str) -> int:
    """What a study looks at first has the least."""
    bare = measure.partition("[")[0]
    return next(place for place, known in enumerate(_ORDER) if known.fullmatch(bare))


def is_looked_up(name: str) -> bool:
    """Whether a measure, as `series_name` or a comparison calls it, explains another one, instead
    of saying itself how good a model is, or how far it has moved.
    """
    title, label = _place(plain_name(name), True)
    if title == _PANELS[events.TeacherGate.type]:
        return label not in ("student", "teacher")
    return _EXPLAINS.fullmatch(title) is not None or _TABLE_ONLY.fullmatch(title) is not None


def measure_rank(name: str) -> int:
    """`rank_of` a measure as `series_name` or a comparison calls it; what is looked up seldom comes
    last.
    """
    title, _ = _place(plain_name(name), True)
    return rank_of(title) + len(_ORDER) * bool(_TABLE_ONLY.fullmatch(title))


def columns_in_order(measures: Mapping[str, int]) -> list[str]:
    """The columns of a table: first what says how good a model is, then what explains that; within
    both what was measured once comes last.

    Args:
        measures: How many values each has.
    """

    def place(name: str) -> tuple[bool, bool, int, bool]:
        is_later = is_looked_up(name) or name.startswith(f"{events.AdapterMoved.type}/")
        is_once = measures[name] == 1
        return is_later, is_once, measure_rank(name), name.startswith("eval_")

    return sorted(measures, key=place)


def _without_copies(panels: Mapping[str, Sequence[Line]]) -> dict[str, Sequence[Line]]:
    """The only reward is the mean of all; a divergence may be the loss. What a figure shows is no
    copy of what it leaves to the table.
    """
    kept: dict[str, Sequence[Line]] = {}
    drawn_first = sorted(panels.items(), key=lambda one: bool(_TABLE_ONLY.fullmatch(one[0])))
    for title, lines in drawn_first:
        # Measures that stand still are often equal, and not copies of each other.
        if not any(map(_moves, lines)) or not any(_is_same(lines, one) for one in kept.values()):
            kept[title] = lines
    return kept


def _is_same(one: Sequence[Line], other: Sequence[Line]) -> bool:
    """Whether every line of `one` is in `other`."""
    return all(
        any(
            line.label == known.label
            and list(line.x) == list(known.x)
            and all(map(_is_close, line.y, known.y))
            for known in other
        )
        for line in one
    )


def _is_close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-6)
