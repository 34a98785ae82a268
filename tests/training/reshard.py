"""Restore a checkpoint and save it again as it is, on as many hosts as there are.

python -m tests.training.reshard COORDINATOR COUNT INDEX FROM TO
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import flax.struct
import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tiue_jax.data.pipeline import make_batches
from tiue_jax.data.prompts import Prompts
from tiue_jax.training.checkpoint import Checkpoints, Restored
from tiue_jax.training.hosts import ALONE, Hosts, join

STEP = 3


@flax.struct.dataclass
class State:
    step: Any
    student: Any
    student_opt: Any


def make_state() -> State:
    rng = np.random.default_rng(0)
    student = {
        "split": jnp.asarray(rng.standard_normal((3, 16)), jnp.float32),
        "halves": jnp.asarray(rng.standard_normal((2, 8)), jnp.bfloat16),
        "whole": jnp.asarray(rng.standard_normal(5), jnp.float32),
    }
    return State(jnp.int32(STEP), student, optax.adam(1e-3).init(student))


def target(devices: list[Any]) -> State:
    """The state as shapes: split over all devices where its last axis divides by them."""
    mesh = Mesh(np.asarray(devices), ("fsdp",), axis_types=(AxisType.Auto,))

    def leaf(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        split = x.ndim == 2 and x.shape[1] % len(devices) == 0
        spec = PartitionSpec(None, "fsdp") if split else PartitionSpec()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(leaf, jax.eval_shape(make_state))


def make_iterator(hosts: Hosts) -> grain.DatasetIterator:
    return make_batches(
        Prompts(tuple(map(str, range(10))), "ten"),
        lambda texts: np.zeros((len(texts), 3), np.int32),
        batch_size=4,
        seed=0,
        process_index=hosts.index,
        process_count=hosts.count,
    )


def restore(
    workdir: Path, hosts: Hosts = ALONE, devices: list[Any] | None = None
) -> tuple[Restored | None, grain.DatasetIterator]:
    batches, checkpoints = make_iterator(hosts), Checkpoints(workdir, keep=2, hosts=hosts)
    found = checkpoints.restore(target(devices or jax.devices()), batches, lambda meta: None)
    checkpoints.close()
    return found, batches


def save(workdir: Path, state: State, batches: Any, hosts: Hosts = ALONE) -> None:
    checkpoints = Checkpoints(workdir, keep=2, hosts=hosts)
    checkpoints.save(STEP, state, {}, batches)
    checkpoints.close()


def main(coordinator: str, count: str, index: str, source: str, destination: str) -> None:
    with join(
        coordinator=coordinator, num_processes=int(count), process_id=int(index), timeout=20.0
    ) as hosts:
        found, batches = restore(Path(source), hosts)
        assert found is not None
        assert not found.state.student["split"].is_fully_addressable
        save(Path(destination), found.state, batches, hosts)


if __name__ == "__main__":
    main(*sys.argv[1:])
