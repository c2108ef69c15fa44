"""The table of what a job has measured, made of its events."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, cast

from openweights import events
from openweights.client.event_json import as_number
from openweights.number_words import number_words
from openweights.types import EventRecord

TRAIN, EVAL = "train", "eval"

# Keys of an event that say how many steps there will be.
TOTALS = ("max_steps", "total_steps", "total")

# What says in one figure how a run goes is the first of these that it measures: the loss of GRPO is
# about 0 whatever is learned, and its reward is what is to rise.
LEADING = ("reward", "loss")

# What a parameter could be called, too, of the measures that docs/measures.md lists.
_KNOWN = re.compile(
    r"(?:eval_)?(?:loss|grad_norm|learning_rate|epoch|step_time|num_tokens"
    r"|\w+_(?:s|per_second|runtime)|mean_token_accuracy|entropy|divergence|agreement"
    r"|teacher_drift|completion_length|eos_share|truncated_share|kl_to_base"
    r"|reward|reward_std|frac_reward_zero_std|failed_fraction|kl|sampling_kl"
    r"|nll_loss|log_odds_chosen|log_odds_ratio)"
)

Row = dict[str, Any]
Series = list[tuple[int, float]]
# What tagged blocks have measured so far, by run, step, tag and the set that they are of.
Blocks = dict[tuple[int, int, str, str], list[float]]

# Events that say something else than how good the model is, or are too many for a table.
_NO_MEASURES = frozenset(
    kind.type
    for kind in (
        events.Stage,
        events.Started,
        events.Reproducibility,
        events.Checkpoint,
        events.Summary,
        events.Pushed,
        events.Completions,
        events.Samples,
    )
)
# Measured once, before the first step.
_BEFORE = frozenset(
    {events.TeacherGate.type, events.LogProbs.type, events.BlockwiseLogProbs.type}
    | {events.MultipleChoice.type}
)


def metric_rows(history: Iterable[EventRecord]) -> list[Row]:
    """One row for each (step, tag): `{"step", "tag", <measure>: number, …}`, by step.

    What a trainer logs keeps its names; its tag is "train", or "eval" for the test set. A number of
    an event with a type is called `<type>/<name>`, such as `multiple_choice/accuracy`, and its tag
    is the name of the set that was measured; of blocks it is their own. Only events with a whole
    `step` and another number count. A step that a later run repeats replaces the earlier run's;
    within a run its events are merged, and log-probabilities of tagged blocks become their mean:
    `logprob_block/mean`, and `logprob_block/mean of <set>` where a further set has the same tag.
    """
    rows: dict[tuple[int, str], tuple[int, Row]] = {}
    tags: dict[str, int] = {}
    blocks: Blocks = {}
    for event in history:
        step, tag, numbers = measures(event, blocks)
        if step is None or not numbers:
            continue
        tags.setdefault(tag, len(tags))
        run_id, row = rows.get((step, tag), (event.run_id, {}))
        row = row if run_id == event.run_id else {}
        rows[step, tag] = (event.run_id, {**row, "step": step, "tag": tag, **numbers})
    ordered = sorted(rows, key=lambda key: (key[0], tags[key[1]]))
    return [rows[key][1] for key in ordered]


def measures(event: EventRecord, blocks: Blocks) -> tuple[int | None, str, dict[str, float]]:
    """Step, tag and numbers of an event; without numbers where it measures nothing.

    Args:
        blocks: Handed from event to event: log-probabilities of tagged blocks come one by one, and
            their mean is what counts.
    """
    data, kind = event.data, kind_of(event)
    step = data.get("step", 0 if kind in _BEFORE else None)
    if not isinstance(step, int) or isinstance(step, bool) or kind in _NO_MEASURES:
        return None, "", {}
    tag = str(data.get("tag") or TRAIN)
    if kind == events.BlockLogProbs.type:
        return step, tag, _block_mean(event, step, tag, blocks)
    return step, tag, dict(_named(data, tag, kind))


def is_known(name: str) -> bool:
    """Whether a measure is called so, be it that nothing has measured it yet."""
    return _KNOWN.fullmatch(name) is not None


def leading_words(values: Mapping[str, object]) -> str:
    """The leading measure among these as in `loss 0.52`; empty when there is none."""
    numbers = ((name, as_number(values.get(name))) for name in LEADING)
    found = (f"{name} {number_words(number, 4)}" for name, number in numbers if number is not None)
    return next(found, "")


def kind_of(event: EventRecord) -> str | None:
    """An event's type, whatever a job has put there; None for metrics."""
    kind = event.data.get("type")
    return None if kind is None else str(kind)


def _block_mean(event: EventRecord, step: int, tag: str, blocks: Blocks) -> dict[str, float]:
    given, source = event.data.get("logprobs"), str(event.data.get("source"))
    found = map(as_number, cast("Sequence[object]", given) if isinstance(given, list) else ())
    values = blocks.setdefault((event.run_id, step, tag, source), [])
    values += [number for number in found if number is not None]
    first = next(other for _, _, known, other in blocks if known == tag)
    name = "mean" if source == first else f"mean of {source}"
    return {f"{events.BlockLogProbs.type}/{name}": fmean(values)} if values else {}


def _named(data: Mapping[str, Any], tag: str, kind: str | None) -> Iterable[tuple[str, float]]:
    for key, value in data.items():
        number = None if key in ("step", "tag") else as_number(value)
        if number is None or (kind is not None and key in TOTALS):
            continue
        if kind is None:
            yield key, number
        elif kind.startswith(events.LogProbs.type):
            # The mean loss goes by the set's name there.
            yield f"{events.LogProbs.type}/{'loss' if key == tag else key}", number
        else:
            yield f"{kind}/{key}", number


def series(rows: Iterable[Row]) -> dict[str, Series]:
    """What is in the table, measure by measure, as `series_name` calls them."""
    found: dict[str, Series] = {}
    for row in rows:
        for name, value in row.items():
            if name not in ("step", "tag"):
                key = series_name(name, row["tag"])
                found.setdefault(key, []).append((row["step"], value))
    return found


def series_name(name: str, tag: str) -> str:
    """`measure`, `eval_measure` of the test set, or `measure[tag]` of another set."""
    if tag == TRAIN:
        return name
    if tag != EVAL:
        return f"{name}[{tag}]"
    # A custom job may log the same name for both.
    return name if name.startswith("eval_") else f"eval_{name}"
