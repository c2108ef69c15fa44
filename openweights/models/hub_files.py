"""What the Hugging Face hub has, and what its cache on this machine has. No torch.

Where huggingface_hub is not installed there is no cache, and nobody to ask. A repository may be
named with the commit that is meant of it, `org/name@0123…`; else it is what its branch main has.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

# What the hub says about a repository. "unclear" is an answer that does not tell, or a late one.
HubAnswer = Literal["has", "lacks", "unreachable", "unclear"]

_TIMEOUT_S = 5.0
_COMMIT = re.compile(r"[0-9a-f]{40}")
_AT_COMMIT = re.compile(rf"(.+)@({_COMMIT.pattern})")


def at_commit(repository: str, commit: str | None) -> str:
    """A repository as it is at a commit; None leaves it at what its branch has."""
    return repository if commit is None else f"{repository}@{commit}"


def split_commit(location: str) -> tuple[str, str | None]:
    """What `at_commit` was given; everything else, a folder too, has no commit."""
    found = _AT_COMMIT.fullmatch(location)
    return (location, None) if found is None else (found[1], found[2])


def base_in(adapter: Mapping[str, Any]) -> str:
    """What the `adapter_config.json` of an adapter names as its base, at the commit that it says;
    "" for nothing.
    """
    base = str(adapter.get("base_model_name_or_path") or "")
    pinned = f"{base}@{adapter.get('revision')}"
    return pinned if _AT_COMMIT.fullmatch(pinned) and not Path(base).is_dir() else base


def commit_of(repository: str) -> str | None:
    """The commit that a repository is at: on the hub or, where that does not answer, in this
    machine's cache. None where neither tells.
    """
    try:
        from httpx import HTTPError
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError
    except ModuleNotFoundError:
        return None
    try:
        return HfApi().model_info(repository, timeout=_TIMEOUT_S).sha
    except (HfHubHTTPError, HTTPError, OSError):  # gone, gated, offline, or out of reach
        names = ("config.json", "adapter_config.json")
        found = next(filter(None, (cached_file(repository, name) for name in names)), None)
        commit = "" if found is None else found.parent.name  # snapshots/<commit>/<name>
        return commit if _COMMIT.fullmatch(commit) else None


def cached_file(repository: str, name: str) -> Path | None:
    """A file of a repository from this machine's cache; None where it has none.

    Raises:
        ValueError: No repository can be called so.
    """
    try:
        from huggingface_hub import try_to_load_from_cache
    except ModuleNotFoundError:
        return None
    name_alone, commit = split_commit(repository)
    found = try_to_load_from_cache(name_alone, name, revision=commit)
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
    name, commit = split_commit(repository)
    try:
        url = hf_hub_url(name, "config.json", revision=commit)
        get_hf_file_metadata(url, timeout=_TIMEOUT_S)
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
