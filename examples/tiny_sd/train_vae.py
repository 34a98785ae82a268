"""Stage 1: the VAE of the embedded teacher, trained on rendered scenes; then its decoder alone.

The second part keeps the latents as they are: the teacher can be trained on them meanwhile.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, UInt8
from tqdm import tqdm

from examples.tiny_sd.fit import fit, muon
from examples.tiny_sd.reader import to_pixels
from tiue_jax.models.vae import AutoencoderKL

ITERATIONS, BATCH_SIZE, LEARNING_RATE = 4000, 16, 2e-3
KL_WEIGHT = 1e-3  # per latent entry, against the mean absolute error of a pixel
DECODER_ITERATIONS, DECODER_LEARNING_RATE = 2000, 2e-3
DECODER = ("decoder", "post_quant_conv")  # the part of the parameters behind the latents


def vae_loss(
    vae: AutoencoderKL, params: Any, pixels: Float[Array, "b h w 3"], key: PRNGKeyArray
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """mean |reconstruction - pixels| + 0.5 mean squared + KL_WEIGHT mean KL(q(z|x) || N(0, 1))."""
    mean, logvar = vae.apply({"params": params}, pixels, method=vae.encode)
    latents = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
    error = vae.apply({"params": params}, latents, method=vae.decode) - pixels
    l1, l2 = jnp.abs(error).mean(), jnp.square(error).mean()
    kl = 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar).mean()
    return l1 + 0.5 * l2 + KL_WEIGHT * kl, {"l1": l1, "l2": l2, "kl": kl}


def train_vae(
    vae: AutoencoderKL, images: UInt8[np.ndarray, "n h w 3"], folder: Path, seed: int = 0
) -> Any:
    """Train on `images`; the latents of the result have mean 0, deviation 1 in every channel."""
    params = vae.init(jax.random.key(seed), jnp.zeros((1, *images.shape[1:])))["params"]

    def batch_of(rng: np.random.Generator) -> Float[np.ndarray, "b h w 3"]:
        return to_pixels(images[rng.integers(len(images), size=BATCH_SIZE)])

    params = fit(
        "vae",
        lambda params, batch, key: vae_loss(vae, params, batch, key),
        params,
        batch_of,
        iterations=ITERATIONS,
        learning_rate=LEARNING_RATE,
        folder=folder,
        seed=seed,
        ema_max_decay=0.995,
    )
    return whiten(vae, params, images[:4096])


def decoder_loss(
    vae: AutoencoderKL,
    params: Any,
    fixed: Any,
    pixels: Float[Array, "b h w 3"],
    key: PRNGKeyArray,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """mean |r - pixels| + 0.5 mean squared + mean |difference of neighbours' errors|.

    The last term weighs edges: shapes are told apart by their outlines, most pixels are flat.

    Args:
        params: of the DECODER part, which is trained.
        fixed: all others.
    """
    mean, logvar = vae.apply({"params": fixed | params}, pixels, method=vae.encode)
    latents = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
    latents = jax.lax.stop_gradient(latents)
    error = vae.apply({"params": fixed | params}, latents, method=vae.decode) - pixels
    l1, l2 = jnp.abs(error).mean(), jnp.square(error).mean()
    edges = jnp.abs(jnp.diff(error, axis=1)).mean() + jnp.abs(jnp.diff(error, axis=2)).mean()
    return l1 + 0.5 * l2 + edges, {"l1": l1, "l2": l2, "edges": edges}


def train_decoder(
    vae: AutoencoderKL, params: Any, images: UInt8[np.ndarray, "n h w 3"], folder: Path, seed: int
) -> Any:
    """Train the decoder further under an encoder that stays; returns all parameters."""
    fixed = {name: tree for name, tree in params.items() if name not in DECODER}

    def batch_of(rng: np.random.Generator) -> Float[np.ndarray, "b h w 3"]:
        return to_pixels(images[rng.integers(len(images), size=BATCH_SIZE)])

    trained = fit(
        "vae_decoder",
        lambda params, batch, key: decoder_loss(vae, params, fixed, batch, key),
        {name: params[name] for name in DECODER},
        batch_of,
        iterations=DECODER_ITERATIONS,
        learning_rate=DECODER_LEARNING_RATE,
        optimizer=muon,
        folder=folder,
        seed=seed,
        ema_max_decay=0.995,
    )
    return fixed | trained


def encode(
    vae: AutoencoderKL, params: Any, images: UInt8[np.ndarray, "n h w 3"], batch_size: int = 64
) -> tuple[Float[np.ndarray, "n h w c"], Float[np.ndarray, "n h w c"]]:
    """Mean and log-variance of the vae_latents of many images, in batches."""
    apply = jax.jit(lambda pixels: vae.apply({"params": params}, pixels, method=vae.encode))
    parts = []
    starts = range(0, len(images), batch_size)
    for start in tqdm(starts, "encode", unit="batch", mininterval=10, disable=len(starts) < 100):
        batch = images[start : start + batch_size]
        padded = np.concatenate(
            [batch, np.zeros((batch_size - len(batch), *batch.shape[1:]), np.uint8)]
        )
        parts.append([np.asarray(m)[: len(batch)] for m in apply(to_pixels(padded))])
    means, logvars = zip(*parts, strict=True)
    return np.concatenate(means), np.concatenate(logvars)


def whiten(vae: AutoencoderKL, params: Any, images: UInt8[np.ndarray, "n h w 3"]) -> Any:
    """Fold a shift and a factor per latent channel into quant_conv and post_quant_conv.

    Afterwards latents (vae_latents * scaling_factor) have mean 0 and deviation 1 in every channel,
    with Stable Diffusion's own scaling_factor; reconstructions are the same.
    """
    mean, logvar = encode(vae, params, images)
    shift = mean.mean(axis=(0, 1, 2))
    std = np.sqrt(mean.var(axis=(0, 1, 2)) + np.exp(logvar).mean(axis=(0, 1, 2)))
    factor = 1.0 / (std * vae.scaling_factor)  # new vae_latents = (old - shift) * factor
    quant, post = params["quant_conv"], params["post_quant_conv"]
    channels = len(shift)
    ones = np.ones_like(factor)
    bias = np.array(quant["bias"])
    bias[:channels] = (bias[:channels] - shift) * factor
    bias[channels:] += 2 * np.log(factor)
    new_quant = {
        "kernel": quant["kernel"] * np.concatenate([factor, ones]).reshape(1, 1, 1, -1),
        "bias": jnp.asarray(bias),
    }
    kernel = post["kernel"]
    new_post = {
        "kernel": kernel / factor.reshape(1, 1, -1, 1),
        "bias": post["bias"] + jnp.einsum("c,co->o", shift, kernel[0, 0]),
    }
    return {**params, "quant_conv": new_quant, "post_quant_conv": new_post}
