"""A training step that compiles in seconds: one level, one layer, latents 4x4."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp

from tiue_jax.diffusion.schedule import make_schedule
from tiue_jax.diffusion.text_image import TextImage
from tiue_jax.models.clip import CLIPTextEncoder
from tiue_jax.models.unet import UNet
from tiue_jax.training.options import StepOptions
from tiue_jax.training.state import Frozen, TrainState, init_state
from tiue_jax.training.step import make_step

TOKENS, WIDTH, WORDS, SIZE = 5, 8, 20, 4
OPTIONS = StepOptions(
    num_steps=2,
    latent_size=SIZE,
    student_lr=1e-2,
    lora_lr=1e-2,
    lora_rank=2,
    lora_alpha=2.0,
)


def unet(**changes: Any) -> UNet:
    """One level with text."""
    options = {
        "block_out_channels": (16,),
        "layers_per_block": 1,
        "cross_attention": (True,),
        "num_heads": (2,),
        "context_dim": WIDTH,
        "norm_groups": 4,
    }
    return UNet(**(options | changes))


def text_encoder() -> CLIPTextEncoder:
    """One layer."""
    return CLIPTextEncoder(
        vocab_size=WORDS,
        hidden_size=WIDTH,
        intermediate_size=16,
        num_layers=1,
        num_heads=2,
        max_length=TOKENS,
    )


@cache
def frozen() -> Frozen:
    """Random networks; the null prompt is all zeros."""
    k_unet, k_text = jax.random.split(jax.random.key(0))
    x, t = jnp.zeros((1, SIZE, SIZE, 4)), jnp.zeros((1,), jnp.int32)
    ids = jnp.zeros((1, TOKENS), jnp.int32)
    init = jax.jit(unet().init)
    return Frozen(
        teacher=init(k_unet, x, t, jnp.zeros((1, TOKENS, WIDTH)))["params"],
        text_encoder=jax.jit(text_encoder().init)(k_text, ids)["params"],
        null_ids=ids[0],
    )


def start(options: StepOptions = OPTIONS) -> TrainState:
    """The state before iteration 0."""
    return init_state(jax.random.key(1), frozen().teacher, options)


def settled(state: TrainState, change: float = 0.1) -> TrainState:
    """The same with a LoRA that has learnt something: b is 0 no more."""
    lora = jax.tree.map(
        lambda x: x + change * jnp.cos(jnp.arange(x.size).reshape(x.shape)), state.lora
    )
    return state.replace(lora=lora)


def ids(batch: int) -> jax.Array:
    """Prompts that all differ."""
    return (jnp.arange(batch * TOKENS, dtype=jnp.int32) * 7 % WORDS).reshape(batch, TOKENS)


def step(
    options: StepOptions = OPTIONS,
    *,
    with_gradients: bool = False,
    lora_only: bool = False,
    prediction_type: str = "epsilon",
    text_image: TextImage | None = None,
    **unet_options: Any,
):
    """The uncompiled step."""
    return make_step(
        unet(**unet_options),
        text_encoder(),
        make_schedule(prediction_type=prediction_type),
        options,
        text_image=text_image,
        with_gradients=with_gradients,
        lora_only=lora_only,
    )


@cache
def jitted():
    """The step with gradients, compiled for one device and without donation."""
    return jax.jit(step(with_gradients=True))
