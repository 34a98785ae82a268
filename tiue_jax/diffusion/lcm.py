"""Multistep consistency sampling: the sampler of latent consistency models (LCM).

With a = sqrt(abar_t), s = sqrt(1 - abar_t), x0hat the clean image that the UNet's output o stands
for, primes for the next timestep, and fresh noise n ~ N(0, I) at every step but the last:

    f = c_skip(t) x + c_out(t) x0hat,   x' = a' f + s' n;   the last f is the image
                                                            (arXiv 2310.04378, algorithm 3)
Every step is linear, x' = c x + d o + e n. With x0hat = p x + q o:

    c = a' (c_skip + c_out p),   d = a' c_out q,   e = s';   in the last step a' = 1, s' = 0
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int, Int32, Key

from tiue_jax.diffusion.ddim import Predict, ddim_step, predictor, x0_coefficients
from tiue_jax.diffusion.schedule import NoiseSchedule
from tiue_jax.models.unet import UNet

ORIGINAL_STEPS = 50  # of the solver that an LCM was distilled with
SIGMA_DATA = 0.5
TIMESTEP_SCALING = 10.0


def lcm_timesteps(
    schedule: NoiseSchedule, num_steps: int, original_steps: int = ORIGINAL_STEPS
) -> Int32[np.ndarray, " K"]:
    """K of the timesteps that the model was distilled at, evenly by index, from T - 1 down.

    Those are T - 1, T - 1 - k, ..., k - 1 with k = T // original_steps. For T = 1000, K = 4:
    999, 759, 499, 259.

    Raises:
        ValueError: not 1 <= num_steps <= original_steps <= T.
    Source: diffusers 0.42 LCMScheduler.set_timesteps.
    """
    total = schedule.num_train_timesteps
    if not 1 <= original_steps <= total:
        raise ValueError(f"original_steps {original_steps}: choose 1..{total}")
    if not 1 <= num_steps <= original_steps:
        raise ValueError(
            f"num_steps {num_steps}: choose 1..{original_steps}, the original_steps of the model"
        )
    distilled = np.arange(original_steps, 0, -1) * (total // original_steps) - 1
    chosen = np.floor(np.linspace(0, original_steps, num_steps, endpoint=False))
    return distilled[chosen.astype(int)].astype(np.int32)


def boundary_scalings(
    timesteps: Int[np.ndarray, " K"],
) -> tuple[Float64[np.ndarray, " K"], Float64[np.ndarray, " K"]]:
    """c_skip = .25 / ((10 t)^2 + .25), c_out = 10 t / sqrt((10 t)^2 + .25): f is x at t = 0.

    Source: diffusers 0.42 LCMScheduler.get_scalings_for_boundary_condition_discrete.
    """
    t = TIMESTEP_SCALING * np.asarray(timesteps, np.float64)
    squares = t**2 + SIGMA_DATA**2
    return SIGMA_DATA**2 / squares, t / np.sqrt(squares)


def lcm_coefficients(
    schedule: NoiseSchedule, timesteps: Int[np.ndarray, " K"]
) -> tuple[Float64[np.ndarray, " K"], Float64[np.ndarray, " K"], Float64[np.ndarray, " K"]]:
    """(c, d, e) of each step x' = c x + d o + e n along `timesteps`, in float64 on the host."""
    alpha, sigma = schedule.alpha_sigma(np.asarray(timesteps))
    alpha_to, sigma_to = np.append(alpha[1:], 1.0), np.append(sigma[1:], 0.0)
    p, q = x0_coefficients(schedule, timesteps)
    c_skip, c_out = boundary_scalings(timesteps)
    return alpha_to * (c_skip + c_out * p), alpha_to * c_out * q, sigma_to


@partial(jax.jit, static_argnames=("num_steps", "shape"))
def step_noises(
    keys: Key[Array, " b"], num_steps: int, shape: tuple[int, int, int]
) -> Float[Array, "_ b h w c"]:
    """N(0, I) noise of all steps but the last, [K - 1, b, h, w, c], of each image from its own key.

    Folding in the step leaves `keys` themselves for the noise that sampling starts from.
    """

    def draw(step: Array, key: Array) -> Array:
        return jax.random.normal(jax.random.fold_in(key, step), shape)

    over_images = jax.vmap(draw, in_axes=(None, 0))
    return jax.vmap(over_images, in_axes=(0, None))(jnp.arange(1, num_steps), keys)


def lcm_loop(
    predict: Predict,
    schedule: NoiseSchedule,
    noise: Float[Array, "b h w c"],
    timesteps: Int[np.ndarray, " K"],
    noises: Float[Array, "_ b h w c"] | None = None,
) -> Float[Array, "b h w c"]:
    """x0 from `noise` through all `timesteps`: one compiled step, scanned.

    Args:
        predict: (x_t, t [b]) -> the model's output.
        noise: z ~ N(0, I), fp32.
        noises: n ~ N(0, I) of all steps but the last, in order: from `step_noises`. None: of one
            step, which needs none.

    Raises:
        ValueError: `noises` are not K - 1.
    """
    if noises is None:
        noises = jnp.zeros((0, *noise.shape), jnp.float32)
    if len(noises) != len(timesteps) - 1:
        raise ValueError(
            f"noises: {len(noises)}, expected {len(timesteps) - 1}: one for every step but the "
            f"last of {len(timesteps)}"
        )
    c, d, e = (jnp.asarray(values, jnp.float32) for values in lcm_coefficients(schedule, timesteps))
    last = jnp.zeros((1, *noise.shape), jnp.float32)
    fresh = jnp.concatenate([noises.astype(jnp.float32), last])
    steps = (jnp.asarray(timesteps, jnp.int32), c, d, e, fresh)

    def body(x: Array, step: tuple[Array, Array, Array, Array, Array]) -> tuple[Array, None]:
        t, c, d, e, fresh = step
        output = predict(x, jnp.broadcast_to(t, x.shape[:1]))
        return ddim_step(x, output, c, d) + e * fresh, None

    return jax.lax.scan(body, noise.astype(jnp.float32), steps)[0]


@partial(jax.jit, static_argnames=("unet", "schedule", "num_steps", "guided", "original_steps"))
def lcm_sample(
    unet: UNet,
    params: Mapping[str, Any],
    schedule: NoiseSchedule,
    noise: Float[Array, "b h w c"],
    context: Float[Array, "b n d"],
    null_context: Float[Array, "b n d"],
    guidance_scale: float | Array = 8.0,
    num_steps: int = 4,
    *,
    noises: Float[Array, "_ b h w c"] | None = None,
    guided: bool = True,
    original_steps: int = ORIGINAL_STEPS,
) -> Float[Array, "b h w c"]:
    """An LCM's images, as latents, in `num_steps` steps.

    Args:
        guidance_scale: w. A UNet with a `time_cond_dim` is told it, at no cost; any other (with an
            LCM-LoRA merged in: w of 1 to 2) computes u + w (c - u).
        num_steps: 1, 2, 4 and 8 are usual; timesteps from `lcm_timesteps`.
        noises: as of `lcm_loop`: needed from two steps on.
        guided: False: the prompt alone, w = 1.
        original_steps: of the solver that the model was distilled with.
        The others as of `ddim_sample`.
    Returns:
        x0, scaled latents, fp32: divide by the VAE's scaling factor to decode.

    Raises:
        ValueError: `noises` are not num_steps - 1, or as `lcm_timesteps`.
    Source: diffusers 0.42 LatentConsistencyModelPipeline with LCMScheduler, no clipping.
    """
    predict = predictor(unet, params, context, null_context, guidance_scale, guided)
    timesteps = lcm_timesteps(schedule, num_steps, original_steps)
    return lcm_loop(predict, schedule, noise, timesteps, noises)
