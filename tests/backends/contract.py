"""What every store has to do: one test set over all verbs of `openweights.backends.base.Backend`.

A subclass named `Test…` provides the fixture `backend`, with a short lease, and `pass_time` if it
can do better than to sleep. Nothing here knows how a store works inside.
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from openweights.backends.base import Backend
from tests.backends.contract_jobs import JobContract
from tests.backends.contract_limits import LimitsContract
from tests.backends.contract_retention import RetentionContract
from tests.backends.contract_runs import RunContract
from tests.backends.contract_scheduling import SchedulingContract
from tests.backends.contract_workers import WorkerContract
from tests.backends.life_cycle import LifeCycle


class BackendContract(
    JobContract,
    RunContract,
    WorkerContract,
    LimitsContract,
    SchedulingContract,
    RetentionContract,
):
    """Inherit, provide the fixture `backend`, and every verb is tested."""

    max_examples = 30

    def test_the_life_cycle_follows_its_model(self, backend: Backend) -> None:
        def machine() -> LifeCycle:
            return LifeCycle(backend, lambda seconds: self.pass_time(backend, seconds))

        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=self.max_examples,
                stateful_step_count=40,
                database=None,
                suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
            ),
        )
