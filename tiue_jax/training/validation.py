"""Images of the validation prompts, always from the same noise, while the student learns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PRNGKeyArray, UInt8

from tiue_jax.data.pipeline import CutReport
from tiue_jax.diffusion.ddim import closed_form
from tiue_jax.diffusion.images import decode_images
from tiue_jax.diffusion.student import student_forward
from tiue_jax.pretrained.folder import StableDiffusion
from tiue_jax.training.options import StepOptions
from tiue_jax.training.sharding import batch_sharding, shard
from tiue_jax.training.summaries import say

Draw = Callable[[Any], UInt8[np.ndarray, "n h w 3"]]


def make_validation(
    sd: StableDiffusion,
    prompts: Sequence[str],
    options: StepOptions,
    key: PRNGKeyArray,
    mesh: Mesh,
) -> Draw:
    """Return draw(student parameters) -> one image a prompt, in one pass.

    Image i is of prompt i and of the noise of (key, i): it changes with the parameters alone. The
    devices of the mesh share the images. Says what of a prompt is too long for the tokenizer.

    Args:
        sd: the teacher: modules, text encoder, VAE, schedule; its UNet's parameters are not read.
    """
    timesteps = np.asarray(options.student_timesteps(sd.schedule), np.int32)
    t_enc = options.encoder_timestep(sd.schedule)
    S, E = closed_form(sd.schedule, timesteps)
    shape = (options.latent_size, options.latent_size, sd.unet.in_channels)
    everywhere, split = NamedSharding(mesh, PartitionSpec()), batch_sharding(mesh)
    ids = CutReport(sd.tokenizer.encode, say, shown=len(prompts))(prompts)
    count = len(ids)
    rows = np.arange(-(-count // mesh.size) * mesh.size) % count  # as many for each device

    def encode(params: Any, ids: Array) -> Float[Array, "b n d"]:
        return sd.text_encoder.apply({"params": params}, ids)

    def draw(student: Any, vae: Any, context: Array, noise: Array) -> UInt8[Array, "n h w 3"]:
        student = jax.lax.with_sharding_constraint(student, everywhere)  # or activations would move
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # for the attention kernel
            x0, _ = student_forward(sd.unet, student, noise, context, timesteps, t_enc, S, E)
            return decode_images(sd.vae, vae, x0)[:count]

    def start_noise(key: PRNGKeyArray) -> Float[Array, "n h w c"]:
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.asarray(rows))
        return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)

    context = jax.jit(encode, out_shardings=split)(sd.params["text_encoder"], ids[rows])
    noise = jax.jit(start_noise, out_shardings=split)(key)
    vae = shard(sd.params["vae"], mesh, split=False)
    compiled = jax.jit(draw, out_shardings=everywhere)
    return lambda student: jax.device_get(compiled(student, vae, context, noise))
