"""What outlives a process: tables, checkpoints, and the lock on a run."""
