"""What tests of several ranks share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest

from tests.jobs.unsloth.runtime.forked_ranks import ForkedRanks


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkedRanks]:
    """Starts groups of processes that train together."""
    with closing(ForkedRanks(tmp_path_factory.mktemp("ranks") / "log.txt")) as ranks:
        yield ranks
