"""Fine-tuning, learning runs and evaluation."""
