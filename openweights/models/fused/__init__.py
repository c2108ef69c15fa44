"""Parts of a model that compute in fewer passes than transformers and peft make."""
