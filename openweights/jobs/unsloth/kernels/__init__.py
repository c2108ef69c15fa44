"""Fused operations of training, each with a slow oracle in its tests."""
