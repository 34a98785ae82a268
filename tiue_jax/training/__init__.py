"""The training state, step, sharding, loop, checkpoints and summaries."""
