"""The page in headless Chromium: every view opened, read and clicked, at two widths and in both
colour schemes, without an error in the console; labels, contrast, and markup that stays text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from openweights import NotFoundError, OpenWeights
from openweights.settings import Settings
from openweights.types import EventDraft, JobSpec, WorkerSpec
from tests.dashboard.conftest import Served, serving
from tests.dashboard.visitor import Visitor
from tests.tiny_model import make_tiny_model

pytestmark = pytest.mark.browser
MARKUP = [
    "<script>window.hit=1</script>",
    "<img src=x onerror='window.hit=1'>",
    "<svg onload=window.hit=1>",
    '"><script>window.hit=1</script>',
    "'><img src=x onerror=window.hit=1>",
    "<iframe srcdoc='<script>parent.hit=1</script>'>",
    "<a href='javascript:window.hit=1'>x</a>",
    "<body onload=window.hit=1>",
    "<details open ontoggle=window.hit=1>",
    "<video><source onerror=window.hit=1>",
    "<input autofocus onfocus=window.hit=1>",
    "<math><mtext></mtext><script>window.hit=1</script></math>",
    "</textarea><script>window.hit=1</script>",
    "</title><script>window.hit=1</script>",
    "<style>@import 'javascript:window.hit=1'</style>",
    "<base href='//evil.example/'>",
    "<meta http-equiv=refresh content='0;url=javascript:window.hit=1'>",
    "<object data='javascript:window.hit=1'>",
    "<embed src='javascript:window.hit=1'>",
    "<form action='javascript:window.hit=1'><button>x</button></form>",
    "<b>plotly</b><br>",
    '<a href="data:text/html,<script>opener.hit=1</script>">x</a>',
    "${window.hit=1}",
    "{{constructor.constructor('window.hit=1')()}}",
    "javascript:window.hit=1",
    '<img src=1 href=1 onerror="javascript:window.hit=1"></img>',
    "<audio src=1 onerror=window.hit=1>",
    "<marquee onstart=window.hit=1>",
    "<keygen autofocus onfocus=window.hit=1>",
    "<isindex type=image src=1 onerror=window.hit=1>",
    "&lt;script&gt;window.hit=1&lt;/script&gt;",
    "<scr<script>ipt>window.hit=1</scr</script>ipt>",
    "<SCRIPT>window.hit=1</SCRIPT>",
    "<img/src='x'/onerror=window.hit=1>",
    "<table background='javascript:window.hit=1'>",
    "<link rel=stylesheet href='javascript:window.hit=1'>",
    "<div style='background:url(javascript:window.hit=1)'>",
    "<svg><animate onbegin=window.hit=1 attributeName=x>",
    "\u0000<script>window.hit=1</script>",
    "<!--<script>window.hit=1</script>-->",
]


@pytest.fixture
def serve_log(home: Path) -> Callable[..., Any]:
    """A server over a store in which a job that runs has a long log, and what appends to it."""

    @contextmanager
    def serve(lines: list[bytes]) -> Iterator[tuple[Served, int, Callable[[bytes], None]]]:
        ow = OpenWeights(settings=Settings(home=home, log_limit_mb=200))
        backend = ow.backend
        backend.register_worker(WorkerSpec(id="worker"))
        backend.submit_job(JobSpec(id="ftjob-log", type="fine-tuning", script="true", params={}))
        claim = backend.claim_job("worker")
        assert claim is not None
        offset = 0

        def append(data: bytes) -> None:
            nonlocal offset
            backend.append_log(claim.run.id, offset, data)
            offset += len(data)

        for start in range(0, len(lines), 100_000):
            append(b"".join(lines[start : start + 100_000]))
        with serving(ow) as served:
            yield served, claim.run.id, append
        ow.close()

    return serve


_LOOKS = [(1280, "light"), (400, "dark"), (1280, "dark"), (400, "light")]


@pytest.fixture(params=_LOOKS, ids=lambda look: f"{look[0]}-{look[1]}")
def each_visitor(request: Any, chromium: Any, served: Served) -> Iterator[Visitor]:
    window = Visitor(chromium, served, *request.param)
    yield window
    window.close()


@pytest.fixture(params=_LOOKS[:2], ids=["wide", "narrow"])
def visitor(request: Any, chromium: Any, served: Served) -> Iterator[Visitor]:
    window = Visitor(chromium, served, *request.param)
    yield window
    window.close()


@pytest.fixture
def jobs(run_job: Any) -> list[str]:
    names = [f"ftjob-{number}" for number in range(4)]
    for number, name in enumerate(names):
        events = [{"step": step, "loss": 2.0 / (step + number + 1)} for step in range(1, 31)]
        events += [{"step": step, "tag": "eval", "loss": 2.2 / step} for step in (10, 20, 30)]
        failed = number == 3
        run_job(
            name,
            events,
            log="line\n" * 300,
            status="failed" if failed else "completed",
            error="CUDA out of memory" if failed else None,
            learning_rate=1e-4 * (1 + number // 2),
            seed=number % 2,
        )
    return names


@pytest.fixture
def watched(served: Served, run_job: Any) -> str:
    """A job of which everything was logged that the page can show of one."""

    def file(*rows: Any) -> str:
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        return served.ow.files.create(content, "result")["id"]

    tokens = ["The", " capital", " is", " Paris", "."]
    plain = {"tokens": tokens, "is_answer": [False, True, True, True, True]}
    block = {"type": "text", "tokens": tokens[1:3]}
    blocks = [
        {**block, "text": " capital is", "tag": "fact", "logprobs": [-0.1, -3.0]},
        {**block, "text": " Paris.", "weight": 0.5, "tokens": tokens[3:], "logprobs": [-6.0, -0.5]},
    ]
    said = {"role": "assistant", "content": blocks}
    asked = {"role": "user", "content": "What is the capital of France?"}
    events: list[dict[str, Any]] = [
        {"step": step, "loss": 2 / step, "reward": step / 40, "kl": 0.01 * step, "rollout_s": 1.0}
        for step in range(1, 41)
    ]
    for step in (1, 20, 40):
        rewards = {"rouge_l": step / 40, "caps_spanish": 0.5}
        answer = f"The capital of France is {'Paris' if step > 1 else 'Lyon'}, at step {step}."
        row = {
            "prompt": asked["content"],
            "completion": answer,
            "rewards": rewards,
            "ended": step > 1,
        }
        example = {"prompt": asked["content"], "demonstration": "Paris", "student": answer}
        scores = [None, *(-7 / (step + at) for at in range(4))]
        events += [
            {"type": "completions", "step": step, "completions": [row]},
            {
                **{"type": "teacher_gate", "step": step, "rows": 16, "student": step / 50},
                **{"teacher": 0.9, "passed": True, "examples": [{**example, "template": "Paris."}]},
            },
            {
                **{"type": "logprobs", "step": step, "tag": "facts", "facts": 1.0, "path": "x"},
                "file": file({**plain, "logprobs": scores}),
            },
            {
                **{"type": "logprobs_blockwise", "step": step, "tag": "blocks", "path": "y"},
                "file": file({"messages": [asked, said], "step": step}),
            },
        ]
    run_job("ftjob-watched", events, log="line\n" * 30, loss="grpo")
    return "ftjob-watched"


def test_every_view(
    served: Served, each_visitor: Visitor, jobs: list[str], watched: str, tmp_path: Path
) -> None:
    visitor = each_visitor
    tiny = make_tiny_model(tmp_path / "tiny")
    question, answer = (
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "an answer"},
    )
    weighted = {"role": "assistant", "content": [{"type": "text", "text": "half", "weight": 0.5}]}
    refused = {"messages": [{"role": "user", "content": "<|im_end|>"}, answer]}
    rows = [{"messages": [question, answer]}, {"messages": [question, weighted]}, refused]
    content = "".join(json.dumps(row) + "\n" for row in rows * 10).encode()
    file = served.ow.files.create(content, "conversations")["id"]
    both = ",".join(jobs)
    for view, until in (
        ("/jobs", "td[data-column=id]"),
        (f"/job/{watched}", ".js-plotly-plot >> nth=2"),
        (f"/job/{jobs[3]}", "text=CUDA out of memory"),
        (f"/compare?jobs={both}&group=learning_rate&sx=loss&sy=eval_loss", ".js-plotly-plot"),
        (f"/samples?jobs={watched}", ".blockmark >> text=fact"),
        ("/data", f"tr[data-row='{file}']"),
        (f"/data/{file}", ".part.learned"),
        (f"/data/{file}?model={tiny}&loss=sft", ".weighted >> text=half"),
        (f"/new?from={jobs[0]}", "text=Submit"),
        ("/cluster", "td >> text=worker"),
        (f"/chat?a={jobs[0]}", "text=Send"),
    ):
        visitor.open(view, until)
        assert visitor.faults() == [], view
    assert visitor.errors == []


def test_the_check_of_faults_finds_them(visitor: Visitor, jobs: list[str]) -> None:
    """The control of `Visitor.faults`."""
    visitor.open("/jobs", "td[data-column=id]")
    visitor.page.evaluate(
        """() => {
          const view = document.getElementById("view");
          const pale = document.createElement("p");
          pale.textContent = "pale";
          pale.style.cssText = "color:#888;background:#999;width:3000px";
          const small = document.createElement("button");
          small.textContent = "x";
          small.style.cssText = "font-size:5px;padding:0;line-height:1";
          const heading = document.createElement("h4");
          heading.id = "view";
          heading.textContent = "too deep";
          const cell = document.createElement("td");
          cell.textContent = "x".repeat(200);
          cell.style.cssText = "display:block;width:5rem;overflow-wrap:normal";
          view.append(pale, document.createElement("input"), small, heading, cell);
        }"""
    )
    found = " ".join(visitor.faults())
    for fault in ("no name", "contrast", "wider", "small", "heading", "id view", "out"):
        assert fault in found


def test_markup_stays_text(served: Served, visitor: Visitor, run_job: Any) -> None:
    """In names, parameters, logs, answers and datasets."""
    said = [{"prompt": text, "completion": text, "rewards": {text: 1.0}} for text in MARKUP]
    events: list[dict[str, Any]] = [{"type": "completions", "step": 1, "completions": said}]
    events += [{"step": step, text: 1.0 * step} for text in MARKUP for step in (1, 2)]
    meta = {text: text for text in MARKUP}
    claim = run_job(
        "ftjob-x",
        events,
        log="\n".join(MARKUP),
        model=MARKUP[0],
        meta=meta,
        status="failed",
        error=MARKUP[1],
    )
    row = {"messages": [{"role": text, "content": text} for text in MARKUP], "other": MARKUP}
    file = served.ow.files.create(json.dumps(row).encode(), "result")["id"]
    backend = served.ow.backend
    named = [backend.put_file(BytesIO(text.encode()), "result", text).id for text in MARKUP]
    results = [{"path": text, "file": one} for text, one in zip(MARKUP, named, strict=True)]
    run = claim.run.id
    backend.append_events(run, [EventDraft(r["path"], r, datetime.now(UTC)) for r in results])
    backend.register_worker(WorkerSpec(id="worker-x", hardware_type=MARKUP[2], pod_id=MARKUP[3]))
    for number, text in enumerate(text.replace("\0", "") for text in MARKUP):
        params = {"validated_params": {"model": text, "loss": text, "meta": {text: text}}}
        spec = JobSpec(
            id=f"ftjob-{number}", type="fine-tuning", script=text, params=params, model=text
        )
        backend.submit_job(spec)
    for view, until in (
        ("/jobs", "text=ftjob-x"),
        (f"/job/{claim.job.id}", ".js-plotly-plot"),
        (f"/compare?jobs={claim.job.id}", ".js-plotly-plot"),
        (f"/samples?jobs={claim.job.id}", ".answer"),
        ("/data?show=results", "td >> text=script"),
        (f"/data/{file}", ".part"),
        ("/cluster", "td >> text=ftjob-7"),
        ("/new?from=ftjob-x", "text=Submit"),
    ):
        visitor.open(view, until)
        visitor.page.wait_for_timeout(300)
        assert visitor.page.evaluate("window.hit") is None, view
        foreign = "iframe, object, embed, base, #view script, #view img, marquee, #view style"
        assert visitor.page.locator(foreign).count() == 0
    assert not [error for error in visitor.errors if "Content Security Policy" not in error]


def test_a_job_is_made_watched_and_canceled(
    served: Served, chromium: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    file = served.ow.files.create(json.dumps(row).encode(), "conversations")["id"]
    visitor = Visitor(chromium, served, 1280, "light")
    page = visitor.page
    visitor.open("/new", "text=Submit")
    page.fill("input[name=training_file]", file)
    page.get_by_role("button", name="Check").click()
    page.locator("pre.problem >> text=model").wait_for()
    page.fill("input[name=model]", "org/model")
    page.select_option("select[name=loss]", "sdft")
    page.locator("summary", has_text="Where it runs").click()
    page.fill("input[name='control:allowed_hardware']", "8x H200")
    page.get_by_role("button", name="Submit").click()
    page.locator("h1 >> text=ftjob-").wait_for()
    (job,) = served.ow.jobs.list()
    assert job.params["validated_params"]["loss"] == "sdft"
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("button", name="Cancel the job").click()
    page.locator(".status.canceled").wait_for()
    assert job.refresh().status == "canceled"
    visitor.close()


def test_a_run_that_was_given_back_is_told_from_one_that_failed(
    served: Served, visitor: Visitor, run_job: Callable[..., Any]
) -> None:
    backend = served.ow.backend
    first = run_job("ftjob-again", [{"loss": 3.0, "step": 1}], status=None).run
    backend.release_run(first.id, 1, reason="its worker was shut down, not counted")
    second = backend.claim_job("worker")
    assert second is not None
    backend.release_run(second.run.id, 2, reason="stopped: it hung", is_lost=True)
    visitor.open("/job/ftjob-again", "summary >> text=2 runs")
    visitor.page.locator("summary", has_text="2 runs").click()
    visitor.photograph("/job/runs")
    told = visitor.page.locator("details .status")
    with visitor.page.expect_response("**/api/jobs/ftjob-again"):
        pass  # what is unfolded stays so when the page reads the job again
    visitor.page.wait_for_timeout(200)
    assert told.all_inner_texts() == ["given back", "failed"]
    assert not visitor.faults() and not visitor.errors
    assert [str(run).split(", ")[1] for run in served.ow.runs.list()] == ["given back)", "failed)"]


def test_the_page_of_a_running_job_follows_it(
    served: Served, chromium: Any, run_job: Callable[..., Any]
) -> None:
    """What is measured after the page was opened is drawn, and that the job ends is shown."""
    losses = [{"loss": 3.0 - at, "step": at} for at in (1, 2)]
    run = run_job("ftjob-live", losses, status=None).run
    visitor = Visitor(chromium, served, 1280, "light")
    page = visitor.page
    visitor.open("/job/ftjob-live", "[aria-label='chart of loss']")
    page.locator(".status.in_progress").first.wait_for()
    now = datetime.now(UTC)
    more = [EventDraft(f"r{at}", {"reward": at / 4, "step": at}, now) for at in (3, 4)]
    served.ow.backend.append_events(run.id, more)
    page.locator("[aria-label='chart of reward']").wait_for()
    served.ow.backend.finish_run(run.id, run.attempt, "completed")
    page.locator(".status.completed").first.wait_for()
    assert visitor.errors == []
    visitor.close()


def test_charts_stand_in_their_order_whenever_they_come(
    served: Served, chromium: Any, run_job: Callable[..., Any]
) -> None:
    """The gate is looked at before the first loss; nothing is a single point, no step is repeated
    on an axis, and the page says how far the job is.
    """
    gates = [{"type": "teacher_gate", "step": n, "student": n / 3, "teacher": 0.9} for n in (0, 1)]
    begun = {"type": "started", "max_steps": 40, "from_step": 0}
    run = run_job("ftjob-live", [begun, *gates], status=None, loss="sdft").run
    visitor = Visitor(chromium, served, 1280, "light")
    page = visitor.page
    visitor.open("/job/ftjob-live", "[aria-label='chart of teacher gate'] .xtick")
    page.locator("dd", has=page.locator("progress")).get_by_text("step 1/40").wait_for()
    now = datetime.now(UTC)
    rows = [{"step": n, "loss": 2 / n, "learning_rate": 1e-4 / n, "rollout_s": n} for n in (1, 2)]
    rows.append({"step": 2, "moved": 7})
    drafts = [EventDraft(f"r{at}", row, now) for at, row in enumerate(rows)]
    served.ow.backend.append_events(run.id, drafts)
    page.locator("[aria-label='chart of learning_rate'] .ytick").first.wait_for()
    titles = page.locator(".panel h3").all_text_contents()
    assert titles[:3] == ["loss", "teacher gate", "learning_rate"]
    ticks = page.locator("[aria-label='chart of loss'] .xtick").all_text_contents()
    assert ticks == ["0", "1", "2"]  # the gate was at step 0: all charts have one range
    rates = page.locator("[aria-label='chart of learning_rate'] .ytick").all_text_contents()
    assert any("e−" in tick for tick in rates) and not any("µ" in tick for tick in rates)
    page.locator("summary", has_text="1 timings and counts, 1 measured once").click()
    page.locator("[aria-label='chart of rollout_s'] .xtick").first.wait_for()
    assert page.locator("dd", has_text="7").count() >= 1
    page.get_by_text("step 2/40").wait_for()
    visitor.photograph("/job/live")
    assert visitor.errors == [] and visitor.faults() == []
    served.ow.backend.finish_run(run.id, run.attempt, "canceled")
    visitor.close()


def test_a_comparison_begins_with_jobs_that_wait_and_outlives_one(
    served: Served, chromium: Any, run_job: Callable[..., Any]
) -> None:
    run = run_job("ftjob-live", [], status=None).run
    visitor = Visitor(chromium, served, 1280, "light")
    page = visitor.page
    visitor.open("/compare?jobs=ftjob-live,ftjob-gone", "text=Not in this store: ftjob-gone")
    page.locator("text=measured nothing yet").wait_for()
    now = datetime.now(UTC)
    drafts = [EventDraft(f"r{n}", {"step": n, "loss": 1 / n}, now) for n in (1, 2)]
    served.ow.backend.append_events(run.id, drafts)
    page.locator("table.last td", has_text="0.5").wait_for()
    served.ow.backend.finish_run(run.id, run.attempt, "canceled")
    visitor.close()


def test_a_parameter_is_headed_apart_from_the_measure_of_its_name(
    served: Served, chromium: Any, run_job: Callable[..., Any]
) -> None:
    for name, rate in (("ftjob-a", 1e-4), ("ftjob-b", 1e-3)):
        run_job(name, [{"step": 1, "loss": 1.0, "learning_rate": 0.25}], learning_rate=rate)
    visitor = Visitor(chromium, served, 1280, "light")
    page = visitor.page
    visitor.open("/compare?jobs=ftjob-a,ftjob-b", "table.last td")
    heads = page.locator("table.last th[scope=col]").all_text_contents()
    assert [head.strip() for head in heads].count("learning_rate") == 1
    page.locator("table.last thead").get_by_role("button", name="params.learning_rate").click()
    page.locator("th[aria-sort=descending]").wait_for()
    rows = page.locator("table.last tbody tr")
    assert rows.first.get_attribute("data-row") == "ftjob-b"
    assert visitor.errors == []
    visitor.close()


def test_where_jobs_ended_fits_the_window(
    served: Served, chromium: Any, run_job: Callable[..., Any]
) -> None:
    """What tells the jobs apart, and as many measures as there is room for; all on demand."""
    names = [f"ftjob-{n}" for n in range(4)]
    for n, name in enumerate(names):
        many = {f"a_measure/of_some_length_{k}": k * n / 7 for k in range(30)}
        params = {f"field_{k}": n for k in range(12)}
        run_job(name, [{"step": s, "loss": 1 / s, **many} for s in (1, 2)], seed=n, **params)
    visitor = Visitor(chromium, served, 1280, "light")
    page = visitor.page
    visitor.open(f"/compare?jobs={','.join(names)}", "table.last td")
    wide = "(() => { const t = document.querySelector('table.last');"
    wide += " return t.offsetWidth - t.parentElement.clientWidth; })()"
    assert page.evaluate(wide) <= 1
    assert page.locator("table.last th", has_text="loss").count() == 1
    page.locator(".legendtext >> nth=3").wait_for()  # the chart comes after the table
    legend = page.locator(".legendtext").all_text_contents()
    assert len(set(legend)) == len(legend) == len(names)
    page.get_by_label("every parameter that differs").check()
    page.locator("table.last th", has_text="a_measure/of_some_length_29").wait_for()
    assert "all=1" in page.url and page.locator("table.last th", has_text="field_11").count() == 1
    assert visitor.faults() == []
    visitor.close()


def test_a_job_is_restarted_and_deleted_with_a_question(
    served: Served, chromium: Any, jobs: list[str]
) -> None:
    visitor = Visitor(chromium, served, 1280, "light")
    page = visitor.page
    visitor.open("/jobs", "svg.spark")
    row = page.locator(f"tr[data-row={jobs[2]}]")
    row.get_by_role("button", name="Delete").click()
    page.get_by_role("button", name="No", exact=True).click()
    assert row.count() == 1 and served.ow.jobs.retrieve(jobs[2]).status == "completed"
    row.get_by_role("button", name="Delete").click()
    page.get_by_role("button", name="Delete the job").click()
    row.wait_for(state="detached")
    with pytest.raises(NotFoundError):
        served.ow.jobs.retrieve(jobs[2])
    page.locator(f"tr[data-row={jobs[3]}]").get_by_role("button", name="Restart").click()
    page.get_by_role("button", name="Restart the job").click()
    page.locator(f"tr[data-row={jobs[3]}] >> text=/pending|in progress/").wait_for()
    served.ow.jobs.cancel(jobs[3])
    visitor.open(f"/job/{jobs[0]}", ".js-plotly-plot")
    page.get_by_role("button", name="Delete").click()
    page.get_by_role("button", name="Delete the job").click()
    page.locator("h1 >> text=Jobs").wait_for()
    assert {job.id for job in served.ow.jobs.list()} == {jobs[1], jobs[3]}
    visitor.close()


def test_columns_are_chosen_and_stay(served: Served, chromium: Any, jobs: list[str]) -> None:
    visitor = Visitor(chromium, served, 1280, "light")
    page = visitor.page
    visitor.open("/jobs", "svg.spark")
    assert page.locator("td[data-column=attempts]").count() == 0
    page.locator("summary", has_text="Columns").click()
    page.get_by_label("Attempts").check()
    page.locator("td[data-column=attempts]").first.wait_for()
    page.reload()
    page.locator("td[data-column=attempts]").first.wait_for()
    visitor.close()


def test_a_long_log_follows_and_is_searched_without_freezing(
    home: Path, chromium: Any, serve_log: Callable[..., Any]
) -> None:
    """100 MB: the page answers within a few frames all the while, and keeps a window of it."""
    line = b"%08d a line of the log, as a trainer writes it, with some numbers 0.123\n"
    with serve_log([line % number for number in range(1_400_000)]) as (served, run_id, append):
        visitor = Visitor(chromium, served, 1280, "light")
        page = visitor.page
        visitor.open("/job/ftjob-log", "text=01399999 a line")
        with visitor.timed() as tasks:
            append(b"and one more\n")
            page.locator("text=and one more").wait_for()
            for _ in range(40):  # faster than anybody reads
                append(b"x" * 99 + b"\n" * 2_000)
                page.wait_for_timeout(50)
            append(b"the very last line\n")
            page.locator("text=the very last line").wait_for()
            page.fill("[aria-label='Find in the log']", "00700000 A LINE")
            page.keyboard.press("Enter")
            page.locator("ul.found button", has_text="00700000 a line").click()
            page.locator(".log >> text=00700000 a line").wait_for()
        assert page.evaluate("document.querySelector('.log').textContent.length") < 1_100_000
        # A page that read or searched 100 MB would be at it for seconds.
        assert 0 < max(tasks) < 1, sorted(tasks)[-5:]
        assert visitor.errors == []
        visitor.close()


def test_a_page_that_freezes_is_noticed(visitor: Visitor) -> None:
    """The control of `Visitor.timed`."""
    with visitor.timed() as tasks:
        visitor.page.evaluate("() => { let sum = 0; for (let n = 0; n < 6e9; n += 1) sum += n; }")
    assert max(tasks) > 1


def test_two_models_answer_side_by_side(
    served: Served, chromium: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deployed by the page when they are first asked."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    tiny = str(make_tiny_model(tmp_path / "tiny"))
    visitor = Visitor(chromium, served, 1280, "light")
    page = visitor.page
    visitor.open(f"/chat?a={tiny}&b={tmp_path / 'none'}", "text=Send")
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Your message").fill("Say something.")
    page.keyboard.press("Control+Enter")
    answers = page.locator(".sides .answer")
    # One answers as it does without the page, the other says what is wrong with it.
    answers.nth(1).locator(".problem").wait_for(timeout=120_000)
    messages = [{"role": "user", "content": "Say something."}]
    whole = served.ow.chat.completions.create(model=tiny, messages=messages, temperature=0)
    expected = whole.choices[0].message.content or "(nothing)"
    while answers.nth(0).locator("span").first.text_content() != expected:
        page.wait_for_timeout(100)
    visitor.photograph("/chat-answered")
    served.ow.chat.kill(tiny)
    visitor.close()


def test_keys_work_from_a_tick_and_not_where_text_goes(
    served: Served, chromium: Any, jobs: list[str]
) -> None:
    visitor = Visitor(chromium, served, 1280, "light")
    page = visitor.page
    visitor.open("/jobs", "svg.spark")
    search = page.locator("input[type=search]").first
    search.focus()
    page.keyboard.type("jc")
    assert search.input_value() == "jc" and "/compare" not in page.url
    search.fill("")
    page.locator("text=1 to 4 of 4").wait_for()
    boxes = page.get_by_role("checkbox", name="choose ftjob")
    boxes.nth(0).click()
    boxes.nth(1).click()
    focused = "document.activeElement.tagName + (document.activeElement.closest('tr')?.dataset.row)"
    assert str(page.evaluate(focused)).startswith("INPUTftjob"), "a tick has the focus"
    page.keyboard.press("j")
    third = page.locator("tr[data-row]").nth(2).get_attribute("data-row")
    assert page.evaluate(focused) == f"A{third}"
    boxes.nth(2).click()
    page.keyboard.press("c")
    page.locator("h2 >> text=Where they ended").wait_for()
    assert visitor.errors == []
    visitor.close()


def test_the_table_is_live_and_has_keys(
    served: Served, chromium: Any, jobs: list[str], run_job: Any
) -> None:
    visitor = Visitor(chromium, served, 1280, "light")
    page = visitor.page
    visitor.open("/jobs", "svg.spark")
    run_job("ftjob-new", [{"step": 1, "loss": 1.0}], status=None)
    page.locator("tr[data-row=ftjob-new] >> text=in progress").wait_for()
    served.ow.jobs.cancel("ftjob-new")
    page.locator("tr[data-row=ftjob-new] >> text=canceled").wait_for()
    page.keyboard.press("/")
    page.keyboard.type("ftjob-1")
    page.locator("text=1 to 1 of 1").wait_for()
    assert "text=ftjob-1" in page.url
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    page.locator("h1 >> text=ftjob-1").wait_for()
    visitor.close()
