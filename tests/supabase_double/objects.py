"""The part of Supabase's storage service that this package uses: objects, and resumable uploads.

As the service does, it asks the policies with an insert that it rolls back, stores the content, and
then writes the row as `service_role`. Contents lie in a folder, each under a version of its own.
"""

from __future__ import annotations

import base64
import contextlib
import json
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tests.supabase_double.rest import Answer, Database, HttpError

PART_BYTES = 6 << 20
_CHUNK_BYTES = 1 << 20
_INSERT = (
    "insert into storage.objects (bucket_id, name, version, metadata) values (%s, %s, %s, %s) "
    "returning id"
)
_UPSERT = (
    "insert into storage.objects (bucket_id, name, version, metadata) values (%s, %s, %s, %s) "
    "on conflict (bucket_id, name) do update set version = excluded.version, "
    "metadata = excluded.metadata, updated_at = now() returning id"
)


@dataclass
class Stored:
    """An object to be sent; `first` is the first byte that is wanted."""

    path: Path
    first: int
    size: int


@dataclass
class Upload:
    """A resumable upload that has begun."""

    bucket: str
    name: str
    path: Path
    size: int
    arrived: int = 0


class Storage:
    """The storage of one project.

    Args:
        folder: Where contents lie.
        most_bytes: The project's limit for one file.
    """

    def __init__(self, database: Database, folder: Path, most_bytes: int = 50 << 20) -> None:
        self._database = database
        self._folder = folder
        self._folder.mkdir(parents=True, exist_ok=True)
        self._uploads: dict[str, Upload] = {}
        self.most_bytes = most_bytes

    def serve(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes
    ) -> Answer | Stored:
        """Answer `/storage/v1/<path>`."""
        try:
            return self._route(method, path, headers, body)
        except HttpError as error:
            status, code, message = error.status, str(error.body["code"]), str(error)
            if code == "42501":
                status, code = 403, "Unauthorized"
            if code == "23505":
                code, message = "Duplicate", "The resource already exists"
            if path.startswith("upload/resumable"):
                return Answer(status, message.encode(), {"content-type": "text/plain"})
            return _refusal(status, code, message)

    def _route(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes
    ) -> Answer | Stored:
        if path.startswith("upload/resumable"):
            return self._serve_upload(method, path, headers, body)
        verb, _, rest = path.partition("/")
        if verb != "object":
            raise HttpError(501, "DOUBLE", f"this double does not serve {method} {path}")
        rest = rest.removeprefix("authenticated/")
        bucket, _, name = rest.partition("/")
        if method == "GET" and name:
            return self._get(bucket, name, path, headers)
        if method == "DELETE" and not name:
            return self._delete(bucket, json.loads(body)["prefixes"], path, headers)
        if method == "POST" and name and not rest.startswith(("sign/", "list/")):
            return self._put(bucket, name, path, headers, body)
        raise HttpError(501, "DOUBLE", f"this double does not serve {method} {path}")

    def _get(self, bucket: str, name: str, path: str, headers: Mapping[str, str]) -> Stored:
        with self._database.transaction("GET", path, headers, read_only=True) as cursor:
            query = "select version from storage.objects where bucket_id = %s and name = %s"
            row = cursor.execute(query, (bucket, name)).fetchone()
        if row is None:
            raise HttpError(404, "not_found", "Object not found")
        content = self._folder / row[0]
        wanted = re.fullmatch(r"bytes=(\d+)-", headers.get("range", ""))
        return Stored(content, int(wanted[1]) if wanted else 0, content.stat().st_size)

    def _put(
        self, bucket: str, name: str, path: str, headers: Mapping[str, str], body: bytes
    ) -> Answer:
        content = _file_of(headers.get("content-type", ""), body)
        self._check_size(len(content))
        self._check_may_put(bucket, name, path, headers)
        version = uuid.uuid4().hex
        (self._folder / version).write_bytes(content)
        found = self._record(bucket, name, version, path, headers)
        return _json(200, {"Id": found, "Key": f"{bucket}/{name}"})

    def _check_size(self, size: int) -> None:
        if size > self.most_bytes:
            raise HttpError(
                413, "Payload too large", "The object exceeded the maximum allowed size"
            )

    def _check_may_put(self, bucket: str, name: str, path: str, headers: Mapping[str, str]) -> None:
        """Insert as the client, and take it back."""
        query = _UPSERT if headers.get("x-upsert") == "true" else _INSERT
        with contextlib.suppress(_TakenBack), self._transaction(path, headers) as cursor:
            cursor.execute(query, (bucket, name, "none", "{}"))
            raise _TakenBack

    def _record(
        self, bucket: str, name: str, version: str, path: str, headers: Mapping[str, str]
    ) -> str:
        size = (self._folder / version).stat().st_size
        metadata = json.dumps({"size": size, "mimetype": "application/octet-stream"})
        with self._transaction(path, headers, role="service_role") as cursor:
            row = cursor.execute(_UPSERT, (bucket, name, version, metadata)).fetchone()
        assert row is not None
        return str(row[0])

    def _transaction(self, path: str, headers: Mapping[str, str], role: str = "anon"):  # noqa: ANN202
        return self._database.transaction("POST", path, headers, role=role)

    def _delete(
        self, bucket: str, names: list[str], path: str, headers: Mapping[str, str]
    ) -> Answer:
        query = (
            "delete from storage.objects where bucket_id = %s and name = any(%s) "
            "returning name, version"
        )
        with self._database.transaction("DELETE", path, headers) as cursor:
            rows = cursor.execute(query, (bucket, names)).fetchall()
        for _, version in rows:
            (self._folder / version).unlink(missing_ok=True)
        return _json(200, [{"name": name} for name, _ in rows])

    # ---- resumable uploads (tus 1.0.0)

    def _serve_upload(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes
    ) -> Answer:
        if headers.get("tus-resumable") != "1.0.0":
            raise HttpError(412, "TUS", "Tus-Resumable Required")
        if method == "POST":
            return self._begin(path, headers)
        upload = self._uploads.get(path.rpartition("/")[2])
        if upload is None:
            raise HttpError(404, "TUS", "The file for this url was not found")
        if method == "PATCH":
            self._check_may_put(upload.bucket, upload.name, path, headers)
            self._append(upload, path, headers, body)
        elif method != "HEAD":
            raise HttpError(501, "DOUBLE", f"this double does not serve {method} {path}")
        shown = {"Upload-Offset": str(upload.arrived), "Tus-Resumable": "1.0.0"}
        return Answer(204 if method == "PATCH" else 200, b"", shown)

    def _begin(self, path: str, headers: Mapping[str, str]) -> Answer:
        pairs = (item.split(" ") for item in headers["upload-metadata"].split(","))
        named = {name: base64.b64decode(value).decode() for name, value in pairs}
        size = int(headers["upload-length"])
        self._check_size(size)
        self._check_may_put(named["bucketName"], named["objectName"], path, headers)
        upload_id, content = uuid.uuid4().hex, self._folder / uuid.uuid4().hex
        content.touch()
        self._uploads[upload_id] = Upload(named["bucketName"], named["objectName"], content, size)
        # Behind a proxy the service often has a wrong idea of its own address.
        location = f"http://storage.invalid/upload/resumable/{upload_id}"
        return Answer(201, b"", {"Location": location, "Tus-Resumable": "1.0.0"})

    def _append(self, upload: Upload, path: str, headers: Mapping[str, str], body: bytes) -> None:
        if int(headers["upload-offset"]) != upload.arrived:
            raise HttpError(409, "TUS", "Upload-Offset conflict")
        left = upload.size - upload.arrived
        if len(body) != min(PART_BYTES, left):
            raise HttpError(400, "DOUBLE", f"a part of {len(body)} bytes, with {left} left to come")
        with upload.path.open("ab") as content:
            content.write(body)
        upload.arrived += len(body)
        if upload.arrived == upload.size:
            self._record(upload.bucket, upload.name, upload.path.name, path, headers)


class _TakenBack(Exception):
    """Rolls a transaction back."""


def send(stored: Stored, target: BinaryIO, most_bytes: int | None = None) -> None:
    """Write an object from its first wanted byte; with `most_bytes`, not all of it."""
    left = stored.size - stored.first if most_bytes is None else most_bytes
    with stored.path.open("rb") as content:
        content.seek(stored.first)
        while left > 0 and (chunk := content.read(min(left, _CHUNK_BYTES))):
            target.write(chunk)
            left -= len(chunk)


def _file_of(content_type: str, body: bytes) -> bytes:
    """The file in a multipart form, or the body itself."""
    boundary = re.search(r"boundary=([^;]+)", content_type)
    if boundary is None:
        return body
    for part in body.split(b"--" + boundary[1].encode())[1:]:
        head, _, content = part.partition(b"\r\n\r\n")
        if b'name="file"' in head:
            return content.removesuffix(b"\r\n")
    raise HttpError(400, "InvalidRequest", "the form has no file")


def _json(status: int, value: object) -> Answer:
    return Answer(status, json.dumps(value).encode(), {"content-type": "application/json"})


def _refusal(status: int, code: str, message: str) -> Answer:
    # The service says 400, and what it means inside.
    return _json(400, {"statusCode": str(status), "error": code, "message": message})
