"""What runs around the model: start, loop, learning rate, checkpoints, what the log shows."""
