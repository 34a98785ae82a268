"""A module of ours beside the torch module whose numbers it has to give; how the two are run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers.models.attention import FeedForward
from flax.traverse_util import unflatten_dict

from tests.parity.comparison import BOUND, NORMS, from_torch, randomise, relative_error, to_torch
from tiue_jax.pretrained import names

QUIET = 0.01  # a gain; see `golden`


@dataclass(frozen=True, eq=False)
class Case:
    """One module of ours, its torch original, and inputs of order 1.

    Attributes:
        theirs: makes the torch module (its weights are redrawn).
        ours: the Flax module.
        inputs: arrays in our layout, the arguments of both.
        call: runs the torch module on the inputs as tensors; its outputs in our order.
        method: of `ours`; None: the call.
        root: path that our parameter tree has above theirs.
    """

    theirs: Callable[[], torch.nn.Module]
    ours: nn.Module
    inputs: tuple[np.ndarray, ...]
    call: Callable[..., Any] = field(default=lambda module, *inputs: module(*inputs))
    method: str | None = None
    root: tuple[str, ...] = ()


@dataclass(frozen=True)
class Golden:
    """What torch gives for a case: its module, parameters in our form, inputs, outputs."""

    module: torch.nn.Module
    params: dict[str, Any]
    inputs: tuple[np.ndarray, ...]
    outputs: list[np.ndarray]


def flax_params(state: Mapping[str, torch.Tensor], root: tuple[str, ...] = ()) -> dict[str, Any]:
    """A torch module's state_dict as the parameters of ours, below `root`."""
    tree = {}
    for name, tensor in state.items():
        array = tensor.detach().numpy()
        path = names.flax_path(name, array.ndim)
        shape = array.shape
        if path[-1] == "kernel":
            shape = (*shape[2:], shape[1], shape[0])
        tree[(*root, *path)] = jnp.array(names.to_flax(array, path, shape))
    return unflatten_dict(tree)


@cache
def golden(case: Case, gain: float = 1.0) -> Golden:
    """Runs torch with random weights.

    Args:
        gain: factor on the inputs (but not on time or text) and on all weights except those of
            norms, feed-forwards, queries and keys. With `QUIET` every norm sees a variance of about
            1e-4, where its epsilon counts, and still has a say in the output.
    """
    torch.manual_seed(0)
    module = randomise(case.theirs())
    spared = {
        id(parameter)
        for name, part in module.named_modules()
        if isinstance(part, (*NORMS, FeedForward)) or name.endswith(("to_q", "to_k"))
        for parameter in part.parameters()
    }
    quieted = [x.dtype == np.float32 and (i == 0 or x.ndim == 4) for i, x in enumerate(case.inputs)]
    inputs = tuple(
        x * np.float32(gain) if q else x for x, q in zip(case.inputs, quieted, strict=True)
    )
    with torch.no_grad():
        for value in module.parameters():
            if id(value) not in spared:
                value.mul_(gain)
        outputs = case.call(module, *map(to_torch, inputs))
    params = flax_params(module.state_dict(), case.root)
    return Golden(module, params, inputs, [from_torch(x) for x in jax.tree.leaves(outputs)])


@cache
def compiled(case: Case, ours: nn.Module | None = None) -> Callable[..., Any]:
    """`params, *inputs -> outputs` of our module (or of `ours` in its place), jitted."""
    module = case.ours if ours is None else ours
    method = None if case.method is None else getattr(type(module), case.method)
    return jax.jit(lambda params, *inputs: module.apply({"params": params}, *inputs, method=method))


def worst_error(run: Callable[..., Any], params: Any, expected: Golden) -> float:
    """Largest relative error over the outputs of `run`; infinite if their shapes differ."""
    outputs = jax.tree.leaves(run(params, *map(jnp.asarray, expected.inputs)))
    if [x.shape for x in outputs] != [x.shape for x in expected.outputs]:
        return float("inf")
    return max(map(relative_error, outputs, expected.outputs))


def assert_parity(name: str, error: float, bound: float = BOUND) -> None:
    """Raises AssertionError beyond `bound`; prints (pytest -rP) the error found."""
    print(f"parity {name}: {error:.2e} of the largest value (bound {bound:.0e})")
    assert error <= bound, f"{name}: {error:.3e} of the largest value, bound {bound:.1e}"
