"""`ow exec`: a shell command, run with the files of a folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, StringConstraints

from openweights.client.exec_files import collect_files
from openweights.client.job_kinds import Jobs

if TYPE_CHECKING:
    from openweights.client.job_options import JobOptions, takes
    from openweights.client.jobs import Job


class ExecParams(BaseModel):
    """What `ow.exec.create` takes.

    Attributes:
        command: A shell command; it runs in a copy of the folder.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    command: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class Exec(Jobs):
    """Runs a command with the files of the current folder, or of `folder`.

    What git ignores is left out, and so are `.git`, secrets, virtual environments and caches.

    Attributes:
        even_home: The folder may be a home folder, or the root.
    """

    if TYPE_CHECKING:

        class _Arguments(ExecParams, JobOptions): ...

        @takes(_Arguments)
        def create(self, **params: Any) -> Job: ...

    params: ClassVar[type[BaseModel]] = ExecParams
    folder: Path | None = None
    even_home: bool = False

    @property
    def id_prefix(self) -> str:
        return "execjob"

    def mounted_paths(self) -> Mapping[str, Path]:
        return collect_files(self.folder or Path.cwd(), even_home=self.even_home)

    def get_entrypoint(self, validated_params: BaseModel) -> str:
        assert isinstance(validated_params, ExecParams)
        return validated_params.command
