"""Content of files in a project's storage, in constant memory.

The supabase client holds whole files in memory, so only what fits into one part goes through it.
Larger files are sent in parts by the resumable protocol (https://tus.io, version 1.0.0; the service
wants parts of exactly 6 MiB), and downloads are streams that go on where a broken connection ended.
"""

from __future__ import annotations

import base64
import hashlib
import io
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO, TypeVar, cast
from urllib.parse import quote

import httpx

from openweights.errors import InvalidInputError, PlatformError

T = TypeVar("T")
Patience = Callable[[Callable[[], T]], T]

BUCKET = "files"
PART_BYTES = 6 << 20
DIGITS = 12  # of the digest, in a file's id
_CHUNK_BYTES = 1 << 20
_IN_MEMORY = 8 << 20
_TUS = {"Tus-Resumable": "1.0.0"}
_PARTIAL_CONTENT = 206
CONTENT_TYPE = "application/octet-stream"


@dataclass(frozen=True, slots=True)
class Content:
    """A stream whose bytes have been counted and hashed, to be read again from `start`.

    Attributes:
        digest: sha256 of content and organization, in hex.
    """

    stream: BinaryIO
    start: int
    bytes: int
    digest: str

    def part_bytes(self, offset: int) -> int:
        """How long the part at `offset` is."""
        return min(PART_BYTES, self.bytes - offset)

    def part(self, offset: int) -> Iterator[bytes]:
        """The part at `offset`, in pieces."""
        self.stream.seek(self.start + offset)
        left = self.part_bytes(offset)
        while left:
            piece = self.stream.read(min(_CHUNK_BYTES, left))
            if not piece:
                raise InvalidInputError("the file became shorter while it was read: try again")
            left -= len(piece)
            yield piece


@contextmanager
def measured(stream: BinaryIO, organization_id: str) -> Generator[Content]:
    """Read a stream once, for its id; one that cannot be read again is kept on disk meanwhile."""
    if stream.seekable():
        yield _measure(stream, organization_id)
        return
    with tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY) as spool:
        shutil.copyfileobj(stream, spool, _CHUNK_BYTES)
        spool.seek(0)
        yield _measure(cast("BinaryIO", spool), organization_id)


def _measure(stream: BinaryIO, organization_id: str) -> Content:
    start, size, digest = stream.tell(), 0, hashlib.sha256()
    while chunk := stream.read(_CHUNK_BYTES):
        digest.update(chunk)
        size += len(chunk)
    digest.update(organization_id.encode())
    return Content(stream, start, size, digest.hexdigest())


def upload_in_parts(
    http: httpx.Client, storage_url: str, key: str, content: Content, patience: Patience[int]
) -> None:
    """Store `content` under `key`; a part whose answer was lost is sent on from where it arrived.

    Raises:
        NotFoundError: The service has forgotten the upload; it can be begun again.
    """
    upload_url = _begin_upload(http, storage_url, key, content.bytes, patience)
    offset = 0
    while offset < content.bytes:
        offset = patience(_PartSender(http, upload_url, content, offset))


def _begin_upload(
    http: httpx.Client, storage_url: str, key: str, size: int, patience: Patience[int]
) -> str:
    url = f"{storage_url}/upload/resumable"
    named = {"bucketName": BUCKET, "objectName": key, "contentType": CONTENT_TYPE}
    metadata = [f"{name} {base64.b64encode(v.encode()).decode()}" for name, v in named.items()]
    headers = {
        **_TUS,
        "Upload-Length": str(size),
        "Upload-Metadata": ",".join(metadata),
        "x-upsert": "true",
    }
    found: list[str] = []

    def begin() -> int:
        answer = http.post(url, headers=headers)
        # Of the address only the id: behind a proxy the service may not know its own address, and
        # the key is sent nowhere else than to the project.
        found.append(answer.headers["Location"].rstrip("/").rpartition("/")[2])
        return 0

    patience(begin)
    return f"{url}/{found[-1]}"


class _PartSender:
    """Sends one part, and says how much of the file has arrived by then."""

    def __init__(self, http: httpx.Client, url: str, content: Content, offset: int) -> None:
        self._http = http
        self._url = url
        self._content = content
        self._offset = offset
        self._is_first = True

    def __call__(self) -> int:
        is_first, self._is_first = self._is_first, False
        arrived = self._offset if is_first else self._ask()
        return arrived if arrived != self._offset else self._send()

    def _ask(self) -> int:
        return int(self._http.head(self._url, headers=_TUS).headers["Upload-Offset"])

    def _send(self) -> int:
        headers = {
            **_TUS,
            "x-upsert": "true",
            "Upload-Offset": str(self._offset),
            "Content-Type": "application/offset+octet-stream",
            "Content-Length": str(self._content.part_bytes(self._offset)),
        }
        # As pieces: a request outlives its answer for a while, and would keep the whole part.
        pieces = self._content.part(self._offset)
        answer = self._http.patch(self._url, headers=headers, content=pieces)
        return int(answer.headers["Upload-Offset"])


class Digest:
    """Checks that what comes is what the file's record was made of: whoever may store something
    could store it under an id that it does not have.
    """

    def __init__(self, organization_id: str, file_id: str, sha256: str) -> None:
        self._organization_id = organization_id
        self._file_id = file_id
        self._sha256 = sha256
        self._hash = hashlib.sha256()

    def update(self, chunk: bytes) -> None:
        self._hash.update(chunk)

    def check(self) -> None:
        """Raise PlatformError if all that came is something else."""
        found = self._hash.copy()
        found.update(self._organization_id.encode())
        if found.hexdigest() != self._sha256:
            raise PlatformError(
                f"what the project holds as {self._file_id} is not that file: delete it, and "
                "upload it again"
            )


def open_download(
    http: httpx.Client, storage_url: str, key: str, digest: Digest, patience: Patience[bytes]
) -> BinaryIO:
    """The content under `key`, as a stream that survives broken connections; at its end, content
    of another digest is a PlatformError.

    Raises:
        NotFoundError: There is none.
    """
    url = f"{storage_url}/object/authenticated/{BUCKET}/{quote(key)}"
    return io.BufferedReader(_Download(http, url, digest, patience), _CHUNK_BYTES)


class _Download(io.RawIOBase):
    def __init__(
        self, http: httpx.Client, url: str, digest: Digest, patience: Patience[bytes]
    ) -> None:
        self._http = http
        self._url = url
        self._digest = digest
        self._patience = patience
        self._position = 0
        self._response: httpx.Response | None = None
        self._chunks: Iterator[bytes] = iter(())
        self._rest = memoryview(patience(self._read))

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not self._rest:
            self._rest = memoryview(self._patience(self._read))
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count

    def close(self) -> None:
        self._drop()
        super().close()

    def _read(self) -> bytes:
        """The next bytes; none at the end."""
        try:
            if self._response is None:
                self._connect()
            chunk = next(self._chunks, b"")
        except BaseException:
            self._drop()
            raise
        self._position += len(chunk)
        self._digest.update(chunk)
        if not chunk:
            self._digest.check()
        return chunk

    def _connect(self) -> None:
        # Compressed bytes could not be counted, and most of what is stored here is compressed.
        headers = {"Accept-Encoding": "identity"}
        if self._position:
            headers["Range"] = f"bytes={self._position}-"
        request = self._http.build_request("GET", self._url, headers=headers)
        self._response = response = self._http.send(request, stream=True)
        self._chunks = response.iter_raw(_CHUNK_BYTES)
        if self._position and response.status_code != _PARTIAL_CONTENT:
            self._skip(self._position)

    def _skip(self, count: int) -> None:
        """A service that knows no ranges has begun from the first byte."""
        while count > 0:
            chunk = next(self._chunks, b"")
            if len(chunk) > count:
                rest, later = chunk[count:], self._chunks
                self._chunks = (piece for part in ((rest,), later) for piece in part)
            if not chunk:
                return
            count -= len(chunk)

    def _drop(self) -> None:
        if self._response is not None:
            self._response.close()
        self._response = None
