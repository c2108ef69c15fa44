"""What `ow doctor` asks of a project."""

from __future__ import annotations

import os
import uuid

from openweights.backends.supabase.connection import Project
from openweights.backends.supabase.storage import BUCKET, CONTENT_TYPE
from openweights.errors import ConfigurationError, NotFoundError, OpenWeightsError

_PROBE = b"written by `ow doctor`"


class HealthVerbs(Project):
    """Whether a project is as this package needs it."""

    def storage_problem(self) -> str | None:
        """What is wrong with storage: an object is written, read and removed in the organization's
        folder, and must be refused in another one.
        """
        name = f"doctor:file-{os.urandom(6).hex()}"
        own = f"{self.organization_id}/{self.identity['key_id']}/{name}"
        foreign = f"{uuid.uuid4()}/{uuid.uuid4()}/{name}"
        try:
            self._upload_probe(own)
            content = self._patiently(lambda: self._bucket().download(own))
            self._patiently(lambda: self._bucket().remove([own]))
        except NotFoundError as error:
            return f"no private bucket {BUCKET!r}: {error}"
        except OpenWeightsError as error:
            return str(error)
        if content != _PROBE:
            return "it does not give back what was stored"
        try:
            self._upload_probe(foreign)
            self._patiently(lambda: self._bucket().remove([foreign]))
        except ConfigurationError:
            return None
        return "this key may write into the folders of other organizations"

    def _upload_probe(self, path: str) -> None:
        options = {"content-type": CONTENT_TYPE}
        self._patiently(lambda: self._bucket().upload(path, _PROBE, options))
