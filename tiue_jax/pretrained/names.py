"""Parameter names: what a torch state dict calls a parameter, and what the Flax tree calls it.

The Flax modules copy diffusers' names, so that the two differ by three rules:

| torch | Flax | where |
|---|---|---|
| `down_blocks.0` | `down_blocks_0` | entries of a module list (`LISTS`) |
| `weight` | `kernel` (rank 2, 4), `scale` (rank 1), `embedding` (an `*_embedding`, rank 2) | last |
| `[out, in]`, `[out, in, kh, kw]` | `[in, out]`, `[kh, kw, in, out]` | kernels |

`torch_name` and `flax_path` are inverse to each other, which `Layout` checks for every parameter.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tiue_jax.io.errors import InputError

ParamPath = tuple[str, ...]
Shape = tuple[int, ...]

LISTS = (
    "attentions",
    "conv",
    "down_blocks",
    "downsamplers",
    "layers",
    "net",
    "resnets",
    "to_out",
    "transformer_blocks",
    "up_blocks",
    "upsamplers",
)
_ENTRY = re.compile(rf"({'|'.join(LISTS)})_(\d+)")
_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "bias": "bias",
    "class_embedding": "class_embedding",
}

# What older files call the four projections of the VAE's attention.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_SHOWN = 4  # names of each kind that an error spells out


def torch_name(path: ParamPath) -> str:
    """Return the state-dict key of the Flax parameter at `path`."""
    *modules, leaf = path
    return ".".join([*(_ENTRY.sub(r"\1.\2", module) for module in modules), _LEAVES[leaf]])


def flax_path(name: str, rank: int) -> ParamPath:
    """Return the Flax path of the state-dict key `name`, whose tensor has `rank` axes."""
    modules: list[str] = []
    *parts, leaf = name.split(".")
    for part in parts:
        if part.isdigit() and modules:
            modules[-1] += f"_{part}"
        else:
            modules.append(part)
    if leaf != "weight":
        return (*modules, leaf)
    if rank == 2 and modules and modules[-1].endswith("_embedding"):
        return (*modules, "embedding")
    return (*modules, "scale" if rank == 1 else "kernel")


def torch_shape(path: ParamPath, shape: Shape) -> Shape:
    """Return the shape torch gives to the Flax parameter at `path` of `shape`."""
    if path[-1] != "kernel":
        return shape
    *window, inputs, outputs = shape
    return (outputs, inputs, *window)


def to_torch(array: np.ndarray, path: ParamPath) -> np.ndarray:
    """Return a view of the Flax parameter in torch's axis order: [.., in, out] -> [out, in, ..]."""
    return array.transpose(_torch_axes(path, array.ndim))


def to_flax(array: np.ndarray, path: ParamPath, shape: Shape) -> np.ndarray:
    """Return a view of torch's `array` as the Flax parameter at `path` of `shape`.

    A 1x1 convolution and a linear layer hold the same numbers; the rank of `shape` decides.
    """
    array = array.reshape(torch_shape(path, shape))
    return array.transpose(np.argsort(_torch_axes(path, array.ndim)))


def _torch_axes(path: ParamPath, rank: int) -> tuple[int, ...]:
    if path[-1] != "kernel":
        return tuple(range(rank))
    return (rank - 1, rank - 2, *range(rank - 2))


def canonical_name(part: str, name: str) -> str | None:
    """Return the present-day diffusers key for the stored key `name`; None for a buffer to ignore.

    Knows the VAE's former attention names, text encoders saved without their `text_model.` prefix,
    CLIP's former `position_ids` buffer, and its `logit_scale`, which no feature depends on.
    """
    if part in ("text_encoder", "clip") and name.endswith("embeddings.position_ids"):
        return None
    if part == "clip" and name == "logit_scale":
        return None
    bare = ("embeddings", "encoder", "final_layer_norm")
    if part == "text_encoder" and name.split(".", 1)[0] in bare:
        return f"text_model.{name}"
    if part == "vae":
        before, dot, after = name.partition("mid_block.attentions.0.")
        old, _, leaf = after.rpartition(".")
        if dot and old in _OLD_ATTENTION:
            return f"{before}{dot}{_OLD_ATTENTION[old]}.{leaf}"
    return name


def _shapes_fit(stored: Shape, wanted: Shape) -> bool:
    """Equal, or equal but for the trailing 1, 1 of a 1x1 convolution."""
    return _without_window(stored) == _without_window(wanted)


def _without_window(shape: Shape) -> Shape:
    return shape[:2] if len(shape) == 4 and shape[2:] == (1, 1) else shape


class Form(NamedTuple):
    """One way of writing parameters into a file: names, axis order, file names."""

    name: str
    file_names: Mapping[str, str]
    key: Callable[[ParamPath], str]
    canonical: Callable[[str, str], str | None]
    stored_shape: Callable[[ParamPath, Shape], Shape]
    fits: Callable[[Shape, Shape], bool]
    store: Callable[[np.ndarray, ParamPath], np.ndarray]
    load: Callable[[np.ndarray, ParamPath, Shape], np.ndarray]


DIFFUSERS = Form(
    name="diffusers",
    file_names={
        "unet": "diffusion_pytorch_model.safetensors",
        "vae": "diffusion_pytorch_model.safetensors",
        "text_encoder": "model.safetensors",
        "taesd": "diffusion_pytorch_model.safetensors",
        "clip": "model.safetensors",
    },
    key=torch_name,
    canonical=canonical_name,
    stored_shape=torch_shape,
    fits=_shapes_fit,
    store=to_torch,
    load=to_flax,
)
FLAX = Form(
    name="flax",
    file_names=dict.fromkeys(("unet", "vae", "text_encoder"), "flax_params.safetensors"),
    key="/".join,
    canonical=lambda part, name: name,
    stored_shape=lambda path, shape: shape,
    fits=lambda stored, wanted: stored == wanted,
    store=lambda array, path: array,
    load=lambda array, path, shape: array,
)
FORMS = {form.name: form for form in (DIFFUSERS, FLAX)}


@dataclass(frozen=True)
class Layout:
    """The parameters that one network has, and what a file of one form calls them.

    Attributes:
        part: a key of `form.file_names`: "unet", "vae", ...
        shapes: Flax path -> Flax shape of every parameter.
    """

    part: str
    shapes: Mapping[ParamPath, Shape]
    form: Form = DIFFUSERS

    def __post_init__(self) -> None:
        for path, shape in self.shapes.items():
            assert flax_path(torch_name(path), len(shape)) == path, f"{path} is no bijection"

    def match(self, stored: Mapping[str, Shape], file: Path) -> dict[ParamPath, str]:
        """Return which stored key holds which parameter: all of them, and nothing besides.

        Args:
            stored: the keys in the file or files, with their shapes.
            file: what to name in an error.

        Raises:
            InputError: keys missing, unexpected, misshapen or given twice; lists them.
        """
        wanted = {self.form.key(path): path for path in self.shapes}
        held: dict[str, str] = {}
        twice: list[str] = []
        for key in stored:
            name = self.form.canonical(self.part, key)
            if name is None:
                continue
            if name in held:
                twice.append(f"{held[name]} and {key}")
            held[name] = key
        both = [name for name in wanted if name in held]
        shapes = {n: self.form.stored_shape(wanted[n], self.shapes[wanted[n]]) for n in both}
        misshapen = [
            f"{held[name]} (expected {list(shapes[name])}, found {list(stored[held[name]])})"
            for name in both
            if not self.form.fits(stored[held[name]], shapes[name])
        ]
        faults = {
            "missing": sorted(wanted.keys() - held.keys()),
            "unexpected": sorted(held[name] for name in held.keys() - wanted.keys()),
            "misshapen": misshapen,
            "given twice": twice,
        }
        if any(faults.values()):
            raise InputError(f"keys do not fit the {self.part}: {list_faults(faults)}", file=file)
        return {wanted[name]: held[name] for name in both}


def list_faults(faults: Mapping[str, list[str]]) -> str:
    """Return "3 missing (a, b, c); 1 misshapen (d)", each list cut after its first few."""
    told = []
    for kind, names in faults.items():
        if names:
            more = [f"and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
            told.append(f"{len(names)} {kind} ({', '.join([*_cut(names[:_SHOWN]), *more])})")
    return "; ".join(told)


def _cut(names: Iterable[str]) -> list[str]:
    return [name if len(name) <= 160 else name[:157] + "..." for name in names]
