"""The contract of every store, kept by a Supabase project: the real client, over HTTP, with the
policies and functions of `backends/sql` in a real PostgreSQL.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest

from openweights.backends.base import Backend
from tests.backends.contract import BackendContract
from tests.supabase_double.team import Team


class TestSupabaseBackend(BackendContract):
    max_examples = 8
    retention_examples = 6
    verb_examples = 120

    @pytest.fixture
    def backend(self, team: Team) -> Iterator[Backend]:
        self.team = team
        team.execute("update organizations set log_limit_mb = 2")
        with closing(team.backend()) as backend:
            yield backend

    def pass_time(self, backend: Backend, seconds: float) -> None:
        self.team.pass_time(seconds)

    def age(self, backend: Backend, seconds: float) -> None:
        self.team.age(seconds)
