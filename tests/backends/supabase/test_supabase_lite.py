"""The store's contract on `@supabase/lite`, and our double's answers compared with lite's: what the
double and the client agree about is not only our own reading of PostgREST.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing

import httpx
import pytest
from psycopg.conninfo import conninfo_to_dict

from openweights.types import JobSpec
from tests.backends.supabase.test_supabase_contract import TestSupabaseBackend as _OnTheDouble
from tests.supabase_double.lite import running_lite
from tests.supabase_double.postgres import PostgresServer
from tests.supabase_double.server import ANON_KEY
from tests.supabase_double.team import LiveTeam

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def lite_project(postgres: PostgresServer) -> str:
    return postgres.create_project()


@pytest.fixture(scope="module")
def lite(lite_project: str) -> Iterator[str]:
    with running_lite(lite_project) as url:
        yield url


@pytest.fixture
def team(lite_project: str, lite: str) -> Iterator[LiveTeam]:
    with closing(LiveTeam(lite_project, lite, ANON_KEY)) as team:
        yield team


class TestLite(_OnTheDouble):
    max_examples = 4


# No writes to tables, which the policies and grants forbid: lite grants everything when it starts.
_JOBS = "GET jobs?select=id,status,priority,params"
_SAME = [
    f"{_JOBS}&order=id.asc",
    f"{_JOBS}&order=priority.desc,id",
    f"{_JOBS}&order=id.desc&limit=2",
    f"{_JOBS}&order=id&limit=2&offset=1",
    f"{_JOBS}&order=id&id=gt.job-1",
    f"{_JOBS}&order=id&id=lt.job-2",
    f"{_JOBS}&id=eq.job-0",
    f"{_JOBS}&id=eq.none",
    f"{_JOBS}&order=id&status=in.(canceled,pending)",
    f'{_JOBS}&order=id&id=in.("job-0","job-2")',
    f'{_JOBS}&id=in.("a,b","c""d")',
    f"{_JOBS}&order=id&priority=gte.1&priority=lt.3",
    f"{_JOBS}&order=id&worker_id=is.null",
    f"{_JOBS}&order=id&worker_id=not.is.null",
    f"{_JOBS}&order=id&or=(id.eq.job-1,and(priority.gte.3,status.neq.canceled))",
    f'{_JOBS}&order=id&params=cs.{{"command": "true"}}',
    "GET jobs?select=nothing",
    "GET jobs?id=eq.a&nothing=eq.b",
    "GET jobs?select=id&limit=1&order=nothing",
    "GET jobs?seq=eq.text",
    "GET nothing",
    "POST rpc/nothing {}",
    'POST rpc/get_nothing {"p_a": 1}',
    "POST rpc/whoami {}",
    'POST rpc/whoami {"p_unknown": 1}',
    'POST rpc/cancel_job {"p_job_id": "none"}',
    'POST rpc/submit_job {"p_spec": {"id": 7}}',
    'POST rpc/claim_job {"p_worker_id": "none"}',
]


@pytest.mark.parametrize("request_line", _SAME)
def test_the_double_answers_as_lite_does(
    request_line: str, team: LiveTeam, double: str, lite_project: str
) -> None:
    with closing(team.backend()) as backend:
        for number in range(4):
            backend.submit_job(_spec(number))
        backend.cancel_job("job-3")
    name = conninfo_to_dict(lite_project)["dbname"]
    line, _, body = request_line.partition(" {")
    content = json.loads("{" + body) if body else None
    expected = _ask(team.url, team, line, content)
    assert _ask(f"{double}/{name}", team, line, content) == expected


def _spec(number: int) -> JobSpec:
    params = {"command": "true", "list": [1, 2.5, None]}
    return JobSpec(f"job-{number}", "custom", "true", params, priority=number)


def _ask(url: str, team: LiveTeam, line: str, content: object = None) -> tuple[int, object]:
    """Status, and rows or what a program reads of an error."""
    method, _, path = line.partition(" ")
    headers = {"apikey": ANON_KEY, "x-ow-key": team.admin_key}
    answer = httpx.request(method, f"{url}/rest/v1/{path}", headers=headers, json=content)
    if answer.is_success:
        return answer.status_code, answer.json()
    error = answer.json()
    # Our functions say in `details` what went wrong; elsewhere it is prose.
    is_ours = error["code"].startswith("PT")
    return answer.status_code, (error["code"], error["details"] if is_ours else None)
