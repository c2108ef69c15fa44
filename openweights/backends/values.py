"""What every store takes: moments, purposes, names of files, and the fields of a job, with limits.

The limits are those of `sql/code/015_limits.sql`. They are there because one record that cannot be
read would stop every reader. What is read all the same, such as a row of another program, is
brought within them (`moment_within`, `base_name`) or left out (`readable`).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, TypeVar, cast

from openweights.backends.scheduling import CAUSES, LONGEST_BACKOFF_S
from openweights.errors import InvalidInputError, shown
from openweights.json_values import storable
from openweights.types import CLOUD_TYPES, JobSpec, Retry, WorkerSpec

logger = logging.getLogger(__name__)
T = TypeVar("T")

FIRST_MOMENT = datetime(2000, 1, 1, tzinfo=UTC)
LAST_MOMENT = datetime(2200, 1, 1, tzinfo=UTC)
MOST_TEXT = 4000
LOG_LIMIT_BYTES = 64 << 20
MOST_EVENT_BYTES = 256 << 20  # of a run
LEAST_KEEP_S = 3600.0  # what was put so lately may be named in a moment
_MOST_KEEP_S = 1000 * 365.25 * 86_400
_MOST_OFFSET = 1 << 62
_MOST_READ_BYTES = 8 << 20  # of a log in one call
LEAST_LOG_BYTES = 1024  # a shorter log is left as it is
MOST_SCRIPT_BYTES = 120_000  # Linux takes no argument that is longer than 128 KiB
_MOST_PARAMS_BYTES = 4 << 20
_MOST_NAME_BYTES = 255
_MOST_RETRIES = 1000
_VALID_PURPOSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_JOB_ID = re.compile(r"[^\s/.-][^\s/]*( [^\s/]+)*")
# Control characters, those that turn the direction of writing or take no place, and half ones.
_HIDDEN = re.compile("[\0-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
_NUMBERS: Mapping[str, tuple[float, float]] = {
    "requires_vram_gb": (0, 100_000),
    "priority": (-1_000_000, 1_000_000),
    "max_attempts": (1, 1000),
    "max_cost_usd": (0, 1e9),
    "max_usd_per_hour": (0, 1e6),
    "max_running": (1, 100_000),
    "max_duration_s": (1, 1e9),
    "stall_timeout_s": (1, 1e9),
    "gpu_count": (0, 10_000),
    "vram_gb": (0, 1_000_000),
}
_NEEDED = frozenset({"requires_vram_gb", "priority", "max_attempts", "gpu_count", "vram_gb"})
_WHOLE = _NEEDED | {"max_running"}
_OF_WORKER = frozenset({"gpu_count", "vram_gb"})
_NAMES = {"model": 1000, "bundle_file": 200, "label": 200}
_NAMES_OF_WORKER = {"id": 250, "docker_image": 1000, "hardware_type": 200, "pod_id": 200}
_CAUSE = re.compile(r"any|oom|hub|exit:[1-9][0-9]{0,2}")


# ---- what comes in -------------------------------------------------------------------------------


def check_moment(moment: datetime) -> datetime:
    """The moment, if it has a time zone and is one of the years 2000 to 2199.

    Raises:
        InvalidInputError: It has none, or is not.
    """
    if moment_within(moment) != moment:
        raise InvalidInputError(f"{moment.isoformat()} is no moment of the years 2000 to 2199")
    return moment


def check_purpose(purpose: str) -> None:
    """Raise InvalidInputError for a purpose that cannot be part of a file id."""
    if not _VALID_PURPOSE.fullmatch(purpose):
        raise InvalidInputError(
            f"purpose {shown(purpose)} cannot be part of a file id: use letters, digits, _ and -"
        )


def check_spec(spec: JobSpec) -> None:
    """Raise InvalidInputError, with the field's name, for what no job can be."""
    _check_name("id", spec.id, 250)
    if not _JOB_ID.fullmatch(spec.id):
        raise InvalidInputError(f"id: {shown(spec.id)} cannot be the id of a job")
    _check_text("script", spec.script, MOST_SCRIPT_BYTES)
    _check_names("allowed_hardware", spec.allowed_hardware or (), 2000)
    _check_name("docker_image", spec.docker_image, 1000)
    for field, most in _NAMES.items():
        if getattr(spec, field) is not None:
            _check_name(field, getattr(spec, field), most)
    _check_names("after", spec.after, 20_000)
    for needed in spec.after:
        if not _JOB_ID.fullmatch(needed):
            raise InvalidInputError(f"after: {shown(needed)} cannot be the id of a job")
    for field in _NUMBERS.keys() - _OF_WORKER:
        check_number(field, getattr(spec, field))
    for moment in (spec.timeout_at, spec.not_before):
        if moment is not None:
            check_moment(moment)
    if spec.max_running is not None and not spec.label:
        raise InvalidInputError("max_running counts the jobs with a label: give one")
    check_retry(spec.retry)
    _check_params(spec.params)


def check_worker(worker: WorkerSpec) -> None:
    """Raise InvalidInputError, with the field's name, for what no worker can be."""
    for field, most in _NAMES_OF_WORKER.items():
        if field != "pod_id" or worker.pod_id is not None:
            _check_name(field, getattr(worker, field), most)
    for field in _OF_WORKER:
        check_number(field, getattr(worker, field))
    if worker.cloud_type not in (*CLOUD_TYPES, None):
        raise InvalidInputError("cloud_type must be SECURE, COMMUNITY or ALL")


def check_number(field: str, value: object) -> None:
    """Raise InvalidInputError for a number that a field cannot be; None is fine where it may be."""
    least, most = _NUMBERS[field]
    if value is None and field not in _NEEDED:
        return
    if not isinstance(value, int | float) or not least <= value <= most:
        raise InvalidInputError(f"{field}: {shown(value)} is not between {least:g} and {most:g}")
    if field in _WHOLE and value != int(value):
        raise InvalidInputError(f"{field}: {shown(value)} is no whole number")


def check_retry(retry: Retry | None) -> None:
    """Raise InvalidInputError for retries that no job can have."""
    if retry is None:
        return
    if not 0 <= retry.max <= _MOST_RETRIES:
        raise InvalidInputError(f"retry.max: {shown(retry.max)} is not between 0 and 1000")
    if not 0 <= retry.backoff_s <= LONGEST_BACKOFF_S:
        raise InvalidInputError(
            f"retry.backoff_s: {shown(retry.backoff_s)} is not between 0 and 86400"
        )
    for cause in retry.on:
        if not _CAUSE.fullmatch(cause):
            raise InvalidInputError(
                f"retry.on: {shown(cause)} is no cause; choose among {', '.join(CAUSES)}"
            )


def retry_from_json(value: Mapping[str, Any]) -> Retry:
    return Retry(int(value["max"]), float(value["backoff_s"]), tuple(map(str, value["on"])))


def _check_params(params: object) -> None:
    if not isinstance(params, Mapping):
        raise InvalidInputError("params must be an object")
    params = cast("Mapping[str, object]", params)
    mounted = params.get("mounted_files", {})
    secrets: object = params.get("secrets") or []
    if not isinstance(mounted, Mapping) or not _are_texts(
        cast("Mapping[object, object]", mounted).values()
    ):
        raise InvalidInputError("params.mounted_files must be an object of file ids")
    if not isinstance(secrets, list | tuple) or not _are_texts(cast("list[object]", secrets)):
        raise InvalidInputError("params.secrets must be a list of names")
    if not isinstance(params.get("validated_params") or {}, Mapping):
        raise InvalidInputError("params.validated_params must be an object")
    if params.get("cloud_type") not in (*CLOUD_TYPES, None):
        raise InvalidInputError("params.cloud_type must be SECURE, COMMUNITY or ALL")


def _are_texts(values: Iterable[object]) -> bool:
    return all(isinstance(value, str) for value in values)


def check_params_size(text: str) -> str:
    """JSON text of a job's params; raises InvalidInputError when it is too long."""
    return _check_text("params", text, _MOST_PARAMS_BYTES)


def base_name(filename: str) -> str:
    """Last part of a path of any operating system, as a name that can be stored, shown and written
    to a folder: never `..`, without control characters, of at most 255 bytes.
    """
    name = re.split(r"[\\/]", filename.rstrip("\\/"))[-1]
    name = _HIDDEN.sub("_", storable(name))
    name = name.encode()[:_MOST_NAME_BYTES].decode(errors="ignore")
    return "file" if name in ("", ".", "..") else name


def check_log_end(run_id: int, end: int, most: int) -> None:
    """Raise InvalidInputError when a log would be longer than it may be."""
    if end > most:
        raise InvalidInputError(
            f"the log of run {run_id} would have {end} bytes, and may have no more than {most}"
        )


def checked_span(offset: int, limit: int) -> tuple[int, int]:
    """Where to read a log, and how much of it at once.

    Raises:
        InvalidInputError: They are less than 0.
    """
    if offset < 0 or limit < 0:
        raise InvalidInputError(f"offset {offset} and limit {limit}: both must be at least 0")
    return min(offset, _MOST_OFFSET), min(limit, _MOST_READ_BYTES)


def checked_keep_s(seconds: float) -> float:
    """For how long to keep what nobody needs, in seconds: an hour at least.

    Raises:
        InvalidInputError: It is no number of at least 0, or more than a thousand years.
    """
    if not 0 <= seconds <= _MOST_KEEP_S:
        raise InvalidInputError(f"{seconds} is no number of seconds to keep things for")
    return max(seconds, LEAST_KEEP_S)


def check_event_bytes(run_id: int, stored: int, more: int) -> None:
    """Raise InvalidInputError when a run logs more events than it may."""
    if stored + more > MOST_EVENT_BYTES:
        raise InvalidInputError(
            f"run {run_id} has logged {stored >> 20} MB of events, and may log no more than "
            f"{MOST_EVENT_BYTES >> 20}"
        )


def removed_log(size: int) -> bytes:
    """What is left of a log that was removed."""
    return f"[openweights] this log of {size} bytes was removed\n".encode()


def _check_names(field: str, texts: object, most: int) -> None:
    """A text is no list of its letters, and JSON has no other lists."""
    if not isinstance(texts, list | tuple) or not _are_texts(cast("list[object]", texts)):
        raise InvalidInputError(f"{field} must be a list of texts")
    _check_name(field, ", ".join(cast("list[str]", texts)), most)


def _check_name(field: str, text: object, most: int) -> None:
    if _HIDDEN.search(_check_text(field, text, most)):
        raise InvalidInputError(f"{field}: {shown(text)} holds characters that cannot be shown")


def _check_text(field: str, text: object, most: int) -> str:
    if not isinstance(text, str):
        raise InvalidInputError(f"{field}: {shown(text)} is no text")
    size = len(text.encode(errors="replace"))
    if size > most:
        raise InvalidInputError(f"{field} has {size} bytes: at most {most} can be stored")
    return text


# ---- what is read --------------------------------------------------------------------------------


def moment_within(moment: datetime) -> datetime:
    """The moment, or the nearest that is one of the years 2000 to 2199.

    Raises:
        InvalidInputError: It has no time zone.
    """
    if moment.tzinfo is None:
        raise InvalidInputError(
            f"{moment.isoformat()} has no time zone: use datetime.now(timezone.utc) or add tzinfo"
        )
    return min(max(moment, FIRST_MOMENT), LAST_MOMENT)


def readable(read: Callable[[Any], T], rows: Iterable[Any], what: str) -> Iterator[T]:
    """What `read` makes of each row; one that cannot be read is told of, and does not keep anybody
    from the others.
    """
    for row in rows:
        try:
            yield read(row)
        except (ValueError, TypeError, LookupError, OverflowError) as error:
            reason = f"{type(error).__name__}: {error}"
            logger.warning("%s %s cannot be read, and is left out: %s", what, _id_of(row), reason)


def _id_of(row: Any) -> object:
    try:
        return row["id"]
    except (LookupError, TypeError):
        return "without an id"
