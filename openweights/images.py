"""Container images that jobs ask for. The embedded worker runs every job whatever it says."""

from __future__ import annotations

TAG = "1.0"

# Training: unsloth, trl, peft, transformers. The default of every job.
UNSLOTH_IMAGE = f"openweights/ow-unsloth:{TAG}"

# Serving: vLLM beside what training needs, but unsloth. The default of `ow.api`.
VLLM_IMAGE = f"openweights/ow-vllm:{TAG}"

# The cluster manager, for `ow deploy`; it needs no GPU.
MANAGER_IMAGE = f"openweights/ow-manager:{TAG}"

# None is published: who rents pods builds them, and says here what they are called.
VARIABLES = {
    UNSLOTH_IMAGE: "OPENWEIGHTS_IMAGE",
    VLLM_IMAGE: "OPENWEIGHTS_VLLM_IMAGE",
    MANAGER_IMAGE: "OPENWEIGHTS_MANAGER_IMAGE",
}


def to_be_built(image: str) -> str | None:
    """What to do before a pod can start from an image; None for one of the user's own."""
    variable = VARIABLES.get(image)
    return variable and (
        f"no registry has {image}: build it, push it, and name yours in {variable}, as "
        "docs/runpod.md says; until then a pod finds nothing to start"
    )
