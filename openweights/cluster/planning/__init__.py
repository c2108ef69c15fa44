"""What the manager decides: pure functions of jobs, workers, offers and the time."""
