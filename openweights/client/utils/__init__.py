"""Helpers about models' names and adapters under the path that scripts of the older runner import.

`openweights.models.names` and `ow.api.deploy` are what this package itself uses. A model is a
repository of the Hugging Face hub, a folder inside one (`org/repo/checkpoint-100`), or a folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from openweights.errors import ConfigError
from openweights.models.names import model_reference, parameters_in_billions

CONFIG = "adapter_config.json"
UNKNOWN_SIZE, MISTRAL_SMALL_SIZE = 32, 22


def guess_model_size(model: str) -> float:
    """Parameters in billions by the model's name; 32 where it does not tell."""
    size = parameters_in_billions(model)
    if size is not None:
        return size
    return MISTRAL_SMALL_SIZE if "mistral-small" in model.lower() else UNKNOWN_SIZE


def model_exists(model: str, token: str | None = None) -> bool:
    """Whether it is a folder, or a repository that the hub shows to the token."""
    reference = model_reference(model)
    if reference.kind == "folder":
        return True
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        HfApi(token=token).model_info(reference.name)
    except (RepositoryNotFoundError, HFValidationError):
        return False
    return True


def get_adapter_config(adapter_id: str, token: str | None = None) -> dict[str, Any]:
    """The `adapter_config.json` of a LoRA adapter.

    Raises:
        ConfigError: It has none, or cannot be had.
    """
    reference = model_reference(adapter_id)
    if reference.kind == "folder":
        path = Path(reference.name, CONFIG)
    else:
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        hub: Any = huggingface_hub  # its annotations are partial
        name = f"{reference.part}/{CONFIG}" if reference.part else CONFIG
        try:
            path = Path(hub.hf_hub_download(reference.name, name, token=token))
        except (HfHubHTTPError, LocalEntryNotFoundError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(f"model: no adapter {adapter_id} can be had ({reason})") from None
    if not path.is_file():
        raise ConfigError(f"model: {adapter_id} is no adapter: it has no {CONFIG}")
    return cast("dict[str, Any]", json.loads(path.read_text(encoding="utf-8")))


def resolve_lora_model(model: str, token: str | None = None) -> tuple[str, str | None]:
    """Base model and adapter; the model itself and None where it is no adapter."""
    try:
        return str(get_adapter_config(model, token)["base_model_name_or_path"]), model
    except ConfigError:
        return model, None


def get_lora_rank(adapter_id: str, token: str | None = None) -> int:
    """The rank of an adapter; raises ConfigError."""
    return int(get_adapter_config(adapter_id, token)["r"])


def group_models_or_adapters_by_model(
    models: Iterable[str], token: str | None = None
) -> dict[str, list[str]]:
    """Base model -> its adapters among `models`; none for a model that is given itself."""
    grouped: dict[str, list[str]] = {}
    for model in models:
        base, adapter = resolve_lora_model(model, token)
        grouped.setdefault(base, []).extend([] if adapter is None else [adapter])
    return grouped
