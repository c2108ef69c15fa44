"""Teaches SmolLM2-135M-Instruct one skill from demonstrations by self-distillation.

    python cookbook/sdft/sdft_smollm2.py [MODEL]

MODEL is a folder or a Hugging Face id; by default SmolLM2-135M-Instruct, downloaded once. On two
cores it takes about three minutes. `ow demo` compares this with SFT on the same rows.
"""

from __future__ import annotations

import sys
from pathlib import Path

from openweights import OpenWeights
from openweights.models.smollm2 import get_model

DATA = Path(__file__).parent / "data"

ow = OpenWeights()
model = sys.argv[1] if len(sys.argv) > 1 else str(get_model(ow.settings.home / "models", print))
job = ow.fine_tuning.create(
    model=model,
    training_file=ow.files.upload(DATA / "train.jsonl", purpose="conversations")["id"],
    loss="sdft",
    sdft_divergence="forward_kl",
    sdft_max_new_tokens=16,
    # A model whose teacher is no better than its student is stopped; another one is only told.
    sdft_gate="warn" if sys.argv[1:] else "stop",
    max_steps=32,
    per_device_train_batch_size=8,
    gradient_accumulation_steps=1,
    learning_rate=3e-4,
    warmup_steps=3,
    requires_vram_gb=0,
)
job.wait(on_event=lambda event: print(event.data) if "agreement" in event.data else None)
job.download(f"{job.id}")
job.plot(f"{job.id}/training.png")
print(f"the adapter is in {job.id}/adapter; load it with peft.PeftModel.from_pretrained")
