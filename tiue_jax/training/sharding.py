"""Where every array lives: a mesh of two axes, a table of rules, and the step compiled for them.

`data` splits the batch; `fsdp` splits the batch too, and the large parameters with it. One device
is the mesh of 1 x 1. All axes are Auto: the compiler places the collectives (Explicit axes, the
default of `jax.make_mesh`, refuse vmapped convolutions).
"""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jax.tree_util import keystr
from jax.typing import DTypeLike
from jaxtyping import Array

from tiue_jax.training.state import Frozen, TrainState

TOGETHER = 8  # devices that hold one state, where the config does not say
BATCH = PartitionSpec(("data", "fsdp"))
REPLICATED = PartitionSpec()

# First match wins. A path is the tree path joined by "/", of a parameter or of Adam's moment of it;
# the spec's last entry is for the array's last axis. An axis that does not divide is not split. A
# LoRA's b is split as its kernel is, so that the sum of both needs nothing from other devices.
RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"/a$", REPLICATED),
    (r"/b$", PartitionSpec("fsdp")),
    (r"/(kernel|embedding)$", PartitionSpec("fsdp")),
    (r"/(bias|scale|class_embedding|logit_scale|null_ids|step|count)$", REPLICATED),
)


def make_mesh(data: int = -1, fsdp: int = 1, devices: list[Any] | None = None) -> Mesh:
    """A mesh with the axes data x fsdp.

    Args:
        data, fsdp: sizes; one of them may be -1: all devices that the other leaves. Both: as many
            in `fsdp` as divide 8 and the devices, so that eight hold a large model's state between
            them wherever there are eight, and one device works too.
        devices: all devices of the process group unless given.
    Raises:
        ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    sizes = [data, math.gcd(count, TOGETHER) if data == fsdp == -1 else fsdp]
    if -1 in sizes:
        other = max(sizes)
        if other > 0 and count % other == 0:
            sizes[sizes.index(-1)] = count // other
    if min(sizes) < 1 or sizes[0] * sizes[1] != count:
        raise ValueError(f"mesh data {data} x fsdp {fsdp}: expected {count} devices in all")
    axes = (AxisType.Auto, AxisType.Auto)
    return Mesh(np.asarray(devices).reshape(sizes), ("data", "fsdp"), axis_types=axes)


def matching_rule(path: str) -> PartitionSpec | None:
    """The spec of the first rule that matches, None where none does."""
    return next((spec for pattern, spec in RULES if re.search(pattern, f"/{path}")), None)


def partition_spec(path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """The spec of the array at `path`: its rule's, aligned to the last axes; whole without one."""
    spec = matching_rule(path) or REPLICATED
    if len(spec) > len(shape):
        return REPLICATED
    aligned = (None,) * (len(shape) - len(spec)) + tuple(spec)
    fits = (n is None or size % mesh.shape[n] == 0 for n, size in zip(aligned, shape, strict=True))
    split = tuple(n if ok else None for n, ok in zip(aligned, fits, strict=True))
    return PartitionSpec(*split) if any(split) else REPLICATED


class Placement(NamedTuple):
    """How a tree lies on a mesh.

    Attributes:
        total, per_device: bytes of the whole, and of what one device holds of it.
        indivisible: paths of the arrays that a rule would split, and whose axis does not divide.
        unmatched: paths of the arrays without a rule; whole on every device.
    """

    total: int
    per_device: int
    indivisible: tuple[str, ...]
    unmatched: tuple[str, ...]

    def __str__(self) -> str:
        text = f"{self.total / 1e9:.2f} GB, {self.per_device / 1e9:.2f} GB on a device"
        for what in ("indivisible", "unmatched"):
            paths = getattr(self, what)
            if paths:
                more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
                text += f"; whole, {what}: {', '.join(paths[:3])}{more}"
        return text


def placement(tree: Any, mesh: Mesh) -> Placement:
    """What the rules make of `tree` (arrays or shapes) on `mesh`."""
    total = per_device = 0
    indivisible, unmatched = [], []
    for keys, x in jax.tree_util.tree_leaves_with_path(tree):
        path, shape = keystr(keys, simple=True, separator="/"), np.shape(x)
        spec, rule = partition_spec(path, shape, mesh), matching_rule(path)
        size = math.prod(shape) * x.dtype.itemsize
        total += size
        per_device += size // math.prod(mesh.shape[n] for n in spec if n is not None)
        if rule is None:
            unmatched.append(path)
        elif rule != REPLICATED and spec == REPLICATED:
            indivisible.append(path)
    return Placement(total, per_device, tuple(indivisible), tuple(unmatched))


def shardings(tree: Any, mesh: Mesh, *, split: bool = True) -> Any:
    """The sharding of every array of `tree` (arrays or shapes), by the rules; else all whole."""

    def leaf(path: Any, x: Any) -> NamedSharding:
        name = keystr(path, simple=True, separator="/")
        spec = partition_spec(name, np.shape(x), mesh) if split else REPLICATED
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(leaf, tree)


def shard(tree: Any, mesh: Mesh, *, split: bool = True) -> Any:
    """Put `tree` where the rules say, or all of it on every device.

    Of several hosts each gives its own devices their parts of what it holds, which has to be the
    same on all: `hosts.agree` sees to it. `jax.device_put` would send every array round to compare.
    """
    places = shardings(tree, mesh, split=split)
    if jax.process_count() == 1:
        return jax.device_put(tree, places)

    def put(x: Any, place: NamedSharding) -> Array:
        if isinstance(x, Array) and not x.is_fully_addressable:
            return jax.device_put(x, place)  # is on all hosts already
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, place, lambda index: x[index])

    return jax.tree.map(put, tree, places)


def gather(params: Any, dtype: DTypeLike) -> Any:
    """Put the whole of every parameter on every device, for a computation in `dtype`.

    What is split is cast first, so that half the bytes are sent in bfloat16; its gradient is split
    again. Without this the compiler keeps the parameters split, and moves activations instead.
    Does nothing where no mesh of several devices is in context (`jit_step` sets one).
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1:
        return params

    def leaf(keys: Any, x: Array) -> Array:
        spec = partition_spec(keystr(keys, simple=True, separator="/"), x.shape, mesh)
        if spec == REPLICATED:
            return x

        @jax.custom_vjp
        def whole(x: Array) -> Array:
            return jax.lax.with_sharding_constraint(x, REPLICATED)

        def backward(_: None, gradient: Array) -> tuple[Array]:
            return (jax.lax.with_sharding_constraint(gradient, spec),)

        whole.defvjp(lambda x: (whole(x), None), backward)
        return whole(jax.lax.with_sharding_constraint(x.astype(dtype), spec))

    return jax.tree_util.tree_map_with_path(leaf, params)


def spread(batch: Any) -> Any:
    """Split arrays [b ...] over all devices; does nothing where no mesh is in context."""
    if jax.sharding.get_abstract_mesh().size <= 1:
        return batch
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, BATCH), batch)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of every array whose first axis is the batch."""
    return NamedSharding(mesh, BATCH)


def check_batch_size(batch_size: int, mesh: Mesh, accumulate: int = 1) -> None:
    """Raise ValueError unless the batch divides over the mesh, in every one of its parts."""
    if batch_size < 1 or batch_size % (mesh.size * accumulate):
        parts = f" times train.accumulate {accumulate}" if accumulate > 1 else ""
        raise ValueError(
            f"batch size {batch_size}: expected a positive multiple of the {mesh.size} "
            f"devices{parts}"
        )


def jit_step(
    step: Callable[..., Any],
    mesh: Mesh,
    state: TrainState,
    frozen: Frozen,
    *,
    shard_teacher: bool = True,
) -> jax.stages.Wrapped:
    """Compile a step for a mesh: (state, frozen, input_ids, key) -> (state, metrics).

    The state given is donated: its memory becomes the new state's. `state` and `frozen` may be
    shapes (`jax.eval_shape`); arguments that lie elsewhere are moved. `shard_teacher`: whether
    `frozen` is split by the rules as the state is.
    """
    places = shardings(state, mesh)
    everywhere = NamedSharding(mesh, REPLICATED)

    def iteration(state: TrainState, frozen: Frozen, input_ids: Any, key: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return step(state, frozen, input_ids, key)

    return jax.jit(
        iteration,
        in_shardings=(
            places,
            shardings(frozen, mesh, split=shard_teacher),
            batch_sharding(mesh),
            everywhere,
        ),
        out_shardings=(places, everywhere),
        donate_argnums=0,
    )
