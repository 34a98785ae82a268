"""A UNet small enough to compile in seconds that still has skips, text and a straddling group."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp

from tiue_jax.models.unet import UNet

SIZE, TOKENS, WIDTH = 8, 5, 16  # latents 8x8, context 5 x 16


def small_unet(**changes: Any) -> UNet:
    """Two levels, text at the finer one."""
    options = {
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "cross_attention": (True, False),
        "num_heads": (2, 2),
        "context_dim": WIDTH,
        "norm_groups": 8,
    }
    return UNet(**(options | changes))


@cache
def small_params(seed: int = 0) -> dict:
    """Random parameters of `small_unet()`, biases and norms too, so that nothing is 0 or 1."""
    keys = jax.random.split(jax.random.key(seed))
    x, t, context = inputs(1)[0], jnp.zeros((1,), jnp.int32), inputs(1)[1]
    params = jax.jit(small_unet().init)(keys[0], x, t, context)["params"]
    leaves, tree = jax.tree.flatten(params)
    noise = jax.random.split(keys[1], len(leaves))
    return jax.tree.unflatten(
        tree,
        [p + 0.05 * jax.random.normal(k, p.shape) for p, k in zip(leaves, noise, strict=True)],
    )


def inputs(batch: int, seed: int = 1) -> tuple[jax.Array, jax.Array]:
    """Noise [b 8 8 4] and context [b 5 16]."""
    k_noise, k_context = jax.random.split(jax.random.key(seed))
    return (
        jax.random.normal(k_noise, (batch, SIZE, SIZE, 4)),
        jax.random.normal(k_context, (batch, TOKENS, WIDTH)),
    )
