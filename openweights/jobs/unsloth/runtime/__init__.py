"""How a run lives: its processes, its log, its events, its checkpoints."""
