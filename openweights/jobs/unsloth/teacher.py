"""The teacher of self-distillation: the same network with a moving average of its weights.

    teacher <- rate * student + (1 - rate) * teacher

after every optimizer step (arXiv 2601.19897, algorithm 1).

The teacher starts as a copy of the student's own first weights. For LoRA that means A as
initialised and B = 0, so the teacher is exactly the base model at step 0, and the average of A is
not biased towards zero. (Starting both from zero, as a fresh adapter would, makes the teacher lag
by a factor of 1 - (1 - rate)^t.)

Teacher and student share one model: `acting` exchanges the storage of the trained parameters, which
copies nothing, and exchanges it back. A backward pass must not run in between.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from openweights.errors import PlatformError

TEACHER_FILE = "sdft_teacher.safetensors"

logger = logging.getLogger(__name__)


class EMATeacher:
    """Float32 moving average of a model's trainable parameters, on their device.

    Attributes:
        rate: Share of the student in each update: 0 freezes the teacher, 1 makes it the live
            student.
        step: Updates so far.
    """

    def __init__(self, model: nn.Module, rate: float) -> None:
        if not 0 <= rate <= 1:
            raise ValueError(f"rate {rate} must be in [0, 1]")
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not named:
            raise ValueError("the model has no trainable parameter, so there is nothing to average")
        self.rate = rate
        self.step = 0
        self._names = list(named)
        self._student = list(named.values())
        self._average = [_float_copy(p) for p in self._student]
        self._initial = [average.clone() for average in self._average]

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the student by `rate`. Rates 0 and 1 are exact."""
        self.step += 1
        if self.rate == 0:
            return
        pairs = zip(self._student, self._average, strict=True)
        student = [parameter.detach().to(average.dtype) for parameter, average in pairs]
        if self.rate == 1:
            torch._foreach_copy_(self._average, student)
        else:
            torch._foreach_lerp_(self._average, student, self.rate)

    @contextmanager
    def acting(self) -> Iterator[None]:
        """The model holds the teacher's weights inside, and bit for bit its own afterwards."""
        own = [p.data for p in self._student]
        for parameter, average in zip(self._student, self._average, strict=True):
            parameter.data = average.to(parameter.dtype)
        try:
            yield
        finally:
            for parameter, data in zip(self._student, own, strict=True):
                parameter.data = data

    @torch.no_grad()
    def drift(self) -> float:
        """Euclidean distance of the teacher from its first weights."""
        difference = torch._foreach_sub(self._average, self._initial)
        return torch.stack(torch._foreach_norm(difference)).norm().item()

    def save(self, folder: Path) -> None:
        """Write the teacher into a checkpoint's folder."""
        tensors = {
            f"{kind}.{name}": tensor.contiguous()
            for kind, values in (("average", self._average), ("initial", self._initial))
            for name, tensor in zip(self._names, values, strict=True)
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
            expected = {f"{kind}.{n}" for kind in ("average", "initial") for n in self._names}
            if set(file.keys()) != expected:
                raise PlatformError(f"{path} belongs to a model with other trained parameters")
            for kind, values in (("average", self._average), ("initial", self._initial)):
                for name, tensor in zip(self._names, values, strict=True):
                    tensor.copy_(file.get_tensor(f"{kind}.{name}"))

    @property
    def size_bytes(self) -> int:
        """Memory of the averages and of the first weights that the drift is measured from."""
        return 2 * sum(average.numel() * average.element_size() for average in self._average)

    def state(self) -> dict[str, Tensor]:
        """The averages by parameter name; the tensors are the teacher's own."""
        return dict(zip(self._names, self._average, strict=True))


def _float_copy(parameter: nn.Parameter) -> Tensor:
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return parameter.detach().to(dtype, copy=True)
