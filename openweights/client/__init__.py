"""The SDK: `OpenWeights` and what hangs on it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from openweights.arguments import as_path, as_texts, check_text, check_whole
from openweights.client.bundle import (
    BUNDLE_PURPOSE,
    Signature,
    build_bundle,
    package_folder,
    signature,
)
from openweights.client.events import EventCollection
from openweights.client.files import FileCollection
from openweights.client.job_kinds import Jobs, find_kind, keep_names, kind_names, register
from openweights.client.jobs import Job, JobCollection
from openweights.client.local_worker import LocalWorkers
from openweights.client.results import read_log_chunks
from openweights.client.runs import Run, RunCollection, ScriptRun
from openweights.client.secrets import SecretCollection
from openweights.errors import ConfigurationError, InvalidInputError, NotFoundError, shown
from openweights.settings import Settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from openweights.backends.base import Backend
    from openweights.client.serving.chat import Chat, Completions, Deployments
    from openweights.jobs.api import Api
    from openweights.jobs.evaluate import Evaluate
    from openweights.jobs.exec import Exec
    from openweights.jobs.inference import Inference
    from openweights.jobs.inspect_ai import InspectAI
    from openweights.jobs.logprob import LogProb
    from openweights.jobs.mmlu_pro import MMLUPro
    from openweights.jobs.multiple_choice import MultipleChoice
    from openweights.jobs.unsloth import FineTuning
    from openweights.jobs.weighted_sft import WeightedSFT
    from openweights.types import AuditRecord

__all__ = ["Job", "JobCollection", "Jobs", "OpenWeights", "Run", "register"]

logger = logging.getLogger(__name__)

_NAMED = "give the name of a parameter, such as 'learning_rate' or 'meta.rate'"
_OF_JOBS = "give jobs, or their ids, as `ow.jobs.list()` shows them"


class OpenWeights:
    """A client. Without a key it uses the store on this machine, under `OPENWEIGHTS_HOME`; with a
    key and an address, a Supabase project.

    Building one does no I/O; the store is opened when something first needs it. Job kinds are
    attributes: `ow.fine_tuning.create(...)`, and `ow.<name>` for each `@register("<name>")`.

    Args:
        supabase_url: Project that holds the jobs; default: `SUPABASE_URL`.
        supabase_key: Its public key; default: `SUPABASE_ANON_KEY`.
        auth_token: An `ow_…` key; default: `OPENWEIGHTS_API_KEY`. Without `SUPABASE_URL` the
            defaults are what `ow login` has stored.
        organization_id: Whose jobs these are. The key, or the store on this machine, says that;
            what you give is compared with it on first use.
        use_async: Whether `ow.chat` is the asynchronous one.
        deploy_kwargs: What `ow.chat` deploys models with, as `ow.api.deploy` takes it.
        settings: Addresses and keys and more, instead of the environment.

    Attributes:
        files, jobs, runs, events: What the store holds.
        secrets: What a project keeps for jobs that name it.
        settings: What the environment said when the client was built.
    """

    RESERVED: ClassVar[frozenset[str]] = frozenset(
        {"files", "jobs", "runs", "events", "secrets", "settings"}
    )

    if TYPE_CHECKING:
        fine_tuning: FineTuning
        weighted_sft: WeightedSFT
        logprob: LogProb
        multiple_choice: MultipleChoice
        inference: Inference
        api: Api
        evaluate: Evaluate
        inspect_ai: InspectAI
        mmlu_pro: MMLUPro
        exec: Exec

    def __init__(
        self,
        supabase_url: str | None = None,
        supabase_key: str | None = None,
        auth_token: str | None = None,
        organization_id: str | None = None,
        use_async: bool = False,
        deploy_kwargs: Mapping[str, Any] | None = None,
        *,
        settings: Settings | None = None,
    ) -> None:
        settings = Settings.from_env() if settings is None else settings
        self.settings = replace(
            settings,
            supabase_url=supabase_url or settings.supabase_url,
            supabase_anon_key=supabase_key or settings.supabase_anon_key,
            api_key=auth_token or settings.api_key,
        )
        self.files = FileCollection(self)
        self.jobs = JobCollection(self)
        self.runs = RunCollection(self)
        self.events = EventCollection(self)
        self.secrets = SecretCollection(self)
        self._use_async = use_async
        self._deploy_kwargs = dict(deploy_kwargs or {})
        self._organization_id = organization_id
        self._lock = threading.RLock()
        self._backend: Backend | None = None
        self._run: Run | None = None
        self._workers: LocalWorkers | None = None
        self._kinds: dict[str, Jobs] = {}
        self._bundle: tuple[Signature, str] | None = None

    def __getattr__(self, name: str) -> Jobs:
        # Called for what is no ordinary attribute: the job kinds.
        kind = None if name.startswith("_") else find_kind(name)
        if kind is None:
            raise AttributeError(
                f"OpenWeights has no {name!r}; the job kinds are {', '.join(kind_names())} "
                "(your own appear once @register has run)"
            )
        known = self._kinds.get(name)
        if known is None or type(known) is not kind:
            known = self._kinds[name] = kind(self)
        return known

    def __repr__(self) -> str:
        url = self.settings.supabase_url
        return f"OpenWeights({f'project {url}' if url else f'this machine, {self.settings.home}'})"

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *kind_names()})

    @property
    def backend(self) -> Backend:
        """The store, opened on first use.

        Raises:
            ConfigurationError: Address or keys of a project are missing, or the organization is
                another one.
        """
        with self._lock:
            if self._backend is None:
                from openweights.backends import open_backend

                self._backend = self._checked(open_backend(self.settings))
            return self._backend

    def _checked(self, backend: Backend) -> Backend:
        asked = self._organization_id
        if asked and asked != (found := backend.organization_id):
            backend.close()
            whose = "OPENWEIGHTS_API_KEY belongs to"
            if backend.team is None:
                whose = "the store on this machine holds"
            raise ConfigurationError(
                f"{whose} the organization {found!r}, not {asked!r}; leave organization_id out"
            )
        return backend

    @property
    def organization_id(self) -> str:
        """Whose jobs and files these are."""
        return self.backend.organization_id

    @property
    def org_name(self) -> str:
        """What the organization is called; the store on this machine has only an id."""
        team = self.backend.team
        return self.organization_id if team is None else str(team.identity["organization"])

    @property
    def hf_org(self) -> str | None:
        """Where models are pushed to: `HF_ORG`, else `HF_USER`."""
        return self.settings.hf_org

    @property
    def run(self) -> Run:
        """The run that this process belongs to: the job's, or outside a job a new one of type
        `script`.
        """
        with self._lock:
            if self._run is None:
                run_id = self.settings.run_id
                self._run = ScriptRun(self) if run_id is None else Run(self, run_id)
            return self._run

    def audit(self, target: str | None = None, limit: int = 100) -> list[AuditRecord]:
        """Who did what, newest first: jobs submitted, changed, canceled; keys made and revoked; …

        Args:
            target: Only of this job, key, member or secret.
        """
        if target is not None:
            check_text("target", target, "give the id of a job, or the name of a key or secret")
        return self.backend.list_audit(target=target, limit=check_whole("limit", limit))

    def compare(
        self, jobs: Sequence[Job | str] | Job | str, as_dataframe: bool | None = None
    ) -> Any:
        """A table with a row for each job: the parameters that differ, and the last value of each
        measure. Printed it has a column for each job, and of all that it holds what somebody has
        chosen and what says how good the models are; `columns` names the rest.

        Args:
            jobs: Jobs, or their ids or beginnings of ids.
            as_dataframe: As of `Job.metrics`.

        Raises:
            ConfigurationError: A DataFrame was asked for, and pandas is not installed.
        """
        from openweights.client.watching.comparison import comparison_columns, comparison_rows

        found = self._found(jobs)
        records = [job.record for job in found]
        rows = comparison_rows(records, [job.metric_rows() for job in found])
        if as_dataframe is False:
            return rows
        from openweights.client.watching.file_names import file_names, keys_with_names, with_names
        from openweights.client.watching.plot import as_comparison

        columns, main = comparison_columns(records, rows)
        names = file_names(self.backend, rows)
        rows, columns = keys_with_names(rows, names), with_names(columns, names)
        return as_comparison(rows, columns, main, required=bool(as_dataframe))

    def plot(
        self,
        jobs: Sequence[Job | str] | Job | str,
        path: str | Path | None = None,
        *,
        x: str = "step",
        y: Sequence[str] | str | None = None,
        group_by: Sequence[str] | str | None = None,
        band: str | None = None,
    ) -> Figure:
        """A figure of several jobs: a panel for each measure, a line for each job.

        Args:
            jobs: Jobs, or their ids or beginnings of ids.
            path: Where to save it, too; the ending decides the format.
            x: "step", or a measure: then each job is a path through the plane of both.
            y: Measures, as `loss` or, of a set that was followed, `logprobs/loss[name]`; default:
                the loss and all such sets. Where the jobs' losses are of different kinds, each kind
                has a panel of its own, as `loss (dpo)`.
            group_by: Parameters such as "learning_rate" or "meta.rate" that name the lines;
                default: all that differ.
            band: A parameter such as "seed" to average over: a line is then the mean of the jobs
                that agree in `group_by`, with a band from the least to the greatest.

        Raises:
            ConfigurationError: matplotlib is not installed.
            InvalidInputError: No job has measured anything, or not what was asked for.
        """
        from openweights.client.watching.comparison import curve_panels, line_names, readable
        from openweights.client.watching.file_names import short_file_names
        from openweights.client.watching.metrics import series
        from openweights.client.watching.model_names import model_names
        from openweights.client.watching.plot import draw_panels, plot_title
        from openweights.client.watching.unmeasured import merged, unmeasured

        found = self._found(jobs)
        records = [job.record for job in found]
        check_text("x", x, "give 'step', or the name of a measure")
        measures = None if y is None else as_texts("y", y, "give names of measures")
        parameters = None if group_by is None else as_texts("group_by", group_by, _NAMED)
        if band is not None:
            check_text("band", band, _NAMED)
        tables = [job.metric_rows() for job in found]
        models = model_names(self.backend, (record.model or "" for record in records))
        files = short_file_names(self.backend, [record.validated_params for record in records])
        told = readable(records, {**models, **files})
        panels = curve_panels(told, tables, x=x, y=measures, group_by=parameters, band=band)
        called = line_names(told, parameters, band)
        missing = unmeasured(records, [series(table) for table in tables], panels)
        target = None if path is None else as_path("path", path)
        notes = [one.words(called) for one in merged(missing)]
        return draw_panels(panels, title=plot_title(records, models), x=x, path=target, notes=notes)

    def _found(self, jobs: Sequence[Job | str] | Job | str) -> list[Job]:
        given = [jobs] if isinstance(jobs, Job | str) else jobs
        if not isinstance(cast("object", given), Iterable):
            raise InvalidInputError(f"jobs: {shown(jobs)} is no list of jobs; {_OF_JOBS}")
        return [job if isinstance(job, Job) else self.jobs.retrieve(job) for job in given]

    @property
    def chat(self) -> Chat:
        """Asks models by their names: `sync_chat`, or `async_chat` with `use_async`."""
        return self.async_chat if self._use_async else self.sync_chat

    @cached_property
    def sync_chat(self) -> Chat:
        """Asks models, and waits for the answers."""
        from openweights.client.serving.chat import Chat

        return Chat(self._deployments, use_async=False)

    @cached_property
    def async_chat(self) -> Chat:
        """Asks models without blocking the event loop."""
        from openweights.client.serving.chat import Chat

        return Chat(self._deployments, use_async=True)

    @cached_property
    def completions(self) -> Completions:
        """Lets models go on with a text: `create(model=…, prompt=…)`, else as `sync_chat`."""
        from openweights.client.serving.chat import Completions

        return Completions(self._deployments, of_chats=False)

    @cached_property
    def _deployments(self) -> Deployments:
        from openweights.client.serving.chat import Deployments

        return Deployments(self, self._deploy_kwargs)

    def close(self) -> None:
        """End what `ow.chat` has deployed, send what the current run has logged, and release the
        store's connections.

        Neither the client nor what it gave out may be used afterwards.
        """
        if "_deployments" in vars(self):
            self._deployments.close()
        with self._lock:
            if self._run is not None:
                self._run.close()
            if self._backend is not None:
                self._backend.close()
                self._backend = None

    # ---- for the modules of this package ---------------------------------------------------------

    def bundle_file(self) -> str:
        """File id of the source bundle, built and uploaded once for each state of the package."""
        with self._lock:
            state = signature(package_folder())
            if self._bundle is None or self._bundle[0] != state or not self._has(self._bundle[1]):
                content = BytesIO(build_bundle())
                record = self.backend.put_file(content, BUNDLE_PURPOSE, "openweights.zip")
                self._bundle = (state, record.id)
            return self._bundle[1]

    def ensure_worker(self) -> None:
        """Start the workers that the store on this machine lacks; a project's workers are started
        by others.
        """
        if self.backend.team is not None:
            return
        with self._lock:
            if self._workers is None:
                self._workers = LocalWorkers(self.settings, self.backend)
            self._workers.ensure()

    def _has(self, file_id: str) -> bool:
        try:
            self.backend.open_file(file_id).close()
        except NotFoundError:
            return False
        return True

    def iterate_log(self, run_id: int) -> Iterator[bytes]:
        """The log of a run so far, in pieces."""
        return read_log_chunks(self.backend, run_id)


keep_names([*dir(OpenWeights), *OpenWeights.RESERVED])
