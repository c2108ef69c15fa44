"""Worker side of a deployment: `python -m openweights.jobs.api.serve JOB_ID`."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from openweights.events import Stage
from openweights.jobs.api import ApiConfig
from openweights.jobs.api.deployment import Place, Use, fixed_adapters
from openweights.jobs.model_source import fetch_model, stages
from openweights.jobs.unsloth.runtime.job_log import run_job
from openweights.settings import Settings

if TYPE_CHECKING:
    from openweights import OpenWeights

logger = logging.getLogger(__name__)


def serve_job(job_id: str) -> int:
    """Serve until nobody uses it, or until it is told to stop."""
    from openweights import OpenWeights

    ow = OpenWeights()
    config = ApiConfig(**ow.jobs.retrieve(job_id).params["validated_params"])
    serve(ow, config, Place.find(Settings.from_env().pod.pod_id))
    return 0


def serve(ow: OpenWeights, config: ApiConfig, place: Place, use: Use | None = None) -> None:
    """Serve models: to everybody with the key, or to `use` alone, which is told the address.

    Raises:
        ConfigError: A model cannot be loaded; one line that says why.
        JobFailedError: vLLM ended by itself; its own log is above.
    """
    ow.run.log(Stage(doing="loading the model").data())
    fixed = fixed_adapters(ow, config)  # before their base, of which they may name the commit
    base = fetch_model(ow, config.model, Path("model"), stages(logger, ow.run.log))
    if _takes_vllm(config):
        from openweights.jobs.api.vllm_server import serve_vllm

        serve_vllm(ow, config, base, fixed, place, use)
    else:
        from openweights.jobs.api.own_server import serve_own

        asyncio.run(serve_own(ow, config, base, fixed, place, use))


def _takes_vllm(config: ApiConfig) -> bool:
    if config.engine != "auto":
        return config.engine == "vllm"
    import torch

    return torch.cuda.is_available() and importlib.util.find_spec("vllm") is not None


if __name__ == "__main__":
    sys.exit(
        run_job(
            sys.argv[1:],
            serve_job,
            module="openweights.jobs.api.serve",
            failure="serving failed",
        )
    )
