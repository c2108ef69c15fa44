"""Watching jobs: waiting, progress, tables and figures of metrics."""
