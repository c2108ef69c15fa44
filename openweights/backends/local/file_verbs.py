"""Files: the record in the database, the content in the folder."""

from __future__ import annotations

from typing import BinaryIO

from openweights.backends.local import records
from openweights.backends.local.failures import clear_errors
from openweights.backends.local.folders import Incoming
from openweights.backends.local.store import Store, find, insert, matching
from openweights.backends.values import base_name, readable
from openweights.errors import InvalidInputError, NotFoundError, shown
from openweights.types import FileRecord


class FileVerbs(Store):
    """The part of `Backend` about files."""

    def put_file(self, content: BinaryIO, purpose: str, filename: str) -> FileRecord:
        with self._read():
            pass  # creates the home
        with clear_errors(self.home):
            incoming = self._files.receive(content, purpose)
            try:
                return self._keep(incoming, purpose, base_name(filename))
            finally:
                self._files.discard(incoming)

    def _keep(self, incoming: Incoming, purpose: str, filename: str) -> FileRecord:
        with self._write() as db:
            row = find(db, "files", incoming.file_id)
            if row is not None and row["sha256"] != incoming.sha256:
                raise InvalidInputError(
                    f"another content already has the id {incoming.file_id}: change a byte of yours"
                )
            if row is None or not self._files.path(incoming.file_id).exists():
                # Content first: a crash in between leaves no record of nothing.
                self._files.adopt(incoming)
            if row is None:
                columns = {
                    "id": incoming.file_id,
                    "purpose": purpose,
                    "filename": filename,
                    "bytes": incoming.bytes,
                    "sha256": incoming.sha256,
                    "created_at": self._now(),
                }
                insert(db, "files", columns)
                row = find(db, "files", incoming.file_id)
            assert row is not None
            # Whoever puts it will name it: `collect_garbage` waits for that.
            db.execute("UPDATE files SET used_at = ? WHERE seq = ?", (self._now(), row["seq"]))
            return records.file_record(row)

    def get_file(self, file_id: str) -> FileRecord:
        with self._read() as db:
            row = find(db, "files", file_id)
        if row is None:
            raise NotFoundError(f"no file {shown(file_id)} in the store in {self.home}")
        return records.file_record(row)

    def open_file(self, file_id: str) -> BinaryIO:
        self.get_file(file_id)
        with clear_errors(self.home):
            try:
                return open(self._files.path(file_id), "rb")
            except FileNotFoundError:
                raise NotFoundError(
                    f"the content of {file_id} is gone from {self.home / 'files'}: upload it again"
                ) from None

    def list_files(
        self, *, purpose: str | None = None, limit: int | None = 100
    ) -> list[FileRecord]:
        query, values = matching("SELECT * FROM files", {"purpose": purpose})
        with self._read() as db:
            query += " ORDER BY created_at DESC, seq DESC LIMIT ?"
            rows = db.execute(query, (*values, -1 if limit is None else limit))
            return list(readable(records.file_record, rows, "file"))

    def delete_file(self, file_id: str) -> None:
        with self._write() as db:
            is_known = db.execute("DELETE FROM files WHERE id = ?", (file_id,)).rowcount > 0
        if is_known:
            # After the record, so that a crash in between leaves no record of nothing; and under
            # the write lock again, because the same content may be coming back just now.
            with self._write() as db:
                if find(db, "files", file_id) is None:
                    self._files.remove(file_id)
