"""What only self-distillation needs."""
