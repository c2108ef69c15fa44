"""The routes of what models said: answers by step, sheets of answers, gates, and tokens."""

from __future__ import annotations

from typing import cast

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from openweights.backends.base import Backend
from openweights.client import OpenWeights
from openweights.dashboard.answers import sheet, sheet_names
from openweights.dashboard.http import whole
from openweights.dashboard.samples import (
    answer_rows,
    answer_steps,
    gates,
    token_rows,
    token_steps,
)


def said_routes() -> list[Route]:
    """All of them, each about a job."""
    return [
        Route("/api/jobs/{job_id}/answers", _answer_steps),
        Route("/api/jobs/{job_id}/answers/{event_id:int}", _answer_rows),
        Route("/api/jobs/{job_id}/sheets", _sheet_names),
        Route("/api/jobs/{job_id}/sheets/{name:path}", _sheet),
        Route("/api/jobs/{job_id}/gates", _gates),
        Route("/api/jobs/{job_id}/tokens", _token_steps),
        Route("/api/jobs/{job_id}/tokens/{event_id:int}", _token_rows),
    ]


def _backend(request: Request) -> Backend:
    return cast("OpenWeights", request.state.client).backend


def _answer_steps(request: Request) -> Response:
    return JSONResponse(answer_steps(_backend(request), request.path_params["job_id"]))


def _answer_rows(request: Request) -> Response:
    path = request.path_params
    return JSONResponse(answer_rows(_backend(request), path["job_id"], path["event_id"]))


def _sheet_names(request: Request) -> Response:
    backend = _backend(request)
    return JSONResponse(sheet_names(backend, backend.get_job(request.path_params["job_id"])))


def _sheet(request: Request) -> Response:
    """Problems and what was answered, `?only=wrong&offset=0&limit=20`, as `sheet` says."""
    backend, path, given = _backend(request), request.path_params, request.query_params
    offset = max(whole(given, "offset", 0), 0)
    limit = min(max(whole(given, "limit", 20), 1), 200)
    job = backend.get_job(path["job_id"])
    only = given.get("only", "all")
    return JSONResponse(sheet(backend, job, path["name"], only, offset, limit))


def _gates(request: Request) -> Response:
    return JSONResponse(gates(_backend(request), request.path_params["job_id"]))


def _token_steps(request: Request) -> Response:
    return JSONResponse(token_steps(_backend(request), request.path_params["job_id"]))


def _token_rows(request: Request) -> Response:
    path = request.path_params
    return JSONResponse(token_rows(_backend(request), path["job_id"], path["event_id"]))
