"""Where pods come from: RunPod, or processes on this machine."""
