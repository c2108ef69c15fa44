"""Calls to a Supabase project: patience with lost answers, and errors that say what to do.

Every verb of ours may be sent twice (a claim per worker, an event by its key, a log by its offset,
a job by its id), so a call whose answer was lost is simply repeated. `check_response` turns each
refusal into an error of this package; PostgREST passes on what the SQL functions raise, with the
class of error in `details`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import httpx

from openweights.errors import (
    ConfigurationError,
    FencedError,
    InvalidInputError,
    InvalidStateError,
    NotFoundError,
    OpenWeightsError,
    PlatformError,
    StoreUnavailableError,
)
from openweights.retry import retry

T = TypeVar("T")

# What a caller waits for a store that is away, before it hears of it.
PATIENCE_S = 20.0
_LONGEST_DELAY_S = 5.0
_LONGEST_QUOTE = 300

# A resumable upload is locked for as long as the service still works on a part.
_LOCKED = 423
_TRANSIENT = frozenset({408, 425, 429, _LOCKED})
_BY_DETAILS: Mapping[str, type[OpenWeightsError]] = {
    "invalid_input": InvalidInputError,
    "unauthenticated": ConfigurationError,
    "forbidden": ConfigurationError,
    "not_found": NotFoundError,
    "invalid_state": InvalidStateError,
    "fenced": FencedError,
    "budget": InvalidStateError,
}
# Function, table or column unknown to PostgREST, and to PostgreSQL.
_SCHEMA_CODES = frozenset({"PGRST202", "PGRST204", "PGRST205", "42883", "42P01", "42703", "3F000"})
_PERMISSION_CODE = "42501"
# The public key was a JWT in older projects; PostgREST takes it for one that is no longer good.
_JWT_CODES = frozenset({"PGRST301", "PGRST302", "PGRST303"})


class TransientError(Exception):
    """The project answered that it cannot answer now.

    Attributes:
        retry_after_s: When to come back, as it said itself.
    """

    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


def patiently(call: Callable[[], T], patience_s: float, url: str) -> T:
    """The answer of `call`, repeated while the project at `url` is away.

    Raises:
        InvalidInputError: What is sent is nothing that a request can hold: half characters, numbers
            that JSON lacks.
        StoreUnavailableError: It was away for `patience_s`, counted from the first failure.
    """
    away = (httpx.TransportError, TransientError)
    try:
        return retry(call, away, patience_s=patience_s, longest_s=_LONGEST_DELAY_S)
    except away as error:
        reason = str(error) or type(error).__name__
        raise StoreUnavailableError(f"cannot reach the store at {url}: {reason}") from error
    except OpenWeightsError:
        raise
    except (ValueError, OverflowError, httpx.InvalidURL) as error:
        raise InvalidInputError(f"the store cannot hold this: {error}") from error


def check_response(response: httpx.Response) -> None:
    """Raise what an answer that is no success means.

    Raises:
        TransientError: Worth repeating.
        OpenWeightsError: A refusal.
    """
    if not response.is_success:
        response.read()
        raise _error(response, _body(response))


def _body(response: httpx.Response) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        body = response.json()
        if isinstance(body, dict):
            return cast(dict[str, Any], body)
    return {}


def _error(response: httpx.Response, body: Mapping[str, Any]) -> Exception:
    message = _message(response, body)
    by_details = _BY_DETAILS.get(str(body.get("details")))
    if by_details is not None:
        return by_details(message)
    status = _status(response, body)
    if status in _TRANSIENT or status >= 500:
        return TransientError(f"HTTP {status}: {message}", _retry_after_s(response))
    code = str(body.get("code") or "")
    if code in _SCHEMA_CODES:
        return ConfigurationError(
            f"the project's tables and functions are not those of this version ({message}): "
            "run `ow db init`"
        )
    if response.status_code == 401 and (not code or code in _JWT_CODES):
        return ConfigurationError(
            f"the project refuses its public key, SUPABASE_ANON_KEY: {message}"
        )
    if status in (401, 403) or code == _PERMISSION_CODE:
        return ConfigurationError(f"the project refuses this: {message}")
    return _plain_error(response, status, code, message)


def _plain_error(response: httpx.Response, status: int, code: str, message: str) -> Exception:
    path = response.request.url.path
    if response.is_redirect:
        target = httpx.URL(response.headers.get("location", "")).host
        return ConfigurationError(
            f"SUPABASE_URL leads elsewhere, to {target or 'another address'}: use that one"
        )
    if status == 404:
        return NotFoundError(message)
    if status == 409 and "/storage/v1/" in path:
        return TransientError(f"HTTP 409: {message}")  # a part is still being written
    if status == 413:
        return InvalidInputError(
            f"the project takes no file of this size ({message}): raise the upload limit in its "
            "storage settings, or upload a smaller file"
        )
    # "PGRST102" and "PGRST100": a body or a query that is none.
    if code[:2] in ("22", "23") or code in ("PGRST100", "PGRST102"):
        return InvalidInputError(f"the store cannot hold this: {message}")
    return PlatformError(f"the project answered {path} with HTTP {status}: {message}")


def _message(response: httpx.Response, body: Mapping[str, Any]) -> str:
    text = body.get("message") or body.get("error") or body.get("msg") or response.text
    line = " ".join(str(text).split())[:_LONGEST_QUOTE]
    return line or response.reason_phrase or "no reason given"


def _status(response: httpx.Response, body: Mapping[str, Any]) -> int:
    # The storage service answers 400 and says what it means inside.
    code = str(body.get("statusCode") or "")
    return int(code) if code.isdecimal() else response.status_code


def _retry_after_s(response: httpx.Response) -> float:
    text = response.headers.get("retry-after", "")
    return float(text) if text.isdecimal() else 0.0
