"""Failed assertions of the contract show their values, although it is no test file itself."""

import pytest

_PARTS = (
    *("contract_jobs", "contract_limits", "contract_runs", "contract_workers"),
    *("contract_scheduling", "life_cycle"),
)
pytest.register_assert_rewrite(*(f"tests.backends.{part}" for part in _PARTS))
