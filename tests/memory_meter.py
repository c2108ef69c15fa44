"""What tensors take on a CPU: counts every storage from its making to its end, while code runs."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class MemoryMeter(TorchDispatchMode):
    """Bytes of the tensors that operations return, and that are alive; as CUDA's allocator counts.

    Attributes:
        now: Bytes at this moment.
        peak: The most that there were.
    """

    def __init__(self, *present: nn.Module) -> None:
        """Counts the parameters and buffers of `present` as there already."""
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, Any] = {}
        for module in present:
            for tensor in (*module.parameters(), *module.buffers()):
                self._count(tensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        # Most operations return one tensor, and a tree costs more than many an operation here.
        for value in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(value, Tensor):
                self._count(value)
        self.peak = max(self.peak, self.now)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        size = storage.nbytes()
        self.now += size

        def gone(_: Any) -> None:
            del self._seen[key]
            self.now -= size

        self._seen[key] = weakref.ref(storage, gone)
