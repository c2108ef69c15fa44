"""Pods for jobs that wait in a store: what to start and to stop (`planner`), and doing it
(`org_manager`).
"""
