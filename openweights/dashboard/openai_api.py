"""`/v1`: files and fine-tuning jobs as OpenAI's API has them, so that its client can drive them.

What OpenAI has no word for goes in as it is: every field of `TrainingConfig` may stand beside
`model` (`extra_body` of the client). Formats: https://platform.openai.com/docs/api-reference.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any, TypeVar, cast

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from openweights.client import OpenWeights
from openweights.client.watching.metrics import metric_rows
from openweights.client.watching.waiting import why_failed
from openweights.dashboard.chat import chat_completions, text_completions
from openweights.dashboard.http import (
    json_body,
    refuse_local_files,
    store_upload,
    stream_file,
    whole,
)
from openweights.errors import InvalidInputError, NotFoundError, shown
from openweights.events import Checkpoint
from openweights.jobs.unsloth.validate import TrainingConfig
from openweights.types import ENDED, FileRecord, JobRecord, JobStatus

_STATUSES: dict[JobStatus, str] = {
    "pending": "queued",
    "in_progress": "running",
    "completed": "succeeded",
    "failed": "failed",
    "canceled": "cancelled",
}
_LOSS_OF_METHOD = {"supervised": "sft", "dpo": "dpo", "reinforcement": "grpo"}
_METHOD_OF_LOSS = {loss: method for method, loss in _LOSS_OF_METHOD.items()}
# Hyperparameters of a method, and the fields that they set.
_FIELDS = {"n_epochs": "epochs", "batch_size": "per_device_train_batch_size", "beta": "beta"}
_OUR_GRADER = ("text_similarity", "rouge_l")
_PAGE = 20

_Item = TypeVar("_Item")


def openai_routes() -> list[Route]:
    """The routes below `/v1`."""
    job = "/v1/fine_tuning/jobs/{job_id}"
    return [
        Route("/v1/files", _upload, methods=["POST"]),
        Route("/v1/files", _files),
        Route("/v1/files/{file_id}", _file),
        Route("/v1/files/{file_id}", _delete_file, methods=["DELETE"]),
        Route("/v1/files/{file_id}/content", _file_content),
        Route("/v1/fine_tuning/jobs", _create, methods=["POST"]),
        Route("/v1/fine_tuning/jobs", _jobs),
        Route(job, _job),
        Route(f"{job}/cancel", _cancel, methods=["POST"]),
        Route(f"{job}/events", _events),
        Route(f"{job}/checkpoints", _checkpoints),
        Route("/v1/chat/completions", chat_completions, methods=["POST"]),
        Route("/v1/completions", text_completions, methods=["POST"]),
        Route("/v1/models", _models),
        Route("/v1/models/{model_id:path}", _model),
    ]


def _client(request: Request) -> OpenWeights:
    return cast("OpenWeights", request.state.client)


# ---- files ---------------------------------------------------------------------------------------


async def _upload(request: Request) -> Response:
    async with request.form(max_files=1) as form:
        file, purpose = form.get("file"), form.get("purpose")
        if not isinstance(file, UploadFile) or not isinstance(purpose, str):
            raise InvalidInputError("file: a file and its purpose are needed")
        purpose = _purpose(file) if purpose == "fine-tune" else purpose
        stored = await run_in_threadpool(store_upload, _client(request), file, purpose)
    return JSONResponse(_file_object(_client(request).backend.get_file(stored["id"])))


def _purpose(file: UploadFile) -> str:
    """Which of our purposes a file for `fine-tune` has, as its first row tells."""
    first = file.file.readline(1 << 20)
    file.file.seek(0)
    try:
        row: object = json.loads(first)
    except ValueError:
        return "conversations"
    return "preference" if isinstance(row, dict) and "rejected" in row else "conversations"


def _files(request: Request) -> Response:
    purpose = request.query_params.get("purpose")
    purpose = None if purpose in (None, "fine-tune") else purpose
    files = _client(request).backend.list_files(purpose=purpose, limit=None)
    return _page(request, [_file_object(file) for file in files])


def _file(request: Request) -> Response:
    return JSONResponse(_file_object(_record(request)))


def _delete_file(request: Request) -> Response:
    record = _record(request)
    _client(request).files.delete(record.id)
    return JSONResponse({"id": record.id, "object": "file", "deleted": True})


def _file_content(request: Request) -> Response:
    return stream_file(_client(request), _record(request))


def _record(request: Request) -> FileRecord:
    return _client(request).backend.get_file(request.path_params["file_id"])


def _file_object(file: FileRecord) -> dict[str, Any]:
    trained = file.purpose in ("conversations", "preference")
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": _seconds(file.created_at),
        "filename": file.filename,
        "purpose": "fine-tune" if trained else file.purpose,
        "status": "processed",
    }


# ---- fine-tuning jobs ----------------------------------------------------------------------------


async def _create(request: Request) -> Response:
    client, body = _client(request), await json_body(request)
    params = training_params(body)
    refuse_local_files(client, params)
    job = await run_in_threadpool(lambda: client.fine_tuning.create(**params))
    return JSONResponse(_job_object(client, job.record))


def training_params(body: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `ow.fine_tuning.create` that a request in OpenAI's format asks for.

    `learning_rate_multiplier` multiplies our own default rate. `"auto"` leaves a default.

    Raises:
        InvalidInputError: The method is unknown, or `model` or `training_file` is missing.
    """
    params = dict(body)
    method = _mapping(params.pop("method", None) or {}, "method")
    hyper = dict(_mapping(params.pop("hyperparameters", None) or {}, "hyperparameters"))
    if method:
        of_method, more = _of_method(method)
        params, hyper = {**of_method, **params}, {**hyper, **more}
    params.setdefault("loss", "sft")
    params |= _hyperparameters(hyper)
    for theirs, ours in (("validation_file", "test_file"), ("suffix", "job_id_suffix")):
        if (value := params.pop(theirs, None)) is not None:
            params[ours] = value
    if (metadata := params.pop("metadata", None)) is not None:
        params["meta"] = metadata
    for name in ("model", "training_file"):
        if name not in params:
            raise InvalidInputError(f"{name}: is missing")
    return {name: value for name, value in params.items() if value is not None}


def _of_method(method: Mapping[str, Any]) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """The fields that a method sets, and its hyperparameters."""
    kind = method.get("type")
    if kind not in _LOSS_OF_METHOD:
        raise InvalidInputError(f"method.type: must be one of {', '.join(_LOSS_OF_METHOD)}")
    params: dict[str, Any] = {"loss": _LOSS_OF_METHOD[kind]}
    own = dict(_mapping(method.get(kind) or {}, f"method.{kind}"))
    hyper = _mapping(own.pop("hyperparameters", None) or {}, "hyperparameters")
    if kind == "reinforcement" and (grader := own.pop("grader", None)) is not None:
        given = _mapping(grader, "grader")
        if (given.get("type"), given.get("evaluation_metric")) != _OUR_GRADER:
            raise InvalidInputError(
                "grader: only text_similarity by rouge_l is a reward here; leave it out, and give "
                "grpo_reward_function in extra_body"
            )
        params["grpo_reward_function"] = "rouge_l"
    if unknown := [name for name, value in own.items() if value is not None]:
        raise InvalidInputError(f"method.{kind}.{unknown[0]}: is nothing that we can do")
    return params, hyper


def _hyperparameters(given: Mapping[str, Any]) -> dict[str, Any]:
    params: dict[str, Any] = {}
    for name, value in given.items():
        if value == "auto":
            continue
        if name == "learning_rate_multiplier":
            params["learning_rate"] = TrainingConfig.model_fields["learning_rate"].default * value
        else:
            params[_FIELDS.get(name, name)] = value
    if "per_device_train_batch_size" in params:
        params.setdefault("gradient_accumulation_steps", 1)
    return params


def _mapping(value: object, name: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise InvalidInputError(f"{name}: must be an object")
    return cast("dict[str, Any]", value)


def _jobs(request: Request) -> Response:
    client = _client(request)
    jobs = [job for job in client.backend.list_jobs(limit=None) if job.type == "fine-tuning"]
    jobs.sort(key=lambda job: job.created_at, reverse=True)
    page, more = _sliced(request, jobs, [job.id for job in jobs])
    return _list([_job_object(client, job) for job in page], more)


def _job(request: Request) -> Response:
    return JSONResponse(_job_object(_client(request), _job_record(request)))


def _cancel(request: Request) -> Response:
    client = _client(request)
    return JSONResponse(_job_object(client, client.jobs.cancel(_job_record(request).id).record))


def _job_record(request: Request) -> JobRecord:
    job = _client(request).backend.get_job(request.path_params["job_id"])
    if job.type != "fine-tuning":
        raise NotFoundError(f"{job.id} is no fine-tuning job")
    return job


def _job_object(client: OpenWeights, job: JobRecord) -> dict[str, Any]:
    params = job.validated_params
    runs = client.backend.list_runs(job_id=job.id, limit=1)
    ended = runs[-1].ended_at if runs and job.status in ENDED else None
    error = why_failed(job, runs[-1].error if runs else None)
    method = _METHOD_OF_LOSS.get(str(params.get("loss")), "supervised")
    hyper = {"n_epochs": params.get("epochs"), "batch_size": _batch_size(params)}
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": _seconds(job.created_at),
        "finished_at": None if ended is None else _seconds(ended),
        "model": job.model,
        "fine_tuned_model": job.id if job.status == "completed" else None,
        "organization_id": job.organization_id,
        "status": _STATUSES[job.status],
        "hyperparameters": hyper,
        "method": {"type": method, method: {"hyperparameters": hyper}},
        "training_file": params.get("training_file"),
        "validation_file": params.get("test_file"),
        "result_files": [],
        "trained_tokens": None,
        "error": {"code": "job_failed", "message": error, "param": None} if error else None,
        "seed": params.get("seed"),
        "metadata": params.get("meta"),
        "loss": params.get("loss"),
    }


def _batch_size(params: Mapping[str, Any]) -> int:
    each = params.get("per_device_train_batch_size") or 1
    return int(each) * int(params.get("gradient_accumulation_steps") or 1)


def _events(request: Request) -> Response:
    """Metrics, newest first, as OpenAI lists events."""
    client, job = _client(request), _job_record(request)
    rows = metric_rows(client.backend.list_events(job_id=job.id))
    return _page(request, [_event_object(job, row) for row in reversed(rows)])


def _event_object(job: JobRecord, row: Mapping[str, Any]) -> dict[str, Any]:
    numbers = ", ".join(f"{k} {v:.4g}" for k, v in row.items() if k not in ("step", "tag"))
    return {
        "id": f"ftevent-{job.id}-{row['tag']}-{row['step']}",
        "object": "fine_tuning.job.event",
        "created_at": _seconds(job.updated_at),
        "level": "info",
        "type": "metrics",
        "message": f"step {row['step']}, {row['tag']}: {numbers}",
        "data": dict(row),
    }


def _checkpoints(request: Request) -> Response:
    job, backend = _job_record(request), _client(request).backend
    events = list(backend.list_events(job_id=job.id, type=Checkpoint.type))
    return _page(
        request,
        [
            {
                "id": f"ftckpt-{event.id}",
                "object": "fine_tuning.job.checkpoint",
                "created_at": _seconds(event.created_at),
                "fine_tuned_model_checkpoint": f"{job.id}/checkpoint-{event.data['step']}",
                "fine_tuning_job_id": job.id,
                "step_number": event.data["step"],
                "metrics": {"step": event.data["step"]},
            }
            for event in reversed(events)
        ],
    )


def _models(request: Request) -> Response:
    jobs = _client(request).backend.list_jobs(statuses=["completed"], limit=None)
    return _list([_model_object(job) for job in jobs if job.type == "fine-tuning"], False)


def _model(request: Request) -> Response:
    return JSONResponse(_model_object(_client(request).backend.get_job(_model_id(request))))


def _model_id(request: Request) -> str:
    return str(request.path_params["model_id"]).partition("/")[0]


def _model_object(job: JobRecord) -> dict[str, Any]:
    return {
        "id": job.id,
        "object": "model",
        "created": _seconds(job.updated_at),
        "owned_by": job.organization_id,
    }


# ---- pages ---------------------------------------------------------------------------------------


def _page(request: Request, objects: list[dict[str, Any]]) -> Response:
    page, more = _sliced(request, objects, [str(one["id"]) for one in objects])
    return _list(page, more)


def _sliced(request: Request, items: list[_Item], ids: list[str]) -> tuple[list[_Item], bool]:
    """`limit` of the items behind the one whose id is `after`, and whether more follow.

    Raises:
        NotFoundError: There is none of that id: from the start, the list would never end.
    """
    after = request.query_params.get("after")
    limit = min(max(whole(request.query_params, "limit", _PAGE), 1), 1000)
    if after is not None and after not in ids:
        raise NotFoundError(f"after: there is no {shown(after)} here")
    start = 0 if after is None else ids.index(after) + 1
    return items[start : start + limit], len(items) > start + limit


def _list(objects: list[dict[str, Any]], more: bool) -> Response:
    first, last = (objects[0]["id"], objects[-1]["id"]) if objects else (None, None)
    return JSONResponse(
        {
            "object": "list",
            "data": objects,
            "first_id": first,
            "last_id": last,
            "has_more": more,
        }
    )


def _seconds(moment: datetime) -> int:
    return int(moment.timestamp())
