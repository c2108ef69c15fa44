"""The store of a team: a Supabase project, reached over HTTP by many machines.

Reads select rows, which row-level security filters; every write is one call of a SQL function (see
`sql/`), so it is atomic. A key of the organization travels in a header of its own, `x-ow-key`, and
the database looks it up at every request: a revoked key is refused at once. Content of files lies
in the private bucket `files`, as `<organization id>/<file id>`.
"""

from __future__ import annotations

import httpx
from supabase import ClientOptions, create_client

from openweights.backends.base import TeamStore
from openweights.backends.supabase.connection import Client
from openweights.backends.supabase.health import HealthVerbs
from openweights.backends.supabase.retention import RetentionVerbs
from openweights.backends.supabase.team import ClusterVerbs, TeamVerbs
from openweights.backends.supabase.verbs import RunVerbs, WorkerVerbs


class SupabaseBackend(RetentionVerbs, RunVerbs, WorkerVerbs, ClusterVerbs, TeamVerbs, HealthVerbs):
    """`TeamStore` and `ClusterStore` in a Supabase project; the verbs are described there.

    One object serves many threads, also after a fork. Opening it does no I/O.

    Args:
        url: Of the project.
        anon_key: The project's public key (publishable, or the older `anon`).
        api_key: A key of the organization, `ow_…`.
        heartbeat_s: Instead of what the project says.
        patience_s: How long a call is repeated while the project is away.

    Raises:
        ConfigurationError: `url` is no address, or `api_key` no key.
    """

    # Workers are on other machines, whose processes this one cannot see.
    liveness_fds: tuple[int, ...] = ()
    pace_s = 1.0

    @property
    def team(self) -> TeamStore:
        return self

    def _connect(self, http: httpx.Client) -> Client:
        # The session of a signed-in user is what the client would store and refresh: there is none.
        # Repeating is done in one place, for all calls.
        # `apiKey` it adds itself, and a project's gateway refuses a request that has it twice.
        options = ClientOptions(
            headers={name: value for name, value in self._headers.items() if name != "apikey"},
            auto_refresh_token=False,
            persist_session=False,
            httpx_client=http,
            postgrest_client_retry=False,
        )
        return create_client(self.url, self._anon_key, options)
