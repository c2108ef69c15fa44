"""What GRPO is made of: rows, rewards at work, advantages, the trainer."""
