"""What an inference job has answered so far, kept in the store as it comes: a job that loses its
worker goes on where it was.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from openweights.errors import NotFoundError
from openweights.events import Part

if TYPE_CHECKING:
    from openweights import OpenWeights
    from openweights.client.runs import Run

PURPOSE = "checkpoint"
# A part is stored when so much of the time since the start has passed since the last one: a job
# that is lost loses little of its work, and one that runs for days stores few parts.
SHARE = 0.2
SHORTEST_S, LONGEST_S = 1.0, 60.0

Result = Mapping[str, Any]


class Parts:
    """The results of a job by the index of their row.

    Attributes:
        results: Those of earlier attempts, too.
    """

    def __init__(self, ow: OpenWeights, run: Run) -> None:
        self._ow, self._run = ow, run
        self._new: dict[int, Result] = {}
        self._started_at = self._saved_at = time.monotonic()
        self.results: dict[int, Result] = dict(self._stored())

    def _stored(self) -> dict[int, Result]:
        found: dict[int, Result] = {}
        for event in self._ow.events.iterate(job_id=self._run.job_id, type=Part.type):
            try:
                content = self._ow.files.content(Part.of(event.data).part)
            except NotFoundError:
                continue  # of a job that completed, and was submitted again
            for line in content.splitlines():
                item = json.loads(line)
                if isinstance(item, list):  # else it says whose they are
                    found[item[0]] = item[1]
        return found

    def add(self, index: int, result: Result) -> None:
        """Take a result; store it, with others, when it is time."""
        self.results[index] = self._new[index] = result
        now = time.monotonic()
        wait_s = min(max(SHARE * (now - self._started_at), SHORTEST_S), LONGEST_S)
        if now - self._saved_at >= wait_s:
            self.save()

    def save(self) -> None:
        """Store what is not stored yet."""
        if not self._new:
            return
        # Equal content is one file, which goes with the job that it is of: each has its own.
        items = [{"job": self._run.job_id}, *self._new.items()]
        lines = "".join(json.dumps(item) + "\n" for item in items)
        stored = self._ow.files.create(lines.encode(), PURPOSE, name="part.jsonl")["id"]
        self._run.log(Part(step=len(self.results), part=stored).data())
        self._new, self._saved_at = {}, time.monotonic()
