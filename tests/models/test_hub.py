"""What would be pushed, and how long it is tried. The hub itself is not called."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from openweights.errors import ConfigurationError
from openweights.jobs.unsloth.validate import training_config
from openweights.models.hub import merge, retried
from openweights.models.load import load_model
from openweights.models.names import repository_id
from tests.jobs.unsloth.malformed_configs import GOOD
from tests.tiny_model import make_tiny_model


@pytest.mark.parametrize(
    ("template", "org", "filled"),
    [
        ("{org_id}/{model_name}-{job_id}", "me", "me/name-ftjob-1"),
        ("{org_id}/{model_name}-{job_id}", None, "{org_id}/name-ftjob-1"),
        ("lab/{run} {job_id}", "me", "lab/-1-ftjob-1"),
        ("lab/{org_id}-{run}", None, "lab/{org_id}--1"),
    ],
)
def test_repository_ids(template: str, org: str | None, filled: str) -> None:
    extra = {"run": "ä1"}
    asked = {"model": "org/name", "job_id": "ftjob-1", "extra": extra}
    assert repository_id(template, org=org, **asked) == filled
    # What the worker makes of it, whose token tells the account.
    assert "{" not in repository_id(filled, org="me", **asked)


def test_merged_model_is_base_and_adapter(tmp_path: Path) -> None:
    tiny = make_tiny_model(tmp_path / "tiny")
    config = training_config({**GOOD, "model": str(tiny)})
    model, tokenizer = load_model(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    model.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    tokenizer.save_pretrained(str(tmp_path / "adapter"))
    folder = merge(config, tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(tiny)
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder)("you and the others")["input_ids"]])
    with torch.no_grad():
        plain = base(ids).logits
        adapted = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))(ids).logits
        got = merged(ids).logits.float()
    assert merged.dtype == torch.bfloat16
    error, change = float((got - adapted).abs().mean()), float((plain - adapted).abs().mean())
    assert error < 0.1 * change, "rounding to 16 bit, not another model"


def test_tries_again_and_gives_up() -> None:
    calls: list[int] = []

    def passes_on_third() -> str:
        calls.append(1)
        if len(calls) < 3:
            raise OSError("connection reset")
        return "done"

    assert retried(passes_on_third, "pushing", pause_s=0) == "done" and len(calls) == 3

    def never() -> None:
        raise OSError("away")

    with pytest.raises(ConfigurationError, match="pushing: failed 5 times, last: away"):
        retried(never, "pushing", pause_s=0)
