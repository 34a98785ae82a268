"""Tests of tiue_jax.pretrained."""
