"""Between latents and images: the VAE's scaling, and the step from pixels to bytes."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from tiue_jax.models.taesd import AutoencoderTiny
from tiue_jax.models.vae import AutoencoderKL


def decode_images(
    vae: AutoencoderKL | AutoencoderTiny,
    params: Mapping[str, Any],
    latents: Float[Array, "b h w c"],
) -> UInt8[Array, "b H W 3"]:
    """Images of (scaled) latents: `to_bytes` of `decode_pixels`."""
    return to_bytes(decode_pixels(vae, params, latents))


def decode_pixels(
    vae: AutoencoderKL | AutoencoderTiny,
    params: Mapping[str, Any],
    latents: Float[Array, "b h w c"],
) -> Float[Array, "b H W 3"]:
    """Pixels of (scaled) latents, fp32, about -1..1."""
    pixels = vae.apply({"params": params}, latents / vae.scaling_factor, method="decode")
    return pixels.astype(jnp.float32)


def to_bytes(pixels: Float[Array, "b H W 3"]) -> UInt8[Array, "b H W 3"]:
    """clip(127.5 pixels + 128, 0, 255), truncated; NaN becomes 0.

    Source: TiUE's public inference code. diffusers rounds instead: up to 1/255 apart.
    """
    return jnp.clip(pixels * 127.5 + 128.0, 0, 255).astype(jnp.uint8)
