"""The contract on a real Supabase project, for whoever has one: `pytest -m supabase_live`.

`OW_TEST_SUPABASE_URL`, `OW_TEST_SUPABASE_ANON_KEY` and `OW_TEST_SUPABASE_DB` (the direct connection
to its database, as the owner) name a project in which `ow db init` has run. Each test makes an
organization of its own and leaves it behind: take a project that is there for tests.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import closing

import pytest

from tests.backends.supabase.test_supabase_contract import TestSupabaseBackend as _OnTheDouble
from tests.supabase_double.team import LiveTeam

pytestmark = pytest.mark.supabase_live

_NAMES = ("OW_TEST_SUPABASE_DB", "OW_TEST_SUPABASE_URL", "OW_TEST_SUPABASE_ANON_KEY")


@pytest.fixture
def team() -> Iterator[LiveTeam]:
    missing = [name for name in _NAMES if not os.environ.get(name)]
    if missing:
        pytest.skip(f"{', '.join(missing)} not set")
    with closing(LiveTeam(*(os.environ[name] for name in _NAMES))) as team:
        yield team


class TestLiveProject(_OnTheDouble):
    max_examples = 2


def test_the_storage_service_passes_our_header_on(team: LiveTeam) -> None:
    content = os.urandom(7 << 20)  # in parts
    with closing(team.backend()) as backend, closing(team.backend(team.key("worker"))) as worker:
        file = backend.put_file(io.BytesIO(content), "result", "large")
        with backend.open_file(file.id) as stream:
            assert stream.read() == content
        with pytest.raises(LookupError):
            worker.open_file(file.id)
        backend.delete_file(file.id)
        with pytest.raises(LookupError):
            backend.open_file(file.id)
