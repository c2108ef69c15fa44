"""What a measure is of: one name means other things under other losses. Figures, tables and the
page ask here before they put jobs beside one another, and keep apart what cannot be compared.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Params = Mapping[str, Any]  # of a job, by dotted names

_APART = re.compile(r"(.+?) \([^()]+\)(\[.*)?", re.DOTALL)
_OF_PAIRS = ("rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected") + (
    *("logps/chosen", "logps/rejected"),
)


def names_apart(jobs: Sequence[Params]) -> list[dict[str, str]]:
    """Of each job what its measures are called beside those of the others: `loss (sft)` and
    `loss (sdft, forward_kl)`, where they are of different things; what is not named keeps its name.

    It follows from the parameters alone: a name does not change while the jobs run.
    """
    found = [dict(_meanings(params)) for params in jobs]
    several = {
        name
        for name in {name for own in found for name in own}
        if len({own[name] for own in found if name in own}) > 1
    }
    return [
        {name: f"{name} ({of})" for name, of in own.items() if name in several} for own in found
    ]


def renamed(series_name: str, apart: Mapping[str, str]) -> str:
    """What a measure, or that of a set (`loss[name]`), is called by one of `names_apart`."""
    name, bracket, of_set = series_name.partition("[")
    return f"{apart.get(name, name)}{bracket}{of_set}"


def plain_name(name: str) -> str:
    """What a job itself calls a measure that was set apart."""
    found = _APART.fullmatch(name)
    return name if found is None else found[1] + (found[2] or "")


def _meanings(params: Params) -> Iterator[tuple[str, str]]:
    """Each measure that is of something else in other jobs, and of what it is in this one."""
    loss = params.get("loss")
    if loss not in ("sft", "sdft", "dpo", "orpo", "grpo"):
        return
    objective = _objective(params)
    yield "loss", objective
    # SDFT's test set has no teacher: it is measured as SFT's.
    yield "eval_loss", _cross_entropy(params) if loss in ("sft", "sdft") else objective
    for name in _OF_PAIRS if loss in ("dpo", "orpo") else ():
        yield from _on_both_sets(name, loss)
    if loss in ("sft", "sdft", "grpo"):
        yield from _on_both_sets("entropy", "of answers" if loss == "sft" else "of completions")
    if loss == "sdft":
        yield from _on_both_sets("divergence", str(params.get("sdft_divergence")))
    if loss == "grpo":
        for name in ("reward", "reward_std"):
            yield from _on_both_sets(name, _rewards(params))


def _on_both_sets(name: str, of: str) -> Iterator[tuple[str, str]]:
    yield name, of
    yield f"eval_{name}", of


def _objective(params: Params) -> str:
    """What is minimised: the loss, and what else decides its scale."""
    loss = str(params["loss"])
    if loss == "sft":
        return _cross_entropy(params).replace("cross-entropy", loss)
    detail = {"sdft": "sdft_divergence", "grpo": "grpo_loss_type"}.get(loss, "")
    return f"{loss}, {params[detail]}" if params.get(detail) else loss


def _cross_entropy(params: Params) -> str:
    read = params.get("train_on", "responses")
    return "cross-entropy" if read == "responses" else f"cross-entropy, train_on {read}"


def _rewards(params: Params) -> str:
    """The rewards that are added, with their weights."""
    field = "grpo_reward_function"
    weights = {
        name.removeprefix(f"{field}."): value
        for name, value in params.items()
        if name.startswith(f"{field}.")
    }
    if not weights:
        return str(params.get(field))
    parts = (n if weight == 1 else f"{weight:g} {n}" for n, weight in weights.items())
    return " + ".join(parts)
