"""The table and the sentences that a study ends with."""

from __future__ import annotations

from rich.table import Table

from openweights.cli.demo.evaluation import score
from openweights.cli.demo.study import Outcome, Study

CAVEAT = (
    "One seed, one learning rate and one model of 135 M parameters: read directions, not sizes. "
    "SFT at a lower rate moves the model less, too; SDFT cannot pass its teacher; and models that "
    "learn little from a demonstration in their prompt (3 B in the paper) lose to SFT."
)


def table(study: Study) -> Table:
    """What each method learnt, what it cost elsewhere, and how long it took."""
    result = Table(
        title="SFT and SDFT on the same rows",
        caption="seconds: from a job's start to its end; on a CPU two at a time share the cores",
    )
    result.add_column("model")
    for heading in ("ledger line", "correct", "KL, everyday", "seconds"):
        result.add_column(heading, justify="right")
    without, shown = study.gate
    gate = f"{study.plan.gate_rows} training orders"
    result.add_row(f"base, {gate}", "", f"{without:.2f}", "0", "")
    result.add_row("… with the demonstration", "", f"{shown:.2f}", "", "")
    result.add_section()
    base = score(study.base)
    result.add_row(
        f"base, {study.plan.test_rows} held-out orders",
        f"{base.format:.2f}",
        f"{base.correct:.2f}",
        "0",
        "",
    )
    for outcome in study.outcomes:
        result.add_row(
            outcome.method.label,
            f"{outcome.score.format:.2f}",
            f"{outcome.score.correct:.2f}",
            f"{outcome.kl:.3f}",
            f"{outcome.seconds:.0f}",
        )
    return result


def reading(study: Study) -> str:
    """One sentence that says who came out ahead, whoever it is."""
    best = max(outcome.score.correct for outcome in study.outcomes)
    winners = [o for o in study.outcomes if o.score.correct == best]
    kept = min(study.outcomes, key=lambda outcome: outcome.kl)
    moved = max(study.outcomes, key=lambda outcome: outcome.kl)
    if best <= score(study.base).correct:
        learnt = f"No method learnt the skill ({best:.2f} correct, as the base model)"
    elif len(winners) == len(study.outcomes):
        learnt = f"All methods answer {best:.2f} of the held-out orders correctly"
    else:
        learnt = f"{_names(winners)} answered most held-out orders correctly ({best:.2f})"
    times = moved.kl / kept.kl if kept.kl > 0 else float("inf")
    return (
        f"{learnt}; on everyday prompts {kept.method.label} stayed closest to the base model "
        f"({kept.kl:.3f} nats), {moved.method.label} moved furthest ({moved.kl:.3f}, "
        f"{times:.1f} times as far)."
    )


def _names(outcomes: list[Outcome]) -> str:
    return " and ".join(outcome.method.label for outcome in outcomes)
