"""What the Hugging Face hub has, and what its cache on this machine has. No torch.

Where huggingface_hub is not installed there is no cache, and nobody to ask.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

# What the hub says about a repository. "unclear" is an answer that does not tell, or a late one.
HubAnswer = Literal["has", "lacks", "unreachable", "unclear"]

_TIMEOUT_S = 5.0


def cached_file(repository: str, name: str) -> Path | None:
    """A file of a repository from this machine's cache; None where it has none.

    Raises:
        ValueError: No repository can be called so.
    """
    try:
        from huggingface_hub import try_to_load_from_cache
    except ModuleNotFoundError:
        return None
    found = try_to_load_from_cache(repository, name)
    return Path(found) if isinstance(found, str) else None


def cached_models() -> set[str]:
    """The ids of the models in this machine's cache."""
    try:
        from huggingface_hub import constants
    except ModuleNotFoundError:
        return set()
    # A repository that was only asked for has a folder as well, but no snapshot.
    found = Path(constants.HF_HUB_CACHE).glob("models--*/snapshots/*/*config.json")
    return {path.parents[2].name.removeprefix("models--").replace("--", "/") for path in found}


def hub_answer(repository: str) -> HubAnswer:
    """Whether the hub has such a repository. It is asked once, and does not wait for a network."""
    try:
        from httpx import ConnectError, ConnectTimeout, HTTPError
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.errors import (
            EntryNotFoundError,
            GatedRepoError,
            HfHubHTTPError,
            OfflineModeIsEnabled,
            RepositoryNotFoundError,
        )
    except ModuleNotFoundError:
        return "unclear"
    try:
        get_hf_file_metadata(hf_hub_url(repository, "config.json"), timeout=_TIMEOUT_S)
    except (GatedRepoError, EntryNotFoundError):
        return "has"
    except RepositoryNotFoundError:
        return "lacks"
    except (ConnectError, ConnectTimeout, OfflineModeIsEnabled):
        return "unreachable"
    except (HfHubHTTPError, HTTPError, OSError):
        return "unclear"
    return "has"


def hub_file(repository: str, name: str) -> Path | None:
    """A file of a repository, from the hub or, where it does not answer, from this machine's cache.

    None where there is none in either. The hub is asked once: its own download tries five times
    and takes most of a minute to say that there is no network.
    """
    try:
        from httpx import HTTPError
        from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
        from huggingface_hub.errors import HfHubHTTPError
    except ModuleNotFoundError:
        return None
    try:
        get_hf_file_metadata(hf_hub_url(repository, name), timeout=_TIMEOUT_S)
        answers = True
    except (HfHubHTTPError, HTTPError, OSError):  # gone, gated, offline, or out of reach
        answers = False
    try:
        return Path(hf_hub_download(repository, name, local_files_only=not answers))
    except (HfHubHTTPError, OSError):
        return None


def out_of_reach(model: str) -> str:
    """What to do about a model that is not here, with a hub that cannot be reached."""
    return (
        f"model: {model} is not on this machine and the Hugging Face hub cannot be reached; give a "
        "folder with the model, or try again with a network"
    )
