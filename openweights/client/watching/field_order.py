"""In which order a job's parameters are shown, wherever only some of them fit."""

from __future__ import annotations

from collections.abc import Iterable

# What somebody looks for first; all others come behind, in the order of their kind's fields.
_FIRST = (
    *("model", "models", "loss", "suite", "learning_rate", "max_steps", "epochs"),
    *("per_device_train_batch_size", "gradient_accumulation_steps"),
    *("training_file", "test_file", "input_file_id", "prompts", "dataset", "command"),
)
_RANKS = {name: rank for rank, name in enumerate(_FIRST)}


def in_order(names: Iterable[str], fields: Iterable[str] = ()) -> list[str]:
    """The parameters by what matters most.

    Args:
        names: Of parameters, dotted ones, too: `meta.rate` has the place of `meta`.
        fields: Of the job's kind: a store may give parameters in an order of its own.
    """
    places = {name: place for place, name in enumerate(fields, start=len(_RANKS))}
    last = len(_RANKS) + len(places)

    def place(name: str) -> int:
        field = name.partition(".")[0]
        return _RANKS.get(field, places.get(field, last))

    return sorted(names, key=place)
