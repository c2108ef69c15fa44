"""A job kind of the tests' own: the smallest that has all that ids depend on."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from openweights import Jobs


class EchoParams(BaseModel):
    """Parameters with defaults of several types."""

    model_config = ConfigDict(extra="forbid")

    text: str
    times: int = Field(default=1, ge=1)
    rate: float = Field(default=0.5, gt=0, le=1)
    style: str | None = None
    tags: list[str] = Field(default_factory=lambda: ["a", "b"])
    meta: dict[str, Any] | None = None
    job_id_suffix: str | None = None


class Echo(Jobs):
    """Prints its text."""

    params = EchoParams
    requires_vram_gb = 0

    def get_entrypoint(self, validated_params: BaseModel) -> str:
        assert isinstance(validated_params, EchoParams)
        return f"echo {validated_params.text} of {{job_id}} in ${{HOME}}"


class Shout(Echo):
    """Another kind with the same parameters."""


class BuiltInEcho(Echo):
    """As built-in kinds are: the command is not part of the id."""

    id_covers_mounts = False

    @property
    def id_prefix(self) -> str:
        return "btjob"
