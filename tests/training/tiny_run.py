"""A teacher of random weights, as small as they come, and a config that trains on it."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from configs import default
from tiue_jax.diffusion.schedule import make_schedule
from tiue_jax.models.clip import CLIPTextEncoder
from tiue_jax.models.unet import UNet
from tiue_jax.models.vae import AutoencoderKL
from tiue_jax.pretrained.folder import StableDiffusion, save_stable_diffusion
from tiue_jax.pretrained.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = ROOT / "tests" / "reference" / "model" / "tokenizer"
PROMPTS = tuple(f"a {c} {s}" for c in ("red", "blue", "green") for s in ("cube", "photo", "table"))


def make_teacher(folder: Path, seed: int = 0) -> Path:
    """Write a Stable Diffusion of one level, latents and images of 4x4."""
    tokenizer = Tokenizer(TOKENIZER)
    unet = UNet(
        block_out_channels=(32,),
        layers_per_block=1,
        cross_attention=(True,),
        num_heads=(2,),
        context_dim=16,
    )
    vae = AutoencoderKL(block_out_channels=(32,), layers_per_block=1)
    text_encoder = CLIPTextEncoder(
        vocab_size=tokenizer.vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_layers=1,
        num_heads=2,
    )

    x, t, context = jnp.zeros((1, 4, 4, 4)), jnp.zeros((1,), jnp.int32), jnp.zeros((1, 77, 16))
    inputs = {
        "unet": (unet, x, t, context),
        "vae": (vae, jnp.zeros((1, 4, 4, 3))),
        "text_encoder": (text_encoder, jnp.zeros((1, 77), jnp.int32)),
    }
    rng = np.random.default_rng(seed)

    def draw(shape: jax.ShapeDtypeStruct) -> np.ndarray:
        fan_in = max(1, int(np.prod(shape.shape[:-1])))
        return (rng.standard_normal(shape.shape) / np.sqrt(fan_in)).astype(np.float32)

    params = {
        part: jax.tree.map(draw, jax.eval_shape(module.init, jax.random.key(0), *args)["params"])
        for part, (module, *args) in inputs.items()
    }

    sd = StableDiffusion(
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        params=params,
        tokenizer=tokenizer,
        schedule=make_schedule(),
        latent_size=4,
    )
    save_stable_diffusion(sd, folder)
    return folder


def make_prompts(file: Path, prompts: tuple[str, ...] = PROMPTS) -> Path:
    """Write a prompt file."""
    file.write_text("\n".join(prompts) + "\n", encoding="utf-8")
    return file


def make_config(teacher: Path, prompts: Path) -> ConfigDict:
    """Twenty iterations of four prompts: two and a bit to an epoch of nine."""
    config = default.get_config()
    config.teacher = str(teacher)
    config.data.source = str(prompts)
    config.student.num_steps = 2
    config.lora.rank = 2
    config.lora.alpha = 2.0
    config.train.iterations = 20
    config.train.batch_size = 4
    config.train.student_lr = 1e-4
    config.train.ema_max_decay = 0.9
    config.train.compute_dtype = "float32"
    config.train.remat = "none"
    config.mesh.data = 1
    config.log.every = 1
    config.log.summary_every = 10
    config.log.validation_prompts = ("a red cube", "a photo")
    config.checkpoint.every = 5
    config.checkpoint.keep = 2
    return config


def slurm_environment(index: int, count: int, port: int) -> dict[str, str]:
    """What SLURM tells task `index` of `count`, all of them on this machine."""
    return {
        "SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": str(count),
        "SLURM_PROCID": str(index), "SLURM_LOCALID": str(index), "JAX_COORDINATOR_PORT": str(port),
    }  # fmt: skip
