"""One UNet call at the noise end: the sampler of SwiftBrush and DMD2.

    x0 = (z - s eps) / a   or   a z - s v   at t = T - 1, a = sqrt(abar_t), s = sqrt(1 - abar_t)

For Stable Diffusion t = 999 and a^2 = 0.00466: z passes for x_t, which has next to no image in it.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tiue_jax.diffusion.ddim import Predict, ddim_step, predictor, x0_coefficients
from tiue_jax.diffusion.schedule import NoiseSchedule
from tiue_jax.models.unet import UNet


def one_step(
    predict: Predict, schedule: NoiseSchedule, noise: Float[Array, "b h w c"]
) -> Float[Array, "b h w c"]:
    """x0 that the model's output at t = T - 1 stands for. Source: arXiv 2312.05239 (SwiftBrush).

    Args:
        predict: (z, t [b]) -> the model's output.
        noise: z ~ N(0, I), fp32.
    """
    t = schedule.num_train_timesteps - 1
    (p,), (q,) = x0_coefficients(schedule, np.array([t]))
    z = noise.astype(jnp.float32)
    return ddim_step(z, predict(z, jnp.full(z.shape[:1], t, jnp.int32)), float(p), float(q))


@partial(jax.jit, static_argnames=("unet", "schedule", "num_steps", "guided"))
def one_step_sample(
    unet: UNet,
    params: Mapping[str, Any],
    schedule: NoiseSchedule,
    noise: Float[Array, "b h w c"],
    context: Float[Array, "b n d"],
    null_context: Float[Array, "b n d"],
    guidance_scale: float | Array = 1.0,
    num_steps: int = 1,
    *,
    guided: bool = False,
) -> Float[Array, "b h w c"]:
    """A one-step student's images, as latents. Has the arguments of every sampler, not their uses.

    Args:
        null_context, guidance_scale: not looked at: these students have guidance in their weights.
        num_steps: 1.
        guided: False.
        The others as of `ddim_sample`.
    Returns:
        x0, scaled latents, fp32: divide by the VAE's scaling factor to decode.

    Raises:
        ValueError: another number of steps, or guidance.
    """
    if num_steps != 1 or guided:
        raise ValueError(
            f"num_steps {num_steps}, guided {guided}: a one-step student takes 1 step, unguided"
        )
    predict = predictor(unet, params, context, null_context, guidance_scale, guided=False)
    return one_step(predict, schedule, noise)
