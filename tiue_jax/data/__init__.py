"""Prompt sources as deterministic, checkpointable iterators."""
