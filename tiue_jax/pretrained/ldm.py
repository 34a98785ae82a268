"""Parameter names of the original Stable Diffusion files, from diffusers' names.

| part | prefix |
|---|---|
| UNet | `model.diffusion_model.` |
| VAE | `first_stage_model.` |
| text encoder, SD 1.x (OpenAI's CLIP, as in transformers) | `cond_stage_model.transformer.` |
| text encoder, SD 2.x (OpenCLIP) | `cond_stage_model.model.` |

A UNet's blocks are numbered through, downsamplers and upsamplers included; the VAE's `up` blocks
have the number of their resolution, finest first, where diffusers counts them as they are run.
Source: github.com/CompVis/stable-diffusion and Stability-AI/stablediffusion, ldm/modules.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from tiue_jax.models.clip import CLIPTextEncoder
from tiue_jax.models.unet import UNet
from tiue_jax.models.vae import AutoencoderKL
from tiue_jax.pretrained.names import DIFFUSERS, Form, canonical_name, torch_name
from tiue_jax.pretrained.weights import TensorEntry

UNET, VAE = "model.diffusion_model.", "first_stage_model."
TEXT = {False: "cond_stage_model.transformer.", True: "cond_stage_model.model."}  # OpenCLIP's?

_UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
}
_UNET_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
    "norm1": "in_layers.0",
    "norm2": "out_layers.0",
    "time_emb_proj": "emb_layers.1",
}
_UNET_MID = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}
_VAE_MID = {"resnets.0": "block_1", "attentions.0": "attn_1", "resnets.1": "block_2"}
_VAE_LAYERS = {
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm",
    "to_k": "k",
    "to_out.0": "proj_out",
    "to_q": "q",
    "to_v": "v",
}
_OPENCLIP_ENDS = {
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "text_model.final_layer_norm.weight": "ln_final.weight",
}
_OPENCLIP_LAYERS = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_FUSED = ("q", "k", "v")  # the order of OpenCLIP's in_proj
_OPENCLIP_UNUSED = ("attn_mask", "logit_scale", "text_projection")
_VAE_UNUSED = ("loss.", "model_ema.")


def ldm_form(
    unet: UNet, vae: AutoencoderKL, encoder: CLIPTextEncoder, openclip: bool
) -> dict[str, Form]:
    """Return part -> the form in which an original file holds the parameters of these networks."""
    vae_levels, layers = len(vae.block_out_channels), encoder.num_layers
    names: dict[str, tuple[str, Callable[[str], str], Callable[[str], str | None]]] = {
        "unet": (UNET, lambda name: unet_key(name, unet), lambda key: key),
        "vae": (
            VAE,
            lambda name: vae_key(name, vae_levels),
            lambda key: None if key.startswith(_VAE_UNUSED) else key,
        ),
        "text_encoder": (
            TEXT[openclip],
            openclip_key if openclip else lambda name: name,
            (lambda key: _used_by_openclip(key, layers))
            if openclip
            else lambda key: canonical_name("text_encoder", key),
        ),
    }
    return {part: _form(*given) for part, given in names.items()}


def _form(
    prefix: str, rename: Callable[[str], str], canonical: Callable[[str], str | None]
) -> Form:
    """Return the form of keys that are `prefix` and what `rename` makes of diffusers' names."""

    def with_prefix(part: str, key: str) -> str | None:
        found = canonical(key.removeprefix(prefix))
        return None if found is None else prefix + found

    return DIFFUSERS._replace(
        name="ldm",
        file_names={},
        key=lambda path: prefix + rename(torch_name(path)),
        canonical=with_prefix,
    )


def unet_key(name: str, unet: UNet) -> str:
    """Return what the original file calls diffusers' UNet parameter `name`, without prefix."""
    module, leaf = name.rsplit(".", 1)
    if module in _UNET_ENDS:
        return f"{_UNET_ENDS[module]}.{leaf}"
    if mid := re.fullmatch(r"mid_block\.(\w+\.\d)\.(.+)", name):
        return f"middle_block.{_UNET_MID[mid[1]]}.{_unet_layer(mid[1], mid[2])}"
    found = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name)
    assert found, name
    way, kind, layer = found[1], found[3], found[5]
    level, n, layers = int(found[2]), int(found[4]), unet.layers_per_block
    if way == "down":
        n = layers if kind == "downsamplers" else n
        place = f"input_blocks.{1 + level * (layers + 1) + n}"
        if kind == "downsamplers":
            return f"{place}.0.op.{leaf}"
    else:
        n = layers if kind == "upsamplers" else n
        place = f"output_blocks.{level * (layers + 1) + n}"
        if kind == "upsamplers":  # behind the resnet, and the attention if there is one
            return f"{place}.{2 if unet.cross_attention[-1 - level] else 1}.{layer}"
    return f"{place}.{int(kind == 'attentions')}.{_unet_layer(kind, layer)}"


def _unet_layer(kind: str, layer: str) -> str:
    if not kind.startswith("resnets"):
        return layer
    module, leaf = layer.rsplit(".", 1)
    return f"{_UNET_RESNET[module]}.{leaf}"


def vae_key(name: str, levels: int) -> str:
    """Return what the original file calls diffusers' VAE parameter `name`, without prefix."""
    module, leaf = name.rsplit(".", 1)
    if mid := re.fullmatch(r"(\w+)\.mid_block\.(\w+\.0|\w+\.1)\.(.+)", module):
        layer = _VAE_LAYERS.get(mid[3], mid[3])
        return f"{mid[1]}.mid.{_VAE_MID[mid[2]]}.{layer}.{leaf}"
    if block := re.fullmatch(r"(\w+)\.(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", module):
        side, way, kind, layer = block[1], block[2], block[4], _VAE_LAYERS.get(block[6], block[6])
        level = int(block[3]) if way == "down" else levels - 1 - int(block[3])
        place = f"block.{block[5]}" if kind == "resnets" else f"{way}sample"
        return f"{side}.{way}.{level}.{place}.{layer}.{leaf}"
    return f"{module.replace('conv_norm_out', 'norm_out')}.{leaf}"


def openclip_key(name: str) -> str:
    """Return what OpenCLIP calls the text encoder's parameter `name`, without prefix."""
    if name in _OPENCLIP_ENDS:
        return _OPENCLIP_ENDS[name]
    found = re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    assert found, name
    place, layer, leaf = f"transformer.resblocks.{found[1]}", found[2], found[3]
    if projection := re.fullmatch(r"self_attn\.([qkv])_proj", layer):
        return f"{place}.attn.in_proj_{leaf}[{projection[1]}]"
    return f"{place}.{_OPENCLIP_LAYERS[layer]}.{leaf}"


def _used_by_openclip(key: str, layers: int) -> str | None:
    """Return `key`, or None for what Stable Diffusion does not use: the last layer, projections.

    Its context is the output of the last layer but one.
    """
    unused = key in _OPENCLIP_UNUSED or key.startswith(f"transformer.resblocks.{layers}.")
    return None if unused else key


def split_fused(entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """Return `entries` with each fused `in_proj` as three: `KEY[q]`, `KEY[k]`, `KEY[v]`.

    The three are rows one behind the other, so that each is a tensor of the file by itself.
    """
    found: dict[str, TensorEntry] = {}
    for key, entry in entries.items():
        fused = key.endswith((".attn.in_proj_weight", ".attn.in_proj_bias"))
        fused = fused and not any(f"{key}[{name}]" in entries for name in _FUSED)
        if not fused or not entry.shape or entry.shape[0] % len(_FUSED):
            found[key] = entry
            continue
        rows, size = entry.shape[0] // len(_FUSED), (entry.stop - entry.start) // len(_FUSED)
        for i, name in enumerate(_FUSED):
            start = entry.start + i * size
            shape = (rows, *entry.shape[1:])
            found[f"{key}[{name}]"] = TensorEntry(entry.dtype, shape, start, start + size)
    return found
