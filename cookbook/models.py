"""The one switch of the cookbook: a small model on this machine, or a large one on a GPU.

    python cookbook/sft/lora_sft.py            SmolLM2-135M-Instruct, which a CPU can train
    python cookbook/sft/lora_sft.py --large    Qwen3-4B

Where the jobs run is decided by the environment, as always: with OPENWEIGHTS_API_KEY and
SUPABASE_URL by the organization's RunPod workers, else by a worker on this machine.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from openweights import OpenWeights, OpenWeightsError
from openweights.cli.output import INTERRUPTED
from openweights.models.names import full_name
from openweights.models.smollm2 import HUB_ID, get_model

LARGE = "Qwen/Qwen3-4B"
LARGE_VRAM_GB = 40

# What scripts leave behind, in the folder where they run; git ignores it.
RESULTS = Path("results")

# The rows that most scripts train on: orders in plain words, answered by one ledger line.
ORDERS = Path(__file__).parent / "sdft" / "data"


@dataclass(frozen=True, slots=True)
class Choice:
    """What a script trains.

    Attributes:
        model: Hugging Face id, or a folder on the machine that trains.
        is_large: Whether `--large` was given.
        most_steps: What `--steps` said; None for what the script wants.
        is_other: Whether `--model` named it.
    """

    model: str
    is_large: bool = False
    most_steps: int | None = None
    is_other: bool = False

    @property
    def vram_gb(self) -> int:
        """GPU memory that a job needs, in GiB."""
        return LARGE_VRAM_GB if self.is_large else 0

    def steps(self, wanted: int) -> int:
        """Optimizer steps, or what checkpoints, evaluations and warm-up count in."""
        return wanted if self.most_steps is None else min(wanted, self.most_steps)


def as_command(main: Callable[[], None]) -> None:
    """Call a script's `main`. What stops it for a reason, what the system refuses to read or write,
    and Ctrl-C, is said without a traceback, as by `ow`.
    """
    try:
        main()
    except OpenWeightsError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
    except OSError as error:
        if error.strerror is None or error.filename is None:
            raise
        sys.exit(f"{Path(sys.argv[0]).name}: {error.filename}: {error.strerror}")
    except KeyboardInterrupt as error:
        print(*getattr(error, "__notes__", ()), sep="\n", file=sys.stderr)
        sys.exit(INTERRUPTED)


def parser(
    about: str | None,
    *,
    model: str = "another model: a Hugging Face id, or a folder",
    steps: str = "stop after so many steps",
) -> argparse.ArgumentParser:
    """The arguments that every script takes, and what two of them mean."""
    found = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--large", action="store_true", help=f"train {LARGE}, on a GPU")
    found.add_argument("--model", help=model)
    found.add_argument("--steps", type=count, help=steps)
    return found


def count(text: str) -> int:
    """A whole number from 1 on, as the type of an argument."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("give a whole number from 1 on")
    return number


def choice(ow: OpenWeights, options: argparse.Namespace) -> Choice:
    """What the arguments ask for; the small model is downloaded once."""
    model = options.model or (LARGE if options.large else _small(ow))
    return Choice(full_name(model), options.large, options.steps, options.model is not None)


def choose(ow: OpenWeights, about: str | None) -> Choice:
    """Read the command line of a script that has no arguments of its own."""
    return choice(ow, parser(about).parse_args())


def _small(ow: OpenWeights) -> str:
    """A worker on another machine fetches it by name."""
    return HUB_ID if ow.settings.is_remote else str(get_model(ow.settings.home / "models", print))
