"""The parameters of one network <-> its weights, tensor by tensor."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike

from tiue_jax.io.errors import InputError
from tiue_jax.models.clip import CLIP
from tiue_jax.models.taesd import AutoencoderTiny
from tiue_jax.models.unet import UNet
from tiue_jax.models.vae import AutoencoderKL
from tiue_jax.pretrained.names import FLAX, Form, Layout, ParamPath, Shape
from tiue_jax.pretrained.shards import Weights, open_part
from tiue_jax.pretrained.sizes import network_size
from tiue_jax.pretrained.weights import convert_dtype, require_finite, write_weights

Params = dict[str, Any]

MAX_TENSORS = 4096  # of one network; SD's UNet has 686, and each takes some ms to trace


@dataclass(frozen=True)
class ParamFile:
    """Weights that hold exactly the parameters of one network, no tensor read yet.

    Attributes:
        weights: the checked file, or files.
        layout: the network's parameters.
        keys: path of a parameter -> its key in the weights.
    """

    weights: Weights
    layout: Layout
    keys: dict[ParamPath, str]

    @classmethod
    def open(
        cls, module: nn.Module, part: str, folder: Path, form: Form, variant: str | None = None
    ) -> ParamFile:
        """Check that the weights in `folder` fit `module`: headers, keys, shapes, dtypes.

        Args:
            variant: as of `shards.open_part`.

        Raises:
            InputError: they do not; says where and how.
        """
        return cls.fit(open_part(folder, form.file_names[part], variant), module, part, form)

    @classmethod
    def fit(cls, weights: Weights, module: nn.Module, part: str, form: Form) -> ParamFile:
        """Check that `weights` hold the parameters of `module` and nothing besides.

        Raises:
            InputError: they do not; says where and how.
        """
        _require_plausible(weights, module, part)
        layout = Layout(part, param_shapes(module), form)
        keys = layout.match(weights.shapes, weights.path)
        for key in keys.values():
            weights.dtype(key)
        return cls(weights, layout, keys)

    def read(self, dtype: DTypeLike | None, place: Callable[[np.ndarray], Any]) -> Params:
        """Return the parameters in `dtype` (None: as stored), each handed to `place` once read.

        Raises:
            InputError: NaN or Inf in a weight, or a value beyond the range of `dtype`.
        """
        flat = {}
        for path, key in sorted(self.keys.items(), key=lambda item: self.weights.position(item[1])):
            stored = self.weights.read(key)
            if dtype is not None:
                stored = convert_dtype(stored, dtype, self.weights.file(key), key)
            flat[path] = place(self.layout.form.load(stored, path, self.layout.shapes[path]))
        return unflatten_dict(dict(sorted(flat.items())))


def _require_plausible(weights: Weights, module: nn.Module, part: str) -> None:
    """Refuse a network far larger than `weights` are, before it is traced: that takes time.

    Whatever is less than double goes on, so that its keys are named.
    """
    size, shapes = network_size(module), weights.shapes
    if size is None:
        return
    held = sum(math.prod(shape) for shape in shapes.values())
    if size.tensors > MAX_TENSORS or size.tensors > 2 * len(shapes) + 64:
        what = f"config.json of the {part} asks for far more tensors than there are, or may be"
        expected = f"{size.tensors} tensors (at most {MAX_TENSORS})"
        raise InputError(what, file=weights.path, expected=expected, found=len(shapes))
    if size.parameters > 2 * held + (1 << 20):
        what = f"config.json of the {part} asks for far more parameters than there are"
        raise InputError(what, file=weights.path, expected=size.parameters, found=held)


def write_params(
    module: nn.Module,
    part: str,
    params: Params,
    folder: Path,
    dtype: str | None,
    form: Form,
    shown: Path,
) -> str:
    """Write `params` of `module` into the new folder `folder`; return the dtype they are stored in.

    Args:
        dtype: "float32", ...; None: every parameter in its own.
        shown: the file's name in errors: `folder` may still be a temporary one.

    Raises:
        InputError: parameters missing, unexpected, misshapen, NaN, Inf, or too large for `dtype`.
    """
    flat = flatten_dict(params)
    shapes = {"/".join(path): tuple(leaf.shape) for path, leaf in flat.items()}
    layout = Layout(part, param_shapes(module), form)
    Layout(part, layout.shapes, FLAX).match(shapes, shown)
    paths = {form.key(path): path for path in flat}

    def read(key: str) -> np.ndarray:
        path = paths[key]
        array = np.asarray(flat[path])
        require_finite(array, shown, key)
        if dtype is not None:
            array = convert_dtype(array, dtypes[key], shown, key)
        return form.store(array, path)

    dtypes = {
        key: np.dtype(flat[path].dtype if dtype is None else jnp.dtype(dtype))
        for key, path in paths.items()
    }
    stored = {key: form.stored_shape(path, layout.shapes[path]) for key, path in paths.items()}
    folder.mkdir()
    write_weights(folder / form.file_names[part], dtypes, stored, read)
    names = {found.name for found in dtypes.values()}
    return names.pop() if len(names) == 1 else "float32"


def to_device(array: np.ndarray) -> jax.Array:
    """Return `array` on the default device, by now: no copies pile up on the host behind it."""
    return jax.device_put(np.ascontiguousarray(array)).block_until_ready()


@functools.cache
def param_shapes(module: nn.Module) -> dict[ParamPath, Shape]:
    """Return path -> shape of every parameter of one of our networks; nothing is computed."""
    size = 2 ** (len(getattr(module, "block_out_channels", ())) or 1)
    if isinstance(module, UNet):
        inputs: tuple[Any, ...] = (
            jax.ShapeDtypeStruct((1, size, size, module.in_channels), jnp.float32),
            jax.ShapeDtypeStruct((1,), jnp.int32),
            jax.ShapeDtypeStruct((1, 1, module.context_dim), jnp.float32),
        )
        if module.time_cond_dim is not None:
            inputs += (jax.ShapeDtypeStruct((1,), jnp.float32),)
    elif isinstance(module, AutoencoderKL):
        inputs = (jax.ShapeDtypeStruct((1, size, size, module.in_channels), jnp.float32),)
    elif isinstance(module, AutoencoderTiny):
        size = 2 ** len(module.num_encoder_blocks)
        inputs = (jax.ShapeDtypeStruct((1, size, size, module.in_channels), jnp.float32),)
    elif isinstance(module, CLIP):
        size = module.image_size
        inputs = (
            jax.ShapeDtypeStruct((1, 1), jnp.int32),
            jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32),
        )
    else:
        inputs = (jax.ShapeDtypeStruct((1, 1), jnp.int32),)
    variables = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    flat = flatten_dict(variables["params"])
    return {path: tuple(leaf.shape) for path, leaf in flat.items()}
