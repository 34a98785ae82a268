"""How well images fit their prompts in CLIP's eyes: the term that TiUE's released weights had.

    L_clip = max(0, tau - mean cos(CLIP_text(y), CLIP_image(i)))
    i = bicubic_224(clip((D(x0) + 1) / 2, 0, 1))

with D the decoder of TAESD, which is small enough to be learnt through.
Source: arXiv 2408.14176 (SwiftBrush v2), as TiUE's public code has it, which leaves out the
normalisation of pixels by mean and deviation that CLIP was trained with.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tiue_jax.diffusion.losses import clip_loss
from tiue_jax.diffusion.resize import resize_bicubic
from tiue_jax.models.clip import CLIP
from tiue_jax.models.taesd import AutoencoderTiny

Params = Mapping[str, Any]


@dataclass(frozen=True)
class TextImage:
    """The networks of the term, and how pixels come to CLIP.

    Attributes:
        size: side of CLIP's images.
        mean, std: of its normalisation, per channel, of pixels in [0, 1]; None: not normalised, as
            in the source.
    """

    taesd: AutoencoderTiny
    clip: CLIP
    size: int = 224
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def loss(
        self,
        taesd_params: Params,
        clip_params: Params,
        x0: Float[Array, "b h w c"],
        input_ids: Int[Array, "b n"],
        tau: float | Array,
    ) -> Float[Array, ""]:
        """L_clip of scaled latents and their prompts; its gradient goes to `x0` alone."""
        pixels = self.taesd.apply(
            {"params": taesd_params}, x0 / self.taesd.scaling_factor, method="decode"
        )
        pixels = jnp.clip((pixels.astype(jnp.float32) + 1.0) / 2.0, 0.0, 1.0)
        pixels = resize_bicubic(pixels, self.size)
        if self.mean is not None and self.std is not None:
            mean, std = (jnp.asarray(m).reshape(1, 1, 1, -1) for m in (self.mean, self.std))
            pixels = (pixels - mean) / std
        variables = {"params": clip_params}
        image = self.clip.apply(variables, pixels, method="encode_image")
        text = self.clip.apply(variables, input_ids, method="encode_text")
        return clip_loss(jax.lax.stop_gradient(text), image, tau)
