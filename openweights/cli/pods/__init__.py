"""Commands that start pods."""
