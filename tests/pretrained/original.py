"""Models in the original one-file layout, made from diffusers' by tables written out by hand."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.numpy import load_file
from transformers import CLIPTextConfig, CLIPTextModel

from tests.pretrained.folders import MODEL, WEIGHTS, edit_json

Tensors = dict[str, np.ndarray]

# Original prefix, diffusers' prefix. SD 1.x: four levels of two layers, the last without text.
UNET_OF_FOUR_LEVELS = """
time_embed.0 time_embedding.linear_1
time_embed.2 time_embedding.linear_2
input_blocks.0.0 conv_in
input_blocks.1.0 down_blocks.0.resnets.0
input_blocks.1.1 down_blocks.0.attentions.0
input_blocks.2.0 down_blocks.0.resnets.1
input_blocks.2.1 down_blocks.0.attentions.1
input_blocks.3.0.op down_blocks.0.downsamplers.0.conv
input_blocks.4.0 down_blocks.1.resnets.0
input_blocks.4.1 down_blocks.1.attentions.0
input_blocks.5.0 down_blocks.1.resnets.1
input_blocks.5.1 down_blocks.1.attentions.1
input_blocks.6.0.op down_blocks.1.downsamplers.0.conv
input_blocks.7.0 down_blocks.2.resnets.0
input_blocks.7.1 down_blocks.2.attentions.0
input_blocks.8.0 down_blocks.2.resnets.1
input_blocks.8.1 down_blocks.2.attentions.1
input_blocks.9.0.op down_blocks.2.downsamplers.0.conv
input_blocks.10.0 down_blocks.3.resnets.0
input_blocks.11.0 down_blocks.3.resnets.1
middle_block.0 mid_block.resnets.0
middle_block.1 mid_block.attentions.0
middle_block.2 mid_block.resnets.1
output_blocks.0.0 up_blocks.0.resnets.0
output_blocks.1.0 up_blocks.0.resnets.1
output_blocks.2.0 up_blocks.0.resnets.2
output_blocks.2.1.conv up_blocks.0.upsamplers.0.conv
output_blocks.3.0 up_blocks.1.resnets.0
output_blocks.3.1 up_blocks.1.attentions.0
output_blocks.4.0 up_blocks.1.resnets.1
output_blocks.4.1 up_blocks.1.attentions.1
output_blocks.5.0 up_blocks.1.resnets.2
output_blocks.5.1 up_blocks.1.attentions.2
output_blocks.5.2.conv up_blocks.1.upsamplers.0.conv
output_blocks.6.0 up_blocks.2.resnets.0
output_blocks.6.1 up_blocks.2.attentions.0
output_blocks.7.0 up_blocks.2.resnets.1
output_blocks.7.1 up_blocks.2.attentions.1
output_blocks.8.0 up_blocks.2.resnets.2
output_blocks.8.1 up_blocks.2.attentions.2
output_blocks.8.2.conv up_blocks.2.upsamplers.0.conv
output_blocks.9.0 up_blocks.3.resnets.0
output_blocks.9.1 up_blocks.3.attentions.0
output_blocks.10.0 up_blocks.3.resnets.1
output_blocks.10.1 up_blocks.3.attentions.1
output_blocks.11.0 up_blocks.3.resnets.2
output_blocks.11.1 up_blocks.3.attentions.2
out.0 conv_norm_out
out.2 conv_out
"""
# A small SD 2.x: two levels of one layer.
UNET_OF_TWO_LEVELS = """
time_embed.0 time_embedding.linear_1
time_embed.2 time_embedding.linear_2
input_blocks.0.0 conv_in
input_blocks.1.0 down_blocks.0.resnets.0
input_blocks.1.1 down_blocks.0.attentions.0
input_blocks.2.0.op down_blocks.0.downsamplers.0.conv
input_blocks.3.0 down_blocks.1.resnets.0
middle_block.0 mid_block.resnets.0
middle_block.1 mid_block.attentions.0
middle_block.2 mid_block.resnets.1
output_blocks.0.0 up_blocks.0.resnets.0
output_blocks.1.0 up_blocks.0.resnets.1
output_blocks.1.1.conv up_blocks.0.upsamplers.0.conv
output_blocks.2.0 up_blocks.1.resnets.0
output_blocks.2.1 up_blocks.1.attentions.0
output_blocks.3.0 up_blocks.1.resnets.1
output_blocks.3.1 up_blocks.1.attentions.1
out.0 conv_norm_out
out.2 conv_out
"""
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_UP = {  # number of levels -> diffusers' up block -> the original one
    2: {"0": "1", "1": "0"},
    4: {"0": "3", "1": "2", "2": "1", "3": "0"},
}
_VAE_MID = {
    "mid_block.resnets.0.": "mid.block_1.",
    "mid_block.resnets.1.": "mid.block_2.",
    "mid_block.attentions.0.group_norm.": "mid.attn_1.norm.",
    "mid_block.attentions.0.to_q.": "mid.attn_1.q.",
    "mid_block.attentions.0.to_k.": "mid.attn_1.k.",
    "mid_block.attentions.0.to_v.": "mid.attn_1.v.",
    "mid_block.attentions.0.to_out.0.": "mid.attn_1.proj_out.",
}


def original_unet(tensors: Mapping[str, np.ndarray], table: str) -> Tensors:
    """The UNet's tensors under their original names."""
    rows = [line.split() for line in table.split("\n") if line]
    found = {}
    for name, tensor in tensors.items():
        ((old, new),) = [(o, n) for o, n in rows if name.startswith(f"{n}.")]
        rest = name.removeprefix(f"{new}.")
        if "resnets" in new:
            layer, leaf = rest.split(".")
            rest = f"{_UNET_RESNET[layer]}.{leaf}"
        found[f"model.diffusion_model.{old}.{rest}"] = tensor
    return found


def original_vae(tensors: Mapping[str, np.ndarray], levels: int) -> Tensors:
    """The VAE's tensors under their original names; its attention is made of 1x1 convolutions."""
    found = {}
    for name, tensor in tensors.items():
        for ours, theirs in _VAE_MID.items():
            if ours in name:
                is_linear = "attn_1" in theirs and tensor.ndim == 2
                tensor = tensor[:, :, None, None] if is_linear else tensor
                name = name.replace(ours, theirs)
        if ".down_blocks." in name:
            name = name.replace(".down_blocks.", ".down.").replace(".resnets.", ".block.")
            name = name.replace(".downsamplers.0.", ".downsample.")
        if ".up_blocks." in name:
            before, number, after = name.replace(".up_blocks.", ".up.|").partition("|")
            number, after = after.split(".", 1)
            after = after.replace("resnets.", "block.").replace("upsamplers.0.", "upsample.")
            name = f"{before}{_VAE_UP[levels][number]}.{after}"
        name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        found[f"first_stage_model.{name}"] = tensor
    return found


def original_text_encoder(tensors: Mapping[str, np.ndarray]) -> Tensors:
    """SD 1.x's text encoder: transformers' own names, and the buffer it used to have."""
    found = {}
    for name, tensor in tensors.items():
        name = name if name.startswith("text_model.") else f"text_model.{name}"
        found[f"cond_stage_model.transformer.{name}"] = tensor
    positions = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    return found | {positions: np.arange(77)[None]}


def openclip_text_encoder(tensors: Mapping[str, np.ndarray], layers: int) -> Tensors:
    """SD 2.x's text encoder: OpenCLIP's names, one layer more, and what only OpenCLIP uses."""
    t = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    found = {
        "positional_embedding": t["embeddings.position_embedding.weight"],
        "token_embedding.weight": t["embeddings.token_embedding.weight"],
        "ln_final.weight": t["final_layer_norm.weight"],
        "ln_final.bias": t["final_layer_norm.bias"],
        "text_projection": np.ones((64, 64), np.float32),
        "logit_scale": np.array(4.6, np.float32),
    }
    for i in range(layers + 1):
        ours = f"encoder.layers.{min(i, layers - 1)}"  # the last one twice: never read
        theirs = f"transformer.resblocks.{i}"
        for leaf in ("weight", "bias"):
            fused = [t[f"{ours}.self_attn.{x}_proj.{leaf}"] for x in "qkv"]
            found |= {
                f"{theirs}.attn.in_proj_{leaf}": np.concatenate(fused),
                f"{theirs}.attn.out_proj.{leaf}": t[f"{ours}.self_attn.out_proj.{leaf}"],
                f"{theirs}.ln_1.{leaf}": t[f"{ours}.layer_norm1.{leaf}"],
                f"{theirs}.ln_2.{leaf}": t[f"{ours}.layer_norm2.{leaf}"],
                f"{theirs}.mlp.c_fc.{leaf}": t[f"{ours}.mlp.fc1.{leaf}"],
                f"{theirs}.mlp.c_proj.{leaf}": t[f"{ours}.mlp.fc2.{leaf}"],
            }
    return {f"cond_stage_model.model.{name}": tensor for name, tensor in found.items()}


def training_leftovers() -> Tensors:
    """What else an original file holds."""
    names = (
        "alphas_cumprod alphas_cumprod_prev betas log_one_minus_alphas_cumprod"
        " posterior_log_variance_clipped posterior_mean_coef1 sqrt_alphas_cumprod"
        " sqrt_recipm1_alphas_cumprod"
    )
    return {name: np.ones(1000, np.float32) for name in names.split()} | {
        "model_ema.decay": np.array(0.9999, np.float32),
        "model_ema.num_updates": np.array(7),
        "model_ema.diffusion_modelinput_blocks00weight": np.ones((2, 2), np.float32),
    }


def make_sd2(folder: Path) -> Path:
    """Write a small SD 2.x as diffusers saves it, random weights, v-prediction."""
    torch.manual_seed(0)
    UNet2DConditionModel(
        sample_size=96,
        block_out_channels=(64, 128),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=(1, 2),
        use_linear_projection=True,
        upcast_attention=True,
    ).save_pretrained(folder / "unet")
    AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ).save_pretrained(folder / "vae")
    text = CLIPTextConfig(
        vocab_size=525,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=1,
        hidden_act="gelu",
    )
    CLIPTextModel(text).save_pretrained(folder / "text_encoder")
    shutil.copytree(MODEL / "tokenizer", folder / "tokenizer", copy_function=shutil.copyfile)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        edit_json(folder / "tokenizer" / name, pad_token="!")  # token 0, as the published ones
    shutil.copytree(MODEL / "scheduler", folder / "scheduler", copy_function=shutil.copyfile)
    shutil.copyfile(MODEL / "model_index.json", folder / "model_index.json")
    edit_json(folder / "scheduler/scheduler_config.json", prediction_type="v_prediction")
    return folder


def sd2_tensors(folder: Path) -> Tensors:
    """`make_sd2`'s folder as one file has it."""
    unet, vae, text = (load_file(folder / WEIGHTS[p]) for p in ("unet", "vae", "text_encoder"))
    return {
        **original_unet(unet, UNET_OF_TWO_LEVELS),
        **original_vae(vae, 2),
        **openclip_text_encoder(text, 2),
        **training_leftovers(),
    }
