"""Checkpoints of the whole training state; the only module that sees Orbax.

`WORKDIR/checkpoints/STEP/` holds `state` (step, student, EMA, LoRA, both optimisers), `data`
(grain's iterator) and `meta` (JSON: what run this is, a digest of every array). Saving is
asynchronous; a checkpoint counts from the moment Orbax commits it, so a kill in the middle leaves
the one before. Orbax stores no checksum of array data (a flipped bit would restore silently): ours
is checked.
"""

from __future__ import annotations

import logging as std_logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jaxtyping import Array, Bool, PyTree, UInt32
from orbax.checkpoint import checkpoint_managers

from tiue_jax.data import pipeline
from tiue_jax.io.errors import InputError, RunError
from tiue_jax.training.hosts import ALONE, Hosts

FOLDER = "checkpoints"
DAMAGED_FOLDER = "checkpoints_damaged"
PARTS = ("student", "ema", "lora")

Meta = dict[str, Any]
State = TypeVar("State")


class Restored(NamedTuple):
    """The newest checkpoint that is whole: its step, state, and meta."""

    step: int
    state: Any
    meta: Meta


class Checkpoints:
    """The checkpoints of one workdir.

    Args:
        workdir: the run's folder; `checkpoints/` is made in it.
        keep: how many of the latest to keep, at least 1.
        hosts: all of them have to call every method, in the same order.
    """

    def __init__(self, workdir: Path, *, keep: int, hosts: Hosts = ALONE) -> None:
        self._folder = workdir.resolve() / FOLDER
        self._damaged = workdir.resolve() / DAMAGED_FOLDER
        self._keep = keep
        self._hosts = hosts
        for logger in (logging.get_absl_logger(), std_logging.getLogger("asyncio")):
            logger.addFilter(_without_traceback)
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.LatestN(self._keep),
            cleanup_tmp_directories=True,  # what a kill left half written
        )
        return ocp.CheckpointManager(self._folder, options=options)

    def latest(self) -> int | None:
        """The step of the newest committed checkpoint, or None."""
        return max(map(int, ocp.utils.checkpoint_steps(self._folder)), default=None)

    def save(self, step: int, state: Any, meta: Meta, batches: grain.DatasetIterator) -> None:
        """Start to save `state` as checkpoint `step`; a step that is there already is left alone.

        Waits for the device and the copy to the host, not for the disk.

        Raises:
            RunError: an array holds NaN or infinity, and nothing is saved; or this checkpoint, or
                the one before, cannot be written.
        """
        if step in self._manager.all_steps():
            return
        digests, finite = inspect_arrays(state)
        bad = [name for name, is_finite in finite.items() if not is_finite]
        if bad:
            more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
            raise RunError(f"step {step}: {bad[0]}{more} is not finite; not saved")
        data = {"batch": pipeline.position(batches), "process_count": jax.process_count()}
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            meta=ocp.args.JsonSave({**meta, "step": step, "data": data, "digests": digests}),
            data=grain.checkpoint.CheckpointSave(batches),
        )
        with self._writing():
            if not self._manager.save(step, args=args, force=True):
                raise RunError(f"step {step}: Orbax did not save the checkpoint")

    def restore(
        self, target: State, batches: grain.DatasetIterator, check: Callable[[Meta], None]
    ) -> Restored | None:
        """Restore the newest checkpoint that is whole, and move damaged newer ones aside.

        Args:
            target: a state of this run as ShapeDtypeStructs with shardings; what was saved under
                others is distributed by these.
            batches: put where it was, also where the number of processes has changed.
            check: called with a checkpoint's meta before its arrays are read; raises to refuse it.

        Returns:
            The checkpoint, or None where there is none.

        Raises:
            InputError: there are checkpoints and none of them can be read, `check` raised it, or
                the hosts do not see the same checkpoints.
        """
        damage: dict[int, Exception] = {}
        steps = sorted(self._manager.all_steps(), reverse=True)
        self._hosts.agree(
            "checkpoints", {"checkpoints": steps}, hint="a --workdir that all hosts share"
        )
        for step in steps:
            try:
                restored = self._restore_step(step, target, batches, check)
            except InputError:
                raise
            except Exception as error:  # Orbax, tensorstore and json raise of every kind
                logging.warning("checkpoint %d cannot be used: %s", step, _brief(error))
                damage[step] = error
                continue
            self._put_aside(sorted(damage))
            return restored
        if damage:
            newest = max(damage)
            raise InputError(
                f"none of {len(damage)} checkpoints can be read: {_brief(damage[newest])}",
                file=self._folder / str(newest),
            )
        return None

    def _restore_step(
        self,
        step: int,
        target: State,
        batches: grain.DatasetIterator,
        check: Callable[[Meta], None],
    ) -> Restored:
        """Restore one checkpoint, or raise on every host what is wrong with it on any.

        The items' handlers are used without the manager: its `restore` waits for all hosts in the
        end, and one that cannot read its part never comes there.
        """
        folder, error = self._folder / str(step), None
        try:
            meta = ocp.JsonCheckpointHandler().restore(folder / "meta")
            check(meta)
            args = ocp.args.StandardRestore(target)
            state = ocp.StandardCheckpointHandler().restore(folder / "state", args=args)
            _restore_batches(folder / "data", batches, meta["data"])
        except InputError:
            raise
        except Exception as found:  # Orbax, tensorstore and json raise of every kind
            error = found
        wrong = self._hosts.share(f"restored {step}", _brief(error) if error else "")
        if any(wrong):
            raise error or ValueError(next(filter(None, wrong)))
        _verify(state, meta["digests"])
        return Restored(step, state, meta)

    def _put_aside(self, steps: list[int]) -> None:
        """Move checkpoints out of the way of the run that will save these steps again."""
        if not steps:
            return
        self._manager.close()
        for step in steps if self._hosts.index == 0 else ():
            self._damaged.mkdir(exist_ok=True)
            taken = {path.name for path in self._damaged.iterdir()}
            name = next(n for i in range(10**6) if (n := f"{step}.{i}") not in taken)
            (self._folder / str(step)).rename(self._damaged / name)
            logging.warning("moved checkpoint %d to %s", step, self._damaged / name)
        self._hosts.wait("damaged checkpoints moved")
        self._manager = self._open()

    def close(self) -> None:
        """Wait until everything is on the disk.

        Raises:
            RunError: the last checkpoint cannot be written.
        """
        with self._writing():
            self._manager.wait_until_finished()
        self._manager.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Say in a line what Orbax, tensorstore and the disk say in pages."""
        try:
            yield
        except RunError:
            raise
        except Exception as error:  # of every kind
            raise RunError(
                f"a checkpoint cannot be written to {self._folder}: {_brief(error)}"
            ) from error


def _without_traceback(record: std_logging.LogRecord) -> bool:
    """Leave the message of what Orbax and its tasks log of an error: the command ends with it."""
    if record.name == "asyncio" or "orbax" in record.pathname:
        record.exc_info = None
    return True


def restore_params(workdir: str | Path, which: str = "ema") -> tuple[int, PyTree[np.ndarray]]:
    """Return the step of a run's newest whole checkpoint, and one of its parameter trees as numpy.

    Args:
        workdir: the run's folder.
        which: "ema" (what a run exports), "student" or "lora".

    Raises:
        InputError: there is no checkpoint, or none can be read.
        ValueError: unknown `which`.
    """
    if which not in PARTS:
        raise ValueError(f"which {which!r}: choose from {sorted(PARTS)}")
    folder = Path(workdir).resolve() / FOLDER
    if not folder.is_dir():
        raise InputError("holds no checkpoints", file=workdir, expected="a workdir of main")
    damage: Exception | None = None
    for step in sorted(ocp.utils.checkpoint_steps(folder), reverse=True):
        try:
            return int(step), _restore_part(folder / str(step), which)
        except Exception as error:  # Orbax, tensorstore and json raise of every kind
            logging.warning("checkpoint %d cannot be used: %s", step, _brief(error))
            damage = damage or error
    if damage:
        raise InputError(f"no checkpoint can be read: {_brief(damage)}", file=folder)
    raise InputError("holds no finished checkpoint", file=folder)


def _restore_part(folder: Path, which: str) -> PyTree[np.ndarray]:
    digests = ocp.JsonCheckpointHandler().restore(folder / "meta")["digests"]
    reader = ocp.PyTreeCheckpointHandler()
    tree = reader.metadata(folder / "state").tree[which]
    wanted = {which: jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)}
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
    args = ocp.args.PyTreeRestore(item=wanted, restore_args=as_numpy, partial_restore=True)
    found = reader.restore(folder / "state", args=args)
    _verify(found, {k: v for k, v in digests.items() if k.split("/")[0] == which})
    return found[which]


def _restore_batches(
    folder: Path, batches: grain.DatasetIterator, saved: Mapping[str, int]
) -> None:
    """Put the iterator where it was. Grain's file is per process; the order of batches is not."""
    if saved["process_count"] == jax.process_count():
        grain.checkpoint.CheckpointHandler().restore(folder, batches)
    else:
        pipeline.seek(batches, saved["batch"])
    if pipeline.position(batches) != saved["batch"]:
        raise ValueError(f"the data iterator is not at batch {saved['batch']}")


def _brief(error: Exception) -> str:
    """The first line of an error, without the page of settings that tensorstore appends."""
    return (str(error).split("\n")[0].split(" [tensorstore_spec=")[0] or type(error).__name__)[:300]


def _verify(state: Any, digests: Mapping[str, int]) -> None:
    """Raise ValueError unless every array of `state` has the digest it was saved with."""
    found, _ = inspect_arrays(state)
    wrong = sorted(k for k in found.keys() | digests.keys() if found.get(k) != digests.get(k))
    if wrong:
        raise ValueError(f"{len(wrong)} arrays are not what was saved, {wrong[0]} the first")


def inspect_arrays(tree: Any) -> tuple[dict[str, int], dict[str, bool]]:
    """Return, by path, a 32-bit digest of every array and whether all its numbers are finite.

    The digest is the sum of every element's bits times an odd number that grows with its place,
    modulo 2**32: any one changed element changes it, and no sharding or order of adding does.
    """
    found, wait = {}, jax.default_backend() == "cpu" and jax.device_count() > 1
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = "/".join(_key_name(key) for key in path)
        found[name] = _inspect(leaf)
        if wait:  # several programs at once can take each other's threads in XLA's CPU collectives
            jax.block_until_ready(found[name])
    found = jax.device_get(found)
    return (
        {name: int(digest) for name, (digest, _) in found.items()},
        {name: bool(finite) for name, (_, finite) in found.items()},
    )


def _key_name(key: Any) -> str:
    """The bare name of a tree path's entry: a dict key, a field, or a place in a sequence."""
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


@jax.jit  # one small program for every shape: compiling one for the whole tree takes minutes
def _inspect(x: Array) -> tuple[UInt32[Array, ""], Bool[Array, ""]]:
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    raw = x.astype(jnp.uint8) if x.dtype == bool else jax.lax.bitcast_convert_type(x, unsigned)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    weight = 2 * place + 1
    digest = jnp.sum(raw.astype(jnp.uint32) * weight, dtype=jnp.uint32)
    return digest, jnp.isfinite(x).all()
