"""The losses of TiUE distillation. All in fp32, whatever the UNet computed in.

Symbols: x0 the student's latents; e_T, e_L the guided noise predictions of teacher and LoRA teacher
at x_t = alpha_t x0 + sigma_t n; alpha_t = sqrt(abar_t), sigma_t = sqrt(1 - abar_t).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def classifier_free_guidance(
    null: Float[Array, "*s"], cond: Float[Array, "*s"], scale: float | Array
) -> Float[Array, "*s"]:
    """u + w (c - u). Source: arXiv 2207.12598, in diffusers' convention (w = 1: no guidance)."""
    return null + scale * (cond - null)


def vsd_gradient(
    eps_teacher: Float[Array, "b h w c"],
    eps_lora: Float[Array, "b h w c"],
    sigma: Float[Array, "b 1 1 1"],
) -> Float[Array, "b h w c"]:
    """g = sigma_t^2 (e_T - e_L): the direction in which x0 becomes less likely.

    Source: variational score distillation, arXiv 2305.16213 equation 9 with weight sigma_t^2, as
    TiUE's public code has it.
    """
    difference = eps_teacher.astype(jnp.float32) - eps_lora.astype(jnp.float32)
    return jnp.square(sigma) * difference


def vsd_loss(
    x0: Float[Array, "b h w c"], score_gradient: Float[Array, "b h w c"]
) -> Float[Array, ""]:
    """L_vsd = 0.5 mean((x0 - stop(x0 - nan_to_num(g)))^2), whose gradient by x0 is g / (b h w c).

    Source: TiUE's public code, its nan_to_num included, and DreamFusion's trick before it.
    """
    target = jax.lax.stop_gradient(x0 - jnp.nan_to_num(score_gradient))
    return 0.5 * mean_square(x0 - target)


def kl_loss(eps: Float[Array, "b K h w c"]) -> Float[Array, ""]:
    """Sum over the b K predicted noise maps of KL(N(m, v) || N(0, 1)) = -0.5 (1 + log v - m^2 - v).

    m and v are the mean and the unbiased variance over all entries of a map.
    Source: TiUE's public code. Differs: fp32 throughout, because bf16 loses the variance.
    """
    maps = eps.astype(jnp.float32).reshape(*eps.shape[:2], -1)
    mean = maps.mean(axis=-1)
    var = maps.var(axis=-1, ddof=1)
    return jnp.sum(-0.5 * (1.0 + jnp.log(var) - jnp.square(mean) - var))


def lora_loss(
    eps_lora: Float[Array, "b h w c"],
    noise: Float[Array, "b h w c"],
    alpha: Float[Array, "b 1 1 1"],
) -> Float[Array, ""]:
    """L_lora = mean((alpha_t e_L - alpha_t n)^2), without guidance. Source: TiUE's public code."""
    return mean_square(alpha * eps_lora.astype(jnp.float32) - alpha * noise)


def mean_square(x: Float[Array, "b h w c"]) -> Float[Array, ""]:
    """The mean over examples of each one's mean square.

    In this order, a sum rounds alike however many devices share the examples.
    """
    return jnp.mean(jnp.mean(jnp.square(x), axis=(1, 2, 3)))


def clip_loss(
    text_features: Float[Array, "b d"], image_features: Float[Array, "b d"], tau: float | Array
) -> Float[Array, ""]:
    """L_clip = max(0, tau - mean cos(text, image)), cos with norms of at least 1e-8.

    Source: arXiv 2408.14176 (SwiftBrush v2), as TiUE's public code has it; torch.cosine_similarity.
    """

    def unit(x: Float[Array, "b d"]) -> Float[Array, "b d"]:
        x = x.astype(jnp.float32)
        # The bound is on the square, so that the gradient at 0 is finite.
        return x / jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(x), -1, keepdims=True), 1e-16))

    cosine = jnp.sum(unit(text_features) * unit(image_features), axis=-1)
    return jax.nn.relu(tau - jnp.mean(cosine))
