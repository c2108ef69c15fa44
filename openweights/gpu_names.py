"""What GPUs are called: one short key for each, and the other names that people and tools use.

Client, worker and cluster compare hardware by these keys, so that "A100 SXM 80GB" in a script,
`NVIDIA A100-SXM4-80GB` from `nvidia-smi` and "A100S" are one GPU. Long names: RunPod's list of GPU
types, which are the names that `nvidia-smi` prints.
"""

from __future__ import annotations

import re
from functools import cache
from types import MappingProxyType

# Key -> the long name.
LONG_NAMES = MappingProxyType(
    {
        "2000ADA": "NVIDIA RTX 2000 Ada Generation",
        "4000ADA": "NVIDIA RTX 4000 Ada Generation",
        "6000ADA": "NVIDIA RTX 6000 Ada Generation",
        "A100": "NVIDIA A100 80GB PCIe",
        "A100S": "NVIDIA A100-SXM4-80GB",
        "A2000": "NVIDIA RTX A2000",
        "A30": "NVIDIA A30",
        "A40": "NVIDIA A40",
        "A4000": "NVIDIA RTX A4000",
        "A4000_SFF": "NVIDIA RTX 4000 SFF Ada Generation",
        "A4500": "NVIDIA RTX A4500",
        "A5000": "NVIDIA RTX A5000",
        "A5000_ADA": "NVIDIA RTX 5000 Ada Generation",
        "A6000": "NVIDIA RTX A6000",
        "B200": "NVIDIA B200",
        "H100": "NVIDIA H100 PCIe",
        "H100N": "NVIDIA H100 NVL",
        "H100S": "NVIDIA H100 80GB HBM3",
        "H200": "NVIDIA H200",
        "L4": "NVIDIA L4",
        "L40": "NVIDIA L40",
        "L40S": "NVIDIA L40S",
        "RTX3070": "NVIDIA GeForce RTX 3070",
        "RTX3080": "NVIDIA GeForce RTX 3080",
        "RTX3080TI": "NVIDIA GeForce RTX 3080 Ti",
        "RTX3090": "NVIDIA GeForce RTX 3090",
        "RTX3090TI": "NVIDIA GeForce RTX 3090 Ti",
        "RTX4070TI": "NVIDIA GeForce RTX 4070 Ti",
        "RTX4080": "NVIDIA GeForce RTX 4080",
        "RTX4090": "NVIDIA GeForce RTX 4090",
    }
)
# Written without punctuation, as `_squeeze` leaves them.
_ALIASES = MappingProxyType(
    {
        "A100": ("A100PCIE", "A10080GB", "A100PCIE80GB"),
        "A100S": ("A100SXM", "A100SXM4", "A100SXM80GB", "A10080GBSXM"),
        "A4000_SFF": ("RTX4000ADASFF", "4000SFFADA", "4000ADASFF"),
        "A5000_ADA": ("5000ADA",),
        "H100": ("H100PCIE80GB", "H10080GBPCIE"),
        "H100S": ("H100SXM", "H100SXM5", "H100SXM80GB", "H10080GBSXM"),
        "H200": ("H200SXM",),
    }
)
_NOISE = re.compile(r"NVIDIA|GEFORCE|GENERATION|[^A-Z0-9]")


def gpu_key(name: str) -> str | None:
    """The key of the GPU that goes by this name, in any case; None if there is none known."""
    return _keys_by_name().get(_squeeze(name))


@cache
def _keys_by_name() -> dict[str, str]:
    known: dict[str, str] = {}
    for key, long_name in LONG_NAMES.items():
        short = _squeeze(key)
        names = {short, short.removeprefix("RTX"), _squeeze(long_name), *_ALIASES.get(key, ())}
        known.update(dict.fromkeys(names, key))
    return known


@cache
def _squeeze(name: str) -> str:
    return _NOISE.sub("", name.upper())
