"""A job kind of one's own: parameters, a mounted script, events, and files that come back.

python cookbook/custom_job/client_side.py

It trains no model: of the arguments that all scripts take it needs none.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, Field

from cookbook.models import RESULTS, as_command, parser
from openweights import Jobs, OpenWeights, register


class CountWordsParams(BaseModel):
    """What the job is told.

    Attributes:
        text: Whose words are counted.
        top: How many of the most frequent ones are kept.
    """

    text: str = Field(min_length=1)
    top: int = Field(default=3, ge=1)


@register("count_words")
class CountWords(Jobs):
    """Counts words on a worker: `ow.count_words.create(text=…)`."""

    mount = {str(Path(__file__).parent / "worker_side.py"): "worker_side.py"}
    params = CountWordsParams
    requires_vram_gb = 0

    def get_entrypoint(self, validated_params: BaseModel) -> str:
        """The command; the script reads its parameters from the job."""
        return "python worker_side.py {job_id}"


def main() -> None:
    """Submit a job, and read what it has logged and uploaded."""
    parser(__doc__).parse_args()
    ow = OpenWeights()
    job = ow.count_words.create(text="the cat saw the dog and the bird saw the cat", top=2)
    job.wait()
    for row in job.metrics(as_dataframe=False):
        print(f"word {row['step']}: {row['count']:.0f} times")
    folder = RESULTS / job.id
    job.download(folder)
    print((folder / "counts.csv").read_text(), end="")


if __name__ == "__main__":
    as_command(main)
