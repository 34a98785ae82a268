"""The networks beside a Stable Diffusion that its training or evaluation may need: TAESD and CLIP.

Each is a folder with config.json and one safetensors file, as diffusers and transformers save it.
Loading has the checks of `folder.load_stable_diffusion`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from tiue_jax.io.errors import InputError
from tiue_jax.io.files import StrPath
from tiue_jax.models.clip import CLIP
from tiue_jax.models.taesd import AutoencoderTiny
from tiue_jax.pretrained import configs
from tiue_jax.pretrained.jsonfile import Fields, read_object
from tiue_jax.pretrained.links import require_contained
from tiue_jax.pretrained.names import DIFFUSERS
from tiue_jax.pretrained.parameters import ParamFile, Params, to_device

# OpenAI's, with which every CLIP was trained that says nothing else.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class LoadedTAESD:
    """The small autoencoder and its parameters."""

    module: AutoencoderTiny
    params: Params


@dataclass(frozen=True)
class LoadedCLIP:
    """Both towers, their parameters, and what images have to be for them.

    The tokens are those of Stable Diffusion's own tokenizer.

    Attributes:
        size: side of the images, in pixels.
        mean, std: per channel, of pixels in [0, 1]; the tower takes (pixels - mean) / std.
    """

    module: CLIP
    params: Params
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load_taesd(
    folder: StrPath,
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike | None = jnp.float32,
    place: Callable[[np.ndarray], Any] = to_device,
) -> LoadedTAESD:
    """Load the folder of an AutoencoderTiny.

    Args:
        folder: holds config.json and diffusion_pytorch_model.safetensors.
        dtype: compute dtype of the module.
        param_dtype: dtype of the parameters; None: as they are stored, each.
        place: what becomes of each parameter as soon as it is read.

    Raises:
        InputError: files missing, truncated or malformed; settings that we do not implement; keys
            missing, unexpected or misshapen; NaN or Inf in a weight.
    """
    module = configs.taesd_from_config(_config(Path(folder), "an AutoencoderTiny"), dtype=dtype)
    return LoadedTAESD(module, _read(module, "taesd", Path(folder), param_dtype, place))


def load_clip(
    folder: StrPath,
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike | None = jnp.float32,
    place: Callable[[np.ndarray], Any] = to_device,
) -> LoadedCLIP:
    """Load the folder of a CLIPModel.

    Args:
        folder: holds config.json, model.safetensors and, where pixels are normalised otherwise than
            OpenAI's, preprocessor_config.json. Its tokenizer is not read.
        The others as in `load_taesd`.

    Raises:
        InputError: as `load_taesd`; also for a preprocessing that does not fit the vision tower.
    """
    folder = Path(folder)
    module = configs.clip_from_config(_config(folder, "a CLIPModel"), dtype=dtype)
    mean, std = _normalisation(folder / "preprocessor_config.json", module.image_size)
    params = _read(module, "clip", folder, param_dtype, place)
    return LoadedCLIP(module, params, module.image_size, mean, std)


def _config(folder: Path, expected: str) -> Fields:
    """Return config.json of `folder`, the first of its files that is read."""
    if not folder.is_dir():
        what = "not a folder" if folder.exists() else "no such folder"
        raise InputError(what, file=folder, expected=f"the folder of {expected}")
    require_contained(folder)
    path = folder / "config.json"
    return Fields(read_object(path), path)


def _read(
    module: nn.Module,
    part: str,
    folder: Path,
    dtype: DTypeLike | None,
    place: Callable[[np.ndarray], Any],
) -> Params:
    return ParamFile.open(module, part, folder, DIFFUSERS).read(dtype, place)


def _normalisation(path: Path, image_size: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and deviation of what `path` (CLIPImageProcessor's) makes of pixels in [0, 1]."""
    if not path.exists():
        return CLIP_MEAN, CLIP_STD
    fields = Fields(read_object(path), path)
    side = fields.values.get("crop_size", image_size)
    sides = [side.get("height"), side.get("width")] if isinstance(side, dict) else [side] * 2
    if sides != [image_size, image_size]:
        raise fields.refuse("crop_size", f"{image_size}, the vision tower's image_size")
    if not fields.boolean("do_normalize", True):
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    mean = _per_channel(fields, "image_mean", CLIP_MEAN, low=-1e3)
    return mean, _per_channel(fields, "image_std", CLIP_STD, low=1e-6)


def _per_channel(
    fields: Fields, key: str, default: tuple[float, ...], low: float
) -> tuple[float, ...]:
    value = fields.values.get(key, default)
    numbers = isinstance(value, (list, tuple)) and all(type(v) in (int, float) for v in value)
    if not numbers or len(value) != 3 or not all(low <= v <= 1e3 for v in value):
        raise fields.refuse(key, f"3 numbers in {low:g}..1000")
    return tuple(float(v) for v in value)
