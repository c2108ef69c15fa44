"""What every store has to do about jobs that wait for something else than a worker."""

from __future__ import annotations

import itertools
from contextlib import suppress
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openweights.backends.base import Backend
from openweights.client.watching.queue import QueueView, in_order, waits_for
from openweights.errors import InvalidInputError, InvalidStateError
from openweights.types import (
    MOST_QUESTIONS,
    QUESTION_PRIORITY,
    SERVED,
    Ahead,
    JobRecord,
    QueuePlace,
    QueueState,
    Retry,
    WorkerSpec,
)
from tests.backends.steps import NOW, Contract, claim, draft, spec, start


class SchedulingContract(Contract):
    """Order between jobs."""

    max_examples = 8

    def chain(self, backend: Backend) -> None:
        """a <- b <- c, and d after a and c; a worker that is there."""
        backend.register_worker(WorkerSpec("w1"))
        for name, after in (("a", ()), ("b", ("a",)), ("c", ("b",)), ("d", ("a", "c"))):
            backend.submit_job(spec(name, after=after, priority=ord(name)))

    def states(self, backend: Backend) -> str:
        return " ".join(backend.get_job(name).status[0] for name in "abcd")

    def run_next(self, backend: Backend, status: Any = "completed") -> str:
        held = claim(backend)
        backend.finish_run(held.run.id, held.run.attempt, status, error="exit code 1")
        return held.job.id

    def test_a_job_waits_until_those_before_it_have_completed(self, backend: Backend) -> None:
        self.chain(backend)
        assert backend.get_job("d").after == ("a", "c")
        assert backend.get_job("a").after == ()
        first = claim(backend)
        backend.register_worker(WorkerSpec("w2"))
        assert backend.claim_job("w2") is None, "the others wait, although they are more urgent"
        backend.finish_run(first.run.id, 1, "completed")
        assert [self.run_next(backend) for _ in range(3)] == ["b", "c", "d"]
        assert backend.claim_job("w1") is None

    @pytest.mark.parametrize("how", ["failed", "canceled", "canceled before it ran"])
    def test_what_waits_for_a_job_fails_with_it_and_comes_back_with_it(
        self, backend: Backend, how: str
    ) -> None:
        self.chain(backend)
        if how == "canceled before it ran":
            backend.cancel_job("a")
        else:
            assert self.run_next(backend, how) == "a"
        ended = "canceled" if "canceled" in how else "failed"
        assert self.states(backend) == f"{ended[0]} f f f"
        b, c = backend.get_job("b"), backend.get_job("c")
        assert (b.failed_by, c.failed_by, b.attempts) == ("a", "b", 0)
        words = "was canceled" if ended == "canceled" else "has failed"
        reason = f"it was to come after job a, which {words}; it is restarted with that one"
        assert b.outputs == {"error": reason}
        assert backend.claim_job("w1") is None
        for name in "bcd":
            with pytest.raises(InvalidStateError, match=f"job [ab] is {ended}|job b is failed"):
                backend.restart_job(name)
        again = backend.restart_job("a")
        assert (again.status, self.states(backend)) == ("pending", "p p p p")
        assert (backend.get_job("c").failed_by, backend.get_job("c").outputs) == (None, None)
        assert [self.run_next(backend) for _ in range(4)] == list("abcd")

    def test_a_job_comes_back_only_when_nothing_before_it_has_failed(
        self, backend: Backend
    ) -> None:
        backend.register_worker(WorkerSpec("w1"))
        for name, after in (("a", ()), ("b", ()), ("c", ("a", "b")), ("d", ("c",))):
            backend.submit_job(spec(name, after=after))
        backend.cancel_job("a")
        backend.cancel_job("b")
        assert self.states(backend) == "c c f f"
        backend.submit_job(spec("a"))
        assert self.states(backend) == "p c f f"
        assert backend.get_job("c").failed_by == "b"
        backend.submit_job(spec("b"))
        assert self.states(backend) == "p p p p"
        backend.cancel_job("a")
        assert self.states(backend) == "c p f f"

    def test_a_lost_run_fails_nobody_until_it_was_the_last(self, backend: Backend) -> None:
        backend.register_worker(WorkerSpec("w1"))
        backend.submit_job(spec("a", max_attempts=2))
        backend.submit_job(spec("b", after=("a",)))
        claim(backend)
        backend.register_worker(WorkerSpec("w1"))
        assert backend.get_job("b").status == "pending"
        claim(backend)
        backend.set_worker_status("w1", "terminated")
        assert backend.get_job("a").status == backend.get_job("b").status == "failed"

    def test_questions_come_first_but_not_for_ever(self, backend: Backend) -> None:
        backend.register_worker(WorkerSpec("w1"))
        backend.submit_job(spec("training"))
        backend.submit_job(spec("urgent", priority=QUESTION_PRIORITY - 1))
        backend.submit_job(spec("later", priority=QUESTION_PRIORITY, type="inference"))
        questions = 2 * MOST_QUESTIONS
        for number in range(questions):
            asked = spec(f"question-{number}", priority=QUESTION_PRIORITY, type="inference")
            assert asked.is_question
            backend.submit_job(asked)
        order = [self.run_next(backend) for _ in range(questions + 3)]
        begins = [order.index(name) for name in ("urgent", "training")]
        assert order[0] == "later" and begins == [MOST_QUESTIONS, 2 * MOST_QUESTIONS + 1]
        assert backend.claim_job("w1") is None

    def test_where_only_questions_wait_none_is_held_back(self, backend: Backend) -> None:
        backend.register_worker(WorkerSpec("w1"))
        for number in range(MOST_QUESTIONS + 2):
            backend.submit_job(
                spec(
                    f"q-{number:02}",
                    priority=QUESTION_PRIORITY,
                    type="inference",
                    label="q",
                    max_running=1,
                )
            )
        order = [self.run_next(backend) for _ in range(MOST_QUESTIONS + 2)]
        assert order == sorted(order)

    def test_only_an_inference_is_a_question(self, backend: Backend) -> None:
        """The control: other jobs of that priority are taken by priority alone."""
        backend.register_worker(WorkerSpec("w1"))
        backend.submit_job(spec("training"))
        for number in range(MOST_QUESTIONS + 2):
            backend.submit_job(spec(f"exec-{number}", priority=QUESTION_PRIORITY))
        order = [self.run_next(backend) for _ in range(MOST_QUESTIONS + 3)]
        assert order[-1] == "training"

    def test_what_a_job_cannot_wait_for_is_refused(self, backend: Backend) -> None:
        self.chain(backend)
        before = backend.list_jobs()
        with pytest.raises(InvalidInputError, match="after: there is no job 'nix'"):
            backend.submit_job(spec("e", after=("a", "nix")))
        with pytest.raises(InvalidInputError, match="after: .*e waits for e"):
            backend.submit_job(spec("e", after=("e",)))
        for closing in ("b", "c"):
            with pytest.raises(InvalidInputError, match="after: .*a waits for .* waits for a"):
                backend.submit_job(spec("a", after=(closing,)))
        with pytest.raises(InvalidInputError, match="after"):
            backend.submit_job(spec("e", after=("a/b",)))
        assert backend.list_jobs() == before
        backend.cancel_job("d")
        with pytest.raises(InvalidStateError, match="after: job d is canceled: .*ow restart d"):
            backend.submit_job(spec("e", after=("d",)))

    def test_resubmitting_a_waiting_job_changes_what_it_waits_for(self, backend: Backend) -> None:
        self.chain(backend)
        assert backend.submit_job(spec("b")).after == ()
        assert self.run_next(backend) == "b"
        assert backend.submit_job(spec("d", after=("c",))).after == ("c",)
        assert backend.submit_job(spec("b", after=("a",))).after == (), "it has completed"

    def test_a_job_may_come_after_completed_ones(self, backend: Backend) -> None:
        self.chain(backend)
        self.run_next(backend)
        backend.submit_job(spec("e", after=("a",), priority=1000))
        assert self.run_next(backend) == "e"

    # ---- when

    def test_a_job_is_not_taken_before_its_moment(self, backend: Backend) -> None:
        backend.register_worker(WorkerSpec("w1"))
        later = backend.now() + timedelta(seconds=100)
        job = backend.submit_job(spec("a", not_before=later, priority=5))
        assert job.not_before == later
        backend.submit_job(spec("b"))
        assert self.run_next(backend) == "b"
        assert backend.claim_job("w1") is None
        self.pass_time(backend, 101)
        assert self.run_next(backend) == "a"

    def test_a_paused_queue_gives_nothing_out(self, backend: Backend) -> None:
        held = start(backend)
        backend.submit_job(spec("a"))
        assert backend.queue_state() == QueueState()
        paused = backend.set_paused(True)
        assert paused.paused_at is not None
        assert backend.set_paused(True) == paused == backend.queue_state()
        assert backend.place_in_queue() == QueuePlace(), "none may be taken"
        assert backend.claim_job("w1") == held, "what runs goes on"
        assert backend.heartbeat("w1", held.run.id) == "continue"
        backend.finish_run(held.run.id, 1, "completed")
        assert backend.claim_job("w1") is None
        assert backend.set_paused(False) == QueueState()
        assert self.run_next(backend) == "a"

    def test_of_a_label_only_so_many_run(self, backend: Backend) -> None:
        for number in range(4):
            backend.register_worker(WorkerSpec(f"w{number}"))
            backend.submit_job(spec(f"sweep-{number}", label="sweep", max_running=2))
        backend.submit_job(spec("other", label="other", max_running=1))
        backend.submit_job(spec("free"))
        taken = [backend.claim_job(f"w{number}") for number in range(4)]
        names = [claimed.job.id for claimed in taken if claimed is not None]
        assert names == ["sweep-0", "sweep-1", "other", "free"]
        backend.finish_run(taken[3].run.id, 1, "completed")  # pyright: ignore[reportOptionalMemberAccess]
        assert backend.claim_job("w3") is None
        backend.finish_run(taken[0].run.id, 1, "completed")  # pyright: ignore[reportOptionalMemberAccess]
        assert claim(backend, "w0").job.id == "sweep-2"
        assert backend.claim_job("w3") is None

    def test_a_run_may_not_take_too_long(self, backend: Backend) -> None:
        held = start(backend, max_duration_s=5.0)
        assert held.job.max_duration_s == 5
        assert backend.heartbeat("w1", held.run.id) == "continue"
        self.pass_time(backend, 6)
        assert backend.heartbeat("w1", held.run.id) == "timeout"
        backend.finish_run(held.run.id, 1, "failed")
        assert backend.set_max_duration(3).max_duration_s == 3
        usual = start(backend, job_id="usual")
        own = start(backend, worker_id="w2", job_id="own", max_duration_s=100.0)
        self.pass_time(backend, 4)
        assert backend.heartbeat("w1", usual.run.id) == "timeout"
        assert backend.heartbeat("w2", own.run.id) == "continue"
        backend.set_max_duration(None)
        assert backend.heartbeat("w1", usual.run.id) == "continue"
        with pytest.raises(InvalidInputError, match="max_duration"):
            backend.set_max_duration(-1)

    # ---- again

    def test_a_run_without_a_sign_of_life_is_stalled(self, backend: Backend) -> None:
        held = start(backend, stall_timeout_s=20.0, max_attempts=2)
        run = held.run.id

        def after_quiet(seconds: float = 15) -> str:
            self.pass_time(backend, seconds)
            return backend.heartbeat("w1", run)

        for sign in (
            lambda: backend.append_log(run, 0, b"a line"),
            lambda: backend.append_events(run, [draft(loss=1)]),
            lambda: backend.touch_run(run),
        ):
            assert after_quiet() == "continue"
            sign()
            assert after_quiet() == "continue"
            assert after_quiet(1) == "continue"
        assert after_quiet(10) == "stalled"
        reason = "no sign of life for 20 s"
        job = backend.release_run(run, 1, reason=reason, is_lost=True)
        assert backend.release_run(run, 1, reason=reason, is_lost=True) == job
        assert (job.status, backend.get_run(run).error) == ("pending", reason)
        assert not backend.get_run(run).is_given_back
        again = claim(backend)
        job = backend.release_run(again.run.id, 2, reason=reason, is_lost=True)
        assert (job.status, job.retries) == ("failed", 0)
        assert (
            backend.get_run(again.run.id).error == f"{reason}; the job has lost 2 of at most 2 runs"
        )

    def test_without_a_limit_nothing_is_stalled(self, backend: Backend) -> None:
        held = start(backend)
        self.pass_time(backend, 1e6)
        assert backend.heartbeat("w1", held.run.id) == "continue"

    def test_a_failure_is_retried_as_often_as_was_said(self, backend: Backend) -> None:
        retry = Retry(max=2, backoff_s=60, on=("oom", "exit:75"))
        held = start(backend, retry=retry)
        backend.submit_job(spec("after", after=("job-1",)))
        assert held.job.retry == retry
        failure: dict[str, Any] = {"error": "no memory", "exit_code": 1, "cause": "oom"}
        job = backend.finish_run(held.run.id, 1, "failed", **failure)
        assert (job.status, job.retries, job.outputs, job.attempts) == ("pending", 1, None, 1)
        assert backend.finish_run(held.run.id, 1, "failed", **failure) == job
        assert job.not_before is not None
        assert 55 < (job.not_before - backend.now()).total_seconds() <= 60
        assert backend.claim_job("w1") is None
        self.pass_time(backend, 61)
        second = claim(backend)
        job = backend.finish_run(second.run.id, 2, "failed", exit_code=75)
        assert job.not_before is not None
        assert 115 < (job.not_before - backend.now()).total_seconds() <= 120
        self.pass_time(backend, 121)
        third = claim(backend)
        assert backend.get_job("after").status == "pending"
        job = backend.finish_run(third.run.id, 3, "failed", **failure)
        assert (job.status, job.retries, backend.get_job("after").status) == ("failed", 2, "failed")
        history = [
            (run.status, run.cause, run.exit_code) for run in backend.list_runs(job_id=job.id)
        ]
        assert history == [("failed", "oom", 1), ("failed", None, 75), ("failed", "oom", 1)]
        again = backend.restart_job("job-1")
        assert (again.status, again.retries, again.not_before) == ("pending", 0, None)
        assert claim(backend).run.attempt == 4

    @pytest.mark.parametrize(
        "end",
        [
            ("failed", None, 1),
            ("failed", "hub", 1),
            ("failed", None, None),
            ("canceled", "oom", 1),
            ("completed", None, 0),
        ],
    )
    def test_what_is_not_retried_ends(self, backend: Backend, end: Any) -> None:
        status, cause, exit_code = end
        held = start(backend, retry=Retry(max=2, on=("oom",)))
        job = backend.finish_run(held.run.id, 1, status, cause=cause, exit_code=exit_code)
        assert (job.status, job.retries) == (status, 0)

    @pytest.mark.parametrize(
        "wrong",
        [
            {"max_running": 2},
            {"max_running": 0, "label": "x"},
            {"label": "a\nb"},
            {"max_duration_s": 0.0},
            {"stall_timeout_s": -1.0},
            {"retry": Retry(max=-1)},
            {"retry": Retry(max=1, backoff_s=-1)},
            {"retry": Retry(max=1, on=("rain",))},
        ],
    )
    def test_what_cannot_be_said_of_a_job_is_refused(self, backend: Backend, wrong: Any) -> None:
        with pytest.raises(InvalidInputError, match=next(iter(wrong))):
            backend.submit_job(spec(**wrong))
        assert backend.list_jobs() == []

    # ---- who

    def test_every_change_is_written_down(self, backend: Backend) -> None:
        held = start(backend)
        backend.submit_job(spec())
        backend.submit_job(spec("b", priority=1))
        backend.submit_job(spec("b", requires_vram_gb=3))
        backend.submit_job(spec("b", requires_vram_gb=3))
        backend.set_timeout("b", NOW)
        backend.cancel_job("b")
        backend.cancel_job("b")
        backend.restart_job("b")
        backend.finish_run(held.run.id, 1, "failed")
        backend.submit_job(spec())
        with pytest.raises(InvalidStateError):
            backend.restart_job("b")
        backend.set_paused(True)
        backend.set_paused(False)
        backend.set_max_duration(60)
        found = [(change.action, change.target) for change in backend.list_audit()]
        of_jobs = [
            *(("job.resubmit", "job-1"), ("job.restart", "b"), ("job.cancel", "b")),
            *(("job.timeout", "b"), ("job.change", "b"), ("job.submit", "b")),
            ("job.submit", "job-1"),
        ]
        of_queue = ["queue.max_duration", "queue.resume", "queue.pause"]
        assert found == [*((action, None) for action in of_queue), *of_jobs]
        newest, canceled = backend.list_audit(limit=1)[0], backend.list_audit(target="b")[1]
        assert newest.details == {"seconds": 60}
        assert canceled.details == {"status": "pending"}
        assert newest.who and abs(newest.created_at - backend.now()) < timedelta(minutes=1)

    def test_workers_get_what_users_are_told(self, backend: Backend) -> None:
        """The stores' own rule of who comes next, and the one by which a client says who waits."""

        @settings(max_examples=self.max_examples // 2, database=None)
        @given(jobs=_waiting)
        def check(jobs: list[dict[str, Any]]) -> None:
            mark = f"example-{next(_examples)}"
            now = backend.now()
            for number, job in enumerate(jobs):
                shift, label = job.pop("shift"), job.pop("label")
                after = [f"{mark}-{index}" for index in job.pop("after") if index < number]
                job |= {"after": tuple(after), "label": f"{mark} {label}"}
                job |= {"not_before": None if shift is None else now + timedelta(seconds=shift)}
                backend.submit_job(spec(f"{mark}-{number}", **job))
            for number in range(len(jobs) + 1):
                expected = self.check_places(backend)
                worker = f"{mark}-w{number}"
                backend.register_worker(WorkerSpec(worker, vram_gb=80, gpu_count=1))
                got = backend.claim_job(worker)
                assert (got and got.job.id) == (expected[0].id if expected else None)
                if got is not None and number % 2:
                    backend.finish_run(got.run.id, 1, "completed")
            for job in backend.list_jobs(statuses=["pending", "in_progress"], limit=None):
                with suppress(InvalidStateError):
                    backend.cancel_job(job.id)

        check()

    def check_places(self, backend: Backend) -> list[JobRecord]:
        """The pending jobs that may be taken now, in order, by what clients are told of each; the
        store says the same of one job as of all of them.
        """
        for is_remote in (False, True):
            view = QueueView.read(backend, is_remote=is_remote)
            reasons = view.reasons(job.id for job in view.pending)
            each = {job.id: waits_for(backend, job, is_remote=is_remote) for job in view.pending}
            assert each == reasons
        due = [job for job in in_order(view.pending) if reasons[job.id].startswith("for a worker")]
        ahead = Ahead()
        for job in due:
            assert backend.place_in_queue(job).ahead == ahead
            ahead = ahead.then(job)
        assert backend.place_in_queue() == QueuePlace(ahead=ahead)
        return due

    def test_no_order_of_changes_leaves_a_job_stuck(self, backend: Backend) -> None:
        @settings(max_examples=self.max_examples // 2, database=None)
        @given(after=_orders, changes=_changes)
        def check(after: list[list[int]], changes: list[tuple[str, int]]) -> None:
            names = [f"example-{next(_examples)}-{n}" for n in range(len(after))]
            needs = dict(zip(names, ([names[i] for i in found] for found in after), strict=True))
            backend.register_worker(WorkerSpec("w1"))
            for name in names:
                backend.submit_job(spec(name, after=tuple(needs[name])))
            for change, index in changes:
                _change(backend, change, names[index % len(names)])
                _check_order(backend, needs)
            for name in names:  # nothing is left that the next example could claim
                with suppress(InvalidStateError):
                    backend.cancel_job(name)

        check()


# Of jobs 0 to 4: those before it that each waits for.
_orders = st.tuples(*(st.lists(st.sampled_from(range(n)), max_size=3) for n in range(1, 5))).map(
    lambda found: [[], *(sorted(set(needed)) for needed in found)]
)
_changes = st.lists(
    st.tuples(
        st.sampled_from(["cancel", "restart", "completed", "failed", "completed"]),
        st.integers(0, 4),
    ),
    max_size=12,
)
_examples = itertools.count()
_waiting = st.lists(
    st.fixed_dictionaries(
        {
            "shift": st.sampled_from([None, None, -100, 100]),
            "label": st.sampled_from("ab"),
            "max_running": st.sampled_from([None, None, 1, 2]),
            "priority": st.sampled_from([0, 0, 1, QUESTION_PRIORITY]),
            "type": st.sampled_from(["custom", "inference", SERVED]),
            "requires_vram_gb": st.sampled_from([0, 24]),
            "after": st.lists(st.integers(0, 4), max_size=1),
        }
    ),
    max_size=6,
)


def _change(backend: Backend, change: Any, name: str) -> None:
    if change in ("completed", "failed"):
        held = backend.claim_job("w1")
        if held is not None:
            backend.finish_run(held.run.id, held.run.attempt, change)
        return
    with suppress(InvalidStateError):
        (backend.cancel_job if change == "cancel" else backend.restart_job)(name)


def _check_order(backend: Backend, needs: dict[str, list[str]]) -> None:
    """Whatever has run, ran after what it needs; whatever waits can still run."""
    jobs = {name: backend.get_job(name) for name in needs}
    for name, job in jobs.items():
        before = [jobs[needed].status for needed in needs[name]]
        if job.attempts:
            assert set(before) <= {"completed"}, name
        if job.status == "pending":
            assert not {"failed", "canceled"} & set(before), name
        if job.failed_by is not None:
            assert job.status == "failed" and job.failed_by in needs[name]
            assert jobs[job.failed_by].status in ("failed", "canceled")
