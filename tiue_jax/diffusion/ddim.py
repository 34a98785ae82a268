"""DDIM with eta = 0: one step, the teacher's sampling loop, and the K updates written out.

With a = sqrt(abar_t), s = sqrt(1 - abar_t), and primes for the timestep that the step arrives at:

    x0 = (x - s eps) / a,   x' = a' x0 + s' eps            (arXiv 2010.02502, equation 12, eta = 0)

Every step is linear, x' = c x + d o, in the noisy latents x and the UNet's output o:

    o = eps:  c = a' / a,          d = s' - a' s / a
    o = v:    c = a' a + s' s,     d = s' a - a' s
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int, Num

from tiue_jax.diffusion.losses import classifier_free_guidance
from tiue_jax.diffusion.schedule import NoiseSchedule
from tiue_jax.models.unet import UNet

Predict = Callable[[Array, Array], Array]


def step_coefficients(
    schedule: NoiseSchedule, timesteps: Int[np.ndarray, " K"]
) -> tuple[Float64[np.ndarray, " K"], Float64[np.ndarray, " K"]]:
    """(c, d) of each DDIM step x' = c x + d o along `timesteps`, in float64 on the host."""
    timesteps = np.asarray(timesteps)
    alpha, sigma = schedule.alpha_sigma(timesteps)
    alpha_to, sigma_to = schedule.alpha_sigma(schedule.previous_timesteps(timesteps))
    if schedule.prediction_type == "epsilon":
        return alpha_to / alpha, sigma_to - alpha_to * sigma / alpha
    return alpha_to * alpha + sigma_to * sigma, sigma_to * alpha - alpha_to * sigma


def x0_coefficients(
    schedule: NoiseSchedule, timesteps: Int[np.ndarray, " K"]
) -> tuple[Float64[np.ndarray, " K"], Float64[np.ndarray, " K"]]:
    """(p, q) of the clean image that each output stands for, x0 = p x + q o; float64, host.

    o = eps: p = 1 / a, q = -s / a; o = v: p = a, q = -s. It is a step that arrives at a' = 1.
    """
    alpha, sigma = schedule.alpha_sigma(np.asarray(timesteps))
    if schedule.prediction_type == "epsilon":
        return 1.0 / alpha, -sigma / alpha
    return alpha, -sigma


def closed_form(
    schedule: NoiseSchedule, timesteps: Int[np.ndarray, " K"]
) -> tuple[float, Float64[np.ndarray, " K"]]:
    """All K steps in one: x0 = S z + sum_i E_i o_i, S = prod_i c_i, E_i = d_i prod_{j>i} c_j.

    Returns:
        S and E [K]. For Stable Diffusion and timesteps 751, 501, 251, 1: S = 4.2346,
        E = -2.4919, -.9249, -.6568, -.0121.
    """
    c, d = step_coefficients(schedule, timesteps)
    rest = np.append(np.cumprod(c[::-1])[::-1], 1.0)  # rest[i] = c_i c_{i+1} ... c_K
    return float(rest[0]), d * rest[1:]


def ddim_step(
    x: Float[Array, "*s"], output: Float[Array, "*s"], c: float | Array, d: float | Array
) -> Float[Array, "*s"]:
    """x' = c x + d o in fp32; (c, d) from `step_coefficients`."""
    return c * x + d * output.astype(jnp.float32)


def predicted_noise(
    schedule: NoiseSchedule,
    timesteps: Int[np.ndarray, " K"],
    noise: Float[Array, "b h w c"],
    outputs: Float[Array, "b K h w c"],
) -> Float[Array, "b K h w c"]:
    """eps_i that the outputs o_i along the DDIM trajectory from `noise` stand for.

    o = eps: the outputs themselves. o = v: alpha_i v_i + sigma_i x_i, with x_1 = z and x_{i+1} =
    c_i x_i + d_i v_i.
    """
    if schedule.prediction_type == "epsilon":
        return outputs
    c, d = step_coefficients(schedule, timesteps)
    alpha, sigma = schedule.alpha_sigma(np.asarray(timesteps))
    x, eps = noise, []
    for i in range(len(timesteps)):
        eps.append(float(alpha[i]) * outputs[:, i] + float(sigma[i]) * x)
        x = ddim_step(x, outputs[:, i], float(c[i]), float(d[i]))
    return jnp.stack(eps, axis=1)


def ddim_loop(
    predict: Predict,
    schedule: NoiseSchedule,
    noise: Float[Array, "b h w c"],
    timesteps: Int[np.ndarray, " K"],
) -> Float[Array, "b h w c"]:
    """x0 from `noise` through all `timesteps`: one compiled step, scanned.

    Args:
        predict: (x_t, t [b]) -> the model's output (guided, if it is to be).
        noise: z ~ N(0, I), fp32.
    """
    c, d = step_coefficients(schedule, timesteps)
    steps = (
        jnp.asarray(timesteps, jnp.int32),
        jnp.asarray(c, jnp.float32),
        jnp.asarray(d, jnp.float32),
    )

    def body(x: Array, step: tuple[Array, Array, Array]) -> tuple[Array, None]:
        t, c, d = step
        output = predict(x, jnp.broadcast_to(t, x.shape[:1]))
        return ddim_step(x, output, c, d), None

    return jax.lax.scan(body, noise.astype(jnp.float32), steps)[0]


def guided_output(
    unet: UNet,
    params: Mapping[str, Any],
    x_t: Float[Array, "b h w c"],
    t: Num[Array, " b"],
    context: Float[Array, "b n d"],
    null_context: Float[Array, "b n d"],
    scale: float | Array,
) -> Float[Array, "b h w c"]:
    """u + w (c - u), both halves in one UNet call of batch 2b; fp32.

    Pairs are kept together (null, prompt, null, prompt, ...), so that a batch sharded over devices
    stays where it is.
    """

    def pair(null: Array, cond: Array) -> Array:
        return jnp.stack([null, cond], axis=1).reshape(-1, *cond.shape[1:])

    out = unet.apply({"params": params}, pair(x_t, x_t), pair(t, t), pair(null_context, context))
    out = out.astype(jnp.float32).reshape(-1, 2, *x_t.shape[1:])
    return classifier_free_guidance(out[:, 0], out[:, 1], scale)


def predictor(
    unet: UNet,
    params: Mapping[str, Any],
    context: Float[Array, "b n d"],
    null_context: Float[Array, "b n d"],
    scale: float | Array,
    guided: bool,
) -> Predict:
    """The predict(x, t) of a sampler's loop, with guidance `scale` in the way that `unet` has it.

    A UNet with a `time_cond_dim` (LCM's) is told w; any other runs twice, as `guided_output`.

    Args:
        guided: False: of the prompt alone, w = 1, whatever `scale` is.
    """

    def predict(x: Array, t: Array) -> Array:
        if unet.time_cond_dim is not None:
            w = jnp.asarray(scale if guided else 1.0, jnp.float32)
            told = jnp.broadcast_to(w, x.shape[:1])
            return unet.apply({"params": params}, x, t, context, told)
        if guided:
            return guided_output(unet, params, x, t, context, null_context, scale)
        return unet.apply({"params": params}, x, t, context)

    return predict


@partial(jax.jit, static_argnames=("unet", "schedule", "num_steps", "spacing", "guided"))
def ddim_sample(
    unet: UNet,
    params: Mapping[str, Any],
    schedule: NoiseSchedule,
    noise: Float[Array, "b h w c"],
    context: Float[Array, "b n d"],
    null_context: Float[Array, "b n d"],
    guidance_scale: float | Array,
    num_steps: int,
    *,
    spacing: str | None = None,
    guided: bool = True,
) -> Float[Array, "b h w c"]:
    """The teacher's images, as latents: DDIM of `num_steps` steps with guidance, compiled once.

    Args:
        noise: z ~ N(0, I); the same noise gives the same image whatever the batch.
        null_context: of the empty prompt, or of a negative prompt.
        guidance_scale: w in u + w (c - u). 1 is no guidance; `guided=False` then halves the work.
        num_steps: 25 to 50 are usual.
        spacing: of the timesteps; None takes the schedule's.
    Returns:
        x0, scaled latents, fp32: divide by the VAE's scaling factor to decode.
    Source: diffusers 0.42 StableDiffusionPipeline with DDIMScheduler, eta 0, no clipping.
    """
    predict = predictor(unet, params, context, null_context, guidance_scale, guided)
    return ddim_loop(predict, schedule, noise, schedule.timesteps(num_steps, spacing))
