"""Stage 3: the UNet of the embedded teacher, under a VAE and a text encoder that stay."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from examples.tiny_sd.fit import fit, muon
from tiue_jax.diffusion.schedule import NoiseSchedule
from tiue_jax.models.clip import CLIPTextEncoder
from tiue_jax.models.unet import UNet

ITERATIONS, BATCH_SIZE, LEARNING_RATE = 8000, 32, 1e-3
MAX_WEIGHT = 20.0  # of the loss at large timesteps
NULL_PROMPT_PROB = 0.1  # of the captions are emptied, so that the teacher can be guided


class LatentData(NamedTuple):
    """The encoded data set. `captions_per_image` captions stand one behind the other.

    Attributes:
        latents: (scaled) of every image, fp16: the VAE's means, without its noise, which no
            network can predict and which would be most of the loss at small t.
        input_ids: of every caption, uint16.
        null_ids: of the empty prompt.
    """

    latents: Float[np.ndarray, "n h w c"]
    input_ids: Int[np.ndarray, "n captions t"]
    null_ids: Int[np.ndarray, " t"]


def teacher_loss(
    unet: UNet,
    text_encoder: CLIPTextEncoder,
    schedule: NoiseSchedule,
    params: Any,
    text_params: Any,
    batch: tuple[Float[Array, "b h w c"], Int[Array, "b t"]],
    key: PRNGKeyArray,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """mean w_t (eps_theta(x_t, t, y) - eps)^2, x_t = alpha_t x0 + sigma_t eps, w_t = 1 / alpha_t^2.

    Differs from Stable Diffusion's uniform t and w = 1: here t ~ 2t / T^2, and the weight is that
    of a v-prediction's loss (at most MAX_WEIGHT). What a picture shows is decided at large t, where
    it is a small part of the plain loss.
    """
    x0, input_ids = batch
    key_t, key_eps = jax.random.split(key)
    # Stratified: one t from each of b equally likely parts: the same mean, less variance.
    steps, size = schedule.num_train_timesteps, x0.shape[0]
    u = (jnp.arange(size) + jax.random.uniform(key_t, (size,))) / size
    t = jnp.clip((steps * jnp.sqrt(u)).astype(jnp.int32), 0, steps - 1)
    eps = jax.random.normal(key_eps, x0.shape)
    x_t = schedule.add_noise(x0, eps, t)
    context = text_encoder.apply({"params": text_params}, input_ids)
    error = jnp.square(unet.apply({"params": params}, x_t, t, context) - eps)
    alpha, _ = schedule.coefficients(t, x0.ndim)
    weighted = (jnp.minimum(alpha**-2, MAX_WEIGHT) * error).mean()
    return weighted, {"loss": weighted, "plain": error.mean()}


def train_teacher(
    unet: UNet,
    text_encoder: CLIPTextEncoder,
    text_params: Any,
    schedule: NoiseSchedule,
    data: LatentData,
    folder: Path,
    seed: int = 0,
    start: Any | None = None,
) -> Any:
    """Train the UNet; returns the moving average of its parameters.

    Args:
        start: its parameters to begin with, instead of random ones.
    """
    if start is None:
        context = jnp.zeros((1, data.null_ids.shape[0], text_encoder.hidden_size))
        latents = jnp.zeros((1, *data.latents.shape[1:]))
        t = jnp.zeros((1,), jnp.int32)
        start = unet.init(jax.random.key(seed), latents, t, context)["params"]

    def batch_of(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        rows = rng.integers(len(data.latents), size=BATCH_SIZE)
        x0 = data.latents[rows].astype(np.float32)
        ids = data.input_ids[rows, rng.integers(data.input_ids.shape[1], size=BATCH_SIZE)]
        empty = rng.random(BATCH_SIZE) < NULL_PROMPT_PROB
        return x0, np.where(empty[:, None], data.null_ids[None], ids).astype(np.int32)

    return fit(
        "unet",
        lambda params, batch, key: teacher_loss(
            unet, text_encoder, schedule, params, text_params, batch, key
        ),
        start,
        batch_of,
        iterations=ITERATIONS,
        learning_rate=LEARNING_RATE,
        optimizer=muon,
        folder=folder,
        seed=seed,
        ema_max_decay=0.9995,
    )
