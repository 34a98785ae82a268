"""Prompts to images in a few lines of Python.

    pipeline = load_pipeline("assets/tiny-sd-tiue")
    images = pipeline.sample(["a red circle above a blue square"], seeds=[0])   # uint8 [1, H, W, 3]

An image is a function of its prompt and its seed: not of the batch, nor of the number of devices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt8, UInt32

from tiue_jax.diffusion.ddim import closed_form, ddim_sample
from tiue_jax.diffusion.images import decode_images
from tiue_jax.diffusion.student import student_forward, student_timesteps
from tiue_jax.io.files import StrPath
from tiue_jax.models.clip import CLIPTextEncoder
from tiue_jax.models.unet import UNet
from tiue_jax.models.vae import AutoencoderKL
from tiue_jax.pretrained.folder import StableDiffusion, StudentOptions, load_stable_diffusion

Images = UInt8[np.ndarray, "n H W 3"]
MAX_SEED = 2**32 - 1


@dataclass(frozen=True, eq=False)
class Pipeline:
    """A loaded model, ready to sample.

    Attributes:
        model: what the folder held.
        batch_size: images made at a time; rounded up to a multiple of the number of devices. The
            last batch is filled up, so that one shape is compiled.
        progress: called with an iterator of batches and their number; a progress bar's place.
    """

    model: StableDiffusion
    batch_size: int = 8
    progress: Callable[[Iterator[Any], int], Iterator[Any]] = lambda batches, total: batches

    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        num_steps: int | None = None,
        timestep_spacing: str | None = None,
    ) -> Images:
        """One pass of the student a batch: the encoder once, `num_steps` decoders in parallel.

        Args:
            prompts: one an image.
            seeds: one an image, 0..2^32 - 1: of the input noise.
            num_steps, timestep_spacing: K and how the timesteps are spread; None: what the student
                was trained for (`tiue.json`), or 4 and "leading" where the model is no student.

        Raises:
            ValueError: numbers of prompts and seeds differ, or settings that make no image.
        """
        told = self.model.student or StudentOptions()
        steps = told.num_steps if num_steps is None else num_steps
        schedule, unet = self.model.schedule, self.model.unet
        timesteps = student_timesteps(schedule, steps, timestep_spacing or told.timestep_spacing)
        S, E = closed_form(schedule, timesteps)

        def latents(params: Mapping[str, Any], noise: Array, context: Array) -> Array:
            return _student_latents(unet, params, noise, context, jnp.asarray(timesteps), S, E)

        return self._run(latents, prompts, seeds)

    def sample_teacher(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        num_steps: int = 25,
        guidance_scale: float = 7.5,
        negative_prompt: str = "",
        timestep_spacing: str | None = None,
    ) -> Images:
        """DDIM with classifier-free guidance: an ordinary Stable Diffusion.

        Args:
            guidance_scale: w in u + w (c - u); 1 samples without guidance, in half the time.
            negative_prompt: takes the place of the empty prompt in u.
            timestep_spacing: None takes the schedule's.
            The others as in `sample`.
        """
        schedule, unet = self.model.schedule, self.model.unet
        null_ids = self.model.tokenizer([negative_prompt])
        null_context = self.encode(null_ids)

        def latents(params: Mapping[str, Any], noise: Array, context: Array) -> Array:
            null = jnp.broadcast_to(null_context, context.shape)
            return ddim_sample(
                unet, params, schedule, noise, context, null, guidance_scale, num_steps,
                spacing=timestep_spacing, guided=guidance_scale != 1.0,
            )  # fmt: skip

        return self._run(latents, prompts, seeds)

    def encode(
        self, input_ids: Int[np.ndarray, "b n"] | Int[Array, "b n"]
    ) -> Float[Array, "b n d"]:
        """The text encoder's context of token ids."""
        return _encode(self.model.text_encoder, self.model.params["text_encoder"], input_ids)

    def _run(
        self,
        latents: Callable[[Mapping[str, Any], Array, Array], Array],
        prompts: Sequence[str],
        seeds: Sequence[int],
    ) -> Images:
        """Encode, draw noise, call `latents`, decode: in batches of one size over all devices."""
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} prompts, {len(seeds)} seeds: expected one each")
        wrong = [seed for seed in seeds if not 0 <= seed <= MAX_SEED]
        if wrong:
            raise ValueError(f"seed {wrong[0]}: expected 0..{MAX_SEED}")
        model = self.model
        devices = jax.device_count()
        split = NamedSharding(_mesh(), PartitionSpec("data"))
        size = -(-min(self.batch_size, max(len(prompts), 1)) // devices) * devices
        shape = (model.latent_size, model.latent_size, model.unet.in_channels)
        input_ids = model.tokenizer(list(prompts))
        side = model.latent_size * model.pixels_per_latent
        done = [np.zeros((0, side, side, model.vae.in_channels), np.uint8)]
        starts = range(0, len(prompts), size)
        for start in self.progress(iter(starts), len(starts)):
            rows = np.arange(start, start + size) % len(prompts)
            ids = jax.device_put(input_ids[rows], split)
            chosen = jax.device_put(np.asarray(seeds, np.uint32)[rows], split)
            context = self.encode(ids)
            x0 = latents(model.params["unet"], seed_noise(chosen, shape), context)
            images = _decode(model.vae, model.params["vae"], x0)
            done.append(np.asarray(images)[: len(prompts) - start])
        return np.concatenate(done)


@partial(jax.jit, static_argnames="shape")
def seed_noise(seeds: UInt32[Array, " b"], shape: tuple[int, int, int]) -> Float[Array, "b h w c"]:
    """N(0, I) noise of every image from its own seed."""
    return jax.vmap(lambda seed: jax.random.normal(jax.random.key(seed), shape))(seeds)


@partial(jax.jit, static_argnames="text_encoder")
def _encode(text_encoder: CLIPTextEncoder, params: Any, ids: Array) -> Array:
    return text_encoder.apply({"params": params}, jnp.asarray(ids))


@partial(jax.jit, static_argnames="vae")
def _decode(vae: AutoencoderKL, params: Any, latents: Array) -> Array:
    return decode_images(vae, params, latents)


@partial(jax.jit, static_argnames="unet")
def _student_latents(
    unet: UNet, params: Any, noise: Array, context: Array, timesteps: Array, S: Any, E: Any
) -> Array:
    return student_forward(unet, params, noise, context, timesteps, timesteps[0], S, E)[0]


def load_pipeline(
    folder: StrPath, *, dtype: DTypeLike = jnp.float32, batch_size: int = 8
) -> Pipeline:
    """Load a model folder for sampling.

    Args:
        folder: a student's or an ordinary Stable Diffusion's.
        dtype: compute dtype, and that of the parameters: bfloat16 on TPUs halves memory and time.
        batch_size: images made at a time.

    Raises:
        InputError: as `load_stable_diffusion`.
    """
    model = load_stable_diffusion(folder, dtype=dtype, param_dtype=dtype)
    everywhere = NamedSharding(_mesh(), PartitionSpec())
    return Pipeline(
        replace(model, params=jax.device_put(model.params, everywhere)), batch_size=batch_size
    )


def _mesh() -> Mesh:
    """All devices in a row."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
