"""The TiUE student: the UNet's encoder once, its decoder at K timesteps in parallel, one image.

    f = encoder(z, t_enc, y);   eps_i = decoder(f, t_i, y), i = 1..K;   x0 = S z + sum_i E_i eps_i

Source: arXiv 2505.21960 (One-Way Ticket: time-independent unified encoder).

The decoder is vmapped over examples OUTSIDE and over timesteps INSIDE. Example-major keeps a batch
that is sharded over devices where it is (timesteps outside: all-gathers, 2.4 times the work per
device). As the features carry no timestep axis, XLA computes once what does not depend on t.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32

from tiue_jax.diffusion.schedule import NoiseSchedule
from tiue_jax.models.attention import batch_axes
from tiue_jax.models.unet import Features, UNet


def student_timesteps(
    schedule: NoiseSchedule, num_steps: int, spacing: str = "leading"
) -> Int32[np.ndarray, " K"]:
    """The K timesteps of a student's decoders; the encoder's t_enc is the first.

    Raises:
        ValueError: for one step that is not at the noise end: leading (t = 1) and linspace (t = 0)
            would return the input noise as the image.
    """
    if num_steps == 1 and spacing != "trailing":
        timestep = int(schedule.timesteps(1, spacing)[0])
        raise ValueError(
            f"num_steps 1 with {spacing} spacing is timestep {timestep}, where the image is the "
            "input noise itself: take num_steps 4 (one encoder, 4 parallel decoders: one pass), or "
            'timestep_spacing "trailing" (timestep 999) for a one-decoder student'
        )
    return schedule.timesteps(num_steps, spacing)


def encode_once(
    unet: UNet,
    params: Mapping[str, Any],
    noise: Float[Array, "b h w c"],
    context: Float[Array, "b n d"],
    t_enc: int | np.integer | Array,
) -> Features:
    """f = encoder(z, t_enc, y): the features that all decoders share."""
    t = jnp.full(noise.shape[:1], t_enc, jnp.int32)
    return unet.apply({"params": params}, noise, t, context, method="encode")


def decode_timesteps(
    unet: UNet,
    params: Mapping[str, Any],
    features: Features,
    context: Float[Array, "b n d"],
    timesteps: Int[np.ndarray, " K"] | Int[Array, " K"],
) -> Float[Array, "b K h w c"]:
    """eps_i = decoder(f, t_i, y) for every example and every timestep."""

    def decode(features: Features, context: Array, t: Array) -> Array:
        batch_of_one = jax.tree.map(lambda x: x[None], (features, t, context))
        return unet.apply({"params": params}, *batch_of_one, method="decode")[0]

    over_timesteps = jax.vmap(decode, in_axes=(None, None, 0))
    over_examples = jax.vmap(
        over_timesteps, in_axes=(0, 0, None), spmd_axis_name=batch_axes(len(context))
    )
    return over_examples(features, context, jnp.asarray(timesteps, jnp.int32))


def student_forward(
    unet: UNet,
    params: Mapping[str, Any],
    noise: Float[Array, "b h w c"],
    context: Float[Array, "b n d"],
    timesteps: Int[np.ndarray, " K"] | Int[Array, " K"],
    t_enc: int | np.integer | Array,
    S: float | Array,
    E: Float[np.ndarray, " K"] | Float[Array, " K"],
) -> tuple[Float[Array, "b h w c"], Float[Array, "b K h w c"]]:
    """One pass of the student.

    Args:
        noise: z ~ N(0, I), fp32.
        timesteps: t_1 > ... > t_K, from `student_timesteps`.
        t_enc: the encoder's timestep: t_1.
        S, E: from `ddim.closed_form` for these timesteps.
    Returns:
        x0: scaled latents, fp32: divide by the VAE's scaling factor to decode.
        eps: the K decoders' outputs, fp32.
    """
    features = encode_once(unet, params, noise, context, t_enc)
    eps = decode_timesteps(unet, params, features, context, timesteps).astype(jnp.float32)
    weights = jnp.asarray(E, jnp.float32).reshape(1, -1, 1, 1, 1)
    return S * noise.astype(jnp.float32) + jnp.sum(weights * eps, axis=1), eps
