"""What both APIs of the server need of a request: its numbers, its body, files in and out."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from openweights.client import OpenWeights
from openweights.client.files import File
from openweights.errors import InvalidInputError, shown
from openweights.models.names import is_path
from openweights.types import FileRecord


def refusal(request: Request, status: int, message: str) -> Response:
    """What went wrong, in the words of the API that was asked."""
    if not request.url.path.startswith("/v1/"):
        return JSONResponse({"error": message}, status)
    kind = "server_error" if status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
    body = {"message": message, "type": kind, "param": None, "code": None}
    return JSONResponse({"error": body}, status)


def whole(given: Mapping[str, str], name: str, default: int) -> int:
    """The query's whole number of that name.

    Raises:
        InvalidInputError: It is none.
    """
    text = given.get(name)
    if text is None:
        return default
    try:
        return int(text)
    except ValueError:
        raise InvalidInputError(f"{name}: {text!r} is no whole number") from None


async def json_body(request: Request) -> dict[str, Any]:
    """The request's JSON object.

    Raises:
        InvalidInputError: The body is none.
    """
    try:
        body: object = await request.json()
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise InvalidInputError("the request's body must be a JSON object")
    return cast("dict[str, Any]", body)


def refuse_local_files(client: OpenWeights, params: object, at: str = "") -> None:
    """See that the parameters of a job name no file of the machine that serves a project to others:
    what a client's own process may upload, whoever asks a server may not.

    Raises:
        InvalidInputError: They do.
    """
    if not client.settings.is_remote:
        return
    if isinstance(params, Mapping):
        for name, value in cast("Mapping[str, object]", params).items():
            refuse_local_files(client, name, at)
            refuse_local_files(client, value, f"{at}.{name}" if at else name)
    elif isinstance(params, list):
        for value in cast("list[object]", params):
            refuse_local_files(client, value, at)
    elif isinstance(params, str) and _is_here(params):
        raise InvalidInputError(
            f"{at}: {shown(params)} is a file of the machine that serves the page, which takes "
            "only files of the store: upload it first"
        )


def _is_here(text: str) -> bool:
    # A reward of one's own is `file.py:function`.
    for name in (text, text.rpartition(":")[0]):
        try:
            path = Path(name).expanduser()
            if name and (path.is_file() or (is_path(name) and path.exists())):
                return True
        except (OSError, ValueError, RuntimeError):
            continue
    return False


def store_upload(client: OpenWeights, file: UploadFile, purpose: str) -> File:
    """Check and store it, through a file of its own name, which the messages about rows name."""
    name = Path(file.filename or "upload").name
    with TemporaryDirectory() as folder:
        path = Path(folder) / name
        with path.open("wb") as out:
            shutil.copyfileobj(file.file, out, 1 << 20)
        return client.files.create(path, purpose)


def stream_file(client: OpenWeights, record: FileRecord) -> Response:
    """The file, always as a download: what a job has written is never shown as a page."""
    content = client.backend.open_file(record.id)

    def pieces() -> Iterator[bytes]:
        with content:
            while piece := content.read(1 << 20):
                yield piece

    name = "".join(c if c.isalnum() or c in "._-" else "_" for c in record.filename) or "file"
    name = name.encode("ascii", "replace").decode().replace("?", "_")
    return StreamingResponse(
        pieces(),
        media_type="application/octet-stream",
        headers={"content-disposition": f'attachment; filename="{name}"'},
    )
