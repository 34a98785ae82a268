"""A step that compiles in no time, for tests of what is around it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tiue_jax.training import setup, sharding
from tiue_jax.training.state import update_ema

MAKE_MESH = sharding.make_mesh


class ToyStep:
    """Stands in for `make_step`: the student moves by a number of prompts, key, step and rate."""

    def __init__(self, nan_at: int = -1) -> None:
        self.nan_at = nan_at
        self.options: Any = None
        self.text_image: Any = None
        self.unet: Any = None

    def __call__(
        self,
        unet: Any,
        text_encoder: Any,
        schedule: Any,
        options: Any,
        *,
        text_image: Any = None,
        lora_only: bool = False,
    ):
        self.unet, self.options, self.text_image = unet, options, text_image or self.text_image

        def step(state: Any, frozen: Any, input_ids: jax.Array, key: jax.Array):
            noise = jax.random.normal(jax.random.fold_in(key, state.step))
            loss = jnp.mean(input_ids.astype(jnp.float32)) * 1e-3 + noise
            loss = jnp.where(state.step + 1 == self.nan_at, jnp.nan, loss)
            if lora_only:
                return state.replace(step=state.step + 1), {"loss/lora": noise}
            student = jax.tree.map(lambda p: p - options.student_lr * loss, state.student)
            ema = update_ema(state.ema, student, jnp.float32(0.5))
            state = state.replace(step=state.step + 1, student=student, ema=ema)
            return state, {"loss/vsd": loss, "loss/kl": loss * 0, "loss/lora": noise}

        return step


def without_adam(start: Callable[..., Any]) -> Callable[..., Any]:
    """`init_state` without the moments that a ToyStep does not move."""

    def started(*args: Any, **named: Any) -> Any:
        return start(*args, **named).replace(student_opt=(), lora_opt=())

    return started


def put_in_toy(monkeypatch: pytest.MonkeyPatch) -> ToyStep:
    step = ToyStep()
    monkeypatch.setattr(setup, "make_step", step)
    monkeypatch.setattr(setup, "init_state", without_adam(setup.init_state))
    use_devices(monkeypatch, 1)
    return step


def use_devices(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    some = jax.devices()[:count]
    monkeypatch.setattr(sharding, "make_mesh", lambda data, fsdp: MAKE_MESH(data, fsdp, some))


def logged(workdir: Path) -> list[dict[str, float]]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if "time/" not in k} for line in lines]


def assert_same(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def steps_of(workdir: Path) -> list[int]:
    folder = workdir / "checkpoints"
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())
