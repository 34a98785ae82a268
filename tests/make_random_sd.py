"""A Stable Diffusion folder of full size with random weights, made by diffusers.

    python -m tests.make_random_sd --kind=sd15 --out=/tmp/sd15

For what needs the real shapes and not the real weights: conversion, memory, speed, parity. It is
what a download would be: model_index.json, safetensors, a CLIP tokenizer of 49,408 entries (whose
words are made up). 4.3 GB for sd15, 5.2 GB for the others (half with --dtype=float16).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from absl import flags
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from examples.tiny_sd.tokenizer import byte_letters
from tiue_jax.io.errors import InputError, run_command
from tiue_jax.io.files import new_folder

VOCABULARY = 49408
_SD2_UNET = {
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
_SD2_TEXT = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
}
_SD1_TEXT = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
}
_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_STABLE = {**_BETAS, "steps_offset": 1, "set_alpha_to_one": False}

# The published settings: UNet, text encoder, scheduler, latent size.
KINDS: dict[str, dict[str, Any]] = {
    "sd15": {
        "unet": {"attention_head_dim": 8, "cross_attention_dim": 768},
        "text": _SD1_TEXT,
        "scheduler": lambda: PNDMScheduler(skip_prk_steps=True, **_STABLE),
        "size": 64,
    },
    "sd21": {
        "unet": _SD2_UNET,
        "text": _SD2_TEXT,
        "scheduler": lambda: PNDMScheduler(skip_prk_steps=True, **_STABLE),
        "size": 64,
    },
    "sd21v": {
        "unet": _SD2_UNET | {"upcast_attention": True},
        "text": _SD2_TEXT,
        "scheduler": lambda: DDIMScheduler(
            prediction_type="v_prediction", clip_sample=False, **_STABLE
        ),
        "size": 96,
    },
}


def make_random_sd(kind: str, folder: Path, *, dtype: str = "float32", seed: int = 0) -> Path:
    """Write the folder; return it.

    Args:
        kind: one of KINDS.
        folder: new or empty.
        dtype: of the weights.
        seed: of the weights.
    """
    shape = KINDS[kind]
    torch.manual_seed(seed)
    with new_folder(folder) as out:
        tokenizer = _write_tokenizer(out / "tokenizer", pad="!" if kind != "sd15" else None)
        bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
        text = CLIPTextConfig(
            vocab_size=VOCABULARY,
            bos_token_id=bos,
            eos_token_id=eos,
            pad_token_id=pad,
            **shape["text"],
        )
        pipeline = StableDiffusionPipeline(
            vae=AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                block_out_channels=(128, 256, 512, 512),
                layers_per_block=2,
                sample_size=8 * shape["size"],
            ),
            text_encoder=CLIPTextModel(text),
            tokenizer=tokenizer,
            unet=UNet2DConditionModel(sample_size=shape["size"], **shape["unet"]),
            scheduler=shape["scheduler"](),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.to(getattr(torch, dtype)).save_pretrained(out, safe_serialization=True)
        _name_as_published(out / "text_encoder" / "model.safetensors")
    return folder


def _name_as_published(file: Path) -> None:
    """Give the text encoder's tensors the names of the published folders.

    transformers 5 writes them without the `text_model.` that they all have there.
    """
    tensors = load_file(file)
    prefix = "" if any(name.startswith("text_model.") for name in tensors) else "text_model."
    named = {prefix + name: tensor for name, tensor in tensors.items()}
    save_file(named, file, metadata={"format": "pt"})


def _write_tokenizer(folder: Path, pad: str | None) -> CLIPTokenizer:
    """A byte-level tokenizer with as many merges as CLIP's has, of pairs in a fixed order."""
    letters = list(byte_letters().values())
    latin = "abcdefghijklmnopqrstuvwxyz"
    pairs = [(a, b) for a in latin for b in latin]
    merges = [*pairs, *((a, f"{b}</w>") for a, b in pairs)]
    joined = ["".join(pair) for pair in pairs]
    fours = ((a, b) for a in joined for b in joined)
    tokens = letters + [f"{letter}</w>" for letter in letters]
    merges += itertools.islice(fours, VOCABULARY - len(tokens) - len(merges) - 2)
    tokens += [a + b for a, b in merges] + ["<|startoftext|>", "<|endoftext|>"]
    assert len(set(tokens)) == VOCABULARY
    folder.mkdir()
    (folder / "vocab.json").write_text(
        json.dumps({token: i for i, token in enumerate(tokens)}, ensure_ascii=False),
        encoding="utf-8",
    )
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
    special |= {"unk_token": "<|endoftext|>", "pad_token": pad or "<|endoftext|>"}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | special))
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    return CLIPTokenizer.from_pretrained(str(folder))


def main(argv: Sequence[str]) -> None:
    """Write --kind to --out."""
    if len(argv) > 1 or not flags.FLAGS.out:
        raise InputError("is required; see --help", key="--out")
    folder = Path(flags.FLAGS.out)
    make_random_sd(flags.FLAGS.kind, folder, dtype=flags.FLAGS.dtype, seed=flags.FLAGS.seed)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{folder}: {flags.FLAGS.kind}, {size / 1e9:.2f} GB")


if __name__ == "__main__":
    flags.DEFINE_enum("kind", "sd15", sorted(KINDS), "Which Stable Diffusion's shapes.")
    flags.DEFINE_string("out", None, "Folder to write: new or empty.")
    flags.DEFINE_enum("dtype", "float32", ["float32", "float16"], "Of the weights.")
    flags.DEFINE_integer("seed", 0, "Of the weights.")
    run_command(main)
