"""How long a row a model takes, as its config tells it. No torch here.

Configs are taken as transformers has read them, and as they stand in config.json, where older ones
write `rope_scaling` with a `type`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from openweights.errors import ConfigError

LONGROPE = "longrope"
# What configs call the positions that a model was made for: most, MPT, GPT 2.
_POSITIONS = ("max_position_embeddings", "max_seq_len", "n_positions")
_NO_LIMIT = 32_768


def made_for(config: Any) -> int | None:
    """How many positions a model was made for; None where nothing limits them, as with ALiBi
    (Bloom) and states (Mamba).
    """
    known = (_given(_text_part(config), name) for name in _POSITIONS)
    return next((int(n) for n in known if isinstance(n, int | float) and n), None)


def longest_row(config: Any) -> int:
    """How many positions a row may have, also where nothing limits them."""
    return made_for(config) or _NO_LIMIT


def short_length(config: Any) -> int | None:
    """Positions of the longest row that has LongRoPE's first table; None where all rows have the
    same.
    """
    config = _text_part(config)
    for given in _rotary_settings(config):
        if _kind(given) == LONGROPE:
            first = given.get("original_max_position_embeddings")
            return int(first or _given(config, "original_max_position_embeddings"))
    return None


def check_row_length(config: Any, max_seq_length: int, *, by_row: bool) -> None:
    """See that no row will be read otherwise because of what it is trained with.

    Args:
        by_row: Whether `rotary.turn_by_row` holds for the model.

    Raises:
        ConfigError: Some may be.
    """
    config = _text_part(config)
    longest = None if by_row else short_length(config)
    why = "the longest row of a batch decides by which of two rotary tables all are turned"
    if any(_kind(given) == "dynamic" for given in _rotary_settings(config)):
        longest = made_for(config)
        why = (
            "this model's rotary table (rope_type 'dynamic') is that of the longest row of a batch"
        )
    if longest is not None and max_seq_length > longest:
        use = "" if by_row else ", or use engine='transformers'"
        raise ConfigError(
            f"max_seq_length: {max_seq_length} is more than {longest} positions, beyond which "
            f"{why}, so that a row's loss would depend on its neighbours; set it to {longest} or "
            f"less{use}"
        )


def _text_part(config: Any) -> Any:
    return _given(config, "text_config") or config


def _rotary_settings(config: Any) -> list[Mapping[str, Any]]:
    """The model's own, or those of each kind of its layers."""
    given: Any = _given(config, "rope_parameters") or _given(config, "rope_scaling") or {}
    if not isinstance(given, Mapping):
        return []
    settings = cast("Mapping[str, Any]", given)
    return [settings, *(own for own in settings.values() if isinstance(own, Mapping))]


def _kind(settings: Mapping[str, Any]) -> Any:
    return settings.get("rope_type") or settings.get("type")


def _given(config: Any, name: str) -> Any:
    if isinstance(config, Mapping):
        return cast("Mapping[str, Any]", config).get(name)
    return getattr(config, name, None)
