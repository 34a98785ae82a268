"""Programs built from tiue_jax: each folder is one worked example."""
