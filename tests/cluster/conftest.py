"""The RunPod double, and what talks to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from openweights.cluster.pods.runpod import RunPod
from tests.runpod_double.server import RunPodDouble


@pytest.fixture
def cloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunPodDouble]:
    """RunPod on this machine; its pods sleep."""
    with RunPodDouble(tmp_path / "pods", command=["sleep", "60"]) as cloud:
        monkeypatch.setenv("RUNPOD_API_BASE_URL", cloud.url)
        yield cloud


@pytest.fixture
def runpod(cloud: RunPodDouble) -> RunPod:
    """Our side of it, with the real SDK between."""
    return RunPod(cloud.api_key, cloud.url)
