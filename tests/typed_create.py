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
    ow.evaluate.create(models="a/b", suite=["gsm8k"], limit=5, cloud_type="COMMUNITY")
    ow.inspect_ai.create(model="a/b", eval_name="inspect_evals/gsm8k", options="--limit 5")
    ow.mmlu_pro.create(model="a/b", ntrain=5, selected_subjects="law")
    ow.exec.create(command="true", secrets=["HF_TOKEN"])
    ow.files.upload(file, purpose="conversations")


def wrong(ow: OpenWeights, file: str) -> None:
    ow.fine_tuning.create(model="a/b", training_fil=file, loss="sft")  # pyright: ignore[reportCallIssue]
    ow.fine_tuning.create(model="a/b", training_file=file, loss="ppo")  # pyright: ignore[reportArgumentType]
    ow.fine_tuning.create(model="a/b", loss="sft")  # pyright: ignore[reportCallIssue]
    ow.weighted_sft.create(model="a/b", training_file=file, loss="dpo")  # pyright: ignore[reportArgumentType]
    ow.logprob.create(model="a/b", dataset=file, cloud_type="secure")  # pyright: ignore[reportArgumentType]
    ow.evaluate.create(models="a/b", suit=["gsm8k"])  # pyright: ignore[reportCallIssue]
    ow.exec.create(command=3)  # pyright: ignore[reportArgumentType]
