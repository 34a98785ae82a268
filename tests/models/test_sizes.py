"""Full-size models have exactly the published numbers of parameters; nothing is allocated."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
import torch
from diffusers import AutoencoderTiny as TorchTiny
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel

from tiue_jax.models.clip import CLIP
from tiue_jax.models.taesd import AutoencoderTiny
from tiue_jax.models.variants import VARIANTS, variant


def _count(module: nn.Module, *inputs: jax.ShapeDtypeStruct) -> int:
    shapes: Any = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.float32)}
    return sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))


def _float(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _int(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


@pytest.mark.parametrize(
    ("name", "count"),
    [("sd15", 859_520_964), ("sd21_base", 865_910_724), ("sd21", 865_910_724)],
)
def test_unet(name: str, count: int):
    unet, size = VARIANTS[name].unet, VARIANTS[name].latent_size
    context = _float(1, 77, unet.context_dim)
    assert _count(unet, _float(1, size, size, 4), _int(1), context) == count


@pytest.mark.parametrize("name", ["sd15", "sd21_base", "sd21"])
def test_vae(name: str):
    size = 8 * VARIANTS[name].latent_size
    assert _count(VARIANTS[name].vae, _float(1, size, size, 3)) == 83_653_863


def test_text_encoder_of_sd15():
    assert _count(VARIANTS["sd15"].text_encoder, _int(1, 77)) == 123_060_480


@pytest.mark.parametrize("name", ["sd21_base", "sd21"])
def test_text_encoder_of_sd21(name: str):
    """As many as transformers has for the config.json that is published with SD 2.1."""
    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=23,
        num_attention_heads=16,
        max_position_embeddings=77,
        hidden_act="gelu",
    )
    with torch.device("meta"):
        theirs = sum(p.numel() for p in CLIPTextModel(config).parameters())
    assert theirs == 340_387_840
    assert _count(VARIANTS[name].text_encoder, _int(1, 77)) == theirs


def test_taesd():
    """As many as diffusers' AutoencoderTiny has by default: 1,222,532 + 1,222,531."""
    with torch.device("meta"):
        module = TorchTiny()
    theirs = {
        name: sum(p.numel() for p in getattr(module, name).parameters())
        for name in ("encoder", "decoder")
    }
    assert theirs == {"encoder": 1_222_532, "decoder": 1_222_531}
    ours = AutoencoderTiny()
    assert _count(ours, _float(1, 64, 64, 3)) == sum(theirs.values())
    params = jax.eval_shape(ours.init, jax.random.key(0), _float(1, 512, 512, 3))
    latents = jax.eval_shape(
        lambda p, x: ours.apply(p, x, method="encode"), params, _float(1, 512, 512, 3)
    )
    assert latents.shape == (1, 64, 64, 4)


def test_clip():
    """151,277,313 are published for ViT-B/32; one of them is the logit scale."""
    with torch.device("meta"):
        theirs = sum(p.numel() for p in CLIPModel(CLIPConfig()).parameters())
    assert theirs == 151_277_313
    assert _count(CLIP(), _int(1, 77), _float(1, 224, 224, 3)) == theirs - 1


def test_clip_refuses_images_of_another_size():
    with pytest.raises(ValueError, match="pixels are 224 x 256, and CLIP takes 224 x 224"):
        _count(CLIP(), _int(1, 77), _float(1, 224, 256, 3))


@pytest.mark.parametrize("name", ["sd15", "sd21_base", "sd21"])
def test_parts_of_a_variant_fit_together(name: str):
    """The text's width is the UNet's context, the VAE's latents are the UNet's input and output."""
    parts = VARIANTS[name]
    assert parts.text_encoder.hidden_size == parts.unet.context_dim
    assert parts.vae.latent_channels == parts.unet.in_channels == parts.unet.out_channels
    size = 8 * parts.latent_size
    image = _float(2, size, size, 3)
    params = jax.eval_shape(parts.vae.init, jax.random.key(0), image)
    mean, logvar = jax.eval_shape(
        lambda p, x: parts.vae.apply(p, x, method="encode"), params, image
    )
    assert mean.shape == logvar.shape == (2, parts.latent_size, parts.latent_size, 4)


def test_unknown_variant_is_answered_with_the_known():
    with pytest.raises(ValueError, match=r"variant 'sd3': choose from .*'sd15'.*'sd21_base'"):
        variant("sd3")
