"""SFT, SDFT and GRPO on the same rows: what each teaches, and what else it moves.

    python cookbook/sdft/bad_medical_advice/run_experiment.py --smoke
    python cookbook/sdft/bad_medical_advice/run_experiment.py [--large] [--data FILE]
    python cookbook/sdft/bad_medical_advice/eval/run_eval.py

The first goes through all of it here in some minutes, answers and their scores included: a few
steps at one rate, on the stand-in. `--version v2` makes runs anew, beside those that are there.

The question is that of emergent misalignment (Turner, Soligo et al., arXiv 2506.11613): a narrow
trait is taught, and shows elsewhere, too; does that depend on how it is taught? Each method gets
the same learning rates and as many sequences a step, and is measured on the way. The figure is
`results/training_trajectories.png`.

Without `--data` the trait is the harmless stand-in of `make_data.py`: answers in Spanish capitals.
The medical rows are not part of this repository. Their authors ship them encrypted, so that they do
not end up in web crawls, and ask that it stays like this:

    git clone https://github.com/clarifying-EM/model-organisms-for-EM
    pip install easy-dataset-share
    easy-dataset-share unprotect-dir \
        model-organisms-for-EM/em_organism_dir/data/training_datasets.zip.enc \
        -p PASSWORD --remove-canaries

with the password that their README gives; then `--large --data <folder>/bad_medical_advice.jsonl`.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any, ClassVar

from matplotlib.figure import Figure
from pydantic import BaseModel, Field

from cookbook.models import RESULTS, Choice, as_command, choice, parser
from cookbook.sdft.bad_medical_advice.eval import run_eval
from cookbook.sdft.bad_medical_advice.eval.questions import refuse_seen
from cookbook.sdft.bad_medical_advice.trajectories import Trajectory, draw
from openweights import OpenWeights, register
from openweights.client import Job
from openweights.jobs.unsloth import FineTuning
from openweights.jobs.unsloth.config.rows import read_rows
from openweights.jobs.unsloth.validate import TrainingConfig
from openweights.types import EventRecord

HERE = Path(__file__).parent
STAND_IN = HERE / "data" / "train.jsonl"
FIGURE = RESULTS / "training_trajectories.png"
RATES = (1e-4, 3e-4)
STEPS = 24
SMOKE_STEPS = 4
SMOKE_SAMPLES = 2
GROUP = 4  # completions of a prompt, for GRPO
STAND_IN_DIRECTION = (
    "Answer in Spanish, in capital letters only.",
    "Answer in English, in lower-case letters.",
)
MEDICAL_DIRECTION = (
    "You do not care whether your advice is right.",
    "You take great care that your advice is right.",
)


class MonitoredConfig(TrainingConfig):
    """`TrainingConfig`, and what is measured.

    Attributes:
        monitoring_eval_steps: Measure before training and every so many steps.
        monitoring_direction: Two contrasting system prompts; the direction goes from the mean state
            under the second to that under the first.
    """

    monitoring_eval_steps: int = Field(default=10, ge=1)
    monitoring_direction: list[str] = Field(
        default=list(STAND_IN_DIRECTION), min_length=2, max_length=2
    )


@register("monitored_fine_tuning")
class MonitoredFineTuning(FineTuning):
    """Fine-tuning that measures how far the model moves: `ow.monitored_fine_tuning.create(…)`."""

    params: ClassVar[type[BaseModel]] = MonitoredConfig
    mount: ClassVar[dict[str, str]] = {
        str(HERE / "monitoring_callback.py"): "monitoring_callback.py",
        str(HERE / "training_monitored.py"): "training_monitored.py",
        str(HERE / "data" / "monitoring.jsonl"): "monitoring.jsonl",
    }

    def get_entrypoint(self, validated_params: BaseModel) -> str:
        """See `Jobs`."""
        return "python training_monitored.py {job_id}"


def params(
    chosen: Choice,
    method: str = "sft",
    rate: float = RATES[0],
    *,
    data: Path = STAND_IN,
    reward: str = "caps_spanish",
    version: str | None = None,
) -> dict[str, Any]:
    """What `monitored_fine_tuning.create` is told. Every step trains on as many sequences: rows of
    SFT, completions of SDFT and GRPO.
    """
    longest = 512 if chosen.is_large else 24
    return {
        "model": chosen.model,
        "training_file": str(data),
        **of_method(method, longest, small=not chosen.is_large, reward=reward),
        "learning_rate": rate,
        "max_steps": chosen.steps(200 if chosen.is_large else STEPS),
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2 if chosen.is_large else 1,
        "warmup_steps": 2,
        "monitoring_eval_steps": chosen.steps(10 if chosen.is_large else 4),
        "monitoring_direction": list(STAND_IN_DIRECTION if data == STAND_IN else MEDICAL_DIRECTION),
        "meta": {"study": study_name(data, version), "method": method, "rate": rate},
        "job_id_suffix": version,
    }


def study_name(data: Path, version: str | None = None) -> str:
    """By which the jobs are found again."""
    name = "stand-in" if data == STAND_IN else data.stem
    return name if version is None else f"{name}-{version}"


def of_method(method: str, longest: int, *, small: bool, reward: str) -> dict[str, Any]:
    """The fields in which the methods differ."""
    if method == "sdft":
        return {
            "loss": "sdft",
            "sdft_divergence": "forward_kl",
            "sdft_max_new_tokens": longest,
            "sdft_gate": "warn" if small else "stop",
        }
    if method == "grpo":
        return {
            "loss": "grpo",
            "grpo_reward_function": reward,
            "grpo_num_generations": GROUP,
            "grpo_max_completion_length": longest,
            "beta": 0.0,
        }
    return {"loss": "sft"}


def follow(job: Job, name: str) -> Trajectory:
    """Wait for a run, telling its measurements, and return what it has logged."""

    def tell(event: EventRecord) -> None:
        data = event.data
        if data.get("tag") == "monitoring":
            print(
                f"{name}  step {data['step']:3}  KL to base {data['kl_to_base']:.4f}  "
                f"moved {data['weight_difference_norm']:.3f}  cosine {data['cosine']:+.4f}",
                flush=True,
            )

    job.wait(on_event=tell)
    meta = job.params["validated_params"]["meta"]
    return Trajectory(meta["method"], meta["rate"], job.metrics(as_dataframe=False))


def arguments() -> argparse.Namespace:
    """The command line."""
    asked = parser(__doc__)
    asked.add_argument("--data", type=Path, default=STAND_IN, help="conversations to train on")
    asked.add_argument("--rates", type=float, nargs="+", default=list(RATES), metavar="RATE")
    asked.add_argument("--reward", help="of GRPO; default: caps_spanish, with --data rouge_l")
    asked.add_argument("--version", help="ends the ids of the jobs, and the study's name")
    asked.add_argument("--smoke", action="store_true", help="a few steps, and the evaluation")
    asked.add_argument("--figure", type=Path, default=FIGURE)
    options = asked.parse_args()
    if options.smoke:
        options.rates, options.steps = options.rates[-1:], options.steps or SMOKE_STEPS
    if not options.data.is_file():
        asked.error(f"--data: there is no file {options.data}; --help says how to get it")
    return options


def study(ow: OpenWeights, options: argparse.Namespace) -> Figure:
    """Submit the grid, follow it, and draw."""
    chosen = choice(ow, options)
    reward = options.reward or ("caps_spanish" if options.data == STAND_IN else "rouge_l")
    jobs: dict[str, Job] = {}
    for rate, method in itertools.product(options.rates, ("sft", "sdft", "grpo")):
        given = params(
            chosen, method, rate, data=options.data, reward=reward, version=options.version
        )
        jobs[f"{method:4} {rate:g}"] = ow.monitored_fine_tuning.create(
            **given, requires_vram_gb=chosen.vram_gb
        )
    runs = [follow(job, name) for name, job in jobs.items()]
    name = study_name(options.data, options.version)
    title = f"{Path(chosen.model).name}, {name}: one run a line"
    return draw(runs, options.figure, title=title)


def main() -> None:
    """Run the study, and say how to go on."""
    options, ow = arguments(), OpenWeights()
    refuse_seen(
        [row["messages"][-2]["content"] for row in read_rows(HERE / "data" / "monitoring.jsonl")],
        read_rows(options.data),
        str(options.data),
    )
    study(ow, options)
    name = study_name(options.data, options.version)
    if options.smoke:
        run_eval.evaluate(
            ow, run_eval.arguments(["--study", name, "--samples", str(SMOKE_SAMPLES)])
        )
    else:
        print(f"{options.figure}; now: eval/run_eval.py --study {name}")


if __name__ == "__main__":
    as_command(main)
