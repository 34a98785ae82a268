"""The training loop that the stages of the embedded teacher share: progress bar, EMA, resume."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import serialization
from jaxtyping import Array, Float, PRNGKeyArray
from optax import contrib
from tqdm import tqdm

from tiue_jax.io.errors import InputError, RunError
from tiue_jax.io.files import write_atomic
from tiue_jax.training.state import ema_decay, update_ema

LOG_EVERY = 50  # iterations

OptimizerFactory = Callable[[optax.Schedule], optax.GradientTransformation]
Loss = Callable[[Any, Any, PRNGKeyArray], tuple[Float[Array, ""], dict[str, Array]]]


@flax.struct.dataclass
class FitState:
    """Parameters, their moving average, the optimiser's state, and the iterations done."""

    params: Any
    ema: Any
    opt_state: Any
    step: Array


def adam(learning_rate: optax.Schedule) -> optax.GradientTransformation:
    """Adam with the short memory of squares that short trainings want."""
    return optax.adam(learning_rate, b2=0.99)


def muon(learning_rate: optax.Schedule) -> optax.GradientTransformation:
    """Muon for kernels (convolutions as [inputs, outputs] matrices), Adam for the rest.

    Steps have the size of Adam's (`consistent_rms`), so that one learning rate serves both.
    """

    def axes(path: Any, param: Array) -> contrib.MuonDimensionNumbers | None:
        last = param.ndim - 1
        is_kernel = jax.tree_util.keystr(path[-1:], simple=True) == "kernel"
        return contrib.MuonDimensionNumbers(range(last), (last,)) if is_kernel else None

    return contrib.muon(
        learning_rate,
        muon_weight_dimension_numbers=lambda params: jax.tree.map_with_path(axes, params),
        consistent_rms=0.2,
        adam_b2=0.99,
    )


def fit(
    name: str,
    loss: Loss,
    params: Any,
    batch_of: Callable[[np.random.Generator], Any],
    *,
    iterations: int,
    learning_rate: float,
    folder: Path,
    seed: int,
    optimizer: OptimizerFactory = adam,
    ema_max_decay: float = 0.999,
    save_every: int = 500,
) -> Any:
    """Minimise `loss` with warm-up and cosine decay; returns the EMA parameters.

    Args:
        name: of the stage; its state is kept in folder/name.msgpack, and gone on from if there.
        loss: (params, batch, key) -> (scalar, metrics).
        batch_of: draws a batch; the generator depends on (seed, iteration) alone, so that a run
            that was interrupted goes on with the batches it would have had.
        iterations: in all, those of an interrupted run included.

    Raises:
        InputError: the state that is there cannot be read, or is of other parameters.
        RunError: a number of the state is not finite; the state of before is kept.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, min(200, iterations // 10 + 1), iterations, learning_rate * 0.01
    )
    chain = optax.chain(optax.clip_by_global_norm(1.0), optimizer(schedule))
    state = FitState(params, params, chain.init(params), jnp.zeros((), jnp.int32))
    path = folder / f"{name}.msgpack"
    if path.exists():
        state = _read_state(path, state)
    key = jax.random.key(seed)

    @jax.jit
    def update(state: FitState, batch: Any) -> tuple[FitState, dict[str, Array]]:
        step_key = jax.random.fold_in(key, state.step)
        grads, metrics = jax.grad(loss, has_aux=True)(state.params, batch, step_key)
        updates, opt_state = chain.update(grads, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        ema = update_ema(state.ema, params, ema_decay(state.step + 1, ema_max_decay))
        return FitState(params, ema, opt_state, state.step + 1), metrics

    start, began = int(state.step), time.monotonic()
    sums: dict[str, Any] = {}
    bar = tqdm(range(start, iterations), desc=name, initial=start, total=iterations, mininterval=10)
    for i in bar:
        state, metrics = update(state, batch_of(np.random.default_rng((seed, i))))
        sums = {k: sums.get(k, 0.0) + v for k, v in metrics.items()}
        if (i + 1) % LOG_EVERY == 0:
            bar.set_postfix({k: f"{float(v) / LOG_EVERY:.4f}" for k, v in sums.items()})
            sums = {}
        if (i + 1) % save_every == 0 or i + 1 == iterations:
            if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state)):
                raise RunError(f"{name}: not finite any more at iteration {i + 1}")
            write_atomic(path, serialization.to_bytes(state))
    print(f"{name}: iterations {start} to {iterations} in {time.monotonic() - began:.0f} s")
    return state.ema


def _read_state(path: Path, like: FitState) -> FitState:
    """Read a state that `fit` has kept."""
    try:
        state = serialization.from_bytes(like, path.read_bytes())
    except (ValueError, KeyError, TypeError) as error:
        what = "not the state of this training, or not whole; move it away to begin anew"
        raise InputError(what, file=path) from error
    for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(like), strict=True):
        if np.shape(old) != np.shape(new):
            raise InputError(
                "the state of other parameters; move it away to begin anew",
                file=path, expected=np.shape(new), found=np.shape(old),
            )  # fmt: skip
    return jax.tree.map(jnp.asarray, state)
