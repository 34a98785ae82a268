"""A model by whatever name people have for it: folder, hub id or single file; LoRA merged in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tiue_jax.io.errors import InputError
from tiue_jax.io.files import StrPath
from tiue_jax.pretrained.folder import StableDiffusion, load_stable_diffusion
from tiue_jax.pretrained.hub import resolve_model
from tiue_jax.pretrained.lora_files import merge_lora_file
from tiue_jax.pretrained.single_file import load_single_file


def load_model(
    name: StrPath,
    *,
    revision: str | None = None,
    variant: str | None = None,
    tokenizer: StrPath | None = None,
    prediction_type: str | None = None,
    loras: Sequence[str] = (),
    **options: Any,
) -> StableDiffusion:
    """Load the model called `name`.

    Args:
        name: a diffusers folder; OWNER/NAME[@REVISION] on the hub; a single .safetensors file in
            the original layout.
        revision, variant: as for `resolve_model`.
        tokenizer, prediction_type: as for `load_single_file`: what such a file does not hold.
        loras: LoRA files merged in, in order: FILE or FILE:SCALE.
        options: dtype, param_dtype, place, parts: as for `load_stable_diffusion`.

    Raises:
        InputError: there is no such model, or it is not what it should be.
    """
    path = resolve_model(str(name), revision=revision, variant=variant)
    if path.is_file():
        if variant is not None:
            raise InputError("a single file has no variants", key="--variant", file=path)
        if tokenizer is None:
            what = "a single file holds no tokenizer"
            expected = "--tokenizer: a tokenizer folder, or a Stable Diffusion folder with one"
            raise InputError(what, file=path, expected=expected)
        sd = load_single_file(
            path, tokenizer=tokenizer_folder(tokenizer), prediction_type=prediction_type, **options
        )
    else:
        for flag, value in (("--tokenizer", tokenizer), ("--prediction_type", prediction_type)):
            if value is not None:
                raise InputError("is for single files: a folder has its own", key=flag, file=path)
        sd = load_stable_diffusion(path, variant=variant, **options)
    for lora in loras:
        file, scale = _split_scale(lora)
        sd = merge_lora_file(sd, file, scale)
    return sd


def tokenizer_folder(folder: StrPath) -> Path:
    """Return `folder`, or the `tokenizer/` in it where that is there."""
    inner = Path(folder) / "tokenizer"
    return inner if inner.is_dir() else Path(folder)


def _split_scale(text: str) -> tuple[Path, float]:
    """FILE:SCALE -> (FILE, SCALE); SCALE is 1 where there is none."""
    name, colon, scale = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), 1.0
    try:
        number = float(scale)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise InputError("not a scale", key="--lora", expected="FILE:0.8", found=scale)
    return Path(name), number
