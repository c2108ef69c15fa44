"""`ow demo`."""

from __future__ import annotations

import signal
import sys
from collections.abc import Generator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from openweights.cli.demo.study import Plan, Study
    from openweights.types import EventRecord

_LINES_A_JOB = 6  # of progress, where there is no terminal to draw a bar on


@click.command()
@click.option(
    "--fresh", is_flag=True, help="Train and measure again what an earlier demo has done."
)
@click.option("--quick", is_flag=True, help="A few steps, to see that everything works.")
@click.option(
    "--model",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of another chat model; default: SmolLM2-135M-Instruct, downloaded once.",
)
@click.option(
    "--data",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder with train.jsonl and test.jsonl; default: the clone's own.",
)
@click.option(
    "--figure",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("trajectories.png"),
    show_default=True,
    help="Where the plot goes.",
)
def demo(fresh: bool, quick: bool, model: Path | None, data: Path | None, figure: Path) -> None:
    """Train a small model here, with and without SDFT.

    Gets a real instruct model of 135 M parameters, trains it on one narrow skill by SFT, by SDFT
    with reverse KL and by SDFT with forward KL, and compares what they learnt and what they changed
    elsewhere. Takes about 8 minutes on two cores. A second demo shows what the first has found, in
    seconds.
    """
    from openweights.cli.demo import study as study_module
    from openweights.client import OpenWeights

    data = data or study_module.DATA
    study_module.check_installation(data)
    ow = OpenWeights()
    if model is None:
        from openweights.models.smollm2 import get_model

        model = get_model(ow.settings.home / "models", say=click.echo)
    with _sigterm_as_ctrl_c():
        study = study_module.Demo(
            ow,
            model.resolve(),
            study_module.QUICK if quick else study_module.Plan(),
            say=click.echo,
            # On a terminal `job.wait` draws a bar.
            follow=None if sys.stderr.isatty() else _print_progress,
            data=data,
            suffix=f"{datetime.now(UTC):%Y%m%d-%H%M%S}" if fresh else None,
        ).run()
    _print_end(study, figure)


@contextmanager
def _sigterm_as_ctrl_c() -> Generator[None]:
    """What goes on behind a demo that is ended is said, whoever ends it."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _print_progress(plan: Plan, event: EventRecord) -> None:
    step, loss = event.data.get("step"), event.data.get("loss")
    if not isinstance(step, int) or not isinstance(loss, float) or "type" in event.data:
        return
    if step == 1 or step % max(1, plan.steps // _LINES_A_JOB) == 0:
        agreement = event.data.get("agreement")
        more = f"  agreement {agreement:.2f}" if isinstance(agreement, float) else ""
        click.echo(f"  step {step:3d}/{plan.steps}  loss {loss:.3f}{more}")


def _print_end(study: Study, figure: Path) -> None:
    from rich.console import Console

    from openweights.cli.demo.figure import draw
    from openweights.cli.demo.report import CAVEAT, reading, table

    draw(study, figure)
    console = Console(highlight=False)
    console.print()
    console.print(table(study))
    console.print(reading(study))
    console.print(CAVEAT)
    console.print(f"The plot is in {figure}; the adapters are in the store: `ow ls`.")
