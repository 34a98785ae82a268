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
    """Images of (scaled) latents: clip(127.5 pixels + 128, 0, 255), truncated.

    Source: TiUE's public inference code. diffusers rounds instead: up to 1/255 apart.
    """
    pixels = vae.apply({"params": params}, latents / vae.scaling_factor, method="decode")
    pixels = pixels.astype(jnp.float32)
    return jnp.clip(pixels * 127.5 + 128.0, 0, 255).astype(jnp.uint8)
