"""Our own engine for CUDA: a static cache and captured decode steps."""
