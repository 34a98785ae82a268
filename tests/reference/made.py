"""A small model folder and a record of our own training on it, in the reference's format.

Other in every respect that the format leaves open: SD 2.x projections, three prompts a batch, two
trailing timesteps, another LoRA. It says nothing about the numbers being right (the recorded runs
do); replaying it with something changed shows that the replay notices.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from tests.reference.iterations import compiled_step, load_text_image
from tests.reference.records import KINDS, LOSSES
from tiue_jax.diffusion.schedule import make_schedule
from tiue_jax.models.clip import CLIPTextEncoder
from tiue_jax.models.unet import UNet
from tiue_jax.models.vae import AutoencoderKL
from tiue_jax.pretrained.folder import StableDiffusion, save_stable_diffusion
from tiue_jax.pretrained.names import torch_name
from tiue_jax.pretrained.tokenizer import Tokenizer
from tiue_jax.training.options import StepOptions
from tiue_jax.training.state import Frozen, init_state
from tiue_jax.training.step import sample_draws

TOKENIZER = Path(__file__).parent / "model" / "tokenizer"
SIZE, BATCH, ITERATIONS = 8, 3, 2
PROMPTS = ["a red cube", "the blue sky", "rocks", "a hippo", "three stones", "rain"]
OPTIONS = {
    "batch": BATCH,
    "num_steps": 2,
    "timesteps": [999, 499],
    "t_enc": 999,
    "guidance_scale": 4.5,
    "student_lr": 1e-4,
    "lora_lr": 2e-3,
    "optimizer": "Adam(0.9, 0.999, eps=1e-8), no weight decay",
    "clip_grad_norm": 1.0,
    "lora_rank": 3,
    "lora_alpha": 5,
    "lora_targets": ["to_k", "to_out.0"],
    "null_prompt_threshold": 0.1,
    "precision": "float32",
    "ema": (
        "decay = min(0.9999, (1+n)/(10+n)) with n = optimizer steps so far - 1, "
        "and decay = 0 where n <= 0"
    ),
    "lambda_kl": 0.1,
    "clip_tau": 0.0,
}
CLIP_WEIGHT = 0.07  # not the default, so that a replay has to read it


def write_model(folder: Path) -> Path:
    """One level, latents 8x8; most GroupNorms have one channel a group."""
    tokenizer = Tokenizer(TOKENIZER)
    unet = UNet(
        block_out_channels=(32,),
        layers_per_block=1,
        cross_attention=(True,),
        num_heads=(2,),
        context_dim=16,
        linear_projection=True,
    )
    vae = AutoencoderKL(block_out_channels=(32,), layers_per_block=1)
    text_encoder = CLIPTextEncoder(
        vocab_size=tokenizer.vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_layers=1,
        num_heads=2,
        activation="gelu",
    )

    def init(key: jax.Array) -> dict[str, Any]:
        k_unet, k_vae, k_text = jax.random.split(key, 3)
        x, t, context = jnp.zeros((1, SIZE, SIZE, 4)), jnp.zeros((1,), int), jnp.zeros((1, 77, 16))
        return {
            "unet": unet.init(k_unet, x, t, context)["params"],
            "vae": vae.init(k_vae, jnp.zeros((1, SIZE, SIZE, 3)))["params"],
            "text_encoder": text_encoder.init(k_text, jnp.zeros((1, 77), jnp.int32))["params"],
        }

    sd = StableDiffusion(
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        params=jax.device_get(jax.jit(init)(jax.random.key(0))),
        tokenizer=tokenizer,
        schedule=make_schedule(),
        latent_size=SIZE,
    )
    save_stable_diffusion(sd, folder)
    return folder


def write_record(model: StableDiffusion, folder: Path, clip_tau: float = 0.0) -> Path:
    """Train for ITERATIONS and write everything down; with a CLIP term where `clip_tau` is above 0.

    The term's networks are those beside the model, `taesd/` and `clip/`.
    """
    options = StepOptions(
        timesteps=(999, 499),
        latent_size=SIZE,
        student_lr=1e-4,
        lora_lr=2e-3,
        lora_rank=3,
        lora_alpha=5.0,
        lora_targets=("to_k", "to_out_0"),
        clip_tau=clip_tau,
        clip_weight=CLIP_WEIGHT,
        clip_iterations=float(ITERATIONS),
    )
    text_image, auxiliary = load_text_image(model, options)
    state = init_state(jax.random.key(0), model.params["unet"], options)
    before = state.student
    frozen = Frozen(
        model.params["unet"],
        model.params["text_encoder"],
        jnp.asarray(model.tokenizer.null_ids),
        **auxiliary,
    )
    step = compiled_step(model, options, text_image)
    arrays = _named("lora_init", state.lora)
    logs, norms, per_parameter = [], [], []
    for i in range(ITERATIONS):
        draws = sample_draws(jax.random.key(5), i, BATCH, (SIZE, SIZE, 4))
        draws = draws.replace(null_uniform=jnp.float32(0.05 if i else 0.5))
        ids = jnp.asarray(model.tokenizer(PROMPTS[i * BATCH : (i + 1) * BATCH]))
        state, metrics, gradients = step(
            state, frozen=frozen, input_ids=ids, key=jax.random.key(0), draws=draws
        )
        for j, (kind, value) in enumerate(zip(KINDS, jax.tree.leaves(draws), strict=True)):
            value = np.asarray(value)
            value = np.moveaxis(value, -1, 1) if value.ndim == 4 else value
            arrays[f"draw/{6 * i + j:03d}_{kind}"] = value
        logs.append({name: float(metrics[key]) for name, key in LOSSES.items() if key in metrics})
        for j, name in enumerate(("student", "lora")):
            norms.append((name, float(metrics[f"grad_norm/{name}"])))
            named = _named(f"grad/{2 * i + j:02d}_{name}", gradients[name])
            arrays |= named
            per_parameter.append(
                {k.split("/", 2)[2]: float(np.linalg.norm(v)) for k, v in named.items()}
            )
    for name in ("student", "ema", "lora"):
        arrays |= _named(f"{name}_final", getattr(state, name))
    changes = jax.tree.map(lambda a, b: a - b, state.student, before)
    content = {
        "options": OPTIONS
        | {
            "clip_tau": clip_tau,
            "clip_weight": f"{CLIP_WEIGHT} * (1 - step / steps_per_epoch), "
            f"steps_per_epoch = {ITERATIONS}, step = 0, 1",
        },
        "prompts": PROMPTS,
        "draw_kinds": list(KINDS) * ITERATIONS,
        "logs": logs,
        "grad_norms": norms,
        "per_parameter_grad_norm": per_parameter,
        "student_final_norm_and_update_norm": {
            name: (0.0, float(np.linalg.norm(v))) for name, v in _named("", changes).items()
        },
    }
    folder.mkdir()
    (folder / "record.json").write_text(json.dumps(content), encoding="utf-8")
    np.savez(folder / "train.npz", **arrays)
    return folder


def _named(prefix: str, tree: dict) -> dict[str, np.ndarray]:
    """`prefix/torch.name` -> array in torch's axis order."""
    named = {}
    for path, leaf in flatten_dict(tree).items():
        value = np.asarray(leaf)
        if path[-1] in ("a", "b"):
            layer = torch_name((*path[:-1], "kernel")).removesuffix(".weight")
            name, value = f"{layer}.lora_{path[-1].upper()}.default.weight", value.T
        else:
            name, axes = torch_name(path), {2: (1, 0), 4: (3, 2, 0, 1)}.get(value.ndim)
            value = value if axes is None else value.transpose(axes)
        named[f"{prefix}/{name}" if prefix else name] = value
    return named


def changed(record: Path, folder: Path, change: Callable[[dict, dict], None]) -> Path:
    """A copy of `record` that `change(content, arrays)` has changed in place."""
    content = json.loads((record / "record.json").read_text(encoding="utf-8"))
    with np.load(record / "train.npz") as stored:
        arrays = {key: stored[key].copy() for key in stored.files}
    change(content, arrays)
    folder.mkdir()
    (folder / "record.json").write_text(json.dumps(content), encoding="utf-8")
    np.savez(folder / "train.npz", **arrays)
    return folder
