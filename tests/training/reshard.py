"""Restore a checkpoint and save it again as it is, on as many hosts as there are.

python -m tests.training.reshard COORDINATOR COUNT INDEX FROM TO
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np

from tests.training import small_step
from tiue_jax.data.pipeline import make_batches
from tiue_jax.data.prompts import Prompts
from tiue_jax.training.checkpoint import Checkpoints, Restored
from tiue_jax.training.hosts import ALONE, Hosts, join
from tiue_jax.training.sharding import make_mesh, shardings
from tiue_jax.training.state import TrainState, init_state

STEP = 3


def shapes() -> TrainState:
    """Of a state with a part of the small UNet: fewer arrays, of every kind."""
    teacher = {name: small_step.frozen().teacher[name] for name in ("conv_in", "mid_block")}
    return jax.eval_shape(lambda: init_state(jax.random.key(0), teacher, small_step.OPTIONS))


def make_state() -> TrainState:
    """Of the small step, every array of it random."""
    rng = np.random.default_rng(0)

    def draw(x: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(rng.uniform(1, 100, x.shape), x.dtype)

    return jax.tree.map(draw, shapes())


def target(devices: list[Any]) -> TrainState:
    """The state as shapes, split over all devices by the rules of a run."""
    state = shapes()
    places = shardings(state, make_mesh(1, -1, devices))
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state, places
    )


def kernel_of(state: TrainState) -> jax.Array:
    """An array that is split."""
    return state.student["conv_in"]["kernel"]


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


def save(workdir: Path, state: TrainState, batches: Any, hosts: Hosts = ALONE) -> None:
    checkpoints = Checkpoints(workdir, keep=2, hosts=hosts)
    checkpoints.save(STEP, state, {}, batches)
    checkpoints.close()


def main(coordinator: str, count: str, index: str, source: str, destination: str) -> None:
    with join(
        coordinator=coordinator, num_processes=int(count), process_id=int(index), timeout=60.0
    ) as hosts:
        found, batches = restore(Path(source), hosts)
        assert found is not None
        assert not kernel_of(found.state).is_fully_addressable
        save(Path(destination), found.state, batches, hosts)


if __name__ == "__main__":
    main(*sys.argv[1:])
