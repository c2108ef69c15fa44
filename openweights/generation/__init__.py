"""Sampling from models: prompts and parameters in, completions out."""
