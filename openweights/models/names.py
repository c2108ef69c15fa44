"""What a model can be called: a Hugging Face id, a folder, an adapter. No torch here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
)

from openweights.errors import ConfigError, shown


def model_location(model: str) -> str:
    """A local folder in full, anything else as it is.

    Raises:
        ConfigError: It is written as a path, but no folder is there.
    """
    folder = Path(os.path.expanduser(model))
    if folder.is_dir():
        return str(folder.resolve())
    if is_path(model):
        raise ConfigError(
            f"model: there is no folder {model} on this machine; correct the path, or give a "
            "Hugging Face id (org/name)"
        )
    return model


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


def _hub_name(text: str) -> str:
    return "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "-" for c in text)


def is_path(model: str) -> bool:
    return model.startswith(("/", "./", "../", "~"))


def bare_name(value: str) -> str:
    if not value.strip() or value != value.strip():
        raise ValueError(f"{shown(value)} is empty or padded with spaces; give the bare name")
    return value


def _model_name(value: str) -> str:
    is_folder = is_path(bare_name(value)) or Path(value).is_dir()
    if not is_folder and (value.count("/") > 1 or any(c.isspace() for c in value)):
        raise ValueError(
            f"{shown(value)} is neither a Hugging Face id (org/name) nor a folder; correct it"
        )
    return value


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


ChatTemplate = Annotated[str, AfterValidator(_chat_template)]


# What a chat template reads beside the messages.
TemplateOptions = Annotated[dict[str, Any], AfterValidator(_template_options)]
