"""How many workers, and how long to wait for what."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds the cluster of one organization.

    Attributes:
        max_workers: Pods at the same time, over all groups together.
        idle_s: A worker without work is asked to end after this long.
        claim_s: A worker that could take a job takes it within this, or something is wrong with it.
        row_s: A worker's row waits this long for its pod.
        startup_s: A worker comes up within this.
        missing_pod_s: A pod that is not listed is taken for gone once its worker is silent for
            this long.
        unresponsive_s: Heartbeats and growth of the log are both signs of life for this long.
        silent_limit_s: Without a heartbeat for this long a worker is lost, whatever its log does.
        stopping_s: A worker that was asked to end does so within this.
        rotate_s: A worker that has been up for this long makes room for a group that has none.
        min_run_s: What may be spent on a job must buy its pod for this long.
    """

    max_workers: int = 8
    idle_s: float = 300.0
    claim_s: float = 60.0
    row_s: float = 120.0
    startup_s: float = 600.0
    missing_pod_s: float = 60.0
    unresponsive_s: float = 120.0
    silent_limit_s: float = 1800.0
    stopping_s: float = 180.0
    rotate_s: float = 1800.0
    min_run_s: float = 900.0
