"""Bicubic resizing, as torch does it, by one small matrix an axis."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

A = -0.75  # of the cubic kernel: torch's, where PIL and jax.image have -0.5


def resize_bicubic(images: Float[Array, "b h w c"], size: int) -> Float[Array, "b {size} {size} c"]:
    """R_h images R_w^T, channel by channel, in fp32: equal to 1e-5, and differentiable.

    Source: torch 2.13 interpolate(mode="bicubic", align_corners=False, antialias=False).
    """
    rows, columns = (jnp.asarray(bicubic_matrix(n, size)) for n in images.shape[1:3])
    x = jnp.einsum(
        "ih,bhwc->biwc", rows, images.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
    return jnp.einsum("jw,biwc->bijc", columns, x, precision=jax.lax.Precision.HIGHEST)


@lru_cache(maxsize=16)
def bicubic_matrix(source: int, target: int) -> Float[np.ndarray, "{target} {source}"]:
    """Weights of every source pixel in every target pixel; rows sum to 1.

    Target pixel i lies at x_i = (i + 1/2) source / target - 1/2 and takes the four pixels around
    it, each with k(distance); one that would lie outside is the border pixel.
        k(d) = (A + 2) d^3 - (A + 3) d^2 + 1 where d <= 1,  A (d^3 - 5 d^2 + 8 d - 4) where d <= 2.
    The scale and x_i are rounded to fp32, because torch's are: at x = 500 that turns a weight by
    3e-5, more than all other rounding.
    """
    scale = float(np.float32(source) / np.float32(target))
    x = (scale * (np.arange(target) + 0.5) - 0.5).astype(np.float32).astype(np.float64)
    left = np.floor(x)
    matrix = np.zeros((target, source))
    for offset in (-1, 0, 1, 2):
        d = np.abs(x - left - offset)
        near = (A + 2) * d**3 - (A + 3) * d**2 + 1
        far = A * (d**3 - 5 * d**2 + 8 * d - 4)
        column = np.clip(left.astype(int) + offset, 0, source - 1)
        np.add.at(matrix, (np.arange(target), column), np.where(d <= 1, near, far))
    return matrix.astype(np.float32)
