"""How and where a job runs, as opposed to what it does: the arguments that every kind's `create`
takes beside its own parameters, and what gives `create` its types.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import logging
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from types import UnionType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Concatenate,
    Literal,
    ParamSpec,
    Self,
    Union,
    cast,
    get_args,
    get_origin,
)

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from openweights.arguments import as_list
from openweights.backends.values import check_moment, check_retry
from openweights.client.jobs import Job, moment_after
from openweights.client.param_errors import describe_validation_error
from openweights.client.params import field_meanings
from openweights.errors import ConfigError, shown
from openweights.gpu_names import LONG_NAMES, gpu_key
from openweights.types import CloudType, Retry

if TYPE_CHECKING:
    from openweights.backends.base import Backend

logger = logging.getLogger(__name__)

_HARDWARE = re.compile(
    r"\s*(?:(\d+)\s*x\s*)?(?!\d+\s*x(?:\s|$))([A-Za-z0-9][A-Za-z0-9 _-]*?)\s*", re.IGNORECASE
)
# Of `create`: what stands for the parameters of any kind.
_ANY_PARAMS = "**params: The parameters of the kind, and how the job runs: see `JobOptions`."
_MOST_GPUS = 64  # more than any host has

P = ParamSpec("P")


def _job_ids(value: object) -> list[str]:
    """Raises ValueError for what names no jobs."""
    given = [value] if isinstance(value, str | Job) else value
    items = cast("Sequence[object]", given) if isinstance(given, list | tuple) else [given]
    if wrong := [item for item in items if not isinstance(item, str | Job)]:
        raise ValueError(f"{shown(wrong[0])} is no job; give jobs, or their ids")
    return [item.id if isinstance(item, Job) else str(item) for item in items]


def _retry_of(value: Mapping[str, Any] | int) -> Retry:
    """Raises ValueError for what says no retries."""
    given: dict[str, Any] = {"max": value} if isinstance(value, int) else dict(value)
    names: object = given.get("on", [])
    numbers = [given.get("max"), given.get("backoff_s", 0.0)]
    if (
        given.keys() - {"max", "backoff_s", "on"}
        or not isinstance(numbers[0], int)
        or not all(isinstance(number, int | float) for number in numbers)
        or not isinstance(names, list | tuple)
    ):
        raise ValueError(
            f"{shown(value)} says no retries; write a number, or "
            '{"max": 2, "backoff_s": 60, "on": ["oom", "hub", "exit:75"]}'
        )
    if "on" in given:
        given["on"] = tuple(map(str, cast("Sequence[object]", names)))
    retry = Retry(**given)
    check_retry(retry)
    return retry


def _checked_retry(value: dict[str, Any] | int | None) -> dict[str, Any] | int | None:
    if value is not None:
        _retry_of(value)
    return value


class JobOptions(BaseModel):
    """How and where a job runs. None of it is part of what makes two jobs the same.

    Attributes:
        allowed_hardware: Such as `["2x H100S", "1x H200"]`; None for any that has the memory.
        docker_image: Image of the workers that may take it; default: the kind's.
        requires_vram_gb: GPU memory needed in all, in GiB; default, or "guess": the kind's, or
            what the hardware that is named has.
        cloud_type: `SECURE`, `COMMUNITY`, or `ALL`, which takes the cheaper one first.
        priority: Higher is taken first. An inference of 1000 or more is a question that somebody
            waits for: on this machine it is answered beside what runs, where memory allows.
        max_attempts: Runs that may lose their worker before the job fails.
        timeout: Seconds from now after which the job is stopped; `job.set_timeout` moves it.
        max_cost_usd: It is stopped once its runs have cost so much; for pods with a price.
        max_usd_per_hour: No pod that costs more is started for it, or takes it.
        secrets: Names of the organization's secrets, such as `["HF_TOKEN"]`, that the job gets as
            variables.
        after: Jobs, or their ids, that must complete first. When one of them fails or is canceled,
            this one fails, and it is restarted with that one.
        not_before: When it may begin: a moment, or seconds from now.
        label: A name that jobs share, for `max_running`.
        max_running: It begins only while fewer jobs with its label run.
        max_duration: Seconds after which a run of it is stopped, and the job fails; default: what
            the organization says.
        stall_timeout_s: A run that gives no sign of life for so long (a printed line, an event,
            tokens generated, a model that is downloaded, `ow.run.heartbeat()`) is ended like one
            whose worker was lost; 0 for never. Default: 1800 for training, else never.
        dry_run: Submit nothing: `create` answers with a `Plan` of what it would cost, and when the
            job would run. Files are uploaded, because the job's id depends on them.
        retry: How often, after which failures of its own, it is tried again: a number, or
            `{"max": 2, "backoff_s": 60, "on": ["oom", "hub", "exit:75"]}`.
    """

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, arbitrary_types_allowed=True
    )

    allowed_hardware: list[str] | str | None = None
    docker_image: Annotated[str, Field(pattern=r"^\S*$")] | None = None
    requires_vram_gb: Annotated[int, Field(ge=0)] | Literal["guess"] | None = None
    cloud_type: CloudType = "SECURE"
    priority: int = 0
    max_attempts: int = Field(default=3, ge=1)
    timeout: float | None = Field(default=None, gt=0)
    max_cost_usd: float | None = Field(default=None, gt=0)
    max_usd_per_hour: float | None = Field(default=None, gt=0)
    secrets: Annotated[Sequence[str] | str, BeforeValidator(as_list)] = ()
    after: Annotated[Sequence[Job | str] | Job | str, BeforeValidator(_job_ids)] = ()
    not_before: datetime | float | None = None
    label: Annotated[str, Field(min_length=1, max_length=200, pattern=r"\S")] | None = None
    max_running: int | None = Field(default=None, ge=1)
    max_duration: float | None = Field(default=None, ge=1)
    stall_timeout_s: float | None = Field(default=None, ge=0)
    retry: Annotated[dict[str, Any] | int | None, AfterValidator(_checked_retry)] = None
    dry_run: bool = False

    @classmethod
    def of(cls, params: Mapping[str, Any]) -> Self:
        """Those among the arguments of `create`.

        Raises:
            ConfigError: A line for each that is wrong.
        """
        given = {name: params[name] for name in cls.model_fields if name in params}
        hardware = normalize_hardware(given.pop("allowed_hardware", None))
        try:
            options = cls.model_validate(given)
        except ValidationError as error:
            raise ConfigError("\n".join(describe_validation_error(error, cls))) from None
        if options.max_running is not None and options.label is None:
            raise ConfigError("max_running: counts the jobs that share a label; give label, too")
        return options.model_copy(update={"allowed_hardware": hardware and list(hardware)})

    @property
    def retry_policy(self) -> Retry | None:
        """As the store takes it."""
        return None if self.retry is None else _retry_of(self.retry)

    def first_moment(self, backend: Backend) -> datetime | None:
        """`not_before` as a moment, by the store's clock."""
        if isinstance(self.not_before, datetime):
            return check_moment(self.not_before)
        return moment_after(backend, "not_before", self.not_before)

    def quiet_s(self, default: float | None) -> float | None:
        """How long it may be quiet; None for ever."""
        return default if self.stall_timeout_s is None else self.stall_timeout_s or None

    def job_ids_before(self, awaited: Sequence[str]) -> tuple[str, ...]:
        """The jobs of `after`, and those that the job cannot do without."""
        return tuple(dict.fromkeys([*map(str, cast("Sequence[object]", self.after)), *awaited]))

    def vram_gb(self, default: int | None) -> int:
        """What to ask for, where the kind asks for `default`."""
        if isinstance(self.requires_vram_gb, int):
            return self.requires_vram_gb
        return 0 if self.allowed_hardware else default or 0


def takes(
    model: Callable[P, object],
) -> Callable[[Callable[..., Job]], Callable[Concatenate[Any, P], Job]]:
    """Gives a kind's `create` the keyword arguments of `model`: its parameters, and `JobOptions`.

    It is for type checkers and editors. `Jobs.__init_subclass__` says the same to `help` and to
    notebooks.
    """

    def decorate(create: Callable[..., Job]) -> Callable[Concatenate[Any, P], Job]:
        return create

    return decorate


def with_arguments(inherited: Callable[..., Job], params: type[BaseModel]) -> Callable[..., Job]:
    """A `create` with the arguments that `help` and notebooks are to show."""
    inherited = inspect.unwrap(inherited)

    @functools.wraps(inherited)
    def create(self: Any, **given: Any) -> Job:
        return inherited(self, **given)

    vars(create)["__signature__"] = _signature(params)
    head, mark, tail = (inherited.__doc__ or "").partition(_ANY_PARAMS)
    if mark:
        indent = head.rpartition("\n")[2]
        create.__doc__ = head + f"\n{indent}".join(_meanings_of_arguments(params, indent)) + tail
    return create


def _meanings_of_arguments(params: type[BaseModel], indent: str) -> list[str]:
    """The parameters of a kind's `create` with what they mean, its own first."""
    meanings = field_meanings(params) | field_meanings(JobOptions)
    named = [f"{n}: {meanings[n]}" for n in meanings if n in params.model_fields]
    named += [f"{n}: {meanings[n]}" for n in JobOptions.model_fields]
    return [textwrap.fill(text, 88, subsequent_indent=f"{indent}    ") for text in named]


def _signature(params: type[BaseModel]) -> inspect.Signature:
    """The arguments of a kind's `create`, its own first."""
    fields = {**params.model_fields, **JobOptions.model_fields}
    arguments = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    arguments += [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty
            if field.is_required()
            else field.get_default(call_default_factory=True, validated_data={}),
            annotation=_without_checks(field.annotation),
        )
        for name, field in fields.items()
    ]
    return inspect.Signature(arguments, return_annotation=Job)


def _without_checks(annotation: Any) -> Any:
    """A type as people read it: `Annotated[int, …] | None` is `int | None`."""
    origin = get_origin(annotation)
    if origin is None or origin is Literal:
        return annotation
    inner = tuple(map(_without_checks, get_args(annotation)))
    if origin is Annotated:
        return inner[0]
    if origin in (Union, UnionType):
        return Union[inner]  # noqa: UP007 - of types that are known only now
    return origin[inner]


def normalize_hardware(hardware: list[str] | str | None) -> tuple[str, ...] | None:
    """Hardware strings as `<count>x <KEY>`: "h100s" -> "1x H100S".

    Raises:
        ConfigError: One of them does not look like this. Whether such hardware exists is the
            cluster's to say.
    """
    if hardware is None:
        return None
    if not isinstance(cast("object", hardware), str | list | tuple):
        raise ConfigError(
            f"allowed_hardware: {shown(hardware)} is no list of hardware; write ['2x H100S']"
        )
    given = [hardware] if isinstance(hardware, str) else list(hardware)
    if not given:
        raise ConfigError(
            "allowed_hardware: is empty, so nothing could run the job; leave it out or name some"
        )
    return tuple(dict.fromkeys(_one_hardware(item) for item in given))


def _one_hardware(item: object) -> str:
    found = _HARDWARE.fullmatch(item) if isinstance(item, str) else None
    count = int(found[1] or 1) if found else 0
    if found is None or not 1 <= count <= _MOST_GPUS:
        raise ConfigError(
            f"allowed_hardware: {shown(item)} is not hardware; write it like '2x H100S'"
        )
    key = gpu_key(found[2])
    if key is None:
        _warn_of_unknown(found[2].upper())
    return f"{count}x {key or found[2].upper()}"


def _warn_of_unknown(name: str) -> None:
    """Somebody's own worker may have it; no pod has."""
    near = difflib.get_close_matches(name, LONG_NAMES, n=1)
    meant = f"did you mean {near[0]}?" if near else "`ow gpus` lists those that are"
    logger.warning(
        "allowed_hardware: %s is not in the catalogue of GPUs, so that no pod has it; %s",
        *(name, meant),
    )
