"""Parts of the VAE and the text encoder, and whole models, beside diffusers and transformers."""

from functools import partial

import numpy as np
import torch
from diffusers.models import attention_processor
from diffusers.models.autoencoders import autoencoder_kl
from diffusers.models.autoencoders import vae as torch_vae
from diffusers.models.unets import unet_2d_blocks, unet_2d_condition
from transformers import CLIPTextConfig, CLIPTextModel
from transformers.models.clip import modeling_clip

from tests.parity.auxiliary_cases import AUXILIARY_CASES
from tests.parity.block_cases import (
    BLOCK_CASES,
    CONTEXT,
    GROUPS,
    LAYER_CASES,
    TEXT,
    TOKENS,
    image,
)
from tests.parity.cases import Case
from tests.parity.comparison import normal
from tiue_jax.models import clip, layers, unet, vae

_VAE_SIZES = {"resnet_eps": vae.EPS, "resnet_groups": GROUPS}
_VAE_WIDTHS = (12, 16)

VAE_CASES: dict[str, Case] = {
    "vae_down_block": Case(
        partial(
            unet_2d_blocks.DownEncoderBlock2D,
            12,
            16,
            num_layers=2,
            downsample_padding=0,
            **_VAE_SIZES,
        ),
        vae.Level(16, 2, GROUPS, "down"),
        (image(12),),
    ),
    "vae_up_block": Case(
        partial(unet_2d_blocks.UpDecoderBlock2D, 12, 16, num_layers=2, **_VAE_SIZES),
        vae.Level(16, 2, GROUPS, "up"),
        (image(12),),
    ),
    "vae_mid_block": Case(
        partial(
            unet_2d_blocks.UNetMidBlock2D,
            16,
            temb_channels=None,
            attention_head_dim=16,
            **_VAE_SIZES,
        ),
        vae.VAEMidBlock(16, GROUPS),
        (image(16),),
    ),
    "vae_mid_attention": Case(
        partial(
            attention_processor.Attention,
            16,
            heads=1,
            dim_head=16,
            bias=True,
            eps=vae.EPS,
            norm_num_groups=GROUPS,
            residual_connection=False,
            upcast_softmax=True,
        ),
        layers.Attention(1, qkv_bias=True, groups=GROUPS),
        (TOKENS,),
    ),
    "vae_encoder": Case(
        partial(
            torch_vae.Encoder,
            3,
            8,
            ("DownEncoderBlock2D",) * 2,
            _VAE_WIDTHS,
            layers_per_block=1,
            norm_num_groups=GROUPS,
            double_z=False,
        ),
        vae.Encoder(4, _VAE_WIDTHS, 1, GROUPS),
        (image(3),),
    ),
    "vae_decoder": Case(
        partial(
            torch_vae.Decoder,
            4,
            3,
            ("UpDecoderBlock2D",) * 2,
            _VAE_WIDTHS,
            layers_per_block=1,
            norm_num_groups=GROUPS,
        ),
        vae.Decoder(3, _VAE_WIDTHS, 1, GROUPS),
        (image(4),),
    ),
}


def _clip_config(activation: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=60,
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
        hidden_act=activation,
        bos_token_id=0,
        eos_token_id=1,
    )


def _clip_layer(activation: str) -> torch.nn.Module:
    config = _clip_config(activation)
    config._attn_implementation = "eager"
    return modeling_clip.CLIPEncoderLayer(config)


def _causal(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return module(x, torch.full((x.shape[1],) * 2, -torch.inf).triu(1)[None, None])


CLIP_CASES: dict[str, Case] = {
    f"clip_layer_{activation}": Case(
        partial(_clip_layer, activation),
        clip.CLIPLayer(2, 40, activation, 1e-5),
        (normal(2, 12, 16),),
        _causal,
    )
    for activation in ("quick_gelu", "gelu")
}

# --- Whole models ---------------------------------------------------------------------------------

LATENTS = normal(2, 8, 16, 4)
UNET_TIMES = np.asarray([751, 3], np.int32)
UNET1 = unet.UNet(
    block_out_channels=(12, 16, 20),
    layers_per_block=1,
    cross_attention=(True, True, False),
    num_heads=(2, 2, 2),
    context_dim=CONTEXT,
    norm_groups=GROUPS,
)
UNET2 = unet.UNet(
    block_out_channels=(12, 20),
    layers_per_block=2,
    cross_attention=(True, False),
    num_heads=(2, 5),
    context_dim=CONTEXT,
    linear_projection=True,
    norm_groups=GROUPS,
    upcast_attention=True,
)
# The least that is a whole UNet: what has to be compiled often takes this.
UNET_ONE_LEVEL = unet.UNet(
    block_out_channels=(12,),
    layers_per_block=1,
    cross_attention=(False,),
    num_heads=(2,),
    context_dim=CONTEXT,
    norm_groups=GROUPS,
)


def torch_unet(ours: unet.UNet) -> torch.nn.Module:
    """The diffusers UNet of the same shape, with the block types that SD 1.x and 2.x have."""
    down = ["CrossAttnDownBlock2D" if c else "DownBlock2D" for c in ours.cross_attention]
    up = ["CrossAttnUpBlock2D" if c else "UpBlock2D" for c in reversed(ours.cross_attention)]
    per_level = len(set(ours.num_heads)) > 1
    return unet_2d_condition.UNet2DConditionModel(
        sample_size=8,
        down_block_types=tuple(down),
        up_block_types=tuple(up),
        block_out_channels=ours.block_out_channels,
        layers_per_block=ours.layers_per_block,
        norm_num_groups=ours.norm_groups,
        cross_attention_dim=ours.context_dim,
        attention_head_dim=ours.num_heads if per_level else ours.num_heads[0],
        use_linear_projection=ours.linear_projection,
        upcast_attention=ours.upcast_attention,
    )


def _unet_case(ours: unet.UNet) -> Case:
    return Case(
        partial(torch_unet, ours),
        ours,
        (LATENTS, UNET_TIMES, TEXT),
        lambda module, x, t, text: module(x, t, encoder_hidden_states=text).sample,
    )


VAE = vae.AutoencoderKL(block_out_channels=(8, 12, 16, 16), layers_per_block=1, norm_groups=GROUPS)


def torch_autoencoder(ours: vae.AutoencoderKL) -> torch.nn.Module:
    """The diffusers AutoencoderKL of the same shape."""
    levels = len(ours.block_out_channels)
    return autoencoder_kl.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=ours.block_out_channels,
        layers_per_block=ours.layers_per_block,
        norm_num_groups=ours.norm_groups,
    )


def _moments(module: torch.nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    distribution = module.encode(x).latent_dist
    return distribution.mean, distribution.logvar


INPUT_IDS = np.random.default_rng(0).integers(0, 60, (3, 12)).astype(np.int32)


def _text_case(activation: str) -> Case:
    return Case(
        lambda: CLIPTextModel(_clip_config(activation)),
        clip.CLIPTextEncoder(60, 16, 40, 2, 2, 12, activation),
        (INPUT_IDS,),
        lambda module, ids: module(ids.long()).last_hidden_state,
        root=("text_model",),
    )


MODEL_CASES: dict[str, Case] = {
    "unet_sd1": _unet_case(UNET1),
    "unet_sd2": _unet_case(UNET2),
    "unet_one_level": _unet_case(UNET_ONE_LEVEL),
    "vae_encode": Case(
        partial(torch_autoencoder, VAE), VAE, (normal(2, 16, 24, 3),), _moments, "encode"
    ),
    "vae_decode": Case(
        partial(torch_autoencoder, VAE),
        VAE,
        (normal(2, 2, 3, 4),),
        lambda module, z: module.decode(z).sample,
        "decode",
    ),
    "text_quick_gelu": _text_case("quick_gelu"),
    "text_gelu": _text_case("gelu"),
}

CASES: dict[str, Case] = {
    **LAYER_CASES,
    **BLOCK_CASES,
    **VAE_CASES,
    **CLIP_CASES,
    **MODEL_CASES,
    **AUXILIARY_CASES,
}
