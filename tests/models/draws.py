"""Random arrays and parameters, drawn by numpy: nothing to compile."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


def normal(*shape: int, seed: int = 0) -> jax.Array:
    """N(0, 1) draws, fp32."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def drawn(module: nn.Module, *inputs: Any) -> Any:
    """Parameters of `module`: kernels N(0, 1/fan_in), scales N(1, 0.2^2), biases N(0, 0.2^2)."""
    rng = np.random.default_rng(0)

    def draw(path: tuple[Any, ...], x: jax.ShapeDtypeStruct) -> jax.Array:
        value = rng.standard_normal(x.shape, np.float32)
        if path[-1].key == "kernel":
            return jnp.asarray(value / np.sqrt(value[..., 0].size, dtype=np.float32))
        return jnp.asarray(value * np.float32(0.2) + np.float32(path[-1].key == "scale"))

    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    return jax.tree_util.tree_map_with_path(draw, shapes)
