"""A model's tokenizer, where it is on this machine already. No torch here."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from openweights.models.hub_files import cached_file
from openweights.models.names import location_here
from openweights.models.reading import without_weights
from openweights.models.templates.ends import tell_ends_of_model


def tokenizer_at_hand(location: str) -> Any | None:
    """A model's tokenizer, if it is on this machine, and so is what reads it; None otherwise.

    It knows which of its tokens the model's weights lack, and which end the model's completions.
    """
    if find_spec("transformers") is None or not is_at_hand(location):
        return None
    location = location_here(location)
    try:
        from transformers import AutoTokenizer

        loader: Any = AutoTokenizer
        # Nobody is asked about a repository's own code.
        given = {"local_files_only": True, "trust_remote_code": False}
        tokenizer = loader.from_pretrained(location, **given)
        if rows := _embedding_rows(location):
            without_weights(tokenizer, rows)
        tell_ends_of_model(tokenizer, ends_at_hand(location))
        return tokenizer
    except (OSError, ValueError):
        return None


def is_at_hand(location: str) -> bool:
    """Whether a model's tokenizer may be on this machine; it need not be readable."""
    try:
        return _file_at_hand(location_here(location), "tokenizer_config.json") is not None
    except (OSError, ValueError):
        return False


def _file_at_hand(location: str, name: str) -> Path | None:
    """A file of a model's folder, or of its repository where that was fetched before."""
    if Path(location).is_dir():
        return Path(location) / name
    return cached_file(location, name)


def _embedding_rows(location: str) -> int | None:
    """How many tokens a model's weights have; None where its folder does not say."""
    config = _json_at_hand(location, "config.json")
    rows = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    return rows if isinstance(rows, int) else None


def ends_at_hand(location: str) -> Any:
    """What a model's generation config calls ends, or else its own config: an id or several; None
    where neither does, or is on this machine.
    """
    location = location_here(location)
    for name in ("generation_config.json", "config.json"):
        if (ends := _json_at_hand(location, name).get("eos_token_id")) is not None:
            return ends
    return None


def _json_at_hand(location: str, name: str) -> dict[str, Any]:
    file = _file_at_hand(location, name)
    if file is None or not file.is_file():
        return {}
    content: Any = json.loads(file.read_text(encoding="utf-8"))
    return cast("dict[str, Any]", content) if isinstance(content, dict) else {}
