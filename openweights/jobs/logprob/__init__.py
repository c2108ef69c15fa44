"""`ow.logprob`: log-probabilities of conversations under a model. Client-side."""

from __future__ import annotations

from typing import Any, ClassVar

from openweights.jobs.scoring import ScoringJobs
from openweights.jobs.unsloth.config.first_look import known_ends
from openweights.jobs.unsloth.config.rendering import row_text
from openweights.jobs.unsloth.config.rows import check_answered


class LogProb(ScoringJobs):
    """Submits log-probability jobs: `ow.logprob.create(model=…, dataset=…)`.

    The result is the event `{type: "logprobs", file, path, loss, …}` and its file, in the formats
    of `logp_callback_datasets`.
    """

    id_covers_mounts: ClassVar[bool] = False
    purpose: ClassVar[str] = "conversations"
    prefix: ClassVar[str] = "lpjob"
    kind: ClassVar[str] = "logprob"

    def check_row(self, row: dict[str, Any]) -> None:
        check_answered(row)

    @staticmethod
    def render_row(row: dict[str, Any], tokenizer: Any) -> object:
        if "messages" not in row:
            return row["text"]
        return row_text(row, tokenizer, train_on="responses", ends=known_ends(tokenizer))
