"""A job's fields and rows, checked before it costs anything: no torch here."""
