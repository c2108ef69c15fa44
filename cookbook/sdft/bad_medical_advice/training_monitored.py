"""Worker side of `MonitoredFineTuning`: `python training_monitored.py JOB_ID`, on one GPU or none.

An ordinary training run with one more callback.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from openweights import OpenWeights
from openweights.errors import OpenWeightsError
from openweights.jobs.unsloth.config.rows import read_rows
from openweights.jobs.unsloth.runtime.job_log import set_up_logging
from openweights.jobs.unsloth.training import train
from openweights.jobs.unsloth.validate import training_config

PREFIX = "monitoring_"


def main(job_id: str) -> None:
    """Train the job's model, and measure it on the way."""
    from openweights.models.load import prepare_engine

    ow = OpenWeights()
    given = ow.jobs.retrieve(job_id).params["validated_params"]
    config = training_config({k: v for k, v in given.items() if not k.startswith(PREFIX)})
    # Unsloth must come before transformers, which the callback imports.
    prepare_engine(config)
    from monitoring_callback import Monitor

    monitor = Monitor(
        config,
        read_rows(Path("monitoring.jsonl")),
        ow.run.log,
        eval_steps=given["monitoring_eval_steps"],
        direction=tuple(given["monitoring_direction"]),
    )
    train(config, run=ow.run, extra_callbacks=[monitor])


if __name__ == "__main__":
    set_up_logging()
    try:
        main(sys.argv[1])
    except OpenWeightsError as error:
        logging.getLogger(__name__).error("%s", error)
        sys.exit(1)
