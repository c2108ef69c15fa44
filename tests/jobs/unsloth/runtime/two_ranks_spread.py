"""Jobs of several losses on each of two ranks, and what each rank saves of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch.distributed.tensor import DTensor

from openweights.generation.choose import generation_engine
from openweights.generation.params import GenerationRequest, SamplingParams
from openweights.jobs.unsloth.preference.trainer import preference_train
from openweights.jobs.unsloth.runtime.launcher import rank
from openweights.jobs.unsloth.runtime.ranks import join, leave
from openweights.jobs.unsloth.sdft import sdft_train
from openweights.jobs.unsloth.sft import sft_train
from openweights.jobs.unsloth.validate import training_config
from openweights.models import sharding
from openweights.models.forward import active_adapter, base_model
from openweights.models.load import load_model
from openweights.models.sharding import decoder_layers
from tests.jobs.unsloth.malformed_configs import DPO, GOOD, SDFT
from tests.jobs.unsloth.test_preference import ROWS as PAIRS
from tests.jobs.unsloth.test_sdft import ROWS, adapters

# Lengths by which the rows of the first rank fill two packs, and those of the second one.
UNEVEN = [
    {
        "messages": [
            {"role": "user", "content": "say"},
            {"role": "assistant", "content": "ab " * (60 if i % 2 == 0 else 5) + str(i)},
        ]
    }
    for i in range(16)
]
LOSSES: dict[str, tuple[dict[str, Any], Any, Any, dict[str, Any]]] = {
    "sft": (GOOD, sft_train, UNEVEN, {"max_seq_length": 256, "lora_dropout": 0.1}),
    "dpo": (DPO, preference_train, PAIRS, {}),
    "sdft": (
        SDFT,
        sdft_train,
        ROWS,
        {"max_seq_length": 200, "sdft_max_new_tokens": 8, "sdft_gate": "off"},
    ),
}


class Passes:
    """Counts those through a model's layers."""

    def __init__(self, model: Any) -> None:
        self.count = 0
        base_model(model).get_decoder().register_forward_hook(self._add)

    def _add(self, *_: Any) -> None:
        self.count += 1


def sampled(model: Any, tokenizer: Any) -> list[int]:
    """More tokens on the second rank."""
    params = SamplingParams(max_new_tokens=4 + 9 * rank(), stop_token_ids=(), detokenize=False)
    engine = generation_engine("auto", model, tokenizer)
    request = GenerationRequest([5, 6, 7], params, active_adapter(model))
    return list(engine.generate([request])[0][0].token_ids)


def runs(model_folder: str, folder_name: str, layers: str) -> None:
    """Jobs of three losses by their own functions.

    Args:
        layers: "whole" on each rank; "spread", and gathered once for what is sampled; or spread,
            with "no room" to do so, SDFT alone.
    """
    folder = Path(folder_name)
    folder.mkdir(exist_ok=True)
    spread = layers != "whole"
    # What else runs on this machine, and how much memory that leaves, is no matter.
    sharding.SPARE = 1.0 if layers == "no room" else 0.0
    logs: dict[str, Any] = {}
    if spread:
        join()
    for name in LOSSES if layers != "no room" else ("sdft",):
        good, train, rows, changes = LOSSES[name]
        options = {
            "model": model_folder,
            "max_steps": 2,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 4,
            "learning_rate": 0.1,
            "optim": "sgd",
            "warmup_steps": 0,
            "output_dir": str(folder / name),
        }
        config = training_config({**good, **options, **changes})
        model, tokenizer = load_model(config, spread=spread)
        passes = Passes(model)
        trainer = train(config, model, tokenizer, rows, None)
        own = [p.to_local().numel() for p in model.parameters() if isinstance(p, DTensor)]
        logs[name] = {
            "log": [entry for entry in trainer.state.log_history if "loss" in entry],
            "weights": {name: value.tolist() for name, value in adapters(model).items()},
            "own": sum(own),
            "matrices": sum(
                p.numel()
                for p in decoder_layers(base_model(model)).parameters()
                if p.dim() > 1 and not p.requires_grad
            ),
            "sampled": sampled(model, tokenizer) if name == "sdft" else [],
            "passes": passes.count,
        }
    (folder / f"rank-{rank()}.json").write_text(json.dumps(logs))
    leave()
