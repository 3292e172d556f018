"""The training loop and what it needs: optimiser and schedule, checkpoints, the run folder, fine-tuning."""
