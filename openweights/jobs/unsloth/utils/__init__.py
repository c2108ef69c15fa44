"""What scripts of the older runner import on the worker: its client, a model, rows.

New scripts write `OpenWeights()`, `openweights.models.load.load_trained` and
`openweights.jobs.unsloth.config.rows.read_rows`.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openweights import OpenWeights
from openweights.jobs.unsloth.config.rows import read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    client: OpenWeights


def __getattr__(name: str) -> OpenWeights:
    # Opened when it is first asked for, not when this module is imported.
    if name == "client":
        return _client()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def _client() -> OpenWeights:
    return OpenWeights()


def load_jsonl(file_id: str) -> list[dict[str, Any]]:
    """The rows of a stored file, or of one on this machine."""
    if Path(file_id).is_file():
        return read_rows(file_id)
    return read_rows(_client().files.content(file_id).splitlines())


def load_model_and_tokenizer(
    model_id: str, load_in_4bit: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model without an adapter to train, and its tokenizer; see `load_trained`."""
    from openweights.models.load import load_trained

    return load_trained(model_id, in_4bit=load_in_4bit)  # type: ignore[return-value]
