"""The teacher of self-distillation: the same network with a moving average of its weights.

    teacher <- rate * student + (1 - rate) * teacher

after every optimizer step (arXiv 2601.19897, algorithm 1).

The teacher starts as a copy of the student's own first weights. For LoRA that means A as
initialised and B = 0, so the teacher is exactly the base model at step 0, and the average of A is
not biased towards zero. (Starting both from zero, as a fresh adapter would, makes the teacher lag
by a factor of 1 - (1 - rate)^t.)

Teacher and student share one model, which holds the teacher's weights while it acts
(`models/weights.py`). Where training goes on from an adapter, that one is the first teacher.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from openweights.errors import PlatformError
from openweights.models.weights import WeightCopy, norm

TEACHER_FILE = "sdft_teacher.safetensors"

logger = logging.getLogger(__name__)


class EMATeacher(WeightCopy):
    """Float32 moving average of a model's trainable parameters: of adapters on their device, of
    whole models on the host, whose memory the GPU could not hold twice.

    Attributes:
        rate: Share of the student in each update: 0 freezes the teacher, 1 makes it the live
            student.
        step: Updates so far.
    """

    def __init__(self, model: nn.Module, rate: float) -> None:
        if not 0 <= rate <= 1:
            raise ValueError(f"rate {rate} must be in [0, 1]")
        is_adapter = hasattr(model, "get_base_model")
        super().__init__(model, None if is_adapter else "cpu")
        self.rate = rate
        self.step = 0
        # A frozen teacher never leaves them.
        self._initial = [value.clone() for value in self.values] if rate else self.values

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the student by `rate`. Rates 0 and 1 are exact."""
        self.step += 1
        if self.rate == 0:
            return
        pairs = zip(self.parameters, self.values, strict=True)
        student = [p.detach().to(average.device, average.dtype) for p, average in pairs]
        if self.rate == 1:
            torch._foreach_copy_(self.values, student)
        else:
            torch._foreach_lerp_(self.values, student, self.rate)

    @torch.no_grad()
    def drift(self) -> float:
        """Euclidean distance of the teacher from its first weights."""
        return norm(torch._foreach_sub(self.values, self._initial))

    def save(self, folder: Path) -> None:
        """Write the teacher into a checkpoint's folder."""
        tensors = {
            # A file holds no tensor twice.
            f"{kind}.{name}": tensor.clone() if kind == "initial" else tensor.contiguous()
            for kind, values in (("average", self.values), ("initial", self._initial))
            for name, tensor in zip(self.names, values, strict=True)
        }
        save_file(tensors, folder / TEACHER_FILE, metadata={"step": str(self.step)})

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Read the teacher from a checkpoint's folder.

        Raises:
            PlatformError: The checkpoint has no teacher, or one of another model.
        """
        path = folder / TEACHER_FILE
        if not path.exists():
            raise PlatformError(f"checkpoint {folder} holds no {TEACHER_FILE}: cannot resume SDFT")
        with safe_open(path, framework="pt") as file:
            self.step = int(file.metadata()["step"])
            expected = {f"{kind}.{n}" for kind in ("average", "initial") for n in self.names}
            if set(file.keys()) != expected:
                raise PlatformError(f"{path} belongs to a model with other trained parameters")
            for kind, values in (("average", self.values), ("initial", self._initial)):
                for name, tensor in zip(self.names, values, strict=True):
                    tensor.copy_(file.get_tensor(f"{kind}.{name}"))

    @property
    def size_bytes(self) -> int:
        """Memory of the averages and of the first weights that the drift is measured from."""
        kept = 1 if self._initial is self.values else 2
        return kept * sum(average.numel() * average.element_size() for average in self.values)
