"""Layers and blocks of the UNet beside diffusers'.

Sizes are small and awkward on purpose: images are not square, GroupNorm groups straddle the seam of
x and skip, the widths of query and text differ.
"""

from functools import partial

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import torch
from diffusers.models import attention as torch_attention
from diffusers.models import attention_processor, embeddings, resnet
from diffusers.models.transformers import transformer_2d
from diffusers.models.unets import unet_2d_blocks

from tests.parity.cases import Case
from tests.parity.comparison import normal
from tiue_jax.models import layers, unet, vae

GROUPS = 4
TEMB = 24
CONTEXT = 20


def image(channels: int, seed: int = 1) -> np.ndarray:
    return normal(2, 6, 8, channels, seed=seed)


TOKENS = normal(2, 12, 16, seed=2)
TEXT = normal(2, 7, CONTEXT, seed=3)
EMBEDDED = normal(2, TEMB, seed=4)
TIMES = np.asarray([0, 1, 500, 999], np.int32)
OPTIONS = unet.BlockOptions(False, GROUPS, 1e-5, False, "none", jnp.float32)
LINEAR = OPTIONS._replace(linear_projection=True, upcast_attention=True)


def _resnet_case(
    inputs: int, skip: int = 0, features: int = 16, temb: bool = True, groups: int = GROUPS
) -> Case:
    """`skip` channels (0: none) are concatenated behind the input; without `temb` as in the VAE."""
    eps = 1e-5 if temb else 1e-6

    def call(module: torch.nn.Module, x: torch.Tensor, temb=None, skip=None) -> torch.Tensor:
        return module(x if skip is None else torch.cat([x, skip], dim=1), temb)

    return Case(
        partial(
            resnet.ResnetBlock2D,
            in_channels=inputs + skip,
            out_channels=features,
            temb_channels=TEMB if temb else None,
            groups=groups,
            eps=eps,
        ),
        layers.ResnetBlock(features, groups, eps),
        (image(inputs), *([EMBEDDED] if temb else []), *([image(skip, 5)] if skip else [])),
        call,
    )


def _transformer_case(linear: bool) -> Case:
    return Case(
        partial(
            transformer_2d.Transformer2DModel,
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=16,
            cross_attention_dim=CONTEXT,
            norm_num_groups=GROUPS,
            use_linear_projection=linear,
            upcast_attention=linear,
        ),
        layers.Transformer2D(2, linear, GROUPS, upcast=linear),
        (image(16), TEXT),
        lambda module, x, text: module(x, encoder_hidden_states=text, return_dict=False)[0],
    )


LAYER_CASES: dict[str, Case] = {
    "conv": Case(partial(torch.nn.Conv2d, 8, 12, 3, padding=1), layers.Conv(12), (image(8),)),
    "group_norm": Case(
        partial(torch.nn.GroupNorm, GROUPS, 16, 1e-5),
        layers.GroupNorm(GROUPS, 1e-5),
        (image(16),),
    ),
    "time_sinusoids": Case(
        partial(embeddings.Timesteps, 16, True, 0),
        nn.Sequential([lambda t: layers.timestep_embedding(t, 16)]),
        (TIMES,),
    ),
    "time_embedding": Case(
        partial(embeddings.TimestepEmbedding, 16, 64),
        layers.TimestepEmbedding(64),
        (normal(3, 16),),
    ),
    "resnet": _resnet_case(16),
    "resnet_shortcut": _resnet_case(12),
    "resnet_skip_straddling": _resnet_case(16, skip=12),  # groups of 7 channels; seam at 16
    "resnet_skip_wide": _resnet_case(8, skip=16),  # groups of 6; two groups wholly in the skip
    "resnet_skip_aligned": _resnet_case(16, skip=16),  # groups of 8; the seam between two groups
    "resnet_skip_swallowed": _resnet_case(8, skip=4, groups=2),  # no group wholly in the skip
    "resnet_vae": _resnet_case(12, temb=False),
    "attention_self": Case(
        partial(attention_processor.Attention, 16, heads=2, dim_head=8),
        layers.Attention(2),
        (TOKENS,),
    ),
    "attention_cross": Case(
        partial(
            attention_processor.Attention, 16, cross_attention_dim=CONTEXT, heads=2, dim_head=8
        ),
        layers.Attention(2),
        (TOKENS, TEXT),
    ),
    "feed_forward": Case(
        partial(torch_attention.FeedForward, 16, activation_fn="geglu"),
        layers.FeedForward(),
        (TOKENS,),
    ),
    "transformer_block": Case(
        partial(torch_attention.BasicTransformerBlock, 16, 2, 8, cross_attention_dim=CONTEXT),
        layers.BasicTransformerBlock(2),
        (TOKENS, TEXT),
        lambda module, x, text: module(x, encoder_hidden_states=text),
    ),
    "transformer_conv": _transformer_case(linear=False),
    "transformer_linear": _transformer_case(linear=True),
    "downsample": Case(
        partial(resnet.Downsample2D, 8, use_conv=True, padding=1, name="op"),
        layers.Downsample(8),
        (image(8),),
    ),
    "downsample_vae": Case(
        partial(resnet.Downsample2D, 8, use_conv=True, padding=0, name="op"),
        layers.Downsample(8, vae.RIGHT_AND_BELOW),
        (image(8),),
    ),
    "upsample": Case(partial(resnet.Upsample2D, 8, use_conv=True), layers.Upsample(8), (image(8),)),
}

_SIZES = {"temb_channels": TEMB, "resnet_eps": 1e-5, "resnet_groups": GROUPS}
_CROSS = {"num_attention_heads": 2, "cross_attention_dim": CONTEXT}
_LINEAR = {"use_linear_projection": True, "upcast_attention": True}


def _up_call(module: torch.nn.Module, x, *rest) -> torch.Tensor:
    """Our argument order is x, skips..., temb, context; ours gets the skips as one tuple."""
    *skips, temb, text = rest
    cross = {"encoder_hidden_states": text} if module.__class__.__name__.startswith("Cross") else {}
    return module(x, tuple(skips), temb, **cross)


class _Up(nn.Module):
    """An UpBlock whose skips are separate arguments, under the parameter names of the block."""

    block: unet.UpBlock

    @nn.compact
    def __call__(self, x, *rest):
        *skips, temb, text = rest
        return self.block(x, tuple(skips), temb, text)


# The deeper skip (used first) has the channels of the level, the other those of the level above.
_UP_INPUTS = (image(20), image(12, 6), image(16, 7), EMBEDDED, TEXT)
_UP_SIZES = {"in_channels": 12, "out_channels": 16, "prev_output_channel": 20, "num_layers": 2}

BLOCK_CASES: dict[str, Case] = {
    "down_block": Case(
        partial(
            unet_2d_blocks.DownBlock2D,
            in_channels=12,
            out_channels=16,
            num_layers=2,
            add_downsample=False,
            **_SIZES,
        ),
        unet.DownBlock(16, 2, None, False, OPTIONS),
        (image(12), EMBEDDED, TEXT),
        lambda module, x, temb, text: module(x, temb),
    ),
    "cross_down_block": Case(
        partial(
            unet_2d_blocks.CrossAttnDownBlock2D,
            in_channels=12,
            out_channels=16,
            num_layers=2,
            **_CROSS,
            **_SIZES,
        ),
        unet.DownBlock(16, 2, 2, True, OPTIONS),
        (image(12), EMBEDDED, TEXT),
    ),
    "mid_block": Case(
        partial(unet_2d_blocks.UNetMidBlock2DCrossAttn, in_channels=16, **_CROSS, **_SIZES),
        unet.MidBlock(16, 2, OPTIONS),
        (image(16), EMBEDDED, TEXT),
        lambda module, x, temb, text: module(x, temb, encoder_hidden_states=text),
    ),
    "mid_block_linear": Case(
        partial(
            unet_2d_blocks.UNetMidBlock2DCrossAttn, in_channels=16, **_CROSS, **_SIZES, **_LINEAR
        ),
        unet.MidBlock(16, 2, LINEAR),
        (image(16), EMBEDDED, TEXT),
        lambda module, x, temb, text: module(x, temb, encoder_hidden_states=text),
    ),
    "up_block": Case(
        partial(unet_2d_blocks.UpBlock2D, **{**_UP_SIZES, "in_channels": 16}, **_SIZES),
        _Up(unet.UpBlock(16, 2, None, True, OPTIONS)),
        (_UP_INPUTS[0], image(16, 6), *_UP_INPUTS[2:]),
        _up_call,
        root=("block",),
    ),
    "cross_up_block": Case(
        partial(
            unet_2d_blocks.CrossAttnUpBlock2D, add_upsample=False, **_UP_SIZES, **_CROSS, **_SIZES
        ),
        _Up(unet.UpBlock(16, 2, 2, False, OPTIONS)),
        _UP_INPUTS,
        _up_call,
        root=("block",),
    ),
    "cross_up_block_linear": Case(
        partial(unet_2d_blocks.CrossAttnUpBlock2D, **_UP_SIZES, **_CROSS, **_SIZES, **_LINEAR),
        _Up(unet.UpBlock(16, 2, 2, True, LINEAR)),
        _UP_INPUTS,
        _up_call,
        root=("block",),
    ),
}
