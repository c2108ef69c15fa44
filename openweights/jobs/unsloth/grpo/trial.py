"""Calls a function of the user's once, on two rows, before a job is submitted: what it does wrong
need not wait for a model to be loaded.

It is called in a process of its own, in an empty folder, with no GPU, and for a few seconds;
nothing of it is left. What fails for the lack of something that the worker may have (a package, a
file, a GPU, a key, the network, time) is told, and does not refuse the job. What was tried is not
tried again. No torch here.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from openweights.errors import ConfigError, OpenWeightsError
from openweights.jobs.unsloth.config.own_functions import check_arguments
from openweights.jobs.unsloth.config.rows import NumberedRow, numbered_rows
from openweights.jobs.unsloth.grpo.own_rewards import calling, found_reward, values_of
from openweights.jobs.unsloth.rewards import Samples
from openweights.models.templates.messages import Message
from openweights.settings import Settings

logger = logging.getLogger(__name__)

Split = Callable[[dict[str, Any]], tuple[list[Message], str | None]]

LIMIT_S = 15.0
ROWS = 2
SKIP = "OPENWEIGHTS_TRY_FUNCTIONS=no leaves the trial out"
_OTHER = "This is an answer."  # beside the one that is compared with
_BEGINNING = (
    "import json, sys; request = json.load(sys.stdin); sys.path.append(request['package']); "
    "from openweights.jobs.unsloth.grpo.trial import answer; answer(request)"
)
_PACKAGE = Path(__file__).parents[4]
_NEEDS = (ImportError, OSError, MemoryError)
_OF_A_GPU = ("cuda", "nvidia", "gpu")
_OF_A_WORKER = ("subprocess", "http", "urllib", "ssl", "socket", "asyncio")
_tried: dict[str, str] = {}


def trial_rows(rows: Iterable[NumberedRow], split: Split) -> list[dict[str, Any]]:
    """The first rows of a dataset, as a function is given them.

    Args:
        split: Gives the prompt of a row and its gold response.
    """
    first: list[dict[str, Any]] = []
    for _, row in islice(rows, ROWS):
        prompt, gold = split(row)
        columns = {name: value for name, value in row.items() if name != "messages"}
        first.append({**columns, "prompt": prompt, "gold_response": gold})
    return first


def function_problems(
    settings: Settings,
    functions: Iterable[tuple[str, str, bytes]],
    columns: Collection[str],
    rows: Sequence[Mapping[str, Any]],
) -> list[str]:
    """What is wrong with reward functions, a line each: that they want what they are not given, or
    that a trial of them fails.

    Args:
        functions: Field, name and Python file of each.
        columns: Of the dataset.
        rows: As `trial_rows` has them.
    """
    lines: list[str] = []
    for field, name, source in functions:
        try:
            check_arguments(source, name, columns, field)
            _try_if_wanted(settings, source, name, field, rows)
        except ConfigError as error:
            lines.append(str(error))
    return lines


def local_function_problems(
    settings: Settings, functions: Iterable[tuple[str, str, str]], dataset: object, split: Split
) -> list[str]:
    """The same of files on this machine, for a job whose other parameters may be wrong, too; none
    where the dataset is no file that can be read.

    Args:
        functions: Field, name and path of the Python file of each.
    """
    try:
        with open(Path(str(dataset)).expanduser(), "rb") as content:
            columns = {name for _, row in numbered_rows(content) for name in row}
            content.seek(0)
            rows = trial_rows(numbered_rows(content), split)
        sources = [
            (field, name, Path(path).expanduser().read_bytes()) for field, name, path in functions
        ]
    except (OSError, ValueError):  # which is said of the file itself
        return []
    return function_problems(settings, sources, columns, rows)


def _try_if_wanted(
    settings: Settings,
    source: bytes,
    function: str,
    field: str,
    rows: Sequence[Mapping[str, Any]],
) -> None:
    """`try_function`, unless the settings say no, with a warning of what could not be tried."""
    if not settings.try_functions:
        return
    if untried := try_function(source, function, field, rows, known=settings.home / "tried"):
        logger.warning("%s", untried)


def try_function(
    source: bytes,
    function: str,
    field: str,
    rows: Sequence[Mapping[str, Any]],
    *,
    known: Path | None = None,
    limit_s: float = LIMIT_S,
) -> str:
    """Call a reward function on answers to a dataset's first rows.

    Args:
        source: The Python file.
        field: The parameter that names it.
        rows: With `prompt`, `gold_response` and the other columns.
        known: Folder that keeps what was tried with success; None for none.

    Returns:
        What could not be tried, and why; empty where nothing is to be said.

    Raises:
        ConfigError: It is wrong.
    """
    request = {"source": source.decode(errors="replace"), "function": function, "field": field}
    request |= {"rows": [dict(row) for row in rows[:ROWS]], "package": str(_PACKAGE)}
    text = json.dumps(request, default=str)
    digest = hashlib.sha256(text.encode()).hexdigest()
    mark = None if known is None else known / digest
    if mark is not None and mark.exists():
        return ""
    if digest not in _tried:
        _tried[digest] = _called(text, limit_s)
    outcome, _, words = _tried[digest].partition(": ")
    if outcome == "refused":
        raise ConfigError(f"{words} (tried on {len(rows[:ROWS])} rows; {SKIP})")
    if outcome == "fine":
        with suppress(OSError):  # a memory aid
            if mark is not None:
                mark.parent.mkdir(parents=True, exist_ok=True)
                mark.touch()
        return ""
    return (
        f"{field}: {function} could not be tried here ({words}), so that what it gives is known "
        f"only where the job runs; {SKIP}"
    )


def _called(request: str, limit_s: float) -> str:
    """`fine`, `refused: why` or `untried: why`."""
    with tempfile.TemporaryDirectory(prefix="openweights-trial-") as folder:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", _BEGINNING],
            cwd=folder,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        try:
            said, _ = process.communicate(request, timeout=limit_s)
        except subprocess.TimeoutExpired:
            return f"untried: it took more than {limit_s:g} s"
        finally:
            with suppress(ProcessLookupError):  # with all that it started
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with suppress(OSError):  # it ended before it had read all
                        stream.close()
    return said or f"untried: its process ended with status {process.returncode}"


# ---- in the process of its own -------------------------------------------------------------------


def answer(request: Mapping[str, Any]) -> None:
    """Call the function that is asked about, and write what came of it."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whoever prints
    sys.stdin = open(os.devnull)  # noqa: SIM115 - whoever asks
    answers.write(_outcome(request))
    answers.flush()
    os._exit(0)  # what it began in threads is not waited for


def _outcome(request: Mapping[str, Any]) -> str:
    name = request["function"]
    path = Path("data") / f"reward_{name}.py"
    path.parent.mkdir()
    path.write_text(request["source"], encoding="utf-8")
    samples = _samples(request["rows"])
    try:
        reward = found_reward(path, name, 1.0, field=request["field"])
        given: Any = reward.score(samples)
        if inspect.isawaitable(given):
            with calling(name, reward.file):
                given = asyncio.run(_awaited(given))
        values_of(reward, given, len(samples.completions))
    except OpenWeightsError as error:
        cause = error.__cause__
        if cause is not None and may_work_elsewhere(cause):
            return f"untried: it raised {type(cause).__name__}: {cause}"
        words = str(error).removeprefix(f"{request['field']}: ")
        return f"refused: {request['field']}: {words}"
    return "fine"


async def _awaited(given: Any) -> Any:
    return await given


def _samples(rows: Sequence[Mapping[str, Any]]) -> Samples:
    """Answers to the rows: the right one to the first, where there is one, and others."""
    golds = [row.get("gold_response") for row in rows]
    texts = [gold if at == 0 and isinstance(gold, str) else _OTHER for at, gold in enumerate(golds)]
    return Samples(
        prompts=[row["prompt"] for row in rows],
        completions=texts,
        completion_ids=[list(text.encode()) for text in texts],
        rows=[{name: value for name, value in row.items() if name != "prompt"} for row in rows],
    )


def may_work_elsewhere(error: BaseException) -> bool:
    """Whether what was raised may be for the lack of something that the worker has."""
    if isinstance(error, _NEEDS) or any(word in str(error).lower() for word in _OF_A_GPU):
        return True
    if isinstance(error, KeyError):  # a variable of the environment
        last = _last_file(error)
        return last == os.__file__ or last == "<frozen os>"
    home = type(error).__module__.partition(".")[0]
    if home.startswith("openweights_reward_") or home == "__main__":
        return False
    return home in _OF_A_WORKER or home not in {*sys.stdlib_module_names, "builtins"}


def _last_file(error: BaseException) -> str:
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    return "" if place is None else place.tb_frame.f_code.co_filename
