"""What would be pushed, and how long it is tried. The hub itself is not called."""

from __future__ import annotations

import errno
from pathlib import Path

import httpx
import pytest
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from openweights.errors import ConfigError, ConfigurationError
from openweights.jobs.unsloth.validate import training_config
from openweights.models.hub import merge, retried
from openweights.models.load import clear_load_errors, load_model
from openweights.models.names import repository_id
from tests.jobs.unsloth.malformed_configs import GOOD
from tests.tiny_model import SECOND_EOS, make_tiny_model


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


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], ["q_proj", "embed_tokens"]])
def test_an_adapter_on_tied_weights_is_merged_into_one_of_the_two(
    targets: list[str], tmp_path: Path
) -> None:
    tiny = make_tiny_model(tmp_path / "tiny")
    shape = LlamaConfig.from_pretrained(tiny)
    shape.tie_word_embeddings = True
    base = LlamaForCausalLM(shape)
    base.generation_config = GenerationConfig.from_pretrained(tiny)
    base.save_pretrained(tiny)
    config = training_config({**GOOD, "model": str(tiny), "target_modules": targets})
    model, tokenizer = load_model(config)
    with torch.no_grad():
        for _, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    model.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    tokenizer.save_pretrained(str(tmp_path / "adapter"))
    whole = AutoModelForCausalLM.from_pretrained(
        merge(config, tmp_path / "adapter", tmp_path / "merged")
    )
    ids = torch.arange(5, 40)[None]
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(tiny)(ids).logits
        live = model.eval()(ids.to(model.device)).logits.cpu()
        got = whole(ids).logits.float()
    error, change = float((got - live).abs().mean()), float((plain - live).abs().mean())
    assert error < 0.05 * change, "rounding to 16 bit, not another model"
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(SECOND_EOS)]
    assert sorted(whole.generation_config.eos_token_id) == sorted(ends)


def hub_error(kind: type[HfHubHTTPError], status: int) -> OSError:
    """As transformers raises it: an error of its own, from the hub's."""
    response = httpx.Response(status, request=httpx.Request("GET", "https://hub.test/org/name"))
    outer = OSError("a layer of shape [4010, 401] is offline, 404 and gated")
    outer.__cause__ = kind("no", response=response)
    return outer


def test_what_is_wrong_is_told_by_the_kind_of_error() -> None:
    words: list[tuple[Exception, str]] = [
        (hub_error(GatedRepoError, 403), "is gated or private"),
        (hub_error(RepositoryNotFoundError, 404), "was not found, neither as a folder"),
        (hub_error(HfHubHTTPError, 403), "is gated or private"),
        (OSError(errno.ENOSPC, "no"), "no disk space left"),
        (LocalEntryNotFoundError("no"), "the Hugging Face hub cannot be reached"),
        (ValueError("a shape of 4010 and 401 is offline"), "cannot be loaded: a shape of 4010"),
    ]
    for error, said in words:
        with pytest.raises(ConfigError, match=said) as caught, clear_load_errors("org/name"):
            raise error
        assert "\n" not in str(caught.value)
