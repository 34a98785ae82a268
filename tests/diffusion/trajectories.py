"""Whole trajectories of a sampler, ours and diffusers', through one model that both can run."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.schedulers import scheduling_lcm

from tests.parity.comparison import BOUND, relative_error

SHAPE = (2, 3, 5, 4)
STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_MIX = np.random.default_rng(7).normal(0, 0.5, (4, 4)).astype(np.float32)

# (timesteps, what the model saw at each, what the last step returned)
Trajectory = tuple[list[float], list[np.ndarray], np.ndarray]


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def model(x: Any, t: Any, tanh: Callable[[Any], Any], mix: Any) -> Any:
    """An output of order 1 that depends on every channel and on t; no step blows up errors."""
    return 0.5 * x + 0.6 * tanh(x @ mix + 0.002 * t - 1.0)


def our_trajectory(loop: Callable[[Callable[..., Any]], jax.Array]) -> Trajectory:
    """Runs `loop(predict)`, compiled, and records what `predict` is called with."""
    times: list[float] = []
    seen: list[np.ndarray] = []

    def record(x: np.ndarray, t: np.ndarray) -> None:
        assert (t == t[0]).all() and t.shape == x.shape[:1]
        times.append(float(t[0]))
        seen.append(np.array(x))

    def predict(x: jax.Array, t: jax.Array) -> jax.Array:
        jax.debug.callback(record, x, t, ordered=True)
        t = t.astype(jnp.float32).reshape(-1, 1, 1, 1)
        return model(x, t, jnp.tanh, jnp.asarray(_MIX))

    last = np.asarray(jax.jit(lambda: loop(predict))())
    jax.effects_barrier()
    return times, seen, last


def their_trajectory(scheduler: Any, noise: np.ndarray, num_steps: int) -> Trajectory:
    """Runs a scheduler of diffusers as StableDiffusionPipeline does, in fp32."""
    scheduler.set_timesteps(num_steps)
    x = torch.from_numpy(noise) * scheduler.init_noise_sigma
    times, seen = [], []
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t)
        times.append(float(t))
        seen.append(scaled.numpy())
        x = scheduler.step(model(scaled, t, torch.tanh, torch.from_numpy(_MIX)), t, x).prev_sample
    return times, seen, x.numpy()


def inject(noises: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> Iterator[np.ndarray]:
    """Make LCMScheduler take its fresh noise from `noises`; returns what is left of them."""
    left = iter(noises)
    monkeypatch.setattr(
        scheduling_lcm, "randn_tensor", lambda *shape, **options: torch.from_numpy(next(left))
    )
    return left


def worst_error(name: str, ours: Trajectory, theirs: Trajectory) -> float:
    """Largest error of any latents of the trajectory, each in units of its largest value.

    Raises AssertionError where timesteps differ, latents are not bounded, or the error is beyond
    `BOUND`; prints (pytest -rP) the error found.
    """
    np.testing.assert_allclose(ours[0], theirs[0], atol=1e-4)  # linspace: fp32 between whole ones
    assert len(ours[1]) == len(theirs[1]) == len(theirs[0])
    errors = [
        relative_error(x, y)
        for x, y in zip((*ours[1], ours[2]), (*theirs[1], theirs[2]), strict=True)
    ]
    largest = max(float(np.abs(y).max()) for y in (*theirs[1], theirs[2]))
    assert largest < 100, largest
    print(f"trajectory {name}: {max(errors):.1e} (bound {BOUND:.0e}), largest value {largest:.1f}")
    assert max(errors) <= BOUND, f"{name}: {errors}"
    return max(errors)
