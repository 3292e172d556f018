"""The training loop and its tasks: optimizer, schedule, checkpoints, resume, distributed training, tracking."""
