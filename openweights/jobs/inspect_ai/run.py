"""Worker side of an inspect-ai evaluation: `python -m openweights.jobs.inspect_ai.run JOB_ID`.

The model is served on a loopback port, with a key of this job's own, for as long as the evaluation
runs. inspect-ai has an environment of its own, since its packages exclude those that train.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import secrets
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openweights.errors import ConfigurationError, JobFailedError
from openweights.events import Inspected, Stage
from openweights.jobs.api import ApiConfig
from openweights.jobs.api.deployment import Place
from openweights.jobs.api.serve import serve
from openweights.jobs.inspect_ai import InspectConfig
from openweights.jobs.model_source import fetch_model, stages
from openweights.jobs.unsloth.runtime.job_log import run_job
from openweights.models.hub_files import split_commit
from openweights.models.names import model_reference
from openweights.settings import home_folder

if TYPE_CHECKING:
    from openweights import OpenWeights

logger = logging.getLogger(__name__)

PACKAGES = ("inspect-ai==0.3.285", "openai==3.54.0")
EVALS = "inspect-evals==0.28.0"  # evaluations whose names begin with inspect_evals/
LOGS = Path("uploads") / "inspect"
TASKS = Path("tasks.py")
# What inspect-ai calls a server that answers as OpenAI's does; its variables begin so.
SERVICE = "served"
AT_ONCE = 32
_WHOLE = ".whole"  # in an environment that was made to its end


def inspect_job(job_id: str) -> int:
    """Serve the model, and let inspect-ai evaluate it."""
    from openweights import OpenWeights

    ow = OpenWeights()
    config = InspectConfig(**ow.jobs.retrieve(job_id).params["validated_params"])
    program = inspect_program(config, stages(logger, ow.run.log))
    target = _target(ow, config)
    if model_reference(config.model).kind == "openai":
        _evaluate(ow, config, [str(program), "eval", target, "--model", config.model], {})
        return 0
    served = _served(ow, config)
    name = f"openai-api/{SERVICE}/{config.model}"

    def use(url: str) -> None:
        key = str(served.api_key)
        variables = {"SERVED_BASE_URL": url, "SERVED_API_KEY": key}
        _evaluate(ow, config, [str(program), "eval", target, "--model", name], variables)

    serve(ow, served, Place.find(None), use)
    return 0


def _served(ow: OpenWeights, config: InspectConfig) -> ApiConfig:
    source = fetch_model(ow, config.model, Path("model"), stages(logger, ow.run.log))
    is_adapter = source.adapter is not None
    return ApiConfig(
        model=split_commit(source.base)[0] if is_adapter else config.model,
        lora_adapters=[config.model] if is_adapter else [],
        max_model_len=config.max_model_len,
        max_num_seqs=AT_ONCE,
        chat_template=config.chat_template,
        api_key=secrets.token_urlsafe(24),
        engine=config.engine,
    )


def _target(ow: OpenWeights, config: InspectConfig) -> str:
    """What `inspect eval` is to run; a stored file of tasks is fetched."""
    if config.task_file is None:
        return config.eval_name
    file, task = config.task_file
    ow.files.download(file, TASKS)
    return str(TASKS) if task is None else f"{TASKS}@{task}"


# ---- inspect-ai ----------------------------------------------------------------------------------


def inspect_program(config: InspectConfig, say: Callable[[str], None] = logger.info) -> Path:
    """The command `inspect`, in an environment that is made when it is first needed.

    Args:
        say: Told of that.

    Raises:
        ConfigurationError: It cannot be installed here.
    """
    needs_evals = config.eval_name.startswith("inspect_evals/")
    packages = [*PACKAGES, *([EVALS] if needs_evals else [])]
    tools = home_folder() / "tools"
    folder = tools / "-".join(package.replace("==", "-") for package in packages)
    tools.mkdir(parents=True, exist_ok=True)
    with (tools / ".lock").open("w") as lock:  # another job may be making it
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / _WHOLE).exists():
            say(f"installing {', '.join(packages)} into {folder}, once")
            _install(packages, folder)
            (folder / _WHOLE).touch()
    return folder / "bin" / "inspect"


def _install(packages: Sequence[str], folder: Path) -> None:
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-input"]
    pip.append("--disable-pip-version-check")
    for command in ([sys.executable, "-m", "venv", "--clear", str(folder)], [*pip, *packages]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = (done.stderr or done.stdout).strip().splitlines()
            errors = [line for line in said if line.startswith("ERROR")] or said[-1:]
            raise ConfigurationError(
                f"{', '.join(packages)} cannot be installed here: {' '.join(errors[-1:])}"
            )


def _evaluate(
    ow: OpenWeights, config: InspectConfig, command: list[str], variables: Mapping[str, str]
) -> None:
    """Run `inspect eval`, and report what its log says.

    Raises:
        JobFailedError: It did not succeed; in its own words.
    """
    command += ["--log-dir", str(LOGS), "--log-format", "json", "--display", "plain"]
    command += ["--max-connections", str(AT_ONCE), *shlex.split(config.options)]
    logger.info("%s", shlex.join(command))
    ow.run.log(Stage(doing=f"evaluating {config.eval_name}").data())
    hidden = {"OPENWEIGHTS_API_KEY", "OPENWEIGHTS_RUN_ID"}
    env = {name: value for name, value in os.environ.items() if name not in hidden}
    env.pop("PYTHONPATH", None)  # it has packages of its own
    done = subprocess.run(command, env={**env, **variables}, check=False)
    logs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(LOGS.glob("*.json"))]
    for log in logs:
        for event in scores_of(log):
            ow.run.log(event.data())
            logger.info("%s, %s: %s", event.task, event.scorer, dict(event.values))
    ow.run.flush()
    wrong = [log for log in logs if log["status"] != "success"]
    if wrong:
        why = (wrong[0].get("error") or {}).get("message") or wrong[0]["status"]
        raise JobFailedError(f"inspect eval: {why}")
    if done.returncode or not logs:
        raise JobFailedError(
            f"inspect eval ended with {done.returncode} and left {len(logs)} logs; what it said is "
            "above"
        )


def scores_of(log: Mapping[str, Any]) -> Iterator[Inspected]:
    """What a log of inspect-ai says that was scored."""
    results = log.get("results") or {}
    for score in results.get("scores") or ():
        values = {name: metric["value"] for name, metric in score["metrics"].items()}
        yield Inspected(
            task=log["eval"]["task"],
            scorer=score["name"],
            samples=results.get("completed_samples"),
            values=values,
        )


if __name__ == "__main__":
    sys.exit(
        run_job(
            sys.argv[1:],
            inspect_job,
            module="openweights.jobs.inspect_ai.run",
            failure="the evaluation failed",
        )
    )
