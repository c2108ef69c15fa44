"""What an editor knows of `create`: read by pyright, which also says when a line marked as wrong is
not. It is never run.
"""

# pyright: strict, reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

from typing import assert_type

from openweights import OpenWeights
from openweights.client import Job


def right(ow: OpenWeights, file: str) -> None:
    job = ow.fine_tuning.create(
        model="a/b",
        training_file=file,
        loss="sdft",
        learning_rate="2e-4 / 3",
        sampling_callbacks=[{"dataset": file}],
        cloud_type="ALL",
        requires_vram_gb="guess",
    )
    assert_type(job, Job)
    assert_type(ow.weighted_sft.create(model="a/b", training_file=file), Job)
    ow.logprob.create(model="a/b", dataset=file, batch_size=2, priority=1)
    ow.multiple_choice.create(model="a/b", dataset=file, timeout=60)
    ow.exec.create(command="true", secrets=["HF_TOKEN"])
    ow.files.upload(file, purpose="conversations")


def wrong(ow: OpenWeights, file: str) -> None:
    ow.fine_tuning.create(model="a/b", training_fil=file, loss="sft")  # pyright: ignore[reportCallIssue]
    ow.fine_tuning.create(model="a/b", training_file=file, loss="ppo")  # pyright: ignore[reportArgumentType]
    ow.fine_tuning.create(model="a/b", loss="sft")  # pyright: ignore[reportCallIssue]
    ow.weighted_sft.create(model="a/b", training_file=file, loss="dpo")  # pyright: ignore[reportArgumentType]
    ow.logprob.create(model="a/b", dataset=file, cloud_type="secure")  # pyright: ignore[reportArgumentType]
    ow.exec.create(command=3)  # pyright: ignore[reportArgumentType]
