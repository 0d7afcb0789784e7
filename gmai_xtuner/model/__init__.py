"""The model: flat batch in, loss out. Nothing here reads or writes a checkpoint."""
