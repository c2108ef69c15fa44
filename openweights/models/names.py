"""What a model can be called: a Hugging Face id, a folder, an adapter. No torch here."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import (
    AfterValidator,
)

from openweights.errors import ConfigError, shown
from openweights.models.hub_files import cached_file, split_commit
from openweights.settings import home_folder

KNOWN_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
# Hugging Face ids of the models that `ow demo` keeps below the home, by their folders.
_KEPT = {KNOWN_MODEL: "SmolLM2-135M-Instruct"}
# Causal and masked models from before the hub had organizations; it redirects their old ids.
BARE_IDS = frozenset(
    {
        *("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2", "openai-gpt", "ctrl"),
        *("bert-base-uncased", "bert-base-cased", "bert-large-uncased", "bert-large-cased"),
        *("bert-base-multilingual-cased", "bert-base-multilingual-uncased", "bert-base-chinese"),
        *("distilbert-base-uncased", "distilbert-base-cased", "roberta-base", "roberta-large"),
        *("distilroberta-base", "albert-base-v2", "xlm-roberta-base", "xlm-roberta-large"),
        *("xlnet-base-cased", "xlnet-large-cased", "transfo-xl-wt103", "t5-small", "t5-base"),
        *("t5-large", "t5-3b", "t5-11b", "camembert-base"),
    }
)
_ALIKE = 0.9  # of 1: one or two slips in an id, but not another model of the same makers


def model_location(model: str) -> str:
    """A local folder in full, anything else as it is.

    Raises:
        ConfigError: It is written as a path, but no folder is there.
    """
    folder = Path(os.path.expanduser(model))
    if os.path.isdir(folder):
        return str(folder.resolve())
    if is_path(model):
        raise ConfigError(
            f"model: there is no folder {model} on this machine; correct the path, or give a "
            "Hugging Face id (org/name)"
        )
    return model


def location_here(model: str) -> str:
    """As `model_location`, but a Hugging Face id whose model lies below `models/` of the home, as
    `ow demo` puts it there, is that folder: it needs no hub. One at a commit is the folder that the
    hub's cache has of it.
    """
    repository, commit = split_commit(model)
    if commit is not None:
        config = cached_file(model, "config.json")
        return model if config is None else str(config.parent)
    folder = home_folder() / "models" / _KEPT.get(repository, repository)
    return str(folder) if os.path.isfile(folder / "config.json") else model_location(model)


def name_of_folder(folder: Path) -> str:
    """The id that `location_here` finds a folder by, or its path: a job that names the id is the
    same wherever the home lies.
    """
    ids = (name for name in _KEPT if Path(location_here(name)).resolve() == folder.resolve())
    return next(ids, str(folder))


def kept_models() -> list[str]:
    """The ids below `models/` of the home, and the one that is put there when it is named."""
    kept = home_folder() / "models"
    found = [*kept.glob("*/config.json"), *kept.glob("*/*/config.json")]
    here = {path.parent.relative_to(kept).as_posix() for path in found}
    return sorted({KNOWN_MODEL, *(name for name in here if name not in _KEPT.values())})


def meant_model(name: str, known: Iterable[str]) -> str | None:
    """The known id that `name` is a slip of; None where it is one itself. Another size or version
    is another model.
    """
    known = list(known)
    if name in known:
        return None
    numbers = re.findall(r"\d+", name)
    ids = {each.lower(): each for each in known if re.findall(r"\d+", each) == numbers}
    near = difflib.get_close_matches(name.lower(), ids, n=1, cutoff=_ALIKE)
    return ids[near[0]] if near else None


def repository_id(
    template: str,
    *,
    model: str,
    job_id: str,
    org: str | None = None,
    extra: Mapping[str, str] | None = None,
) -> str:
    """`finetuned_model_id`, filled in; characters that the hub refuses become dashes.

    Args:
        org: None leaves {org_id}: the account of the token that pushes is not known yet.
    """
    unknown = "{org_id}"
    filled = template.format(
        org_id=org or unknown, model_name=Path(model).name, job_id=job_id, **(extra or {})
    )
    owner, _, name = filled.partition("/")
    return f"{owner}/{unknown.join(map(_hub_name, name.split(unknown)))[:96]}"


def name_as_given(name: str, usual: str, *, model: str, job_id: str, org: str | None) -> str:
    """What `repository_id` has made `name` of for a job, as far as that can be told: `usual`, or a
    name with {job_id} in it, so that another job of the same parameters gets a name of its own.
    """
    filled = {repository_id(usual, model=model, job_id=job_id, org=o) for o in (org, None)}
    return usual if name in filled else name.replace(job_id, "{job_id}")


def _hub_name(text: str) -> str:
    return "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "-" for c in text)


TRAINING_JOB = re.compile(r"s?ftjob-[0-9a-f]{12}(?:-[A-Za-z0-9._-]+)?")
CHECKPOINT = "checkpoint-"  # of a job, before its step
_LIKE_A_JOB = re.compile(r"[a-z]+job-[^/]*")
# What the hub's own client takes for an id.
_WORD = r"\b[\w.-]{1,96}\b"
_REPO = re.compile(rf"(?!.*(?:--|\.\.|\.git$))(?:{_WORD}/)?{_WORD}", re.ASCII)
_PART = re.compile(r"[\w.-]{1,96}")  # of a repository's id, or of a folder inside it
_OPENAI = "openai/"
# OpenAI's account on the hub has the same name: these weights are open, and no model of its API.
_OPEN_WEIGHTS = ("gpt-oss", "whisper", "clip-")


@dataclass(frozen=True, slots=True)
class ModelReference:
    """What a model's name means.

    Attributes:
        name: A folder in full, a repository, the id of a fine-tuning job, or OpenAI's name.
        part: Folder inside the repository, or `checkpoint-N` of the job; None for all of it.
    """

    kind: Literal["folder", "repository", "job", "openai"]
    name: str
    part: str | None = None


def model_reference(model: str) -> ModelReference:
    """What `model` names.

    Raises:
        ConfigError: It cannot be a model.
    """
    if not isinstance(cast("object", model), str):
        raise ConfigError(
            f"model: {shown(model)} is no string; give a Hugging Face id, a folder, or a job's id"
        )
    model = id_in_address(model)
    head, _, rest = model.partition("/")
    # Before folders: the results of a job may lie in one that is named after it.
    if TRAINING_JOB.fullmatch(head):
        return ModelReference("job", head, rest or None)
    if model and (is_path(model) or os.path.isdir(model)):
        return ModelReference("folder", model_location(model))
    if problem := _no_training_job(head):
        raise ConfigError(f"model: {problem}")
    name = model.removeprefix(_OPENAI)
    if name and name != model and not name.startswith(_OPEN_WEIGHTS):
        return ModelReference("openai", name)
    name, part = "/".join(model.split("/")[:2]), "/".join(model.split("/")[2:])
    if not _REPO.fullmatch(name) or ".." in model or {"", "."} & {*model.split("/")}:
        raise ConfigError(
            f"model: {shown(model)} is neither a Hugging Face id (org/name, org/name/folder), nor "
            "a folder, nor the id of a fine-tuning job; correct it"
        )
    return ModelReference("repository", name, part or None)


def _no_training_job(head: str) -> str:
    """What is wrong with a name that looks like a job's and is no fine-tuning job's, or nothing."""
    if not _LIKE_A_JOB.fullmatch(head) or TRAINING_JOB.fullmatch(head):
        return ""
    return (
        f"{shown(head)} is no fine-tuning job; give the whole id of one, as `ow ls` says it "
        "(ftjob- and 12 hexadecimal digits)"
    )


def short_name(model: str) -> str:
    """The last part of a repository's or folder's name; a checkpoint with its job."""
    *before, name = model.rstrip("/").split("/")
    return "/".join([*before[-1:], name]) if name.startswith(CHECKPOINT) else name


def full_name(model: str) -> str:
    """What a model is served as: a folder's path in full, every other name as it is.

    Raises:
        ConfigError: It cannot be a model.
    """
    reference = model_reference(model)
    return reference.name if reference.kind == "folder" else id_in_address(model)


# "7B", "0.5b", "135M", "8x7B", but neither the 4 of "4bit" nor the 2.5 of "Qwen2.5".
_SIZE = re.compile(r"(?<![\w.])(?:(\d+)x)?(\d+(?:\.\d+)?)([bm])(?![a-z])", re.IGNORECASE)


def parameters_in_billions(model: str) -> float | None:
    """How many parameters a model has, as far as its name tells."""
    found = _SIZE.search(re.sub(r"[/_-]", " ", split_commit(model)[0]))
    if found is None:
        return None
    count, size, unit = found.groups()
    return int(count or 1) * float(size) * (1.0 if unit in "bB" else 1e-3)


_UNKNOWN_SIZE = 32.0  # in billions of parameters, of a model whose name does not tell


def guessed_vram_gb(model: str, quantization: str | None = None) -> int:
    """GPU memory that a model's weights and some room are likely to need, in GiB, by its name."""
    size = parameters_in_billions(model) or _UNKNOWN_SIZE
    name = f"{model} {quantization or ''}".lower()
    shrunk = 4 if "4bit" in name or "bitsandbytes" in name else 2 if "8bit" in name else 1
    return round(2 * size / shrunk + 5.5)


def is_path(model: str) -> bool:
    """Whether it is written as a folder, be there one or not."""
    return model in (".", "..") or model.startswith(("/", "./", "../", "~"))


_HUB_URL = re.compile(r"(?:(?:https?://)?(?:www\.)?(?:huggingface|hf)\.co|hf:/)/(.*)", re.I)


def id_in_address(model: str) -> str:
    """The id in the address of a model's page on the hub; anything else as it is.

    Raises:
        ConfigError: It is the address of something else.
    """
    found = _HUB_URL.fullmatch(model)
    if found is None:
        if "://" in model:
            raise ConfigError(
                f"model: {shown(model)} is no address of a model on the Hugging Face hub; give its "
                "id (org/name), or the folder of a download"
            )
        return model
    org, name, *rest = *re.split(r"[?#]", found[1])[0].strip("/").split("/"), ""
    repository = f"{org}/{name}"
    if not name or org in ("datasets", "spaces", "collections", "docs", "papers", "blog"):
        raise ConfigError(
            f"model: {shown(model)} is no address of a model; give that of its page, or org/name"
        )
    folder = [part for part in rest if part]
    if folder[:2] not in ([], ["tree", "main"]):
        raise ConfigError(
            f"model: {shown(model)} is the address of a file, or of another version than main, "
            f"which is the one that is taken; give {repository}"
        )
    return "/".join([repository, *folder[2:]])


def bare_name(value: str) -> str:
    if not value.strip() or value != value.strip():
        raise ValueError(f"{shown(value)} is empty or padded with spaces; give the bare name")
    return value


def _model_name(value: str) -> str:
    try:
        value = id_in_address(bare_name(value))
    except ConfigError as error:
        raise ValueError(str(error).removeprefix("model: ")) from None
    is_folder = is_path(value) or os.path.isdir(value)
    if not is_folder and (problem := _no_training_job(value.partition("/")[0])):
        raise ValueError(problem)
    if not is_folder and not all(map(_PART.fullmatch, value.split("/"))):
        raise ValueError(
            f"{shown(value)} is neither a Hugging Face id (org/name) nor a folder; correct it"
        )
    return value


def _any_model(value: str) -> str:
    try:
        model_reference(bare_name(value))
        return id_in_address(value)
    except ConfigError as error:
        raise ValueError(str(error).removeprefix("model: ")) from None


def _chat_template(value: str) -> str:
    if value != "default" and ("messages" not in value or "{" not in value):
        raise ValueError(
            "is no Jinja template over `messages`; give its text, or 'default' for the model's own"
        )
    return value


def _template_options(value: dict[str, Any]) -> dict[str, Any]:
    reserved = {"messages", "tools", "add_generation_prompt"}
    for name in value:
        if not name.isidentifier() or name in reserved:
            raise ValueError(
                f"{shown(name)} is no option of a chat template; name one that it reads, such as "
                "enable_thinking"
            )
    return value


ModelName = Annotated[str, AfterValidator(_model_name)]
# What can be run: also a folder of a repository, a job, one of its checkpoints, `openai/<name>`.
AnyModel = Annotated[str, AfterValidator(_any_model)]


ChatTemplate = Annotated[str, AfterValidator(_chat_template)]


# What a chat template reads beside the messages.
TemplateOptions = Annotated[dict[str, Any], AfterValidator(_template_options)]
