"""Container images that jobs ask for. The embedded worker runs every job whatever it says."""

from __future__ import annotations

TAG = "1.0"

# Training: unsloth, trl, peft, transformers. The default of every job.
UNSLOTH_IMAGE = f"openweights/ow-unsloth:{TAG}"

# Serving: vLLM beside what training needs, but unsloth. The default of `ow.api`.
VLLM_IMAGE = f"openweights/ow-vllm:{TAG}"

# The cluster manager, for `ow deploy`; it needs no GPU.
MANAGER_IMAGE = f"openweights/ow-manager:{TAG}"
