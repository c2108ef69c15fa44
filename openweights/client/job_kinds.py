"""Job kinds: what turns keyword arguments into a job.

A kind is a subclass of `Jobs`: a model of its parameters, the files it needs, and the command that
runs them. `register` gives it a name, and `ow.<name>.create(...)` submits it. The collection of all
jobs, whatever their kind, is `ow.jobs`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar, TypeVar, cast

from openweights import images
from openweights.arguments import check_limit, check_text
from openweights.client.datasets import HOLD, no_dataset, other_purpose
from openweights.client.jobs import Job, moment_after
from openweights.client.mounts import expand_mounts
from openweights.client.param_errors import describe_validation_error, ignored_params
from openweights.client.params import dumped, field_defaults, plain
from openweights.client.secrets import hand_over_keys, wanted_secrets
from openweights.client.watching.notes import tell
from openweights.errors import (
    ConfigError,
    InvalidInputError,
    InvalidStateError,
    NotFoundError,
    shown,
)
from openweights.models.checkpoint import folders_of
from openweights.needs import has_gpu, has_package, unmet_needs
from openweights.settings import job_variables
from openweights.types import CloudType, JobRecord, JobSpec, JobStatus, JobType

if TYPE_CHECKING:
    from pydantic import BaseModel

    from openweights.client import OpenWeights
    from openweights.client.watching.estimates import Work
    from openweights.client.watching.plan import Plan
    from openweights.needs import Need

logger = logging.getLogger(__name__)

MOUNT_PURPOSE = "custom_job_file"

# Built-in kinds by name; resolved on first use, so that the client does not import what it does not
# need.
_BUILT_IN = {
    "fine_tuning": "openweights.jobs.unsloth:FineTuning",
    "weighted_sft": "openweights.jobs.weighted_sft:WeightedSFT",
    "logprob": "openweights.jobs.logprob:LogProb",
    "multiple_choice": "openweights.jobs.multiple_choice:MultipleChoice",
    "inference": "openweights.jobs.inference:Inference",
    "api": "openweights.jobs.api:Api",
    "evaluate": "openweights.jobs.evaluate:Evaluate",
    "inspect_ai": "openweights.jobs.inspect_ai:InspectAI",
    "mmlu_pro": "openweights.jobs.mmlu_pro:MMLUPro",
    "exec": "openweights.jobs.exec:Exec",
}
# What their ids begin with.
_PREFIXES = {
    **{"ftjob": "fine_tuning", "sftjob": "weighted_sft", "lpjob": "logprob"},
    **{"mcjob": "multiple_choice", "inferencejob": "inference", "apijob": "api"},
    **{"evaljob": "evaluate", "inspectjob": "inspect_ai", "mmlujob": "mmlu_pro"},
    **{"execjob": "exec"},
}
_REGISTERED: dict[str, type[Jobs]] = {}
# Of the job that is being made: its id must be of the same state as what is kept for its worker,
# and kinds that have a `compute_id` of their own are not asked to pass it on.
_folders_read: ContextVar[dict[str, dict[str, str]] | None] = ContextVar("folders", default=None)
_TAKEN: set[str] = set()  # attributes of a client, which no kind may be called

_SUFFIX = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# `{job_id}`, but not the shell's `${job_id}`.
_JOB_ID = re.compile(r"(?<!\$)\{job_id\}")

_Kind = TypeVar("_Kind", bound="type[Jobs]")


class Jobs:
    """Base class of a job kind.

    Attributes:
        mount: Local file or folder -> target inside the job's folder.
        params: Model of the parameters that `create` takes.
        base_image: Image of the workers that may take the job. One that this package names gives
            way to what `OPENWEIGHTS_IMAGE` or `OPENWEIGHTS_VLLM_IMAGE` says.
        requires_vram_gb: GPU memory needed in all, in GiB; None for none.
        job_type: How listings call it.
        stall_timeout_s: How long its jobs may be quiet where nobody says it; None for ever.
        id_covers_mounts: Whether command and mounted files are part of the job id. False is for a
            command that comes from the parameters, so that a new version of this package does not
            run everything again; of the built-in kinds only exec covers them. It holds for the
            class that says so, not for its subclasses, which may run something else.
    """

    mount: ClassVar[dict[str, str]] = {}
    params: ClassVar[type[BaseModel]]
    base_image: ClassVar[str] = images.UNSLOTH_IMAGE
    requires_vram_gb: ClassVar[int | None] = 24
    job_type: ClassVar[JobType] = "custom"
    stall_timeout_s: ClassVar[float | None] = None
    id_covers_mounts: ClassVar[bool] = True

    def __init_subclass__(cls) -> None:
        if "params" in vars(cls) and "create" not in vars(cls):
            from openweights.client.job_options import with_arguments

            cls.create = with_arguments(cls.create, cls.params)

    def __init__(self, ow: OpenWeights) -> None:
        self.ow = ow

    @property
    def id_prefix(self) -> str:
        """What the ids of its jobs begin with."""
        if older := getattr(self, "id_predix", None):
            logger.warning("%s: id_predix is called id_prefix now", type(self).__name__)
            return str(older)
        return type(self).__name__.lower()

    @property
    def image(self) -> str:
        """Of the workers that may take its jobs, where nobody names one."""
        settings = self.ow.settings
        named = {images.UNSLOTH_IMAGE: settings.image, images.VLLM_IMAGE: settings.vllm_image}
        return named.get(self.base_image) or self.base_image

    # ---- what a subclass may define --------------------------------------------------------------

    def get_entrypoint(self, validated_params: BaseModel) -> str:
        """The shell command to run in the job's folder; `{job_id}` in it becomes the job's id."""
        raise NotImplementedError(f"{type(self).__name__} must define get_entrypoint")

    def check(self, validated: BaseModel) -> None:
        """Look things up in the store before the job is submitted; the default does nothing.

        Raises:
            InvalidInputError: The job could not work.
        """

    def with_job_id(self, validated: BaseModel, job_id: str) -> BaseModel:
        """The parameters as they are stored, once the id is known; the default changes nothing."""
        return validated

    def vram_gb(self, validated: BaseModel) -> int | None:
        """GPU memory to ask for where nobody says how much; the default is the kind's."""
        return type(self).requires_vram_gb

    def awaited_jobs(self, validated: BaseModel) -> Sequence[str]:
        """Ids of jobs that must complete before this one can begin; the default has none."""
        return ()

    def work(self, validated: BaseModel) -> Work | None:
        """What the job has to do, for an estimate of its time and price; the default knows nothing.

        Called after `check`.
        """
        return None

    def needed_secrets(self, validated: BaseModel) -> Sequence[str]:
        """Names of secrets that the job cannot do without; the default has none."""
        return ()

    def needs(self, validated: BaseModel) -> Sequence[Need]:
        """What a machine must have to run the job, as far as parameters tell; the default knows
        nothing.
        """
        return ()

    def mounted_paths(self) -> Mapping[str, Path]:
        """Target inside the job's folder -> local file."""
        return expand_mounts(self.mount)

    def stored(self, file: str, purpose: str) -> str:
        """The id of a file: a local one is uploaded, anything else is taken for an id."""
        return self.ow.files.create(file, purpose)["id"] if os.path.isfile(file) else file

    def stored_dataset(self, field: str, file: str, purpose: str) -> str:
        """The id of a dataset, which a local file is uploaded for.

        Raises:
            ConfigError: It is neither, or holds rows of another kind; names `field`.
        """
        if os.path.isfile(file) and (other := other_purpose(file, purpose)):
            raise ConfigError(
                f"{field}: {shown(os.path.basename(file))} holds {HOLD[other]}; give a file of "
                f"{HOLD[purpose]}"
            )
        file_id = self.stored(file, purpose)
        if not file_id.startswith(f"{purpose}:"):
            raise ConfigError(f"{field}: {no_dataset(file, purpose)}")
        return file_id

    def open_stored(self, field: str, file: str) -> BinaryIO:
        """A stored file that the parameter `field` names.

        Raises:
            ConfigError: It is not in the store.
        """
        try:
            return self.ow.backend.open_file(file)
        except NotFoundError:
            raise ConfigError(
                f"{field}: the store has no file {file}; upload it with "
                "ow.files.upload(path, purpose=…)"
            ) from None

    # ---- its jobs --------------------------------------------------------------------------------

    def list(self, limit: int | None = 10, status: JobStatus | None = None) -> list[Job]:
        """Its jobs, the last changed first; None for all."""
        limit, jobs = check_limit(limit), self.ow.jobs.list(limit=None, status=status)
        return [job for job in jobs if job.id.startswith(f"{self.id_prefix}-")][:limit]

    def retrieve(self, job_id: str) -> Job:
        """As `ow.jobs.retrieve`."""
        return self.ow.jobs.retrieve(job_id)

    def cancel(self, job_id: str) -> Job:
        """As `ow.jobs.cancel`."""
        return self.ow.jobs.cancel(job_id)

    # ---- submitting ------------------------------------------------------------------------------

    def create(self, **params: Any) -> Job:
        """Submit a job, or return the one that does the same.

        Args:
            **params: The parameters of the kind, and how the job runs: see `JobOptions`.

        Raises:
            ConfigError: A parameter is wrong; the message has a line for each.
            InvalidInputError: A file to mount is not there, or the look-ups of the kind failed, or
                `after` names no job.
            InvalidStateError: A job of `after` has failed or was canceled.
        """
        if params.get("dry_run"):
            # What editors show is a job, as nearly every call gives one; see `plan`.
            return cast("Job", self.plan(**params))
        spec = self.prepare(**params)
        hand_over_keys(self.ow, spec)
        record = self.ow.backend.submit_job(spec)
        _check_secrets(record, spec.params.get("secrets", []))
        if known := known_before(record):
            remedy = "; give a job_id_suffix for another" if self._takes_suffix() else ""
            tell(logger, f"{record.id} {known}{remedy}")
        return self._started(record)

    def _takes_suffix(self) -> bool:
        return "job_id_suffix" in type(self).params.model_fields

    def plan(self, **params: Any) -> Plan:
        """What `create` with these arguments would do, cost, and wait for; nothing is submitted,
        but files are uploaded, because the job's id depends on them. It raises what `create` does.
        """
        from openweights.client.watching.plan import make_plan

        spec = self.prepare(**params)
        plan = make_plan(self.ow, spec)
        if plan.status is not None:
            _check_secrets(self.ow.backend.get_job(spec.id), spec.params.get("secrets", []))
        return plan

    def prepare(self, **params: Any) -> JobSpec:
        """What `create` would submit for these arguments: checked, with its files uploaded and what
        it is likely to take. It raises what `create` does.
        """
        from openweights.client.job_options import JobOptions

        options = JobOptions.of(params)
        own = {name: value for name, value in params.items() if name not in JobOptions.model_fields}
        validated = self.validate({name: plain(value, name) for name, value in own.items()})
        self._check_this_machine(validated)
        self.check(validated)
        hardware = options.allowed_hardware
        spec = replace(
            self._spec(validated, options.cloud_type),
            requires_vram_gb=options.vram_gb(self.vram_gb(validated)),
            allowed_hardware=None if hardware is None else tuple(hardware),
            priority=options.priority,
            max_attempts=options.max_attempts,
            timeout_at=moment_after(self.ow.backend, "timeout", options.timeout),
            max_cost_usd=options.max_cost_usd,
            max_usd_per_hour=options.max_usd_per_hour,
            after=options.job_ids_before(self.awaited_jobs(validated)),
            not_before=options.first_moment(self.ow.backend),
            label=options.label,
            max_running=options.max_running,
            max_duration_s=options.max_duration,
            stall_timeout_s=options.quiet_s(type(self).stall_timeout_s),
            retry=options.retry_policy,
        )
        if options.docker_image:
            spec = replace(spec, docker_image=options.docker_image)
        named = [*options.secrets, *self.needed_secrets(validated)]
        if wanted := wanted_secrets(self.ow, named):
            spec = replace(spec, params={**spec.params, "secrets": wanted})
        return self._estimated(spec, self.work(validated))

    def own_params(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Those of `create` that say what the job does; the others, how it runs, are checked.

        Raises:
            ConfigError: A line for each of the others that is wrong.
        """
        from openweights.client.job_options import JobOptions

        JobOptions.of(params)
        return {
            name: value for name, value in params.items() if name not in JobOptions.model_fields
        }

    def _check_this_machine(self, validated: BaseModel) -> None:
        """With the store on this machine, see that it has what the job needs."""
        if self.ow.settings.is_remote or not (needed := self.needs(validated)):
            return
        if lacking := unmet_needs(
            needed,
            has_gpu=lambda: has_gpu(self.ow.settings.child_env()),
            has_package=has_package,
            has_variable=lambda name: name in job_variables((name,)),
        ):
            raise ConfigError("\n".join(lacking))

    def _estimated(self, spec: JobSpec, work: Work | None) -> JobSpec:
        """The job with what it is likely to take, which is said, too."""
        if work is None:
            return spec
        from openweights.client.watching.estimates import estimate

        found = estimate(self.ow.backend, spec, work, is_remote=self.ow.settings.is_remote)
        tell(logger, f"{spec.id}: {found.words()}")
        return replace(spec, params={**spec.params, "estimate": found.to_keep()})

    def _started(self, record: JobRecord) -> Job:
        if record.status == "pending":
            self.ow.ensure_worker()
        return Job(self.ow, record)

    def _spec(self, validated: BaseModel, cloud_type: CloudType) -> JobSpec:
        """What the job does, with its files uploaded."""
        mounted = self._upload(self.mounted_paths())
        script = self.get_entrypoint(validated)
        folders = self._model_folders(validated)
        reading = _folders_read.set(folders)
        try:
            job_id = self.compute_id(validated, mounted, script)
        finally:
            _folders_read.reset(reading)
        model = getattr(validated, "model", None)
        validated = self.with_job_id(validated, job_id)
        return JobSpec(
            id=job_id,
            type=self.job_type,
            script=_JOB_ID.sub(job_id, script),
            params={
                "validated_params": dumped(validated),
                "mounted_files": mounted,
                "cloud_type": cloud_type,
                **folders,
            },
            model=model if isinstance(model, str) else None,
            docker_image=self.image,
            bundle_file=self.ow.bundle_file(),
        )

    def validate(self, params: dict[str, Any]) -> BaseModel:
        """The parameters, checked. Those that the model would ignore are refused, too.

        Raises:
            ConfigError: A line for each field that is wrong, and what would work.
        """
        from pydantic import ValidationError

        wrong = ignored_params(params, self.params)
        try:
            validated = self.params.model_validate(params)
        except ValidationError as error:
            wrong += describe_validation_error(error, self.params)
            raise ConfigError("\n".join(wrong)) from None
        if wrong:
            raise ConfigError("\n".join(wrong))
        return validated

    def compute_id(
        self,
        validated: BaseModel | Mapping[str, Any],
        mounted_files: Mapping[str, str] | None = None,
        script: str = "",
    ) -> str:
        """`<prefix>-<12 hex>[-<job_id_suffix>]` of what the job does, or of a row's contents.

        Values left at their defaults are not hashed, so that a parameter that a later version adds
        does not change the ids of the jobs that do not use it.
        """
        if isinstance(validated, Mapping):
            row = {"row": dict(validated), "organization": self.ow.backend.organization_id}
            return f"{self.id_prefix}-{_digest(row)}"
        content: dict[str, Any] = {
            "kind": type(self).__name__,
            "params": dumped(validated, exclude_defaults=True),
            "organization": self.ow.backend.organization_id,
            **self._model_folders(validated),
        }
        if self.id_covers_mounts or "id_covers_mounts" not in vars(type(self)):
            content["script"] = script
            content["mounted_files"] = dict(mounted_files or {})
        digest = _digest(content)
        suffix = getattr(validated, "job_id_suffix", None)
        if not suffix:
            return f"{self.id_prefix}-{digest}"
        if not _SUFFIX.fullmatch(str(suffix)):
            raise ConfigError(
                f"job_id_suffix: {suffix!r} cannot end an id; use letters, digits, '.', '_', '-'"
            )
        return f"{self.id_prefix}-{digest}-{suffix}"

    def _model_folders(self, validated: BaseModel) -> dict[str, dict[str, str]]:
        read = _folders_read.get()
        if read is not None:
            return read
        # A project's workers have folders of their own.
        return {} if self.ow.settings.is_remote else folders_of(validated)

    # ---- what kinds that were written for the older runner call ----------------------------------

    def _upload_mounted_files(self, extra_files: Mapping[str, str] | None = None) -> dict[str, str]:
        """Target -> file id of what is mounted, and of what else is given as `{local: target}`."""
        return self._upload({**self.mounted_paths(), **expand_mounts(extra_files or {})})

    def get_or_create_or_reset(self, data: Mapping[str, Any]) -> Job:
        """Submit a row with `id`, `script`, `params` and whatever else a `JobSpec` has."""
        from openweights.client.job_options import normalize_hardware

        logger.warning("%s: get_or_create_or_reset is what create does", type(self).__name__)
        known = {field.name for field in fields(JobSpec)}
        row: dict[str, Any] = {name: value for name, value in data.items() if name in known}
        row["allowed_hardware"] = normalize_hardware(data.get("allowed_hardware"))
        row["params"] = {"cloud_type": "SECURE", **data.get("params", {})}
        usual: dict[str, Any] = {"id": self.compute_id(data), "type": self.job_type, "script": ""}
        usual |= {"docker_image": self.image, "bundle_file": self.ow.bundle_file()}
        return self._started(self.ow.backend.submit_job(JobSpec(**usual | row)))

    def _upload(self, paths: Mapping[str, Path]) -> dict[str, str]:
        files: dict[str, str] = {}
        for target, path in sorted(paths.items()):
            try:
                target.encode()
                with path.open("rb") as content:
                    record = self.ow.backend.put_file(content, MOUNT_PURPOSE, path.name)
            except UnicodeEncodeError:
                raise InvalidInputError(f"cannot mount {target!a}: rename it, in UTF-8") from None
            except OSError as error:
                raise InvalidInputError(f"cannot mount {path}: {error.strerror}") from error
            files[target] = record.id
        return files


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def register(name: str) -> Callable[[_Kind], _Kind]:
    """Class decorator: `@register("my_job")` makes the kind available as `ow.my_job`, also on
    clients that exist already.

    Raises:
        InvalidInputError: The name cannot be an attribute of a client.
    """
    check_text("register", name, "give a name for the job kind, as @register('my_job')")
    if not name.isidentifier() or name.startswith("_"):
        raise InvalidInputError(f"{name!r} is not a name for a job kind; use one like 'my_job'")
    if name in _TAKEN:
        raise InvalidInputError(f"ow.{name} is taken; choose another name for the job kind")

    def decorate(kind: _Kind) -> _Kind:
        if not (isinstance(cast("object", kind), type) and issubclass(kind, Jobs)):
            given = getattr(cast("object", kind), "__name__", None) or shown(kind)
            raise InvalidInputError(f"{given} is no job kind; make it a subclass of Jobs")
        _REGISTERED[name] = kind
        return kind

    return decorate


def keep_names(names: Iterable[str]) -> None:
    """No kind may be registered under these names: the client's own attributes."""
    _TAKEN.update(names)


def find_kind(name: str) -> type[Jobs] | None:
    """The kind of that name, imported if need be, or None."""
    if name in _REGISTERED:
        return _REGISTERED[name]
    if name not in _BUILT_IN:
        return None
    from importlib import import_module

    module, _, attribute = _BUILT_IN[name].partition(":")
    return cast("type[Jobs]", getattr(import_module(module), attribute))


def kind_name(job_id: str) -> str | None:
    """Under which name of `ow.<name>.create` a job was made, for the kinds of this package."""
    return _PREFIXES.get(job_id.partition("-")[0])


def kind_word(job: JobRecord) -> str:
    """What a job is, in a word: the loss that it trains with, or what `ow.<word>.create` makes; for
    a kind of one's own the prefix of its ids.
    """
    params = job.validated_params
    if isinstance(loss := params.get("loss"), str) and job.type != "custom":
        return loss
    return kind_name(job.id) or (job.id.partition("-")[0] if job.type == "custom" else job.type)


def default_params(job: JobRecord) -> dict[str, Any]:
    """What the parameters of a job of a built-in kind are when nothing is said; else nothing."""
    kind = find_kind(kind_name(job.id) or "")
    if kind is None:
        return {}
    return field_defaults(kind.params)


def kind_names() -> list[str]:
    """Names that `find_kind` knows."""
    return sorted({*_BUILT_IN, *_REGISTERED})


def known_before(record: JobRecord) -> str | None:
    """What is said of a job, as it was submitted, that is not a new one; None where nothing tells.

    One that still waits for its first run is the same whoever submitted it.
    """
    match record.status:
        case "completed":
            return "has completed already: the same parameters are the same job, and nothing is run"
        case "in_progress":
            return "is running already: the same parameters are the same job"
        case "pending" if record.attempts:
            return f"was there before, and goes on with attempt {record.attempts + 1}"
        case _:
            return None


def _check_secrets(record: JobRecord, wanted: Sequence[str]) -> None:
    """A job that waits or runs already keeps the secrets that it was submitted with."""
    named: list[str] = record.params.get("secrets", [])
    absent = [name for name in wanted if name not in named]
    if absent and record.status in ("pending", "in_progress"):
        raise InvalidStateError(
            f"job {record.id} is {record.status} already, without {', '.join(absent)}: cancel it, "
            "and submit it again"
        )
