"""LoRA as a second parameter tree: kernel + scale * a b on chosen dense layers.

Source: arXiv 2106.09685. A frozen and an adapted network are the same module applied to other
parameters; there is no mode to switch.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, PRNGKeyArray

Params = Mapping[str, Any]


def init_lora(
    key: PRNGKeyArray, params: Params, rank: int, targets: Sequence[str] = ("to_q", "to_v")
) -> dict[str, Any]:
    """LoRA matrices for every dense layer named in `targets`; a ~ N(0, 1/rank^2), b = 0.

    Args:
        params: the UNet's parameters (arrays or shapes).
        rank: inner dimension.
        targets: last names of the layers to adapt.
    Returns:
        A tree like `params` that has, in place of a target's parameters, {"a": [in, rank],
        "b": [rank, out]}, fp32.
    Raises:
        ValueError: no layer has such a name, one is a convolution, or rank < 1.
    Source: peft's `init_lora_weights="gaussian"`, the initialisation of diffusers' LoRA trainings.
    """
    if rank < 1:
        raise ValueError(f"LoRA rank {rank}: expected at least 1")
    kernels = {
        path[:-1]: leaf
        for path, leaf in sorted(flatten_dict(params).items())
        if path[-1] == "kernel" and path[-2] in targets
    }
    missing = set(targets) - {path[-1] for path in kernels}
    if missing:
        raise ValueError(f"LoRA targets {sorted(missing)}: no such layer in the parameters")
    convolutions = {path[-1] for path, kernel in kernels.items() if kernel.ndim != 2}
    if convolutions:
        raise ValueError(f"LoRA targets {sorted(convolutions)}: convolutions; choose dense layers")
    lora = {}
    for layer_key, (path, kernel) in zip(
        jax.random.split(key, len(kernels)), kernels.items(), strict=True
    ):
        fan_in, fan_out = kernel.shape
        lora[(*path, "a")] = jax.random.normal(layer_key, (fan_in, rank), jnp.float32) / rank
        lora[(*path, "b")] = jnp.zeros((rank, fan_out), jnp.float32)
    return unflatten_dict(lora)


def merge_lora(params: Params, lora: Params, scale: float | Array) -> dict[str, Any]:
    """`params` with kernel + scale * a b in every layer that `lora` names; `params` is not changed.

    Args:
        scale: alpha / rank.
    Raises:
        ValueError: `lora` names a layer that `params` has not.
    """
    merged, pairs = flatten_dict(params), flatten_dict(lora)
    for path in {path[:-1] for path in pairs}:
        kernel = merged.get((*path, "kernel"))
        if kernel is None:
            raise ValueError(f"LoRA for {'/'.join(path)}: no such layer in the parameters")
        update = scale * (pairs[(*path, "a")] @ pairs[(*path, "b")])
        merged[(*path, "kernel")] = kernel + update.astype(kernel.dtype)
    return unflatten_dict(merged)
