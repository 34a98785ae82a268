"""Where arrays lie, and that it changes no number."""

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tests.training.small_step import OPTIONS, frozen, ids, settled, start, step
from tiue_jax.training.hlo import collectives, totals
from tiue_jax.training.sharding import (
    batch_sharding,
    check_batch_size,
    jit_step,
    make_mesh,
    partition_spec,
    placement,
    shard,
)
from tiue_jax.training.state import TrainState
from tiue_jax.training.step import Draws, sample_draws

KEY = jax.random.key(7)
ITERATIONS, BATCH = 5, 24  # no size of a network is 24, nor what a device has of it
# name -> (data, fsdp, parts of a batch)
MESHES = {
    "1 device": (1, 1, 1),
    "2": (2, 1, 1),
    "4, in two parts": (2, 2, 2),
    "8": (8, 1, 1),
    "8, split": (2, 4, 1),
}
# Relative, of each loss of each of the five iterations: fp32 rounds otherwise where a device has
# other shapes.
TOLERANCE = 1e-6
# Of each array's gradient, as Adam's first moment sums them; where it is small, of all of them.
GRADIENTS = 1e-5
LEARNING = replace(OPTIONS, student_lr=1e-4, lora_lr=1e-3)


class Run(NamedTuple):
    """State after the last iteration, metrics of each, and the compiled program."""

    state: TrainState
    metrics: list[dict[str, float]]
    compiled: jax.stages.Compiled


def run(data: int, fsdp: int, accumulate: int, *, iterations: int = ITERATIONS, **unet: Any) -> Run:
    mesh = make_mesh(data, fsdp, jax.devices()[: data * fsdp])
    options = replace(LEARNING, accumulate=accumulate)
    # The LoRA far from the teacher: the VSD loss is of their difference, and its rounding theirs.
    state = settled(start(options), change=0.3)
    split = accumulate == 1  # the teacher once whole, too
    jitted = jit_step(step(options, **unet), mesh, state, frozen(), shard_teacher=split)
    state, fixed = shard(state, mesh), shard(frozen(), mesh, split=split)
    inputs = jax.device_put(ids(BATCH), batch_sharding(mesh))
    compiled = jitted.lower(state, fixed, inputs, KEY).compile()
    given, metrics = state.student["conv_in"]["kernel"], []
    for _ in range(iterations):
        state, told = compiled(state, fixed, inputs, KEY)
        metrics.append({name: float(value) for name, value in told.items()})
    assert given.is_deleted(), "the state is donated"
    return Run(state, metrics, compiled)


@pytest.fixture(scope="module")
def results() -> dict[str, Run]:
    return {name: run(*sizes) for name, sizes in MESHES.items()}


@pytest.mark.parametrize("name", [name for name in MESHES if name != "1 device"])
def test_any_number_of_devices_is_one(results: dict[str, Run], name: str) -> None:
    """The same losses and gradients, and students that differ by a twentieth of a learning rate.

    fp32 sums in another order. Worst seen: gradients 1.7e-6 apart, students 3e-3 learning rates.
    """
    one, other = results["1 device"], results[name]
    for key in one.metrics[0]:
        pairs = [(a[key], b[key]) for a, b in zip(one.metrics, other.metrics, strict=True)]
        worst = max(abs(b - a) / abs(a) if a else abs(b) for a, b in pairs)
        print(f"{name}: {key} {worst:.1e} apart")
        assert worst <= (TOLERANCE if key.startswith("loss/") else 1e-5), key
    for network in ("student", "lora"):
        worst = gradients_apart(one, other, network)
        print(f"{name}: {network}'s gradients {worst:.1e} apart")
        assert worst <= GRADIENTS
    for network, lr in (("student", 1e-4), ("ema", 1e-4), ("lora", 1e-3)):
        leaves = zip(
            jax.tree.leaves(getattr(one.state, network)),
            jax.tree.leaves(getattr(other.state, network)),
            strict=True,
        )
        gaps = np.concatenate([np.abs(np.asarray(a) - np.asarray(b)).ravel() for a, b in leaves])
        print(f"{name}: {network} {gaps.max() / lr:.1e} learning rates apart")
        assert gaps.max() <= 0.05 * lr


def gradients_apart(one: Run, other: Run, network: str) -> float:
    """The worst difference of an array of Adam's first moments, by its norm or 1 % of all."""
    moments = [getattr(r.state, f"{network}_opt")[1][0].mu for r in (one, other)]
    pairs = [
        (np.linalg.norm(a), np.linalg.norm(np.asarray(a) - np.asarray(b)))
        for a, b in zip(*map(jax.tree.leaves, moments), strict=True)
    ]
    whole = np.linalg.norm([norm for norm, _ in pairs])
    return max(gap / (norm + 1e-2 * whole) for norm, gap in pairs)


@pytest.mark.slow
def test_in_bfloat16_more_devices_change_no_more_than_the_dtype_does() -> None:
    """There the devices' gradients are summed in bfloat16 too. Worst seen: 3.6 % of 3.3 %."""
    one = run(1, 1, 1, iterations=1, dtype=jnp.bfloat16)
    many = run(2, 4, 1, iterations=1, dtype=jnp.bfloat16)
    full = run(1, 1, 1, iterations=1)
    for network in ("student", "lora"):
        devices, dtype = (gradients_apart(one, r, network) for r in (many, full))
        print(f"{network}: 8 devices {devices:.1e}, fp32 {dtype:.1e} apart from bf16 on one")
        assert devices < 2 * dtype < 0.2


def test_the_noise_is_the_same_in_every_bit() -> None:
    def draws(mesh: Mesh) -> Draws:
        split, whole = batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())
        places = Draws(*[split] * 5, null_uniform=whole)
        draw = jax.jit(lambda key: sample_draws(key, 3, 8, (4, 4, 4)), out_shardings=places)
        return draw(KEY)

    one = draws(make_mesh(1, 1, jax.devices()[:1]))
    for count in (2, 4, 8):
        many = draws(make_mesh(count, 1, jax.devices()[:count]))
        assert len(many.noise.sharding.device_set) == count
        assert jax.tree.all(jax.tree.map(np.array_equal, one, many))


def test_large_parameters_and_their_moments_are_split(results: dict[str, Run]) -> None:
    state = results["8, split"].state
    for tree in (state.student, state.ema, state.student_opt[1][0].mu):
        kernel = tree["down_blocks_0"]["resnets_0"]["conv1"]["kernel"]
        assert kernel.addressable_shards[0].data.size == kernel.size / 4
    bias = state.student["conv_in"]["bias"]
    assert bias.addressable_shards[0].data.size == bias.size
    for tree in (state.lora, state.lora_opt[1][0].nu):
        query = tree["mid_block"]["attentions_0"]["transformer_blocks_0"]["attn1"]["to_q"]
        assert query["b"].addressable_shards[0].data.size == query["b"].size / 4


def test_data_parallel_training_only_sums_gradients(results: dict[str, Run]) -> None:
    """No activation and no parameter is gathered or moved: all-reduces alone."""
    found = totals(collectives(results["8"].compiled.as_text()))
    print(found)
    assert set(found) == {"all-reduce"}
    learns = results["8"].state.student, results["8"].state.lora
    size = sum(x.nbytes for x in jax.tree.leaves(learns))
    assert size <= found["all-reduce"]["bytes"] <= 1.01 * size  # and a few scalars of metrics


def test_split_training_gathers_parameters_and_sums_gradients(results: dict[str, Run]) -> None:
    """What is gathered or summed has the shape of a parameter: no activation moves."""
    program, state = results["8, split"].compiled, results["8, split"].state
    found = collectives(program.as_text())
    print(totals(found))
    assert set(totals(found)) == {"all-gather", "all-reduce"}
    trees = state.student, state.lora, frozen().text_encoder
    allowed = {kind for x in jax.tree.leaves(trees) for kind in parameter_like(x.shape, parts=4)}
    odd = {x for one in found for x in one.shapes if unordered(x) not in allowed}
    print(odd)
    # The embedding of the K = 2 timesteps, which all examples share, and scalars.
    assert odd <= {(2, 1, 64), ()}


def test_where_the_lora_learns_alone_a_part_of_a_batch_is_on_all_devices_too() -> None:
    """The images that it learns from are made in two parts: no activation moves for that."""
    mesh = make_mesh(2, 2, jax.devices()[:4])
    options = replace(LEARNING, accumulate=2)
    state = start(options)
    jitted = jit_step(step(options, lora_only=True), mesh, state, frozen())
    program = jitted.lower(state, frozen(), ids(BATCH), KEY).compile()
    trees = state.student, state.lora, frozen().text_encoder
    allowed = {kind for x in jax.tree.leaves(trees) for kind in parameter_like(x.shape, parts=2)}
    found = collectives(program.as_text())
    assert {x for one in found for x in one.shapes if unordered(x) not in allowed} <= {()}


def parameter_like(shape: tuple[int, ...], parts: int) -> set[tuple[int, ...]]:
    """The shapes of a parameter, and of its gradient split along any axis; see `unordered`."""
    split = (
        (*shape[:i], shape[i] // parts, *shape[i + 1 :])
        for i in range(len(shape))
        if shape[i] % parts == 0
    )
    return {unordered(shape), *map(unordered, split)}


def unordered(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The sizes but 1, sorted: the compiler transposes and reshapes what it sums."""
    return tuple(sorted(size for size in shape if size != 1))


@pytest.mark.slow
def test_a_second_call_compiles_nothing() -> None:
    mesh = make_mesh(1, 1, jax.devices()[:1])
    state = shard(start(), mesh)
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


def test_what_is_not_split_is_reported() -> None:
    kernel, bias = jnp.zeros((3, 8), jnp.bfloat16), jnp.zeros((8,))
    tree = {
        "a": {"kernel": kernel, "bias": bias},
        "out": {"kernel": kernel[:, :6]},
        "table": jnp.zeros((8, 8)),
    }
    found = placement(tree, make_mesh(2, 4))
    assert found == (48 + 32 + 36 + 256, 12 + 32 + 36 + 256, ("out/kernel",), ("table",))
    assert str(found) == (
        "0.00 GB, 0.00 GB on a device; whole, indivisible: out/kernel; whole, unmatched: table"
    )
    assert placement(tree, make_mesh(8, 1))[2:] == ((), ("table",))


def test_every_parameter_has_a_rule() -> None:
    found = placement((start(), frozen()), make_mesh(2, 4))
    assert not found.unmatched


@pytest.mark.parametrize(("data", "fsdp"), [(3, 1), (-1, 3), (0, 8), (8, 2), (-2, 4)])
def test_meshes_that_do_not_fit_are_refused(data: int, fsdp: int) -> None:
    with pytest.raises(ValueError, match="expected 8 devices in all"):
        make_mesh(data, fsdp)


def test_meshes() -> None:
    assert dict(make_mesh().shape) == {"data": 8, "fsdp": 1}
    assert dict(make_mesh(2, -1).shape) == {"data": 2, "fsdp": 4}
    assert dict(make_mesh(1, 1, jax.devices()[:1]).shape) == {"data": 1, "fsdp": 1}
    assert make_mesh(1, -1).shape["fsdp"] == 8
    for count, (data, fsdp) in {1: (1, 1), 4: (1, 4), 6: (3, 2), 8: (1, 8)}.items():
        assert make_mesh(-1, -1, jax.devices()[:count]).shape == {"data": data, "fsdp": fsdp}
    assert make_mesh(-1, -1, [*range(256)]).shape == {"data": 32, "fsdp": 8}


@pytest.mark.parametrize("batch", [0, 4, 12])
def test_a_batch_that_does_not_divide_is_refused(batch: int) -> None:
    check_batch_size(16, make_mesh())
    with pytest.raises(ValueError, match=f"batch size {batch}: expected a positive multiple"):
        check_batch_size(batch, make_mesh())
