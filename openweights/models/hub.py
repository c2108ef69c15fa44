"""The Hugging Face hub: what is fetched from it, and results that are pushed to it.

With `merge_before_push` the base model is loaded anew in 16 bit and the saved adapter is merged
into it, so that the same path serves every engine and a base that was trained in 4 bit. What is in
`uploads/` already is never touched: a push that fails loses nothing.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from openweights.errors import ConfigError, ConfigurationError
from openweights.models.hub_files import at_commit, base_in, cached_file
from openweights.models.names import location_here, repository_id
from openweights.progress import transferring

logger = logging.getLogger(__name__)

TRIES = 5
PAUSE_S = 10.0

Result = TypeVar("Result")


class PushRequest(Protocol):
    """What a push reads of a job's config; the fields are those of `TrainingConfig`."""

    model: str
    finetuned_model_id: str
    model_naming_extra_parameters: dict[str, str] | None
    is_peft: bool
    merge_before_push: bool
    push_to_private: bool


# Weights in the format that transformers takes first, and in the one that it takes else.
_WEIGHTS = (".safetensors", ".bin")
# The same weights in formats of other programs, and what no program loads.
_OTHER_FILES = (
    *(".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack", ".ot", ".tflite", ".zip"),
    *(".tar", ".gz", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".pdf", ".mp4"),
)
_TEMPLATES = "additional_chat_templates/"
_ANSWER_S = 10.0


def wanted_files(names: Sequence[str]) -> list[str]:
    """Those of a repository's files that a model, or an adapter, is loaded from."""
    top = [name for name in names if "/" not in name and not name.startswith("consolidated")]
    kind = next((k for k in _WEIGHTS if any(name.endswith(k) for name in top)), "")
    unread = tuple(suffix for suffix in (*_WEIGHTS, *_OTHER_FILES) if suffix != kind)
    return [name for name in top if not name.lower().endswith(unread)] + [
        name for name in names if name.startswith(_TEMPLATES)
    ]


def download_commit(repository: str, commit: str) -> Path:
    """What a model, or an adapter, is loaded from, as it was at a commit; on this disk.

    Raises:
        ConfigError: It cannot be had; one line that says why.
    """
    from httpx import HTTPError
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    from openweights.models.load import clear_load_errors

    with clear_load_errors(at_commit(repository, commit)):
        try:
            info = HfApi().model_info(repository, revision=commit, timeout=_ANSWER_S)
        except (HfHubHTTPError, HTTPError, OSError):
            if (kept := _kept_commit(repository, commit)) is None:
                raise
            return kept
        names = wanted_files([file.rfilename for file in info.siblings or ()])
        return Path(snapshot_download(repository, revision=commit, allow_patterns=names))


def _kept_commit(repository: str, commit: str) -> Path | None:
    """The folder of the hub's cache with a commit, if there are weights in it."""
    location = at_commit(repository, commit)
    config = cached_file(location, "config.json") or cached_file(location, "adapter_config.json")
    folder = None if config is None else config.parent
    return folder if folder and any(file.suffix in _WEIGHTS for file in folder.iterdir()) else None


def download(repository: str, folder: str | None = None, *, commit: str | None = None) -> Path:
    """The files of a repository, or of one folder in it, on this disk.

    Args:
        commit: As it was there; None for what its branch has.

    Raises:
        ConfigError: It cannot be had; one line that says why.
    """
    from huggingface_hub import snapshot_download

    from openweights.models.load import clear_load_errors

    wanted = None if folder is None else f"{folder}/*"
    with clear_load_errors(repository):
        path = Path(snapshot_download(repository, revision=commit, allow_patterns=wanted))
    found = path if folder is None else path / folder
    if not found.is_dir():
        raise ConfigError(f"model: the repository {repository} has no folder {folder}; correct it")
    return found


def push_result(
    config: PushRequest,
    result: Path,
    *,
    job_id: str,
    token: str,
    org: str | None,
    merged_card: str = "",
    scratch: Path | None = None,
) -> str:
    """Push the adapter in `result`, the model merged with it, or the model there; returns the id of
    the repository.

    Args:
        org: Fills {org_id}; None for the account of the token.
        merged_card: The README of the model merged with it; that of the adapter is beside it.
        scratch: Where that model is written meanwhile; None for what the system has.

    Raises:
        ConfigurationError: The hub refused it, or could not be reached in five tries.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    org = org or retried(lambda: str(api.whoami()["name"]), "asking whose token this is")
    repo = repository_id(
        config.finetuned_model_id,
        model=config.model,
        job_id=job_id,
        org=org,
        extra=config.model_naming_extra_parameters,
    )
    with tempfile.TemporaryDirectory(dir=scratch) as temporary, transferring():
        # First, so that a merge that fails leaves no empty repository behind.
        merges = config.is_peft and config.merge_before_push
        folder = merge(config, result, Path(temporary)) if merges else result
        if merges and merged_card:
            (folder / "README.md").write_text(merged_card, encoding="utf-8")
        retried(
            lambda: api.create_repo(repo, private=config.push_to_private, exist_ok=True),
            f"creating {repo}",
        )
        retried(
            lambda: api.upload_folder(
                repo_id=repo, folder_path=str(folder), commit_message=f"openweights {job_id}"
            ),
            f"pushing to {repo}",
        )
    logger.info("pushed to https://huggingface.co/%s", repo)
    return repo


def merge(config: PushRequest, adapter: Path, folder: Path) -> Path:
    """Write the base model with the adapter merged into it, and the tokenizer, to `folder`."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from openweights.models.tokens import eos_token_ids

    lora = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    location = location_here(base_in(lora) or config.model)
    model: Any = AutoModelForCausalLM.from_pretrained(
        location, dtype=torch.bfloat16, device_map="cpu"
    )
    # Merged in float32: adding small updates to 16-bit weights one by one would round them away.
    model = model.float()
    _untie(model, str(adapter))
    merged: Any = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    tokenizer = AutoTokenizer.from_pretrained(str(adapter))
    if merged.generation_config is not None:
        # Those that training knew, so that the model ends where its adapter did.
        merged.generation_config.eos_token_id = eos_token_ids(merged, tokenizer)
    merged.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _untie(model: Any, adapter: str) -> None:
    """Give the output head weights of its own where the adapter changes it or the embeddings.

    An adapter on one of the two leaves the other as it is; merged into weights that both share, it
    would change both.
    """
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists
    from torch import nn

    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embeddings.weight:
        return
    lora = LoraConfig.from_pretrained(adapter)
    names = [name for name, module in model.named_modules() if module in (head, embeddings)]
    if not any(check_target_module_exists(lora, name) for name in names):
        return
    head.weight = nn.Parameter(embeddings.weight.detach().clone())
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False


def retried(act: Callable[[], Result], what: str, *, pause_s: float = PAUSE_S) -> Result:
    """Do it, trying again after failures that may pass.

    Raises:
        ConfigurationError: Refused, or failed five times.
    """
    from httpx import HTTPError
    from huggingface_hub.errors import HfHubHTTPError

    for attempt in range(1, TRIES + 1):
        try:
            return act()
        except (HfHubHTTPError, HTTPError, OSError) as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            reason = (
                str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            )
            if status in (400, 401, 403, 404):
                raise ConfigurationError(
                    f"{what}: the Hugging Face hub refused it ({reason}); check HF_TOKEN and "
                    "finetuned_model_id"
                ) from error
            if attempt == TRIES:
                raise ConfigurationError(f"{what}: failed {TRIES} times, last: {reason}") from error
            logger.warning("%s failed (%s); trying again in %.0f s", what, reason, pause_s)
            time.sleep(pause_s)
    raise AssertionError("unreachable")
