"""Where arrays lie, and that it changes no number."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from tests.diffusion.test_student import COLLECTIVE
from tests.training import small_step
from tests.training.small_step import frozen, ids, settled, start, step
from tiue_jax.training.sharding import (
    batch_sharding,
    check_batch_size,
    jit_step,
    make_mesh,
    partition_spec,
    shard,
)

KEY = jax.random.key(7)
MESHES = {"1 device": (1, 1), "8 x 1": (8, 1), "2 x 4": (2, 4)}


def run(data: int, fsdp: int, iterations: int = 2):
    """The state and metrics after some iterations of 8 prompts; the compiled program."""
    mesh = make_mesh(data, fsdp, jax.devices()[: data * fsdp])
    state = settled(start())
    jitted = jit_step(step(), mesh, state, frozen())
    state, fixed = shard(state, mesh), shard(frozen(), mesh)
    inputs = jax.device_put(ids(8), batch_sharding(mesh))
    compiled = jitted.lower(state, fixed, inputs, KEY).compile(small_step.FAST)
    given = state.student["conv_in"]["kernel"]
    for _ in range(iterations):
        state, metrics = compiled(state, fixed, inputs, KEY)
    assert given.is_deleted(), "the state is donated"
    return state, metrics, compiled


@pytest.fixture(scope="module")
def results() -> dict:
    return {name: run(*sizes) for name, sizes in MESHES.items()}


@pytest.mark.parametrize("name", ["8 x 1", "2 x 4"])
def test_eight_devices_are_one(results: dict, name: str) -> None:
    one, many = results["1 device"], results[name]
    for key, value in one[1].items():
        # fp32 sums in another order; worst seen 1.8e-6.
        assert float(many[1][key]) == pytest.approx(float(value), rel=1e-4, abs=1e-6), key
    # A share of the learning rate; entries without a gradient but noise make whole steps, two of
    # them at most.
    for network, lr in (("student", 1e-2), ("ema", 1e-2), ("lora", 1e-2)):
        difference = jax.tree.map(
            lambda a, b: np.abs(np.asarray(a) - np.asarray(b)),
            getattr(one[0], network),
            getattr(many[0], network),
        )
        flat = np.concatenate([x.reshape(-1) for x in jax.tree.leaves(difference)])
        assert flat.max() <= 4.1 * lr
        assert np.mean(flat > 0.02 * lr) < 0.01


def test_large_parameters_and_their_moments_are_split(results: dict) -> None:
    state = results["2 x 4"][0]
    for tree in (state.student, state.ema, state.student_opt[1][0].mu):
        kernel = tree["down_blocks_0"]["resnets_0"]["conv1"]["kernel"]
        assert kernel.addressable_shards[0].data.size == kernel.size / 4
    bias = state.student["conv_in"]["bias"]
    assert bias.addressable_shards[0].data.size == bias.size


def test_data_parallel_training_only_sums_gradients(results: dict) -> None:
    """No activation and no parameter is gathered or moved: all-reduces alone."""
    assert set(COLLECTIVE.findall(results["8 x 1"][2].as_text())) == {"all-reduce"}


@pytest.mark.slow
def test_a_second_call_compiles_nothing() -> None:
    mesh = make_mesh(1, 1, jax.devices()[:1])
    state = start()
    jitted = jit_step(step(), mesh, state, frozen())
    for _ in range(2):
        state, _ = jitted(state, frozen(), ids(2), KEY)
    assert jitted._cache_size() == 1


def test_rules() -> None:
    mesh = make_mesh(2, 4)
    for path, shape, expected in (
        ("student/conv_in/kernel", (3, 3, 4, 16), PartitionSpec(None, None, None, "fsdp")),
        ("student/conv_out/kernel", (3, 3, 16, 6), PartitionSpec()),
        ("student_opt/1/0/mu/ff/kernel", (8, 32), PartitionSpec(None, "fsdp")),
        ("student/conv_in/bias", (16,), PartitionSpec()),
        ("lora/attn1/to_q/a", (16, 8), PartitionSpec()),
        ("text/token_embedding/embedding", (20, 8), PartitionSpec(None, "fsdp")),
        ("step", (), PartitionSpec()),
    ):
        assert partition_spec(path, shape, mesh) == expected, path


@pytest.mark.parametrize(("data", "fsdp"), [(3, 1), (-1, 3), (0, 8), (-1, -1), (8, 2), (-2, 4)])
def test_meshes_that_do_not_fit_are_refused(data: int, fsdp: int) -> None:
    with pytest.raises(ValueError, match="expected 8 devices in all"):
        make_mesh(data, fsdp)


def test_meshes() -> None:
    assert dict(make_mesh().shape) == {"data": 8, "fsdp": 1}
    assert dict(make_mesh(2, -1).shape) == {"data": 2, "fsdp": 4}
    assert dict(make_mesh(1, 1, jax.devices()[:1]).shape) == {"data": 1, "fsdp": 1}


@pytest.mark.parametrize("batch", [0, 4, 12])
def test_a_batch_that_does_not_divide_is_refused(batch: int) -> None:
    check_batch_size(16, make_mesh())
    with pytest.raises(ValueError, match=f"batch size {batch}: expected a positive multiple"):
        check_batch_size(batch, make_mesh())
