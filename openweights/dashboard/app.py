"""The server: what the page asks for, as JSON, and the page's own files.

Endpoints are ordinary functions, which Starlette runs in threads, because the store blocks. Each
acts through `request.state.client`, which `access.Gate` has chosen.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import (
    FileResponse,
    JSONResponse,
    RedirectResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from openweights import __version__
from openweights.client import Job, OpenWeights
from openweights.client.job_kinds import kind_names
from openweights.client.params import field_defaults, field_meanings
from openweights.client.results import result_files
from openweights.client.watching.panels import shares_loss
from openweights.client.watching.scores import scores
from openweights.dashboard.access import Gate, Sessions, session_of
from openweights.dashboard.chat import chat_completions
from openweights.dashboard.cluster import (
    change_team,
    cluster_state,
    costs,
    team_of,
    team_state,
)
from openweights.dashboard.details import (
    compared_jobs,
    job_details,
    kind_named,
    log_matches,
)
from openweights.dashboard.file_uses import files_of_group
from openweights.dashboard.http import (
    json_body,
    refusal,
    refuse_local_files,
    store_upload,
    stream_file,
    whole,
)
from openweights.dashboard.job_index import SORT_KEYS, JobIndex, JobQuery
from openweights.dashboard.openai_api import openai_routes
from openweights.dashboard.rendered import Reader, reader_of
from openweights.dashboard.rows import dataset_page, dataset_summary
from openweights.dashboard.said import said_routes
from openweights.dashboard.series import READ_S, SeriesCache
from openweights.errors import (
    ConfigurationError,
    InvalidInputError,
    InvalidStateError,
    NotFoundError,
    OpenWeightsError,
    StoreUnavailableError,
)
from openweights.types import ENDED, FileRecord

STATIC = Path(__file__).parent / "static"
_STATUS_OF = {NotFoundError: 404, InvalidStateError: 409, InvalidInputError: 400}
_POLL_S = 1.0
_LOG_PIECE = 1 << 18
_MOST_POINTS = 4000


def create_app(sessions: Sessions, hosts: frozenset[str] | None, cookie: str) -> Starlette:
    """The page and what it asks for.

    Args:
        hosts: As of `Gate`.
        cookie: Name of the session's cookie; browsers share cookies between ports.

    Returns:
        The application; its streams end once `app.state.stopping`, an event, is set.
    """
    routes = [
        Route("/", _page),
        Route("/login", _login, methods=["POST"]),
        Route("/logout", _logout, methods=["POST"]),
        *_api_routes(),
        *openai_routes(),
        Route("/static/plotly.min.js", _plotly),
        Mount("/static", StaticFiles(directory=STATIC)),
    ]
    app = Starlette(
        routes=routes,
        middleware=[Middleware(Gate, sessions=sessions, hosts=hosts, cookie=cookie)],
        exception_handlers={OpenWeightsError: _refused, ValueError: _refused},
    )
    app.state.sessions, app.state.cookie = sessions, cookie
    app.state.views = _Views()
    app.state.stopping = threading.Event()
    return app


def read_ahead(app: Starlette, client: OpenWeights) -> None:
    """Read the store's jobs now, so that who opens the page does not wait for that."""
    with suppress(OpenWeightsError):  # the page will say it
        cast("_Views", app.state.views).of(client)[0].records()


def _api_routes() -> list[Route]:
    return [
        Route("/api/state", _state),
        Route("/api/jobs", _jobs),
        Route("/api/jobs", _create_job, methods=["POST"]),
        Route("/api/jobs/check", _check_job, methods=["POST"]),
        Route("/api/jobs/stream", _stream),
        Route("/api/jobs/{job_id}", _job),
        Route("/api/jobs/{job_id}/files", _result_files),
        *said_routes(),
        Route("/api/jobs/{job_id}/cancel", _cancel, methods=["POST"]),
        Route("/api/jobs/{job_id}/restart", _restart, methods=["POST"]),
        Route("/api/jobs/{job_id}/delete", _delete, methods=["POST"]),
        Route("/api/compare", _compare),
        Route("/api/scores", _scores),
        Route("/api/series", _series),
        Route("/api/runs/{run_id:int}/log", _log),
        Route("/api/runs/{run_id:int}/log/search", _log_search),
        Route("/api/kinds", _kinds),
        Route("/api/files", _files),
        Route("/api/files", _upload, methods=["POST"]),
        Route("/api/files/{file_id:path}/rows", _file_rows),
        Route("/api/files/{file_id:path}/summary", _file_summary),
        Route("/api/files/{file_id:path}/content", _file_content),
        Route("/api/cluster", _cluster),
        Route("/api/costs", _costs),
        Route("/api/team", _team),
        Route("/api/team/{verb}", _change_team, methods=["POST"]),
        Route("/api/chat", chat_completions, methods=["POST"]),
    ]


class _Views:
    """What is kept in memory of each client's store."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._of: WeakKeyDictionary[OpenWeights, tuple[JobIndex, SeriesCache]] = WeakKeyDictionary()

    def of(self, client: OpenWeights) -> tuple[JobIndex, SeriesCache]:
        with self._lock:
            if client not in self._of:
                self._of[client] = JobIndex(client.backend), SeriesCache(client.backend)
            return self._of[client]


def _client(request: Request) -> OpenWeights:
    return cast("OpenWeights", request.state.client)


def _views(request: Request) -> tuple[JobIndex, SeriesCache]:
    return cast("_Views", request.app.state.views).of(_client(request))


def _refused(request: Request, error: Exception) -> Response:
    """What went wrong, as the person at the page is to read it."""
    if isinstance(error, StoreUnavailableError):
        status = 503
    elif isinstance(error, ConfigurationError) and _is_locked_out(request):
        status = 401
    else:
        status = next((_STATUS_OF[kind] for kind in _STATUS_OF if isinstance(error, kind)), 400)
    return refusal(request, status, str(error))


def _is_locked_out(request: Request) -> bool:
    """Whether the project knows the key no more with which this request came: it was revoked."""
    client, sessions = _client(request), cast("Sessions", request.app.state.sessions)
    if not client.settings.is_remote:
        return False
    try:
        client.backend.list_jobs(limit=1)
    except ConfigurationError:
        sessions.forget(client)
        return True
    return False


# ---- the page itself, and who may see it ---------------------------------------------------------


def _page(request: Request) -> Response:
    """The page; an address with a token becomes one without, and a session."""
    sessions = cast("Sessions", request.app.state.sessions)
    token = request.query_params.get("token")
    if token is None:
        return FileResponse(STATIC / "index.html", headers={"cache-control": "no-cache"})
    session = sessions.open_with_token(token)
    response = RedirectResponse("/" if session else "/#/login", 303)
    return _with_session(request, response, session)


async def _login(request: Request) -> Response:
    """A session for the bearer of a key."""
    sessions = cast("Sessions", request.app.state.sessions)
    body = await json_body(request)
    session = await run_in_threadpool(sessions.open_with_key, str(body.get("key", "")))
    if session is None:
        return JSONResponse({"error": "the store does not know this key"}, 401)
    return _with_session(request, JSONResponse({}), session)


def _logout(request: Request) -> Response:
    sessions, cookie = request.app.state.sessions, request.app.state.cookie
    cast("Sessions", sessions).close_session(session_of(request.headers, cookie))
    response = JSONResponse({})
    response.delete_cookie(cookie)
    return response


def _with_session(request: Request, response: Response, session: str | None) -> Response:
    if session is not None:
        response.set_cookie(
            request.app.state.cookie,
            session,
            httponly=True,
            samesite="strict",
            secure=request.url.scheme == "https",
        )
    return response


def _plotly(request: Request) -> Response:
    """The charts' library, from its package."""
    spec = find_spec("plotly")
    assert spec is not None and spec.origin is not None  # `ow serve` has looked
    script = Path(spec.origin).parent / "package_data" / "plotly.min.js"
    return FileResponse(script, headers={"cache-control": "max-age=86400"})


# ---- jobs ----------------------------------------------------------------------------------------


def _state(request: Request) -> Response:
    client = _client(request)
    remote = client.settings.is_remote
    return JSONResponse(
        {
            "version": __version__,
            "organization": client.organization_id,
            "store": client.settings.supabase_url if remote else "this machine",
            "project": remote,
            "now": datetime.now(UTC).isoformat(),
        }
    )


def _jobs(request: Request) -> Response:
    return JSONResponse(_views(request)[0].page(_job_query(request.query_params)))


def _job_query(given: Mapping[str, str]) -> JobQuery:
    sort = given.get("sort", "updated")
    if sort not in SORT_KEYS:
        raise InvalidInputError(f"sort: {sort!r} is none of {', '.join(SORT_KEYS)}")
    return JobQuery(
        text=given.get("text", ""),
        samples=given.get("samples") == "1",
        trained=given.get("trained") == "1",
        status=given.get("status", ""),
        kind=given.get("kind", ""),
        model=given.get("model", ""),
        tag=given.get("tag", ""),
        sort=sort,
        descending=given.get("order", "desc") != "asc",
        offset=max(whole(given, "offset", 0), 0),
        limit=min(max(whole(given, "limit", 100), 1), 1000),
    )


async def _stream(request: Request) -> Response:
    """Rows of the table whose jobs changed after `since`, `as_of` of a page, as server-sent
    events.
    """
    index, _ = await run_in_threadpool(_views, request)
    stopping: threading.Event = request.app.state.stopping
    since = request.query_params.get("since", "")

    async def changes() -> AsyncIterator[str]:
        last = since
        yield "retry: 2000\n\n"
        while not stopping.is_set():
            try:
                rows = await run_in_threadpool(index.changed_since, last)
            except OpenWeightsError as error:
                yield f"event: away\ndata: {json.dumps(str(error))}\n\n"
                rows = []
            if rows:
                last = str(rows[-1]["updated"])
                yield f"data: {json.dumps(rows)}\n\n"
            else:
                yield ": still here\n\n"
            await asyncio.sleep(_POLL_S)

    return StreamingResponse(changes(), media_type="text/event-stream")


def _job(request: Request) -> Response:
    client = _client(request)
    job = client.backend.get_job(request.path_params["job_id"])
    return JSONResponse(job_details(client, job))


def _result_files(request: Request) -> Response:
    backend = _client(request).backend
    runs = backend.list_runs(job_id=request.path_params["job_id"], limit=1)
    events = backend.list_events(run_id=runs[-1].id) if runs else iter(())
    return JSONResponse(result_files(events))


def _cancel(request: Request) -> Response:
    job = _client(request).jobs.cancel(_exact_id(request))
    return JSONResponse({"status": job.status})


def _restart(request: Request) -> Response:
    job = _client(request).jobs.restart(_exact_id(request))
    return JSONResponse({"status": job.status})


def _delete(request: Request) -> Response:
    job_id = _exact_id(request)
    _client(request).jobs.delete(job_id)
    _views(request)[0].forget(job_id)
    return JSONResponse({})


def _exact_id(request: Request) -> str:
    """The job's id; the beginning of one, which would do in Python, is not enough to change it."""
    return _client(request).backend.get_job(request.path_params["job_id"]).id


async def _create_job(request: Request) -> Response:
    """Submit what the form holds: `{kind, params}`."""
    client, body = _client(request), await json_body(request)
    job = await run_in_threadpool(_submit, client, body)
    return JSONResponse({"id": job.id, "status": job.status})


def _submit(client: OpenWeights, body: Mapping[str, Any]) -> Job:
    kind, params = _kind_and_params(body)
    refuse_local_files(client, params)
    return kind_named(client, kind).create(**params)


async def _check_job(request: Request) -> Response:
    """What `create` would say of the form, without submitting: `{problems: [line, …]}`."""
    client, body = _client(request), await json_body(request)
    return JSONResponse({"problems": await run_in_threadpool(_problems, client, body)})


def _problems(client: OpenWeights, body: Mapping[str, Any]) -> list[str]:
    name, params = _kind_and_params(body)
    kind = kind_named(client, name)
    try:
        refuse_local_files(client, params)
        kind.check(kind.validate(params))
    except InvalidInputError as error:
        return str(error).splitlines()
    return []


def _kind_and_params(body: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    kind, params = body.get("kind"), body.get("params")
    if kind not in kind_names() or not isinstance(params, dict):
        raise InvalidInputError(f"kind: must be one of {', '.join(kind_names())}, with params")
    return str(kind), cast("dict[str, Any]", params)


def _kinds(request: Request) -> Response:
    """The fields of each kind of job: `{kind: {schema, defaults, meanings}}`."""
    client = _client(request)
    models = {name: kind_named(client, name).params for name in kind_names()}
    return JSONResponse(
        {
            name: {
                "schema": model.model_json_schema(),
                "defaults": field_defaults(model),
                "meanings": field_meanings(model),
            }
            for name, model in models.items()
        }
    )


# ---- numbers, samples, logs ----------------------------------------------------------------------


def _compare(request: Request) -> Response:
    """Jobs beside one another, `?jobs=a,b`: `{jobs: [{id, status, params, …}], differing}`."""
    cache = _views(request)[1]
    return JSONResponse(compared_jobs(_client(request), _named(request, "jobs") or [], cache))


def _scores(request: Request) -> Response:
    """What evaluations have scored of these jobs' models, and these evaluations, `?jobs=a,b`."""
    jobs, index = _named(request, "jobs") or [], _views(request)[0]
    return JSONResponse(scores(_client(request).backend, index.records(), jobs))


def _series(request: Request) -> Response:
    """Points of measures of jobs, `?jobs=a,b&names=loss&points=600`, of each job as
    `JobSeries.shown`; without `names` of all measures, with their `JobSeries.panels`. What is of
    the version that is `known` is not sent again: `{complete, version, unchanged: true}`.
    """
    backend, cache, given = _client(request).backend, _views(request)[1], request.query_params
    names, known = _named(request, "names"), _named(request, "known") or []
    buckets = min(max(whole(given, "points", 600), 2), _MOST_POINTS)
    answer: dict[str, Any] = {}
    until = time.monotonic() + READ_S
    for job_id in _named(request, "jobs") or []:
        series = cache.of(job_id, until - time.monotonic())
        if str(series.last_event) in known:
            same = {"complete": series.complete, "version": series.last_event, "unchanged": True}
            answer[job_id] = same
        else:
            answer[job_id] = series.shown(names, buckets)
            if names is None:
                shares = shares_loss(backend.get_job(job_id))
                answer[job_id] |= {"layout": series.panels(shares_loss=shares)}
    return JSONResponse(answer)


def _named(request: Request, name: str) -> list[str] | None:
    """The parts of a query's value between commas; None when it is not given."""
    text = request.query_params.get(name)
    return None if text is None else [part for part in text.split(",") if part]


def _log(request: Request) -> Response:
    """A piece of a run's log: `{offset, next, size, text, ended}`; a negative `offset` counts from
    the end.
    """
    backend = _client(request).backend
    run = backend.get_run(request.path_params["run_id"])
    offset = whole(request.query_params, "offset", -_LOG_PIECE)
    if offset < 0:
        offset = max(run.log_bytes + offset, 0)
    limit = min(max(whole(request.query_params, "limit", _LOG_PIECE), 1), 4 * _LOG_PIECE)
    data = _whole_characters(backend.read_log(run.id, offset, limit))
    return JSONResponse(
        {
            "offset": offset,
            "next": offset + len(data),
            "size": max(run.log_bytes, offset + len(data)),
            "text": data.decode(errors="replace"),
            "ended": run.status in ENDED,
        }
    )


def _whole_characters(data: bytes) -> bytes:
    """`data` without the beginning of a UTF-8 character at its end."""
    for back in range(1, min(4, len(data)) + 1):
        first = data[-back]
        if first & 0xC0 == 0x80:  # goes on a character
            continue
        length = 1 if first < 0x80 else 2 if first < 0xE0 else 3 if first < 0xF0 else 4
        return data[:-back] if length > back else data
    return data


def _log_search(request: Request) -> Response:
    backend, text = _client(request).backend, request.query_params.get("text", "")
    if not text:
        raise InvalidInputError("text: say what to look for")
    after = max(whole(request.query_params, "after", 0), 0)
    return JSONResponse(log_matches(backend, request.path_params["run_id"], text, after))


# ---- files and the cluster -----------------------------------------------------------------------


def _files(request: Request) -> Response:
    """The newest files, of a `purpose`, of a `group` of `files_of_group`, or all, from `offset`."""
    given = request.query_params
    offset = max(whole(given, "offset", 0), 0)
    limit = min(max(whole(given, "limit", 100), 1), 500)
    if group := given.get("group"):
        backend, jobs = _client(request).backend, _views(request)[0].records()
        return JSONResponse(files_of_group(backend, jobs, group, offset, limit))
    files = _client(request).files.list(given.get("purpose") or None, limit=offset + limit)
    return JSONResponse(files[offset:])


async def _upload(request: Request) -> Response:
    """A form with `file` and `purpose`; refused as `ow.files.upload` refuses."""
    async with request.form(max_files=1) as form:
        file, purpose = form.get("file"), form.get("purpose")
        if not isinstance(file, UploadFile) or not isinstance(purpose, str):
            raise InvalidInputError("file: choose one, and its purpose")
        stored = await run_in_threadpool(store_upload, _client(request), file, purpose)
    return JSONResponse(stored)


def _file_rows(request: Request) -> Response:
    client, file, reader = _opened(request)
    offset = max(whole(request.query_params, "offset", 0), 0)
    limit = min(max(whole(request.query_params, "limit", 20), 1), 200)
    return JSONResponse(dataset_page(client.backend, file, offset, limit, reader))


def _file_summary(request: Request) -> Response:
    client, file, reader = _opened(request)
    return JSONResponse(
        {"filename": file.filename, **dataset_summary(client.backend, file, reader)}
    )


def _opened(request: Request) -> tuple[OpenWeights, FileRecord, Reader | None]:
    """The file, and how it is read: `?job=`, or `?model=&loss=`."""
    client = _client(request)
    file = client.backend.get_file(request.path_params["file_id"])
    return client, file, reader_of(client, file, request.query_params)


def _file_content(request: Request) -> Response:
    client = _client(request)
    return stream_file(client, client.backend.get_file(request.path_params["file_id"]))


def _cluster(request: Request) -> Response:
    return JSONResponse(cluster_state(_client(request).backend))


def _costs(request: Request) -> Response:
    return JSONResponse(costs(team_of(_client(request).backend)))


def _team(request: Request) -> Response:
    return JSONResponse(team_state(team_of(_client(request).backend)))


async def _change_team(request: Request) -> Response:
    team, body = team_of(_client(request).backend), await json_body(request)
    verb = request.path_params["verb"]
    return JSONResponse(await run_in_threadpool(change_team, team, verb, body))
