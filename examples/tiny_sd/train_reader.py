"""Train the scene reader.

python -m examples.tiny_sd.train_reader --out=runs/scene-reader

Cost: about 8 minutes of one core. Expect: at least 98 % of pictures read without a single mistake,
on clean held-out scenes of every colour-shape pair (99.5 % or more for each attribute).

Some training scenes are ones that captions never ask for (no object, three objects, a shape that
is none of ours), so that the reader can say that a generated picture is wrong.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from jaxtyping import Array, Float, PRNGKeyArray

from examples.tiny_sd.reader import (
    HEADS,
    Reader,
    SceneReader,
    accuracy,
    calibrated,
    save_reader,
    to_pixels,
    true_labels,
)
from examples.tiny_sd.render import render
from examples.tiny_sd.scenes import IMAGE_SIZE, OTHER, Scene, sample_scenes
from tiue_jax.io.errors import RunError, run_command
from tiue_jax.io.files import new_folder

FLAGS = flags.FLAGS
TEST_SEED, TEST_SIZE = 900_001, 5000
CALIBRATION_SIZE = 2000  # pictures that set the scale of the features
Labels = Mapping[str, Array]  # [b] for each of HEADS
REQUIRED = 0.98  # joint accuracy on held-out scenes
EMPTY, CROWDED, STRANGE = 0.05, 0.07, 0.06  # fractions: no object, three objects, odd shape


def define_flags() -> None:
    """Define this command's flags."""
    flags.DEFINE_string("out", None, "folder to write; it must not exist", required=True)
    flags.DEFINE_integer("iterations", 4000, "optimiser steps", lower_bound=1)
    flags.DEFINE_integer("batch_size", 64, "pictures a step", lower_bound=1)
    flags.DEFINE_float("learning_rate", 3e-3, "peak rate of AdamW (one cosine)")
    flags.DEFINE_integer("seed", 0, "seed of scenes, distortions and weights", 0, 2**32 - 1)


def training_scenes(rng: np.random.Generator, n: int) -> list[Scene]:
    """Scenes of every pair, some of them made empty, crowded or strange."""
    scenes = sample_scenes(rng, n, pairs="all")
    spare = sample_scenes(rng, n, pairs="all")
    draw, odd = rng.random(n), rng.random((n, 2))
    for i, scene in enumerate(scenes):
        if draw[i] < EMPTY:
            scenes[i] = replace(scene, objects=())
        elif draw[i] < EMPTY + CROWDED:
            scenes[i] = replace(scene, objects=_three_objects(rng, scene, spare[i]))
        elif odd[i].min() < STRANGE:
            scenes[i] = replace(
                scene,
                objects=tuple(
                    replace(o, shape=OTHER, blob=_odd_outline(rng)) if u < STRANGE else o
                    for o, u in zip(scene.objects, odd[i], strict=False)
                ),
            )
    return scenes


def _three_objects(rng: np.random.Generator, scene: Scene, spare: Scene) -> tuple:
    """Three objects at the corners of a turned triangle, small enough not to overlap much."""
    kinds = (scene.objects + spare.objects + scene.objects)[:3]
    turn = rng.uniform(0, 2 * np.pi)
    placed = []
    for k, obj in enumerate(kinds):
        angle = turn + 2 * np.pi * k / 3
        radius = rng.uniform(8, 10.5)
        x, y = (IMAGE_SIZE / 2 + 18 * f(angle) + rng.uniform(-2, 2) for f in (np.cos, np.sin))
        edge = radius + 1.5
        x, y = (float(np.clip(c, edge, IMAGE_SIZE - edge)) for c in (x, y))
        placed.append(replace(obj, x=x, y=y, radius=float(radius)))
    return tuple(placed)


def _odd_outline(rng: np.random.Generator) -> tuple[float, ...]:
    """Harmonics 2..5 of an outline that is far from a circle."""
    amplitude = rng.dirichlet(np.ones(4)) * rng.uniform(0.22, 0.38)
    phase = rng.uniform(-np.pi, np.pi, 4)
    return tuple(float(x) for pair in zip(amplitude, phase, strict=True) for x in pair)


def distort(key: PRNGKeyArray, pixels: Float[Array, "b h w 3"]) -> Float[Array, "b h w 3"]:
    """Blur, noise and brightness, as a decoder might leave them; a quarter stays clean."""
    key_keep, key_blur, key_noise, key_level, key_gain, key_shift = jax.random.split(key, 6)
    shape = (pixels.shape[0], 1, 1, 1)
    dirty = (jax.random.uniform(key_keep, shape) > 0.25).astype(pixels.dtype)
    x = pixels
    for step_key in jax.random.split(key_blur, 2):
        weight = dirty * jax.random.uniform(step_key, shape)
        x = x + weight * (_box_blur(x) - x)
    level = dirty * jax.random.uniform(key_level, shape, maxval=0.12)
    x = x + level * jax.random.normal(key_noise, x.shape)
    gain = 1 + dirty * jax.random.uniform(key_gain, shape, minval=-0.08, maxval=0.08)
    shift_shape = (pixels.shape[0], 1, 1, 3)
    shift = dirty * jax.random.uniform(key_shift, shift_shape, minval=-0.04, maxval=0.04)
    return jnp.clip(x * gain + shift, -1, 1)


def _box_blur(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Mean of 3x3 pixels, edges repeated."""
    wide = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    tall = (wide[:, :-2] + wide[:, 1:-1] + wide[:, 2:]) / 3
    return (tall[:, :, :-2] + tall[:, :, 1:-1] + tall[:, :, 2:]) / 3


def make_train_step(model: SceneReader, optimizer: optax.GradientTransformation) -> Callable:
    """One jitted step: (params, opt_state, key, pixels, labels, masks) -> (..., loss)."""

    def loss_fn(params: Any, pixels: Array, labels: Labels, masks: Labels) -> Array:
        _, logits = model.apply({"params": params}, pixels)
        total = jnp.zeros(())
        for name in HEADS:
            each = optax.softmax_cross_entropy_with_integer_labels(logits[name], labels[name])
            total += jnp.sum(each * masks[name]) / pixels.shape[0]
        return total

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(
        params: Any, opt_state: Any, key: Array, pixels: Array, labels: Labels, masks: Labels
    ) -> tuple[Any, Any, Array]:
        loss, grads = jax.value_and_grad(loss_fn)(params, distort(key, pixels), labels, masks)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return step


def train(
    model: SceneReader, iterations: int, batch_size: int, learning_rate: float, seed: int
) -> Reader:
    """Train a reader from nothing on scenes drawn as it goes."""
    key_init, key_distort = jax.random.split(jax.random.key(seed))
    params = jax.jit(model.init)(key_init, jnp.zeros((1, IMAGE_SIZE, IMAGE_SIZE, 3)))["params"]
    warmup = max(1, iterations // 20)
    rate = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup, iterations)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=1e-4))
    step, opt_state = make_train_step(model, optimizer), jax.jit(optimizer.init)(params)
    rng = np.random.default_rng(seed)
    start = time.monotonic()
    for i in range(iterations):
        scenes = training_scenes(rng, batch_size)
        pixels = to_pixels(render(scenes))
        key = jax.random.fold_in(key_distort, i)
        params, opt_state, loss = step(params, opt_state, key, pixels, *true_labels(scenes))
        if (i + 1) % 100 == 0 or i + 1 == iterations:
            seconds = time.monotonic() - start
            print(f"step {i + 1}/{iterations}  loss {float(loss):.4f}  {seconds:.0f} s", flush=True)
    return calibrated(Reader(model, params), render(sample_scenes(rng, CALIBRATION_SIZE)))


def held_out_report(reader: Reader) -> dict[str, dict[str, float]]:
    """Accuracy on scenes that training never drew: clean, and distorted as in training."""
    rng = np.random.default_rng(TEST_SEED)
    scenes = sample_scenes(rng, TEST_SIZE, pairs="all")
    images = render(scenes)
    pixels = distort(jax.random.key(TEST_SEED), jnp.asarray(to_pixels(images)))
    distorted = np.asarray(jnp.round((pixels + 1) * 127.5)).astype(np.uint8)
    odd_scenes = training_scenes(rng, TEST_SIZE)
    return {
        "clean": accuracy(reader(images), scenes),
        "distorted": accuracy(reader(distorted), scenes),
        "with_empty_crowded_strange": accuracy(reader(render(odd_scenes)), odd_scenes),
    }


def main(argv: Sequence[str]) -> None:
    """Train, measure on held-out scenes, and write the folder if it is good enough."""
    del argv
    with new_folder(FLAGS.out) as folder:
        reader = train(
            SceneReader(), FLAGS.iterations, FLAGS.batch_size, FLAGS.learning_rate, FLAGS.seed
        )
        report = held_out_report(reader)
        for name, row in report.items():
            print(f"{name}: " + "  ".join(f"{k} {100 * v:.2f} %" for k, v in row.items()))
        if report["clean"]["joint"] < REQUIRED:
            raise RunError(f"joint accuracy {report['clean']['joint']:.4f} is below {REQUIRED}")
        save_reader(Path(folder), reader, report)
    print(f"wrote {FLAGS.out}")


if __name__ == "__main__":
    define_flags()
    run_command(main)
