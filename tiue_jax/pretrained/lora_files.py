"""LoRA files: those of diffusers, peft and kohya merged into a model; ours, for them to read.

A key of a file is part, layer and ending:

| writer | key |
|---|---|
| diffusers with peft | `unet.mid_block.attentions.0.proj_in.lora_A.weight`, `.lora_B.weight` |
| diffusers | `unet.mid_block.attentions.0.proj_in.lora.down.weight`, `.lora.up.weight` |
| diffusers, formerly | `mid_block....attn1.processor.to_q_lora.down.weight`, `_lora.up.weight` |
| kohya | `lora_unet_mid_block_attentions_0_proj_in.lora_down.weight`, `.lora_up.weight`, `.alpha` |

and likewise `text_encoder.` and `lora_te_` for the text encoder. With down [r, in] and up [out, r]
a layer's weight becomes weight + scale * alpha/r * up down; of a convolution, down has the window
and up is 1x1. Alpha is `.alpha`, else what the file's metadata say (`lora_adapter_metadata`, peft's
config as diffusers stores it), else r.

All of a file is checked before a tensor is read: every key has its place, or nothing is merged.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save

from tiue_jax.io.errors import InputError
from tiue_jax.io.files import StrPath, require_absent, write_atomic
from tiue_jax.pretrained.folder import StableDiffusion
from tiue_jax.pretrained.jsonfile import Fields, parse_object
from tiue_jax.pretrained.links import require_inside
from tiue_jax.pretrained.names import (
    DIFFUSERS,
    ParamPath,
    Shape,
    list_faults,
    to_flax,
    torch_name,
    torch_shape,
)
from tiue_jax.pretrained.parameters import param_shapes
from tiue_jax.pretrained.weights import (
    WeightFile,
    convert_dtype,
    open_weights,
    require_finite,
)

FILE_NAME = "pytorch_lora_weights.safetensors"  # what diffusers looks for in a folder
METADATA = "lora_adapter_metadata"

_ENDINGS = {  # of a key -> what it holds
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".alpha": "alpha",
}
# What diffusers formerly called the projections of an attention: our name's end -> theirs.
_FORMER = {
    "unet": {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out.0": "to_out"},
    "text_encoder": {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"},
}
_KOHYA = {"unet": ("lora_unet_",), "text_encoder": ("lora_te_", "lora_te1_")}
# Initialisations of peft that leave the base weights alone; others (PiSSA, ...) change them.
_KEEPS_BASE = (True, False, None, "gaussian", "eva", "orthogonal")


class Layer(NamedTuple):
    """One layer that a LoRA can adapt.

    Attributes:
        part: "unet" or "text_encoder".
        name: as torch has it, without its part: "mid_block.attentions.0.proj_in".
        path, shape: of its kernel, Flax's.
    """

    part: str
    name: str
    path: ParamPath
    shape: Shape


class Pair(NamedTuple):
    """The keys of a layer's two matrices, their rank, and the alpha to divide by it."""

    down: str
    up: str
    rank: int
    alpha: float


@dataclass(frozen=True)
class LoraFile:
    """A file of which every key has its place, no matrix read yet."""

    weights: WeightFile
    pairs: Mapping[Layer, Pair]

    def update(self, layer: Layer) -> np.ndarray:
        """Return what the file adds to a layer's kernel, fp32 and in its shape."""
        pair = self.pairs[layer]
        down, up = self.matrix(pair.down), self.matrix(pair.up)
        product = up.reshape(up.shape[0], -1) @ down.reshape(pair.rank, -1)
        return np.float32(pair.alpha / pair.rank) * to_flax(product, layer.path, layer.shape)

    def matrix(self, key: str) -> np.ndarray:
        """Return a tensor as fp32."""
        return convert_dtype(self.weights.read(key), np.float32, self.weights.path, key)


def open_lora(file: StrPath, shapes: Mapping[str, Mapping[ParamPath, Shape]]) -> LoraFile:
    """Check the LoRA in `file`, or in the folder `file`, against the networks it is for.

    Args:
        shapes: part -> path -> shape of its parameters.

    Raises:
        InputError: not a safetensors file; keys unknown, without their other half, misshapen or
            given twice (lists them); settings of peft that we do not implement.
    """
    path = Path(file)
    if path.is_dir():
        require_inside(path / FILE_NAME, path)
        path /= FILE_NAME
    weights = open_weights(path)
    layers = {spelled: layer for part in shapes for spelled, layer in _spell(part, shapes[part])}
    held: dict[Layer, dict[str, str]] = {}
    faults: dict[str, list[str]] = {"unknown": [], "given twice": []}
    for key in weights.entries:
        ending = next((e for e in _ENDINGS if key.endswith(e)), "")
        layer = layers.get(key.removesuffix(ending)) if ending else None
        if layer is None:
            faults["unknown"].append(key)
            continue
        roles = held.setdefault(layer, {})
        if _ENDINGS[ending] in roles:
            faults["given twice"].append(f"{roles[_ENDINGS[ending]]} and {key}")
        roles[_ENDINGS[ending]] = key
    faults["without the other half"] = [
        next(iter(roles.values())) for roles in held.values() if not {"down", "up"} <= roles.keys()
    ]
    whole = {layer: roles for layer, roles in held.items() if {"down", "up"} <= roles.keys()}
    faults["misshapen"] = [
        fault for layer, roles in whole.items() for fault in _misshapen(layer, roles, weights)
    ]
    if any(faults.values()):
        what = f"keys do not fit the {' and the '.join(shapes)}: {list_faults(faults)}"
        raise InputError(what, file=weights.path)
    if not whole:
        raise InputError("holds no LoRA", file=weights.path)
    for roles in whole.values():
        for key in roles.values():
            weights.dtype(key)
    configs = {part: _peft_config(weights, part) for part in shapes}
    pairs = {layer: _pair(layer, roles, weights, configs) for layer, roles in whole.items()}
    return LoraFile(weights, pairs)


def merge_lora_file(sd: StableDiffusion, file: StrPath, scale: float = 1.0) -> StableDiffusion:
    """Put the LoRA of `file` into the parameters of `sd`; each keeps its dtype and its place.

    Kernel by kernel and in place, so that no second copy of the parameters is ever held; nothing
    is changed before the whole file has been checked.

    Args:
        sd: with the parameters of the parts that the file adapts.
        file: a .safetensors file, or a folder with pytorch_lora_weights.safetensors.
        scale: how much of it; 1 is the whole.

    Returns:
        `sd`.
    Raises:
        InputError: as `open_lora`; NaN or Inf in a matrix, or a sum beyond the range of its dtype.
        ValueError: parameters that the file adapts were not loaded, or `scale` is no number.
    """
    if not math.isfinite(scale):
        raise ValueError(f"LoRA scale {scale}: expected a number")
    lora = open_lora(file, {part: param_shapes(sd.modules[part]) for part in _FORMER})
    missing = sorted({layer.part for layer in lora.pairs} - sd.params.keys())
    if missing:
        raise ValueError(f"parameters of {missing} were not loaded")
    for layer, pair in lora.pairs.items():
        holder = sd.params[layer.part]
        for module in layer.path[:-1]:
            holder = holder[module]
        kernel = holder[layer.path[-1]]
        merged = np.asarray(kernel).astype(np.float32) + np.float32(scale) * lora.update(layer)
        require_finite(merged, lora.weights.path, pair.up)
        merged = convert_dtype(merged, kernel.dtype, lora.weights.path, pair.up)
        if isinstance(kernel, jax.Array):
            merged = jax.device_put(np.ascontiguousarray(merged), kernel.sharding)
        holder[layer.path[-1]] = merged
    return sd


def save_lora(lora: Mapping[str, Any], alpha: float, target: StrPath) -> Path:
    """Write the LoRA matrices of a training as diffusers' `load_lora_weights` reads them.

    It then has kernel + alpha/rank * a b. Alpha stands in the file's metadata, where diffusers
    stores it: a reader that ignores them, as `UNet.load_lora_adapter` does where it is not given
    the `weight_name`, takes alpha = rank.

    Args:
        lora: the UNet's, of `models.lora`: {path: {"a": [in, rank], "b": [rank, out]}}.
        target: a new .safetensors file, or the folder for pytorch_lora_weights.safetensors.

    Returns:
        The file.
    Raises:
        InputError: the file is there already; NaN or Inf in a matrix.
        ValueError: ranks differ, or `alpha` is not positive.
    """
    file = Path(target)
    file = file if file.suffix == ".safetensors" else file / FILE_NAME
    require_absent(file)
    flat = {path: np.asarray(leaf) for path, leaf in sorted(flatten_dict(dict(lora)).items())}
    names = {path[:-1]: torch_name((*path[:-1], "kernel")).rsplit(".", 1)[0] for path in flat}
    ranks = {leaf.shape[1 if path[-1] == "a" else 0] for path, leaf in flat.items()}
    if len(ranks) != 1 or not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"LoRA of ranks {sorted(ranks)}, alpha {alpha}: expected one, above 0")
    tensors = {}
    for path, leaf in flat.items():
        key = f"unet.{names[path[:-1]]}.lora_{path[-1].upper()}.weight"
        require_finite(leaf, file, key)
        tensors[key] = np.ascontiguousarray(leaf.T)
    config = {
        "unet.r": ranks.pop(),
        "unet.lora_alpha": int(alpha) if float(alpha).is_integer() else float(alpha),
        "unet.target_modules": sorted(names.values()),
    }
    metadata = {"format": "pt", METADATA: json.dumps(config, indent=2, sort_keys=True)}
    write_atomic(file, save(tensors, metadata))
    return file


def load_lora(
    file: StrPath, params_shapes: Mapping[ParamPath, Shape]
) -> tuple[dict[str, Any], float]:
    """Return the LoRA in `file` as `models.lora` has it, and alpha: what `save_lora` was given.

    Args:
        file: of any writer; it adapts dense layers of the UNet, all with one rank and one alpha.
        params_shapes: path -> shape of the UNet's parameters.

    Raises:
        InputError: as `open_lora`; a convolution, or several ranks or alphas; NaN or Inf.
    """
    found = open_lora(file, {"unet": params_shapes})
    where = found.weights.path
    for layer, pair in found.pairs.items():
        if len(layer.shape) != 2:
            raise InputError("not a dense layer", file=where, key=pair.down)
    settings = sorted({(pair.rank, pair.alpha) for pair in found.pairs.values()})
    if len(settings) > 1:
        shown = ", ".join(f"{rank} and {alpha:g}" for rank, alpha in settings[:4])
        raise InputError("layers differ", file=where, expected="one rank and alpha", found=shown)
    flat = {}
    for layer, pair in found.pairs.items():
        for leaf, key in (("a", pair.down), ("b", pair.up)):
            matrix = found.matrix(key)
            matrix = matrix.reshape(matrix.shape[:2]).T
            flat[*layer.path[:-1], leaf] = np.ascontiguousarray(matrix)
    return unflatten_dict(dict(sorted(flat.items()))), next(iter(found.pairs.values())).alpha


def _spell(part: str, shapes: Mapping[ParamPath, Shape]) -> list[tuple[str, Layer]]:
    """Return (what some writer calls it, layer) for every layer of `part`."""
    spelled = []
    for path, shape in shapes.items():
        if path[-1] != "kernel":
            continue
        name = torch_name(path).removesuffix(".weight")
        layer = Layer(part, name, path, shape)
        names = [name]
        if part == "text_encoder":  # transformers 5 has dropped this level
            names.append(name.removeprefix("text_model."))
        between = "processor." if part == "unet" else ""
        for ours, theirs in _FORMER[part].items():
            if name.endswith(f".{ours}"):
                names += [n.removesuffix(ours) + between + theirs for n in names]
        spelled += [(f"{part}.{n}", layer) for n in names]
        if part == "unet":  # a file of the UNet alone need not say so
            spelled += [(n, layer) for n in names]
        spelled += [(prefix + name.replace(".", "_"), layer) for prefix in _KOHYA[part]]
    return spelled


def _misshapen(layer: Layer, roles: Mapping[str, str], weights: WeightFile) -> list[str]:
    """Return what is wrong with the shapes of one layer's tensors."""
    out, inputs, *window = torch_shape(layer.path, layer.shape)
    down = weights.entries[roles["down"]].shape
    rank = down[0] if down else 0
    ones = (1,) * len(window)
    wanted = {"down": (rank, inputs, *window), "up": (out, rank, *ones), "alpha": ()}
    found = {role: weights.entries[key].shape for role, key in roles.items()}
    fits = {
        role: rank > 0 and DIFFUSERS.fits(shape, wanted[role])
        if role != "alpha"
        else shape in ((), (1,))
        for role, shape in found.items()
    }
    return [
        f"{roles[role]} (expected {list(wanted[role])}, found {list(found[role])})"
        for role, right in fits.items()
        if not right
    ]


def _peft_config(weights: WeightFile, part: str) -> Fields | None:
    """Return peft's config of the adapter of `part`, if the file has it."""
    text = weights.metadata.get(METADATA)
    if text is None:
        return None
    values = parse_object(text.encode(), weights.path)
    prefixes = tuple(f"{other}." for other in _FORMER)
    if part == "unet" and not any(key.startswith(prefixes) for key in values):
        ours = values  # of the UNet alone
    else:
        ours = {k[len(part) + 1 :]: v for k, v in values.items() if k.startswith(f"{part}.")}
    if not ours:
        return None
    fields = Fields(ours, weights.path)
    fields.only("init_lora_weights", _KEEPS_BASE)
    patterns = ours.get("alpha_pattern") or {}
    if not isinstance(patterns, dict) or not all(
        re.fullmatch(r"\^?[\w.]+", name) for name in patterns
    ):
        raise fields.refuse("alpha_pattern", "names of layers -> alpha")
    return fields


def _pair(
    layer: Layer,
    roles: Mapping[str, str],
    weights: WeightFile,
    configs: Mapping[str, Fields | None],
) -> Pair:
    """Find alpha: of the layer's own key, of peft's config, or the rank."""
    rank = weights.entries[roles["down"]].shape[0]
    config = configs[layer.part]
    alpha = float(rank)
    if "alpha" in roles:
        key = roles["alpha"]
        if config is not None:
            what = "alpha is in the file's keys and in its metadata"
            raise InputError(what, file=weights.path, key=key, expected="one of them")
        alpha = float(weights.read(key).reshape(()))
        if alpha <= 0:
            raise InputError(
                "not an alpha", file=weights.path, key=key, expected="above 0", found=alpha
            )
    elif config is not None:
        alpha = config.number("lora_alpha", 8.0, 0.0, 1e6)  # 8 is peft's default
        patterns = Fields(config.values.get("alpha_pattern") or {}, config.file)
        for pattern in patterns.values:
            bare = pattern.removeprefix("^")
            anywhere = bare == pattern and layer.name.endswith(f".{bare}")
            if layer.name == bare or anywhere:
                alpha = patterns.number(pattern, alpha, 0.0, 1e6)
                break
        if config.boolean("use_rslora", False):  # divides by the root of the rank
            alpha *= math.sqrt(rank)
    return Pair(roles["down"], roles["up"], rank, alpha)
