"""What `nvidia-smi` says, and what becomes of a machine without it."""

from __future__ import annotations

from pathlib import Path

import pytest

from openweights.errors import ConfigurationError
from openweights.hardware import CPU, Hardware, detect, short_name, summarize

TWO = "0, GPU-aa11, NVIDIA H100 80GB HBM3, 81559\n1, GPU-bb22, NVIDIA H100 80GB HBM3, 81559\n"


def test_rows_become_a_hardware_string() -> None:
    assert summarize(TWO) == Hardware("2x H100S", 2, 158)
    assert summarize("") == CPU
    assert summarize(TWO, visible="1") == Hardware("1x H100S", 1, 79)
    assert summarize(TWO, visible="GPU-bb") == Hardware("1x H100S", 1, 79)
    # As CUDA reads it: nothing after an entry that names no device, and none at all for "".
    assert summarize(TWO, visible="0,7,1").gpu_count == 1
    assert summarize(TWO, visible="") == summarize(TWO, visible="-1") == CPU
    with pytest.raises(ConfigurationError, match="No devices"):
        summarize("No devices were found\n")


def test_a_gpu_without_memory_of_its_own_computes_in_the_machines() -> None:
    for nothing in ("[N/A]", "[Not Supported]"):
        row = f"0, GPU-cc33, NVIDIA GB10, {nothing}\n"
        assert summarize(row, shared_mib=122_570) == Hardware("1x GB10", 1, 119)


SLICES = """GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-aa11)
  MIG 3g.20gb     Device  0: (UUID: MIG-11)
  MIG 1g.10gb+me  Device  1: (UUID: MIG-22)
"""


def test_a_slice_of_a_gpu(tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nif [ $1 = -L ]; then echo '{SLICES}'; else echo '{TWO}'; fi\n")
    program.chmod(0o755)

    def found(visible: str) -> Hardware:
        return detect({"PATH": f"{tmp_path}:/bin", "CUDA_VISIBLE_DEVICES": visible})

    assert found("MIG-11") == found("MIG-11,MIG-22") == Hardware("1x MIG 3g.20gb", 1, 20)
    assert found("MIG-22") == Hardware("1x MIG 1g.10gb+me", 1, 10)
    assert found("MIG-33") == CPU


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("NVIDIA H100 NVL", "H100N"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GH200 480GB", "GH200 480GB"),
        ("NVIDIA GB200", "GB200"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA A100-SXM4-80GB", "A100S"),
        ("NVIDIA A100 80GB PCIe", "A100"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA GeForce RTX 4090", "RTX4090"),
        ("NVIDIA GeForce RTX 3080 Ti", "RTX3080TI"),
        ("NVIDIA RTX 6000 Ada Generation", "6000ADA"),
        ("NVIDIA RTX A6000", "A6000"),
        ("Tesla V100-SXM2-16GB", "Tesla V100-SXM2-16GB"),
        ("NVIDIA Something New", "Something New"),
    ],
)
def test_short_names(name: str, short: str) -> None:
    assert short_name(name) == short


def test_no_nvidia_smi_is_a_cpu_and_a_broken_one_is_said(tmp_path: Path) -> None:
    assert detect({"PATH": str(tmp_path)}) == CPU
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'could not communicate with the driver'; exit 9\n")
    program.chmod(0o755)
    with pytest.raises(ConfigurationError, match="could not communicate with the driver"):
        detect({"PATH": str(tmp_path)})
    program.write_text(f"#!/bin/sh\nprintf '%s' '{TWO}'\n")
    env = {"PATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": "0"}
    assert detect(env) == Hardware("1x H100S", 1, 79)
