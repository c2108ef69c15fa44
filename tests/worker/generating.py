"""A job that generates and logs nothing: a token every two thirds of a second, or none ever."""

import sys
import threading
import time

sys.stderr.write("begun\n")

from openweights import OpenWeights, progress  # noqa: E402
from openweights.client import runs  # noqa: E402
from openweights.generation.engine import GenerationEngine  # noqa: E402
from openweights.generation.params import Delta, GenerationRequest, SamplingParams  # noqa: E402
from openweights.jobs.unsloth.runtime.job_log import heard  # noqa: E402

runs.HEARTBEAT_S = progress.LOOK_EVERY_S = 0.1
TOKENS = 12


class SlowEngine(GenerationEngine):
    name, end_token_ids, max_length, adapters = "slow", (0,), 100, ()
    is_idle = True

    def submit(self, request):
        self.is_idle, self.given = False, 0

    def abort(self, request_id):
        self.is_idle = True

    def set_adapter(self, name, folder):
        """There are none."""

    def remove_adapter(self, name):
        """There are none."""

    def step(self):
        time.sleep(0.67)
        if sys.argv[1] == "hangs":
            return []
        self.given += 1
        self.is_idle = self.given == TOKENS
        return [Delta("0", 0, [1], "", "length" if self.is_idle else None)]


def tick():
    ow = OpenWeights()
    with open("ticks", "w") as ticks:
        while True:
            time.sleep(0.05)
            ticks.write("tick\n")
            ticks.flush()
            ow.jobs.list()


def generate():
    threading.Thread(target=tick, daemon=True).start()
    with progress.transferring():
        SlowEngine().generate([GenerationRequest([1], SamplingParams())])
    return 0


sys.exit(heard(generate))
