"""What the files of a store are for, as the jobs tell that read them: what is trained on is kept
apart from what is measured on, and from prompts.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from openweights.backends.base import Backend
from openweights.client.datasets import CHECKED_PURPOSES
from openweights.client.job_kinds import MOUNT_PURPOSE
from openweights.client.watching.file_names import FILE_ID
from openweights.errors import InvalidInputError
from openweights.types import FileRecord, JobRecord

# As what a parameter reads its files.
_USES = {
    "training_file": "training",
    "test_file": "test",
    "logp_callback_datasets": "log-probabilities",
    "mcq_callbacks": "questions",
    "dataset": "scoring",
    "sampling_callbacks": "sampling",
    "input_file_id": "inference",
    "prompts": "evaluation",
}
_GROUP_OF = {"training": "training", "sampling": "prompts", "inference": "prompts"} | {
    use: "evaluation" for use in ("test", "log-probabilities", "questions", "scoring", "evaluation")
}
# Files of these are not asked of whom they serve: their purpose says it.
_BY_PURPOSE = {"custom": MOUNT_PURPOSE, "results": "result"}
GROUPS = ("training", "evaluation", "prompts", *_BY_PURPOSE)


def files_of_group(
    backend: Backend, jobs: Iterable[JobRecord], group: str, offset: int, limit: int
) -> list[dict[str, Any]]:
    """Files of a group, the newest first: `{id, filename, purpose, bytes, created_at, uses}`.

    `uses` says how many jobs read it as what, `{"training": 2}`. A dataset that jobs read for
    several ends is in several groups; one that none has read yet is what its purpose says:
    questions are for evaluation, all other ones to train on.

    Raises:
        InvalidInputError: There is no such group.
    """
    if group not in GROUPS:
        raise InvalidInputError(f"group: {group!r} is none of {', '.join(GROUPS)}")
    found = uses(jobs)
    if group in _BY_PURPOSE:
        files = backend.list_files(purpose=_BY_PURPOSE[group], limit=offset + limit)
    else:
        every = [f for own in CHECKED_PURPOSES for f in backend.list_files(purpose=own, limit=None)]
        files = [file for file in every if group in _groups(file, found.get(file.id, {}))]
        files.sort(key=lambda file: file.created_at, reverse=True)
    return [_shown(file, found.get(file.id, {})) for file in files[offset : offset + limit]]


def uses(jobs: Iterable[JobRecord]) -> dict[str, dict[str, int]]:
    """Of each file that parameters name how many jobs read it as what."""
    found: dict[str, Counter[str]] = {}
    for job in jobs:
        params = job.validated_params
        for name, use in _USES.items():
            for file in set(FILE_ID.findall(json.dumps(params.get(name), default=str))):
                found.setdefault(file, Counter())[use] += 1
    return {file: dict(counts) for file, counts in found.items()}


def _groups(file: FileRecord, own: Mapping[str, int]) -> set[str]:
    if not own:
        return {"evaluation" if file.purpose == "multiple_choice" else "training"}
    return {_GROUP_OF[use] for use in own}


def _shown(file: FileRecord, own: Mapping[str, int]) -> dict[str, Any]:
    return {
        "id": file.id,
        "filename": file.filename,
        "purpose": file.purpose,
        "bytes": file.bytes,
        "created_at": file.created_at.isoformat(),
        "uses": dict(own),
    }
