"""Euler's method on the probability flow, noise level by noise level: the sampler of SD-Turbo.

With sigma_t = sqrt((1 - abar_t) / abar_t), latents are x = x0 + sigma_t eps, the UNet sees
x / sqrt(sigma_t^2 + 1), and a prime stands for the noise level that the step arrives at:

    x' = x + h eps,   h = sigma' - sigma             (arXiv 2206.00364, algorithm 1, lines 4 and 5)

Every step is linear, x' = c x + d o, in the latents x and the UNet's output o:

    o = eps:  c = 1,                               d = h
    o = v:    c = 1 + h sigma / (sigma^2 + 1),     d = h / sqrt(sigma^2 + 1)

It is DDIM in other units: what differs is where it starts, and that it ends at a clean image.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64

from tiue_jax.diffusion.ddim import Predict, ddim_step, predictor
from tiue_jax.diffusion.schedule import NoiseSchedule
from tiue_jax.models.unet import UNet


def euler_timesteps(
    schedule: NoiseSchedule, num_steps: int, spacing: str | None = None
) -> Float64[np.ndarray, " K"]:
    """The timesteps t_1 > ... > t_K: `schedule.timesteps`, but that linspace is not rounded.

    Raises:
        ValueError: as `schedule.timesteps`.
    Source: diffusers 0.42 EulerDiscreteScheduler.set_timesteps.
    """
    timesteps = schedule.timesteps(num_steps, spacing)
    if (spacing or schedule.timestep_spacing) != "linspace":
        return timesteps.astype(np.float64)
    return np.linspace(0, schedule.num_train_timesteps - 1, num_steps)[::-1]


def euler_sigmas(
    schedule: NoiseSchedule, timesteps: Float64[np.ndarray, " K"]
) -> Float64[np.ndarray, " K1"]:
    """The K noise levels of `timesteps`, linear between whole ones, and the 0 that ends them."""
    known = np.arange(schedule.num_train_timesteps)
    alpha, sigma = schedule.alpha_sigma(known)
    return np.append(np.interp(timesteps, known, sigma / alpha), 0.0)


def euler_coefficients(
    schedule: NoiseSchedule, sigmas: Float64[np.ndarray, " K1"]
) -> tuple[Float64[np.ndarray, " K"], Float64[np.ndarray, " K"]]:
    """(c, d) of each Euler step x' = c x + d o along `sigmas`, in float64 on the host."""
    sigma, h = sigmas[:-1], np.diff(sigmas)
    if schedule.prediction_type == "epsilon":
        return np.ones_like(h), h
    return 1.0 + h * sigma / (sigma**2 + 1.0), h / np.sqrt(sigma**2 + 1.0)


def euler_loop(
    predict: Predict,
    schedule: NoiseSchedule,
    noise: Float[Array, "b h w c"],
    num_steps: int,
    spacing: str | None = None,
) -> Float[Array, "b h w c"]:
    """x0 from `noise` in `num_steps` steps: one compiled step, scanned.

    The latents start at sigma_1 z; with leading spacing at sqrt(sigma_1^2 + 1) z.

    Args:
        predict: (x / sqrt(sigma_t^2 + 1), t [b] in fp32) -> the model's output (guided, if it is
            to be).
        noise: z ~ N(0, I), fp32.
        spacing: of the timesteps; None takes the schedule's.
    """
    timesteps = euler_timesteps(schedule, num_steps, spacing)
    sigmas = euler_sigmas(schedule, timesteps)
    c, d = euler_coefficients(schedule, sigmas)
    levels = np.sqrt(sigmas**2 + 1.0)  # standard deviation of x, were that of x0 one
    leading = (spacing or schedule.timestep_spacing) == "leading"
    start = levels[0] if leading else sigmas[0]
    steps = tuple(jnp.asarray(values, jnp.float32) for values in (timesteps, 1 / levels[:-1], c, d))

    def body(x: Array, step: tuple[Array, ...]) -> tuple[Array, None]:
        t, scale, c, d = step
        output = predict(scale * x, jnp.broadcast_to(t, x.shape[:1]))
        return ddim_step(x, output, c, d), None

    return jax.lax.scan(body, float(start) * noise.astype(jnp.float32), steps)[0]


@partial(jax.jit, static_argnames=("unet", "schedule", "num_steps", "spacing", "guided"))
def euler_sample(
    unet: UNet,
    params: Mapping[str, Any],
    schedule: NoiseSchedule,
    noise: Float[Array, "b h w c"],
    context: Float[Array, "b n d"],
    null_context: Float[Array, "b n d"],
    guidance_scale: float | Array = 1.0,
    num_steps: int = 1,
    *,
    spacing: str | None = None,
    guided: bool = False,
) -> Float[Array, "b h w c"]:
    """SD-Turbo's images, as latents: `num_steps` Euler steps, without guidance unless `guided`.

    Args:
        num_steps: 1, 2 or 4 for SD-Turbo, whose `spacing` is trailing: timesteps 999; 999, 499;
            999, 749, 499, 249.
        The others as of `ddim_sample`.
    Returns:
        x0, scaled latents, fp32: divide by the VAE's scaling factor to decode.
    Source: diffusers 0.42 StableDiffusionPipeline with EulerDiscreteScheduler, s_churn 0.
    """
    predict = predictor(unet, params, context, null_context, guidance_scale, guided)
    return euler_loop(predict, schedule, noise, num_steps, spacing)
