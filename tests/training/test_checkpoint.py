"""Checkpoints of a state of a few arrays: nothing of a model is needed to lose or keep one."""

import json
import shutil
from pathlib import Path
from typing import Any

import flax.struct
import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tiue_jax.data.pipeline import make_batches, position
from tiue_jax.data.prompts import Prompts
from tiue_jax.io.errors import InputError, RunError
from tiue_jax.training.checkpoint import Checkpoints, inspect_arrays, restore_params

# A failed read leaves tensorstore's callbacks behind an event loop that Orbax has closed by then.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

META = {"config": {"seed": 0}}


@flax.struct.dataclass
class State:
    step: Any
    student: Any
    ema: Any
    lora: Any
    student_opt: Any


def make_state(value: float = 1.0) -> State:
    student = {"conv_in": {"kernel": jnp.arange(24.0).reshape(3, 8) * value, "bias": jnp.ones(8)}}
    ema = jax.tree.map(lambda x: x / 3, student)
    lora = {"to_q": {"a": jnp.full((3, 2), value)}}
    return State(jnp.int32(7), student, ema, lora, optax.adam(1e-3).init(student))


def abstract(state: State) -> State:
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state)


def make_iterator() -> grain.DatasetIterator:
    prompts = Prompts(tuple(map(str, range(10))), "ten")
    return make_batches(prompts, lambda t: np.zeros((len(t), 3), np.int32), batch_size=4, seed=0)


def save(workdir: Path, *steps: int, keep: int = 3) -> None:
    checkpoints = Checkpoints(workdir, keep=keep)
    batches = make_iterator()
    for step in range(1, max(steps) + 1):
        next(batches)
        if step in steps:
            checkpoints.save(step, make_state(float(step)), META, batches)
    checkpoints.close()


def restore(workdir: Path, check=lambda meta: None):
    checkpoints, batches = Checkpoints(workdir, keep=3), make_iterator()
    found = checkpoints.restore(abstract(make_state()), batches, check)
    checkpoints.close()
    return found, batches


def assert_same(found: Any, wanted: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def array_files(workdir: Path, step: int) -> list[Path]:
    """The files that hold the arrays' bytes, largest first."""
    files = (workdir / "checkpoints" / str(step) / "state").glob("**/d/*")
    return sorted(files, key=lambda file: -file.stat().st_size)


def test_nothing_to_restore(tmp_path: Path):
    assert restore(tmp_path)[0] is None


def test_newest_comes_back_with_its_iterator_and_only_the_last_are_kept(tmp_path: Path):
    save(tmp_path, 2, 4, 5, keep=2)
    found, batches = restore(tmp_path)
    assert found.step == 5
    assert_same(found.state, make_state(5.0))
    assert found.meta["config"] == {"seed": 0}
    assert (
        next(batches)["prompts"]
        == [next(it) for it in [make_iterator()] for _ in range(6)][5]["prompts"]
    )
    kept = {p.name for p in (tmp_path / "checkpoints").iterdir() if p.is_dir()}
    assert kept == {"4", "5"}


def test_saving_a_step_again_changes_nothing(tmp_path: Path):
    save(tmp_path, 3)
    checkpoints = Checkpoints(tmp_path, keep=3)
    checkpoints.save(3, make_state(99.0), META, make_iterator())
    checkpoints.close()
    assert_same(restore(tmp_path)[0].state, make_state(3.0))


def test_what_is_not_finite_is_not_saved(tmp_path: Path):
    save(tmp_path, 2)
    checkpoints = Checkpoints(tmp_path, keep=3)
    state = make_state()
    state.student["conv_in"]["bias"] = jnp.asarray([1.0, jnp.nan] * 4)
    with pytest.raises(RunError, match=r"step 3: student/conv_in/bias is not finite; not saved"):
        checkpoints.save(3, state, META, make_iterator())
    checkpoints.close()
    assert restore(tmp_path)[0].step == 2


def test_state_goes_onto_another_mesh(tmp_path: Path):
    save(tmp_path, 1)
    mesh = Mesh(np.array(jax.devices()), ("fsdp",))

    def place(x: jax.Array) -> NamedSharding:
        split = x.ndim == 2 and x.shape[1] == 8
        return NamedSharding(mesh, PartitionSpec(None, "fsdp") if split else PartitionSpec())

    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(x)), make_state()
    )
    checkpoints = Checkpoints(tmp_path, keep=3)
    state = checkpoints.restore(target, make_iterator(), lambda meta: None).state
    checkpoints.close()
    assert_same(jax.device_get(state), jax.device_get(make_state(1.0)))
    assert len(state.student["conv_in"]["kernel"].addressable_shards) == len(jax.devices())
    assert inspect_arrays(state)[0] == inspect_arrays(make_state(1.0))[0]


def test_iterator_follows_where_the_number_of_hosts_has_changed(tmp_path: Path):
    save(tmp_path, 3)
    file = tmp_path / "checkpoints" / "3" / "meta" / "metadata"
    meta = json.loads(file.read_text())
    file.write_text(json.dumps(meta | {"data": {"batch": 3, "process_count": 4}}))
    shutil.rmtree(tmp_path / "checkpoints" / "3" / "data")
    found, batches = restore(tmp_path)
    assert found.step == 3
    assert position(batches) == 3


def test_refusal_of_the_meta_is_the_users_error_and_moves_nothing(tmp_path: Path):
    save(tmp_path, 1, 2)

    def check(meta: dict) -> None:
        raise InputError("another config", key="seed", found=meta["config"]["seed"])

    with pytest.raises(InputError, match="another config, found 0"):
        restore(tmp_path, check)
    assert restore(tmp_path)[0].step == 2


def flip_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "bit flipped": lambda workdir, step: [flip_bit(f) for f in array_files(workdir, step)[:1]],
    "truncated": lambda workdir, step: [f.write_bytes(b"") for f in array_files(workdir, step)],
    "array files gone": lambda workdir, step: [f.unlink() for f in array_files(workdir, step)],
    "meta broken": lambda workdir, step: (
        workdir / "checkpoints" / str(step) / "meta" / "metadata"
    ).write_text("{"),
    "iterator gone": lambda workdir, step: shutil.rmtree(
        workdir / "checkpoints" / str(step) / "data"
    ),
    "digest differs": lambda workdir, step: replace_digest(workdir, step),
}


def replace_digest(workdir: Path, step: int) -> None:
    """As if a bit of the array had flipped where nothing but the digest notices."""
    file = workdir / "checkpoints" / str(step) / "meta" / "metadata"
    meta = json.loads(file.read_text())
    meta["digests"]["student/conv_in/kernel"] ^= 1
    file.write_text(json.dumps(meta))


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_put_aside_for_the_one_before(tmp_path: Path, damage: str):
    save(tmp_path, 2, 4)
    DAMAGES[damage](tmp_path, 4)
    found, batches = restore(tmp_path)
    assert found.step == 2
    assert position(batches) == 2
    assert_same(found.state, make_state(2.0))
    assert [p.name for p in (tmp_path / "checkpoints_damaged").iterdir()] == ["4.0"]
    save(tmp_path, 4)  # the run that goes on from 2 comes to 4 again
    assert restore(tmp_path)[0].step == 4


def test_no_checkpoint_that_can_be_read_is_an_error_and_nothing_is_moved(tmp_path: Path):
    save(tmp_path, 2, 4)
    for step in (2, 4):
        DAMAGES["digest differs"](tmp_path, step)
    with pytest.raises(InputError, match=r"none of 2 checkpoints can be read.*conv_in/kernel"):
        restore(tmp_path)
    assert not (tmp_path / "checkpoints_damaged").exists()


def test_half_written_checkpoint_is_not_seen_nor_in_the_way(tmp_path: Path):
    """Orbax writes under a temporary name, and commits by renaming."""
    save(tmp_path, 2, 4)
    folder = tmp_path / "checkpoints" / "4"
    for marker in folder.rglob("commit_success.txt"):
        marker.unlink()
    folder.rename(folder.with_name("4.orbax-checkpoint-tmp-1"))
    assert_same(restore_params(tmp_path)[1], jax.device_get(make_state(2.0).ema))
    assert restore(tmp_path)[0].step == 2
    save(tmp_path, 4)
    assert restore(tmp_path)[0].step == 4


@pytest.mark.parametrize("which", ["ema", "student", "lora"])
def test_parameters_alone(tmp_path: Path, which: str):
    save(tmp_path, 2, 4)
    found = restore_params(tmp_path, which)[1]
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(found))
    assert_same(found, jax.device_get(getattr(make_state(4.0), which)))
    DAMAGES["truncated"](tmp_path, 4)
    assert_same(restore_params(tmp_path, which)[1], jax.device_get(getattr(make_state(2.0), which)))
    assert not (tmp_path / "checkpoints_damaged").exists()  # reading moves nothing


def test_parameters_of_no_run(tmp_path: Path):
    with pytest.raises(InputError, match="holds no checkpoints"):
        restore_params(tmp_path)
    with pytest.raises(ValueError, match="choose from"):
        restore_params(tmp_path, "teacher")
    Checkpoints(tmp_path, keep=1).close()
    with pytest.raises(InputError, match="holds no finished checkpoint"):
        restore_params(tmp_path)


def test_digest_changes_with_any_bit_and_any_exchange():
    x = np.arange(12, dtype=np.float32).reshape(3, 4)

    def digest(array: np.ndarray) -> int:
        return inspect_arrays({"x": jnp.asarray(array)})[0]["x"]

    digests = {digest(x)}
    for bit in range(32):
        flipped = x.view(np.uint32).copy()
        flipped[1, 2] ^= np.uint32(1 << bit)
        digests.add(digest(flipped.view(np.float32)))
    swapped = x.copy()
    swapped[0, 0], swapped[2, 3] = x[2, 3], x[0, 0]
    digests |= {digest(swapped), digest(x.T)}
    assert len(digests) == 35


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32, jnp.uint8, jnp.bool_])
def test_digest_of_every_dtype(dtype):
    tree = {"a": jnp.ones((2, 3), dtype), "b": [jnp.zeros((), dtype)]}
    digests, finite = inspect_arrays(tree)
    assert set(digests) == {"a", "b/0"}
    assert digests["a"] != 0 == digests["b/0"]
    assert finite == {"a": True, "b/0": True}
    if jnp.issubdtype(dtype, jnp.floating):
        assert inspect_arrays({"a": jnp.asarray([1.0, jnp.inf], dtype)})[1] == {"a": False}
