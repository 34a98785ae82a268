"""TAESD and both towers of CLIP beside diffusers' and transformers'."""

from functools import partial

import numpy as np
import torch
from diffusers.models.autoencoders import autoencoder_tiny
from diffusers.models.autoencoders import vae as torch_vae
from diffusers.models.unets import unet_2d_blocks
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel
from transformers.models.clip import modeling_clip

from tests.parity.cases import Case
from tests.parity.comparison import normal
from tiue_jax.models import clip, layers, taesd

# --- TAESD ----------------------------------------------------------------------------------------

TAESD = taesd.AutoencoderTiny(
    encoder_channels=8, decoder_channels=12, num_encoder_blocks=(1, 2), num_decoder_blocks=(2, 1)
)
_PIXELS, _LATENTS = normal(2, 12, 16, 3), normal(2, 6, 8, 4, std=2.0)


def torch_taesd(ours: taesd.AutoencoderTiny) -> torch.nn.Module:
    """The diffusers AutoencoderTiny of the same shape."""
    levels = len(ours.num_encoder_blocks)
    return autoencoder_tiny.AutoencoderTiny(
        encoder_block_out_channels=(ours.encoder_channels,) * levels,
        decoder_block_out_channels=(ours.decoder_channels,) * levels,
        num_encoder_blocks=ours.num_encoder_blocks,
        num_decoder_blocks=ours.num_decoder_blocks,
    )


TAESD_CASES: dict[str, Case] = {
    "taesd_block": Case(
        partial(unet_2d_blocks.AutoencoderTinyBlock, 8, 8, "relu"),
        taesd.Block(8),
        (normal(2, 6, 8, 8),),
    ),
    "taesd_encoder": Case(
        partial(torch_vae.EncoderTiny, 3, 4, (1, 2, 1), (8, 8, 8), "relu"),
        taesd.Encoder(4, 8, (1, 2, 1)),
        (_PIXELS,),
    ),
    "taesd_decoder": Case(
        partial(torch_vae.DecoderTiny, 4, 3, (2, 1, 1), (8, 8, 8), 2, "relu", "nearest"),
        taesd.Decoder(3, 8, (2, 1, 1)),
        (_LATENTS,),
    ),
    "taesd_encode": Case(
        partial(torch_taesd, TAESD),
        TAESD,
        (_PIXELS,),
        lambda module, x: module.encode(x).latents,
        "encode",
    ),
    "taesd_decode": Case(
        partial(torch_taesd, TAESD),
        TAESD,
        (_LATENTS,),
        lambda module, z: module.decode(z).sample,
        "decode",
    ),
    "taesd": Case(
        partial(torch_taesd, TAESD),
        TAESD,
        (_PIXELS,),
        lambda module, x: module.decode(module.encode(x).latents).sample,
    ),
}

# --- CLIP -----------------------------------------------------------------------------------------

TEXT_TOWER = clip.Tower(16, 40, 2, 2)
VISION_TOWER = clip.Tower(24, 36, 2, 3)
FIRST_EOS = 50  # not the largest id: the two rules for the end of a text differ
_CLIP = clip.CLIP(
    text=TEXT_TOWER,
    vision=VISION_TOWER,
    vocab_size=60,
    max_length=12,
    image_size=13,  # one pixel more than whole patches
    patch_size=4,
    projection_dim=10,
)
_IMAGES = normal(2, 13, 13, 3)
# Ends at 5, at 0, twice (at 2 and 8), and never; the largest id is elsewhere, and also twice.
INPUT_IDS = np.random.default_rng(0).integers(3, 50, (4, 12)).astype(np.int32)
INPUT_IDS[[0, 1, 2, 2], [5, 0, 2, 8]] = FIRST_EOS
INPUT_IDS[[0, 1, 2, 2, 3], [7, 3, 4, 6, 11]] = 59


def clip_module(activation: str, eos_token_id: int) -> clip.CLIP:
    """The small CLIP with another activation and rule for the end of a text.

    Its epsilon is large enough to count wherever it belongs, at activations of order 1.
    """
    text, vision = (
        tower._replace(activation=activation, eps=1e-3) for tower in (TEXT_TOWER, VISION_TOWER)
    )
    return _CLIP.clone(text=text, vision=vision, eos_token_id=eos_token_id)


def tower_config(tower: clip.Tower) -> dict[str, object]:
    """transformers' settings of a tower."""
    return {
        "hidden_size": tower.hidden_size,
        "intermediate_size": tower.intermediate_size,
        "num_hidden_layers": tower.num_layers,
        "num_attention_heads": tower.num_heads,
        "hidden_act": tower.activation,
        "layer_norm_eps": tower.eps,
    }


def vision_config(ours: clip.CLIP) -> dict[str, object]:
    """transformers' settings of the vision tower."""
    sizes = {"image_size": ours.image_size, "patch_size": ours.patch_size}
    return tower_config(ours.vision) | sizes


def torch_clip(ours: clip.CLIP) -> torch.nn.Module:
    """The transformers CLIPModel of the same shape, without the `logit_scale` that ours has not."""
    text = tower_config(ours.text) | {
        "vocab_size": ours.vocab_size,
        "max_position_embeddings": ours.max_length,
        "bos_token_id": 0,
        "eos_token_id": ours.eos_token_id,
    }
    module = CLIPModel(
        CLIPConfig(
            text_config=text,
            vision_config=vision_config(ours),
            projection_dim=ours.projection_dim,
        )
    )
    del module.logit_scale
    return module


def text_features(module: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """transformers' projected features of texts."""
    return module.get_text_features(ids.long()).pooler_output


def image_features(module: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """transformers' projected features of images."""
    return module.get_image_features(pixels).pooler_output


def _text_case(ours: clip.CLIP) -> Case:
    return Case(partial(torch_clip, ours), ours, (INPUT_IDS,), text_features, "encode_text")


def _image_case(ours: clip.CLIP) -> Case:
    return Case(partial(torch_clip, ours), ours, (_IMAGES,), image_features, "encode_image")


def _torch_vision_layer() -> torch.nn.Module:
    config = CLIPVisionConfig(**vision_config(_CLIP))
    config._attn_implementation = "eager"
    return modeling_clip.CLIPEncoderLayer(config)


TWO_TOWER_CASES: dict[str, Case] = {
    "clip_vision_layer": Case(
        _torch_vision_layer,
        clip.CLIPLayer(3, 36, "quick_gelu", 1e-5, causal=False),
        (normal(2, 10, 24),),
        lambda module, x: module(x, None),
    ),
    "clip_vision_tower": Case(
        lambda: CLIPVisionModel(CLIPVisionConfig(**vision_config(_CLIP))),
        clip.VisionTransformer(
            clip.VisionEmbeddings(24, 13, 4),
            layers.layer_norm(np.float32),
            clip.LayerStack(VISION_TOWER, causal=False),
            layers.layer_norm(np.float32),
        ),
        (_IMAGES,),
        lambda module, x: module(x).pooler_output,
    ),
    **{
        f"clip_text_{rule}_{activation}": _text_case(clip_module(activation, eos))
        for rule, eos in (("first", FIRST_EOS), ("legacy", clip.LEGACY_EOS))
        for activation in ("quick_gelu", "gelu")
    },
    **{
        f"clip_image_{activation}": _image_case(clip_module(activation, FIRST_EOS))
        for activation in ("quick_gelu", "gelu")
    },
}

AUXILIARY_CASES: dict[str, Case] = {**TAESD_CASES, **TWO_TOWER_CASES}
