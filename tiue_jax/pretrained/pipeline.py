"""Prompts to images in a few lines of Python.

    pipeline = load_pipeline("assets/tiny-sd-tiue")
    images = pipeline.sample(["a red circle above a blue square"], seeds=[0])   # uint8 [1, H, W, 3]

An image is a function of its prompt and its seed, whatever the batch and the number of devices, up
to rounding: at most 1/255 in a few bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, UInt8, UInt32

from tiue_jax.diffusion.ddim import closed_form, ddim_sample
from tiue_jax.diffusion.euler import euler_sample
from tiue_jax.diffusion.images import decode_pixels, to_bytes
from tiue_jax.diffusion.lcm import lcm_sample, step_noises
from tiue_jax.diffusion.one_step import one_step_sample
from tiue_jax.diffusion.student import student_forward, student_timesteps
from tiue_jax.io.errors import InputError, RunError
from tiue_jax.io.files import StrPath
from tiue_jax.models.clip import CLIPTextEncoder
from tiue_jax.models.taesd import AutoencoderTiny
from tiue_jax.models.unet import UNet
from tiue_jax.models.vae import AutoencoderKL
from tiue_jax.pretrained.auxiliary import LoadedTAESD, load_taesd
from tiue_jax.pretrained.folder import StableDiffusion, StudentOptions
from tiue_jax.pretrained.hub import resolve_network
from tiue_jax.pretrained.load import load_model
from tiue_jax.pretrained.methods import METHODS, choose_method, default_guidance, original_steps

Images = UInt8[np.ndarray, "n H W 3"]
Latents = Callable[[Mapping[str, Any], Array, Array, Array], Array]
MAX_SEED = 2**32 - 1
_SAMPLERS: dict[str, Callable[..., Array]] = {
    "teacher": ddim_sample,
    "turbo": euler_sample,
    "lcm": lcm_sample,
    "one-step": one_step_sample,
}


@dataclass(frozen=True, eq=False)
class Pipeline:
    """A loaded model, ready to sample.

    Attributes:
        model: what the folder held.
        taesd: a small decoder in place of the VAE's; None: the VAE.
        batch_size: images made at a time; rounded up to a multiple of the number of devices. The
            last batch is filled up, so that one shape is compiled.
    """

    model: StableDiffusion
    batch_size: int = 8
    taesd: LoadedTAESD | None = None

    def sample(self, prompts: Sequence[str], seeds: Sequence[int], **options: Any) -> Images:
        """Make one image a prompt and seed, all in memory; options and errors: `sample_batches`."""
        side = self.model.latent_size * self.model.pixels_per_latent
        images = np.empty((len(prompts), side, side, self.model.vae.in_channels), np.uint8)
        done = 0
        for batch in self.sample_batches(prompts, seeds, **options):
            images[done : done + len(batch)] = batch
            done += len(batch)
        return images

    def sample_batches(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        method: str = "auto",
        num_steps: int | None = None,
        timestep_spacing: str | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
    ) -> Iterator[Images]:
        """Make one image a prompt and seed; yield them in order, `batch_size` at a time.

        Args:
            prompts: one an image.
            seeds: one an image, 0..2^32 - 1: of all its noise.
            method: one of `methods.METHODS`; "auto": what the folder says.
            num_steps, timestep_spacing: K and how the timesteps are spread; None: what the student
                was trained for, or the method's own.
            guidance_scale: w, where the method has one; 1 samples without, in half the time.
            negative_prompt: takes the place of the empty prompt in u, where there is a u.

        Raises:
            ValueError: numbers of prompts and seeds differ, or settings that make no image.
            RunError: an image is not finite; raised in place of its batch.
        """
        _require_seeds(prompts, seeds)
        model = self.model
        name = choose_method(model, method)
        told = METHODS[name]
        student = model.student or StudentOptions()
        if num_steps is None:
            num_steps = student.num_steps if name == "tiue" else told.num_steps
        if told.guidance_scale is None and guidance_scale not in (None, 1.0):
            raise ValueError(f"guidance_scale {guidance_scale}: method {name} has no guidance")
        if guidance_scale is not None and not math.isfinite(guidance_scale):
            raise ValueError(f"guidance_scale {guidance_scale}: expected a finite number")
        w = default_guidance(model, name) if guidance_scale is None else guidance_scale
        embedded = model.unet.time_cond_dim is not None
        guided = w is not None and (w != 1.0 or embedded)
        if negative_prompt and (embedded or not guided):
            raise ValueError(f"negative_prompt: method {name} without guidance has no use for it")
        if timestep_spacing is not None and name in ("lcm", "one-step"):
            raise ValueError(f"timestep_spacing: method {name} has timesteps of its own")
        spacing = timestep_spacing or told.spacing
        if name == "tiue":
            return self._run(
                self._one_pass(num_steps, spacing or student.timestep_spacing), prompts, seeds
            )
        null_context = self.encode(model.tokenizer([negative_prompt or ""]))
        sampler = partial(
            _SAMPLERS[name], model.unet, schedule=model.schedule, num_steps=num_steps,
            guided=guided, guidance_scale=1.0 if w is None else w,
        )  # fmt: skip
        if name in ("teacher", "turbo"):
            sampler = partial(sampler, spacing=spacing)
        elif name == "lcm":
            sampler = partial(sampler, original_steps=original_steps(model))

        def latents(params: Mapping[str, Any], noise: Array, context: Array, seeds: Array) -> Array:
            null = jnp.broadcast_to(null_context, context.shape)
            noises = {}
            if name == "lcm":
                noises["noises"] = seed_step_noises(seeds, num_steps, noise.shape[1:])
            return sampler(params, noise=noise, context=context, null_context=null, **noises)

        return self._run(latents, prompts, seeds)

    def _one_pass(self, num_steps: int, spacing: str) -> Latents:
        """The encoder once, `num_steps` decoders in parallel."""
        schedule, unet = self.model.schedule, self.model.unet
        timesteps = student_timesteps(schedule, num_steps, spacing)
        S, E = closed_form(schedule, timesteps)

        def latents(params: Mapping[str, Any], noise: Array, context: Array, seeds: Array) -> Array:
            return _student_latents(unet, params, noise, context, jnp.asarray(timesteps), S, E)

        return latents

    def encode(
        self, input_ids: Int[np.ndarray, "b n"] | Int[Array, "b n"]
    ) -> Float[Array, "b n d"]:
        """The text encoder's context of token ids."""
        return _encode(self.model.text_encoder, self.model.params["text_encoder"], input_ids)

    def _decode(
        self, latents: Float[Array, "b h w c"]
    ) -> tuple[UInt8[Array, "b H W 3"], Bool[Array, " b"]]:
        if self.taesd is not None:
            return _decode(self.taesd.module, self.taesd.params, latents)
        return _decode(self.model.vae, self.model.params["vae"], latents)

    def _run(
        self,
        latents: Latents,
        prompts: Sequence[str],
        seeds: Sequence[int],
    ) -> Iterator[Images]:
        """Encode, draw noise, call `latents`, decode: in batches of one size over all devices.

        Args:
            latents: (UNet's parameters, noise, context, seeds) -> x0.
        """
        model = self.model
        devices = jax.device_count()
        mesh = _mesh()
        split = NamedSharding(mesh, PartitionSpec("data"))
        size = -(-min(self.batch_size, max(len(prompts), 1)) // devices) * devices
        shape = (model.latent_size, model.latent_size, model.unet.in_channels)
        order = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        unique_ids = model.tokenizer(list(order))  # each once: it warns of what it cuts
        input_ids = unique_ids[[order[prompt] for prompt in prompts]]
        for start in range(0, len(prompts), size):
            rows = np.arange(start, start + size) % len(prompts)
            ids = jax.device_put(input_ids[rows], split)
            chosen = jax.device_put(np.asarray(seeds, np.uint32)[rows], split)
            with jax.set_mesh(mesh):  # or TPUs would not take the attention kernel
                context = self.encode(ids)
                x0 = latents(model.params["unet"], seed_noise(chosen, shape), context, chosen)
                images, finite = self._decode(x0)
            if not np.all(finite):
                i = int(rows[np.argmin(finite)])
                raise RunError(f"image {i} is not finite: seed {seeds[i]}, prompt {prompts[i]!r}")
            yield np.asarray(images)[: len(prompts) - start]


def _require_seeds(prompts: Sequence[str], seeds: Sequence[int]) -> None:
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts, {len(seeds)} seeds: expected one each")
    wrong = [seed for seed in seeds if not 0 <= seed <= MAX_SEED]
    if wrong:
        raise ValueError(f"seed {wrong[0]}: expected 0..{MAX_SEED}")


@partial(jax.jit, static_argnames="shape")
def seed_noise(seeds: UInt32[Array, " b"], shape: tuple[int, int, int]) -> Float[Array, "b h w c"]:
    """N(0, I) noise of every image from its own seed."""
    return jax.vmap(lambda seed: jax.random.normal(jax.random.key(seed), shape))(seeds)


@partial(jax.jit, static_argnames=("num_steps", "shape"))
def seed_step_noises(
    seeds: UInt32[Array, " b"], num_steps: int, shape: tuple[int, int, int]
) -> Float[Array, "_ b h w c"]:
    """The noise that LCM adds between its steps, of every image from its own seed."""
    return step_noises(jax.vmap(jax.random.key)(seeds), num_steps, shape)


@partial(jax.jit, static_argnames="text_encoder")
def _encode(text_encoder: CLIPTextEncoder, params: Any, ids: Array) -> Array:
    return text_encoder.apply({"params": params}, jnp.asarray(ids))


@partial(jax.jit, static_argnames="vae")
def _decode(
    vae: AutoencoderKL | AutoencoderTiny, params: Any, latents: Array
) -> tuple[Array, Array]:
    """The images, and which of them are finite: in bytes a NaN is a black pixel."""
    pixels = decode_pixels(vae, params, latents)
    return to_bytes(pixels), jnp.isfinite(pixels).all((1, 2, 3))


@partial(jax.jit, static_argnames="unet")
def _student_latents(
    unet: UNet, params: Any, noise: Array, context: Array, timesteps: Array, S: Any, E: Any
) -> Array:
    return student_forward(unet, params, noise, context, timesteps, timesteps[0], S, E)[0]


def load_pipeline(
    model: StrPath,
    *,
    dtype: DTypeLike = jnp.float32,
    batch_size: int = 8,
    taesd: StrPath | None = None,
    **options: Any,
) -> Pipeline:
    """Load a model for sampling.

    Args:
        model: a folder, hub id or single file, as `load_model` takes it.
        dtype: compute dtype, and that of the parameters: bfloat16 on TPUs halves memory and time.
        batch_size: images made at a time.
        taesd: folder or hub id of a TAESD to decode with, instead of the VAE.
        options: further ones of `load_model`.

    Raises:
        InputError: as `load_model`; a TAESD of other latents or of other images.
    """
    found = load_model(model, dtype=dtype, param_dtype=dtype, **options)
    everywhere = NamedSharding(_mesh(), PartitionSpec())
    found = replace(found, params=jax.device_put(found.params, everywhere))
    if taesd is None:
        return Pipeline(found, batch_size)
    small = load_taesd(resolve_network(str(taesd)), dtype=dtype, param_dtype=dtype)
    _require_same_images(small.module, found, taesd)
    small = replace(small, params=jax.device_put(small.params, everywhere))
    return Pipeline(found, batch_size, small)


def _require_same_images(taesd: AutoencoderTiny, model: StableDiffusion, file: StrPath) -> None:
    """Raise InputError unless `taesd` decodes this model's latents to images of its VAE's shape."""
    upsampling = 2 ** (len(taesd.num_decoder_blocks) - 1)
    for what, found, expected in (
        ("channels in its latents", taesd.latent_channels, model.unet.out_channels),
        ("channels in its images", taesd.in_channels, model.vae.in_channels),
        ("pixels a latent", upsampling, model.pixels_per_latent),
    ):
        if found != expected:
            what = f"TAESD of another model: {what}"
            raise InputError(what, file=file, key="--taesd", expected=expected, found=found)


def _mesh() -> Mesh:
    """All devices in a row."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
