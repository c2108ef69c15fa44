"""What SFT, SDFT and GRPO teach, and what they keep: one skill, and then skills in sequence.

    python cookbook/sdft/skills/run.py --small              SmolLM2, two skills, 7 minutes
    python cookbook/sdft/skills/run.py --model Qwen/Qwen2.5-Coder-0.5B-Instruct
    python cookbook/sdft/skills/run.py --draw results.json  figures and tables of what was measured

Everything runs as ordinary jobs: a grid of training jobs (methods x learning rates x seeds) on the
first skill, and for each an evaluation that waits for it (`after=[job]`). From the first seed's
every method's rate is chosen, and at it the skills are taught one after another, each stage going
on from the adapter of the one before; with `--later-rates` every method does so at those. A study
that was stopped is taken up by the same command: equal jobs have equal ids, so what is done is
done. On a large card `--at-once 8` lets so many jobs share it.

Written to `--out`, as runs end: `results.json`; and at the end `frontier.png` (the new skill
against what was kept; each rate a point, with its interval), `sequence.png` (every skill over the
stages, a line for each method) and `results.md`, which names the runs that are missing.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from cookbook.models import LARGE, as_command, choice, count, parser
from cookbook.sdft.skills.data import SKILLS
from cookbook.sdft.skills.plan import (
    GOES_ON,
    METHODS,
    Scale,
    chains,
    frontier,
    sequence,
    small,
    whole,
)
from cookbook.sdft.skills.results import (
    Run,
    chosen_rates,
    frontier_points,
    in_order,
    measured,
    read_results,
)
from cookbook.sdft.skills.study import Study
from cookbook.sdft.skills.telling import (
    SILENT_S,
    at_most_every,
    at_work,
    chosen,
    lacking,
    planned,
    told,
)
from openweights import OpenWeights
from openweights.client.local_worker import workers_beside
from openweights.client.results import write_chunks
from openweights.errors import InvalidInputError

MODEL = "Qwen/Qwen2.5-Coder-0.5B-Instruct"


def carry_out(study: Study, scale: Scale, out: Path, deadline: float) -> tuple[list[Run], str]:
    """All runs that ended in time, and in words what is missing; `results.json` is written after
    each.
    """
    plan = frontier(scale)
    if scale.later_rates is not None:
        plan += sequence(scale, {})
    total = whole(scale)
    undecided = {run.key for run in plan if run.seed in (0, scale.seeds[0])}
    say(planned(len(plan), total))
    queue(study, plan)
    tell = at_most_every(SILENT_S, lambda: say(at_work(study.waiting())))
    runs: list[Run] = []
    for run in study.ended(deadline, tell):
        runs = in_order([*runs, run])
        write(out / "results.json", scale, runs)
        say(f"{len(runs)}/{total} {told(run)}")
        if scale.later_rates is None and undecided:
            undecided.discard(run.key)
            if not undecided:
                first = [one for one in measured(runs) if one.seed in (0, scale.seeds[0])]
                rates = chosen_rates(frontier_points(first, scale.skills[0]))
                later = sequence(scale, rates)
                total = len(plan) + len(later)
                say(chosen(rates, len(later)))
                queue(study, later)
    return runs, lacking(total, runs, study.waiting())


def queue(study: Study, runs: Sequence[Run]) -> None:
    """Submit them, and say how many were there."""
    if there := sum(study.submit(chain) for chain in chains(runs)):
        say(f"{there} of these {'is' if there == 1 else 'are'} there already")


def say(line: str) -> None:
    """At once, into a pipe as well."""
    print(line, flush=True)


def write(path: Path, scale: Scale, runs: Sequence[Run]) -> None:
    """What was done, and what was measured."""
    about = {**asdict(scale), "model": Path(scale.model).name}
    lines = ",\n".join(f"  {json.dumps(run.data())}" for run in runs)
    text = f'{{"study": {json.dumps(about)},\n "runs": [\n{lines}\n]}}\n'
    write_chunks([text.encode()], path)


def draw(skills: Sequence[str], runs: Sequence[Run], out: Path, lack: str = "") -> None:
    """The figures and tables of what was measured.

    Args:
        skills: In the order of the sequence.
        lack: What is missing, in words.
    """
    # A machine that only trains needs no matplotlib.
    from cookbook.sdft.skills.figures import differences, draw_frontier, draw_sequence, table

    out.mkdir(parents=True, exist_ok=True)
    draw_frontier(frontier_points(runs, skills[0]), skills[0], out / "frontier.png")
    draw_sequence(runs, skills, out / "sequence.png")
    text = "\n".join(filter(None, (table(runs, skills), differences(runs, skills), lack)))
    (out / "results.md").write_text(text, encoding="utf-8")
    print(text)
    print(f"figures and tables are in {out}")


def draw_again(results: Path, out: Path) -> None:
    """What a study has written before.

    Raises:
        InvalidInputError: The file holds something else, or no run that completed.
    """
    skills, runs = read_results(results)
    if not (completed := measured(runs)):
        raise InvalidInputError(
            f"{results}: no run has completed, so that there is nothing to draw"
        )
    draw(skills, completed, out)


def arguments() -> argparse.Namespace:
    """The command line."""
    asked = parser(__doc__)
    asked.add_argument("--small", action="store_true", help="two skills, one seed, a small model")
    asked.add_argument("--methods", nargs="+", choices=list(METHODS))
    asked.add_argument("--rates", nargs="+", type=rate, metavar="RATE")
    asked.add_argument("--seeds", nargs="+", type=seed, metavar="SEED")
    asked.add_argument("--skills", nargs="+", choices=SKILLS, help="in the order of the sequence")
    asked.add_argument(
        "--later-rates",
        nargs="*",
        type=rate,
        metavar="RATE",
        help="rates at which the later skills are taught; the best of each method on the first",
    )
    asked.add_argument("--grpo-rates", nargs="+", type=rate, metavar="RATE")
    asked.add_argument("--grpo-steps", type=count, help="optimizer steps of GRPO")
    asked.add_argument("--test-rows", type=count, help="held-out rows of each skill")
    asked.add_argument("--at-once", type=count, help="jobs that share this machine")
    asked.add_argument("--memory-gb", type=amount, help="GPU memory that each of them may fill")
    asked.add_argument(
        "--minutes", type=amount, default=math.inf, help="look no longer for results"
    )
    asked.add_argument("--out", type=Path, default=Path("results") / "skills")
    asked.add_argument("--draw", type=Path, metavar="FILE", help="run nothing; draw a results.json")
    return asked.parse_args()


def rate(text: str) -> float:
    """A learning rate, as the type of an argument."""
    if not 0 < (number := float(text)) < 1:
        raise argparse.ArgumentTypeError("give a learning rate such as 1e-4")
    return number


def seed(text: str) -> int:
    """A seed, as the type of an argument."""
    if (number := int(text)) < 0:
        raise argparse.ArgumentTypeError("give a whole number from 0 on")
    return number


def amount(text: str) -> float:
    """Minutes or GiB, as the type of an argument."""
    if not (number := float(text)) >= 0:
        raise argparse.ArgumentTypeError("give a number from 0 on")
    return number


def scale_of(options: argparse.Namespace, ow: OpenWeights) -> Scale:
    """What the command line asks for."""
    if options.small:
        default = small(choice(ow, options).model)
    else:
        default = Scale(options.model or (LARGE if options.large else MODEL))
    names = ("steps", "methods", "rates", "later_rates", "seeds", "skills", "grpo_steps")
    names += ("test_rows", "memory_gb")
    given = {name: _once(getattr(options, name)) for name in names}
    given = {name: value for name, value in given.items() if value is not None}
    own = {m: r for m, r in default.rates_of.items() if not options.rates or default.is_grpo(m)}
    if options.grpo_rates:
        own |= dict.fromkeys(("grpo", GOES_ON), _once(options.grpo_rates))
    scale = replace(default, **given, rates_of=own)
    if GOES_ON in scale.methods and "sft" not in scale.methods:
        raise SystemExit(f"--methods: {GOES_ON} goes on from sft; add sft")
    taught = {rate for method in scale.methods for rate in scale.rates_at(method)}
    if unknown := [rate for rate in scale.later_rates or () if rate not in taught]:
        raise SystemExit(
            f"--later-rates: no method teaches the first skill at {unknown[0]:g}, so that there is "
            f"nothing to go on from; add it to --rates"
        )
    return scale


def _once(value: Any) -> Any:
    """Of what is given twice, one: two equal runs would count as two seeds."""
    return list(dict.fromkeys(value)) if isinstance(value, list) else value


def main() -> None:
    """Run the study, or take it up."""
    options = arguments()
    if options.draw is not None:
        draw_again(options.draw, options.out)
        return
    deadline = time.monotonic() + 60 * options.minutes
    ow = OpenWeights()
    scale = scale_of(options, ow)
    study = Study(ow, scale, options.out)
    at_once = options.at_once or (2 if options.small and not ow.settings.is_remote else 1)
    with workers_beside(ow.settings, ow.backend, at_once):
        ended, lack = carry_out(study, scale, options.out, deadline)
    if not (runs := measured(ended)):
        raise SystemExit(f"there is nothing to draw: {lack}")
    # Not from `results.json`, which another of these commands may be at.
    draw(scale.skills, runs, options.out, lack)


if __name__ == "__main__":
    as_command(main)
