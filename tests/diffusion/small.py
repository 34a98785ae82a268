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
    x, context = inputs(1)

    def init(key: jax.Array) -> dict:
        k_init, k_noise = jax.random.split(key)
        t = jnp.zeros((1,), jnp.int32)
        leaves, tree = jax.tree.flatten(small_unet().init(k_init, x, t, context)["params"])
        keys = jax.random.split(k_noise, len(leaves))
        noisy = (
            p + 0.05 * jax.random.normal(k, p.shape) for p, k in zip(leaves, keys, strict=True)
        )
        return jax.tree.unflatten(tree, noisy)

    return jax.jit(init)(jax.random.key(seed))


def inputs(batch: int, seed: int = 1) -> tuple[jax.Array, jax.Array]:
    """Noise [b 8 8 4] and context [b 5 16]."""
    k_noise, k_context = jax.random.split(jax.random.key(seed))
    return (
        jax.random.normal(k_noise, (batch, SIZE, SIZE, 4)),
        jax.random.normal(k_context, (batch, TOKENS, WIDTH)),
    )
