"""Several jobs beside one another: what differs between them, where they ended, their curves."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean

from openweights.client.job_kinds import default_params
from openweights.client.watching.differences import (
    Params,
    differing,
    flat,
    labels_by,
    parameters,
    telling_apart,
)
from openweights.client.watching.file_names import replaced
from openweights.client.watching.meaning import names_apart, plain_name, renamed
from openweights.client.watching.metrics import Row, Series, is_known, series
from openweights.client.watching.panels import Line, columns_in_order, is_looked_up, measure_rank
from openweights.errors import InvalidInputError, closest, shown
from openweights.types import JobRecord

Curves = dict[str, Series]
Points = Sequence[tuple[int, float, float]]  # step, x, y


def asked_for(jobs: Sequence[JobRecord]) -> list[str]:
    """Of the parameters that differ those that somebody has chosen, or that all of the jobs have:
    what one loss has and the others do not is no difference while it is at its default.
    """
    given = [parameters(job) for job in jobs]
    usual = [dict(flat(default_params(job), "")) for job in jobs]

    def is_chosen(name: str) -> bool:
        values = zip(given, usual, strict=True)
        return any(name in own and own[name] != default.get(name) for own, default in values)

    return [n for n in differing(given) if all(n in own for own in given) or is_chosen(n)]


def curves_apart(jobs: Sequence[Params], tables: Iterable[Iterable[Row]]) -> list[Curves]:
    """The curves of each job, under names that mean the same in all of them."""
    return [
        {renamed(name, apart): points for name, points in series(table).items()}
        for apart, table in zip(names_apart(jobs), tables, strict=True)
    ]


def comparison_rows(jobs: Sequence[JobRecord], tables: Sequence[Sequence[Row]]) -> list[Row]:
    """Of each job its id, status, the parameters that differ, and each measure's last value.

    A parameter that is called as a measure, as `loss` is, stands as `params.loss`, before the first
    step, too: a column does not change its meaning while the jobs run. Measures of one name that
    are of different things, as the losses of SFT and DPO, stand in columns of their own.
    """
    given = [parameters(job) for job in jobs]
    curves = curves_apart(given, tables)
    ends = [{name: points[-1][1] for name, points in curve.items()} for curve in curves]
    measures = {plain_name(name) for last in ends for name in last}
    names = headings(differing(given), measures)
    rows: list[Row] = []
    for job, params, table, last in zip(jobs, given, tables, ends, strict=True):
        step = max((row["step"] for row in table), default=None)
        own = {shown: params.get(name) for name, shown in names.items()}
        rows.append({"id": job.id, "status": job.status, **own, "step": step, **last})
    return rows


def headings(names: Iterable[str], measures: Container[str] = ()) -> dict[str, str]:
    """What the columns of these parameters are called beside those of measures.

    Args:
        measures: Of the jobs' own, which nobody can know before they are measured.
    """
    return {n: f"params.{n}" if n in measures or is_known(n) else n for n in names}


def comparison_columns(jobs: Sequence[JobRecord], rows: Sequence[Row]) -> tuple[list[str], int]:
    """What `comparison_rows` have beside the id, and how many of these answer most questions: what
    somebody has chosen, then the measures that say how good a model is; last all the rest.
    """
    names = list(dict.fromkeys(name for row in rows for name in row if name != "id"))
    ahead = names.index("step") if rows else 0
    asked = set(headings(asked_for(jobs), [*map(plain_name, names[ahead:])]).values())
    measures = columns_in_order(dict.fromkeys(names[ahead + 1 :], 2))
    main = [name for name in measures if not is_looked_up(name)] or measures
    first = ["status", *(name for name in names[:ahead] if name in asked), "step", *main]
    first = first if rows else []
    rest = [name for name in (*names[:ahead], *measures) if name not in first]
    return first + rest, len(first)


def measured_names(rows: Iterable[Row]) -> list[list[str]]:
    """Of each of the `comparison_rows` what its job has measured."""
    return [names[names.index("step") + 1 :] for names in map(list, rows)]


def curve_panels(
    jobs: Sequence[JobRecord],
    tables: Sequence[Sequence[Row]],
    *,
    x: str = "step",
    y: Sequence[str] | None = None,
    group_by: str | Sequence[str] | None = None,
    band: str | None = None,
) -> dict[str, list[Line]]:
    """A panel for each measure, a line for each job; or one for each group of jobs, as `band` says.

    Args:
        x: "step", or a measure: then each job is a path through the plane of both.
        y: Measures to show; default: the loss, and what was measured on other sets, as far as
            that is more than a single point. Of one that is of different things, as the losses of
            SFT and DPO, each has a panel of its own.
        group_by: Parameters whose values name the lines; default: all that differ.
        band: A parameter such as "seed" that is averaged over: the line is the mean of the jobs
            that agree otherwise, the band reaches from the least to the greatest; a path over
            another measure than the step is the mean of theirs, without a band.

    Raises:
        InvalidInputError: There is no such parameter or measure.
    """
    curves = curves_apart([parameters(job) for job in jobs], tables)
    keys, labels = _labels(jobs, group_by, band)
    known = list(dict.fromkeys(name for curve in curves for name in curve))
    if not known:
        raise InvalidInputError("none of these jobs has measured anything to plot")
    shown_measures = [each for name in y or () for each in _measures_named(name, known)]
    if x != "step":
        x = _one_measure(x, known)
    panels: dict[str, list[Line]] = {}
    for name in shown_measures or _default_measures(known, x):
        groups: dict[str, list[Points]] = {}
        for place, curve in enumerate(curves):
            if points := _against(curve, name, x):
                groups.setdefault(keys[place], []).append(points)
        panels[name] = [_line(labels[key], group) for key, group in groups.items()]
    if y:
        return panels
    curved = {n: lines for n, lines in panels.items() if any(len(line.x) > 1 for line in lines)}
    return curved or panels


def readable(jobs: Iterable[JobRecord], names: Mapping[str, str]) -> list[JobRecord]:
    """The jobs with these names in place of the ids of models and files, for lines' names."""
    named = partial(replaced, change=lambda text: names.get(text, text))
    return [replace(job, params=named(job.params)) for job in jobs]


def line_names(
    jobs: Sequence[JobRecord],
    group_by: str | Sequence[str] | None = None,
    band: str | None = None,
) -> dict[str, str]:
    """Of each job's id what its line is called in `curve_panels`."""
    keys, labels = _labels(jobs, group_by, band)
    return {job.id: labels[key] for job, key in zip(jobs, keys, strict=True)}


def _labels(
    jobs: Sequence[JobRecord], group_by: str | Sequence[str] | None, band: str | None
) -> tuple[list[str], dict[str, str]]:
    """Of each job which line it is part of, and what these lines are called."""
    given = [parameters(job) for job in jobs]
    texts = labels_by(given, _chosen(given, group_by, band))
    keys = texts if band else [job.id for job in jobs]
    ids = {key: [job.id for job, own in zip(jobs, keys, strict=True) if own == key] for key in keys}
    return keys, {key: _label(text, ids[key]) for key, text in zip(keys, texts, strict=True)}


def _measures_named(name: str, known: Sequence[str]) -> list[str]:
    """The measure of that name, or those that were set apart under it."""
    found = [other for other in known if name in (other, plain_name(other))]
    if not found:
        hint = f"; did you mean {near!r}?" if (near := closest(name, known)) else ""
        raise InvalidInputError(f"no job has measured {shown(name)}{hint}: {', '.join(known)}")
    return found


def _one_measure(name: str, known: Sequence[str]) -> str:
    first, *others = _measures_named(name, known)
    if others:
        raise InvalidInputError(
            f"x: {shown(name)} is of different things in these jobs; choose one of "
            + ", ".join(map(repr, (first, *others)))
        )
    return first


def _chosen(
    given: Sequence[Params], group_by: str | Sequence[str] | None, band: str | None
) -> list[str]:
    names = [group_by] if isinstance(group_by, str) else list(group_by or ())
    known = list(dict.fromkeys(name for params in given for name in params))
    for name in (*names, *((band,) if band else ())):
        if name not in known:
            hint = f"; did you mean {near!r}?" if (near := closest(name, known)) else ""
            raise InvalidInputError(f"the jobs have no parameter {shown(name)}{hint}")
    return names or telling_apart(given, [name for name in differing(given) if name != band])


def _label(text: str, ids: Sequence[str]) -> str:
    """What a line is called: the values of its jobs, where these are short enough to read."""
    if 0 < len(text) <= 80:
        return text
    return ids[0] if len(ids) == 1 else f"{ids[0]} and {len(ids) - 1} more"


def _default_measures(known: Sequence[str], x: str) -> list[str]:
    tracked = [name for name in known if "[" in name and not is_looked_up(name)]
    main = [name for name in known if plain_name(name) in ("loss", "eval_loss", "reward")]
    shown = sorted((*main, *tracked), key=measure_rank)
    return [name for name in shown if name != x] or list(known)


def _against(curve: Mapping[str, Series], name: str, x: str) -> Points:
    places = None if x == "step" else dict(curve.get(x, []))
    points = curve.get(name, [])
    if places is None:
        return [(step, step, value) for step, value in points]
    return [(step, places[step], value) for step, value in points if step in places]


def _line(label: str, group: Sequence[Points]) -> Line:
    """One job as it is; several by their mean and extremes at each step that any of them has."""
    at: dict[int, list[tuple[float, float]]] = {}
    for path in group:
        for step, x, y in path:
            at.setdefault(step, []).append((x, y))
    steps = sorted(at)
    xs = [fmean(x for x, _ in at[step]) for step in steps]
    ys = [[y for _, y in at[step]] for step in steps]
    means = [fmean(values) for values in ys]
    if len(group) == 1 or xs != steps:
        return Line(label, xs, means)
    return Line(label, xs, means, [min(values) for values in ys], [max(values) for values in ys])
