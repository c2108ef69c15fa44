"""A function of the user's as a reward: its file is run, it is called by the names of its
arguments, and what it gives is read. What it raises, and `sys.exit()`, which would end the job as
if it were done, is told with its line. No torch here: it is tried before a job is submitted, too.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from openweights.errors import ConfigError, JobFailedError, OpenWeightsError, shown
from openweights.jobs.unsloth.rewards import LARGEST, Reward, Samples
from openweights.jobs.unsloth.runtime.launcher import EXIT_TERMINATED


def found_reward(
    path: Path, function_name: str, weight: float, *, field: str = "grpo_reward_function"
) -> Reward:
    """A function of a Python file, which `field` names, as a reward.

    It is called with those of these that it has parameters for: `completions` (texts), `prompts`
    (lists of messages), `completion_ids`, `gold_response` and the other columns of the dataset, a
    list each; and returns a number for each completion, or None where it cannot say, as a list, a
    tensor or an array. It may be a coroutine function. What it is given are copies.

    Raises:
        ConfigError: The file cannot be run, or has no such function.
    """
    place, path = f"{field}: {path.name}", path.absolute()
    function = getattr(run_file(path, place), function_name, None)
    if not callable(function):
        raise ConfigError(f"{place}: has no function {function_name!r}; define it, or correct it")
    takes = _parameters(function, f"{place}: {function_name}")
    takes_all = any(p.kind is p.VAR_KEYWORD for p in takes.values())

    def score(samples: Samples) -> Any:
        given = {k: v for k, v in _arguments(samples).items() if takes_all or k in takes}
        with calling(function_name, path):
            return function(**copy.deepcopy(given))

    return Reward(function_name, weight, score, file=path)


def _parameters(function: Callable[..., Any], place: str) -> Mapping[str, inspect.Parameter]:
    try:
        takes = inspect.signature(function).parameters
    except ValueError:
        raise ConfigError(
            f"{place} does not say what it takes; write a function around it: "
            "def score(completions): …"
        ) from None
    if any(p.kind is p.POSITIONAL_ONLY for p in takes.values()):
        raise ConfigError(f"{place} is called by the names of its arguments; remove the '/'")
    return takes


def _arguments(samples: Samples) -> dict[str, Any]:
    columns = {name for row in samples.rows for name in row}
    given = {name: [row.get(name) for row in samples.rows] for name in columns}
    return given | {
        "prompts": samples.prompts,
        "completions": samples.completions,
        "completion_ids": samples.completion_ids,
    }


def values_of(reward: Reward, result: Any, count: int) -> list[float]:
    """One number for each completion; NaN where there is none.

    Lists and whatever else has an order will do, tensors and arrays among them.
    """
    if result is None and reward.causes:
        return [math.nan] * count
    given = _plain(result)
    has_order = isinstance(given, Iterable) and not isinstance(given, str | bytes | Mapping | Set)
    with calling(reward.name, reward.file):  # a generator's body runs here
        values: list[Any] = list(given) if has_order else []
    if len(values) != count:
        raise JobFailedError(
            f"reward {reward.name}: must return a list with one number for each of the {count} "
            f"completions, not {shown(result)}; correct it"
        )
    numbers = [_number(reward, value) for value in values]
    if any(map(math.isnan, numbers)) and not reward.causes:
        reward.causes["it gave None or no finite number"] += 1
    return numbers


def _plain(value: Any) -> Any:
    """Tensors, arrays and series as lists or numbers, everything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def _only(value: Any) -> Any:
    """What a dict or a list holds where that is one thing, everything else as it is."""
    parts: Any = value.values() if isinstance(value, Mapping) else value
    return next(iter(parts)) if isinstance(value, Mapping | list) and len(value) == 1 else value


def _number(reward: Reward, value: Any) -> float:
    """A completion's value: a number, or a dict or list that holds just one. The text of a number
    is none: what a program prints is likely not what was meant.
    """
    inner = _only(_plain(value))
    if isinstance(inner, str | bytes):
        raise JobFailedError(
            f"reward {reward.name}: gave {shown(value)}, which is text; give numbers, as float(…) "
            "makes them, or None for a completion that cannot be scored"
        )
    try:
        number = math.nan if inner is None else float(inner)
    except (TypeError, ValueError, OverflowError):
        raise JobFailedError(
            f"reward {reward.name}: gave {shown(value)}; give numbers, or None for a completion "
            "that cannot be scored"
        ) from None
    if math.isfinite(number) and abs(number) > LARGEST:
        reward.causes[f"it gave a number beyond {LARGEST:g}, which 32-bit sums cannot hold"] += 1
        return math.nan
    return number if math.isfinite(number) else math.nan


@contextmanager
def calling(name: str, file: Path | None) -> Iterator[None]:
    """While a reward function computes: what it raises ends the job, with its name and line.

    Args:
        file: That it is defined in; None for one of ours.

    Raises:
        JobFailedError: It raised something.
    """
    try:
        yield
    except OpenWeightsError:
        raise
    except SystemExit as error:
        if error.code == EXIT_TERMINATED:  # the job itself is asked to stop
            raise
        raise JobFailedError(_raised(name, file, ended_by_exit(error), error)) from error
    except Exception as error:
        raise JobFailedError(_raised(name, file, error, error)) from error


def ended_by_exit(error: SystemExit) -> RuntimeError:
    """What is said of a call of `sys.exit`."""
    return RuntimeError(f"sys.exit({error.code!r}) was called")


def run_file(path: Path, place: str) -> Any:
    """The module that a file is.

    Args:
        place: What it is called in messages.

    Raises:
        ConfigError: It cannot be run.
    """
    spec = importlib.util.spec_from_file_location(f"openweights_reward_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{place}: is no Python file; give one that ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        if isinstance(error, SystemExit) and error.code == EXIT_TERMINATED:
            raise
        text = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{place}: cannot be run ({text}); correct it") from error
    return module


def _raised(name: str, file: Path | None, said: Exception, error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if file is None or frame.filename == str(file)]
    line = f" (line {lines[-1]})" if lines else ""
    return (
        f"reward {name}: raised {type(said).__name__}: {said}{line}; correct it, and let it return "
        "None for a completion that it cannot score"
    )
