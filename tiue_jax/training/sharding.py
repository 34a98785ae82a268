"""Where every array lives: a mesh of two axes, a table of rules, and the step compiled for them.

`data` splits the batch; `fsdp` splits the batch too, and the large parameters with it. One device
is the mesh of 1 x 1. All axes are Auto: the compiler places the collectives (Explicit axes, the
default of `jax.make_mesh`, refuse vmapped convolutions).
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.tree_util import keystr

from tiue_jax.training.state import Frozen, TrainState

BATCH = PartitionSpec(("data", "fsdp"))
REPLICATED = PartitionSpec()

# First match wins. A path is the tree path joined by "/", of a parameter or of Adam's moment of it;
# the spec's last entry is for the array's last axis. An axis that does not divide is not split.
RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"lora.*/(a|b)$", REPLICATED),
    (r"/kernel$", PartitionSpec("fsdp")),
    (r"/embedding$", PartitionSpec("fsdp")),
    (r"", REPLICATED),
)


def make_mesh(data: int = -1, fsdp: int = 1, devices: list[Any] | None = None) -> Mesh:
    """A mesh with the axes data x fsdp.

    Args:
        data, fsdp: sizes; one of them may be -1: all devices that the other leaves.
        devices: all devices of the process group unless given.
    Raises:
        ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    count, sizes = len(devices), [data, fsdp]
    if sizes.count(-1) == 1:
        other = max(sizes)
        if other > 0 and count % other == 0:
            sizes[sizes.index(-1)] = count // other
    if min(sizes) < 1 or sizes[0] * sizes[1] != count:
        raise ValueError(f"mesh data {data} x fsdp {fsdp}: expected {count} devices in all")
    axes = (AxisType.Auto, AxisType.Auto)
    return Mesh(np.asarray(devices).reshape(sizes), ("data", "fsdp"), axis_types=axes)


def partition_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The spec of the array at `path`: the first rule that matches, aligned to the last axes."""
    spec = next(spec for pattern, spec in RULES if re.search(pattern, path))
    if len(spec) > len(shape):
        return REPLICATED
    aligned = (None,) * (len(shape) - len(spec)) + tuple(spec)
    fits = (n is None or size % mesh.shape[n] == 0 for n, size in zip(aligned, shape, strict=True))
    split = tuple(n if ok else None for n, ok in zip(aligned, fits, strict=True))
    return PartitionSpec(*split) if any(split) else REPLICATED


def shardings(tree: Any, mesh: Mesh) -> Any:
    """The sharding of every array of `tree` (arrays or shapes), by the rules."""

    def leaf(path: Any, x: Any) -> NamedSharding:
        name = keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, partition_spec(name, np.shape(x), mesh))

    return jax.tree_util.tree_map_with_path(leaf, tree)


def shard(tree: Any, mesh: Mesh) -> Any:
    """Put `tree` where the rules say."""
    return jax.device_put(tree, shardings(tree, mesh))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of every array whose first axis is the batch."""
    return NamedSharding(mesh, BATCH)


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """Raise ValueError unless the batch divides over the mesh."""
    if batch_size < 1 or batch_size % mesh.size:
        raise ValueError(
            f"batch size {batch_size}: expected a positive multiple of the {mesh.size} devices"
        )


def jit_step(
    step: Callable[..., Any], mesh: Mesh, state: TrainState, frozen: Frozen
) -> jax.stages.Wrapped:
    """Compile a step for a mesh: (state, frozen, input_ids, key) -> (state, metrics).

    The state given is donated: its memory becomes the new state's. `state` and `frozen` may be
    shapes (`jax.eval_shape`); arguments that lie elsewhere are moved.
    """
    places = shardings(state, mesh)
    everywhere = NamedSharding(mesh, REPLICATED)

    def iteration(state: TrainState, frozen: Frozen, input_ids: Any, key: Any) -> Any:
        return step(state, frozen, input_ids, key)

    return jax.jit(
        iteration,
        in_shardings=(places, shardings(frozen, mesh), batch_sharding(mesh), everywhere),
        out_shardings=(places, everywhere),
        donate_argnums=0,
    )
