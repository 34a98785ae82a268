"""Run the recorded iterations with the recorded draws, and compare all that was recorded.

Two things limit how near two float32 computations can come, and both are measured here: every
iteration is computed again with every student and LoRA weight nudged by 1e-6 of itself, which draws
the rounding errors anew.

- The VSD gradient is a small difference of large numbers: after one LoRA update e_T - e_L is a
  thousandth of e_T, so its rounding error is a thousandth too, in our numbers and in the recorded
  ones. A bound is never below NOISES standard deviations of what the nudges do.
- Adam divides a gradient by its own size: where it is rounding noise, as where it is zero in theory
  (before a GroupNorm with one channel a group, in attention over one token), noise becomes a whole
  step of random sign. Entries whose gradient a nudge changes by a share of itself are shown, left
  out of the comparison of final parameters, and compared by their gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from tests.reference.records import (
    LOSSES,
    ParamPath,
    Record,
    from_torch,
    lora_path,
    nhwc,
    param_path,
    read_record,
)
from tests.reference.report import WIDEST, Report, relative
from tiue_jax.diffusion.schedule import NoiseSchedule
from tiue_jax.diffusion.text_image import TextImage
from tiue_jax.io.errors import InputError
from tiue_jax.models.clip import CLIPTextEncoder
from tiue_jax.models.unet import UNet
from tiue_jax.pretrained.auxiliary import load_clip, load_taesd
from tiue_jax.pretrained.folder import StableDiffusion
from tiue_jax.training.options import StepOptions
from tiue_jax.training.state import Frozen, TrainState, init_state
from tiue_jax.training.step import Draws, make_step

SCALARS = 1e-4  # losses and gradient norms, relative
GRADIENT = 1e-3  # of the norm of the stored gradient
CHANGE = 2e-2  # of the norm of the parameter's change
ZERO = 1e-5  # of the global gradient norm: what a gradient of zero may be
UNSTEADY = 0.3  # a gradient entry that moves by this share of itself under a nudge is noise
NUDGE = 1e-6  # relative, of every student and LoRA weight
NUDGES = 4
ROUNDED = ("loss/vsd", "grad_norm/student")  # of a difference of nearly equal noises
NOISES = 6.0  # standard deviations, of a number that few nudges estimate

COMPILER = {"xla_backend_optimization_level": 0}  # of XLA on a CPU: half the time to compile
NUMBERS = (  # options that are arguments of the compiled step, so that records can share it
    "guidance_scale",
    "lambda_kl",
    "clip_weight",
    "clip_iterations",
    "student_lr",
    "lora_lr",
    "lora_alpha",
    "clip_grad_norm",
    "null_prompt_prob",
)
Flat = dict[ParamPath, np.ndarray]


class Iteration(NamedTuple):
    """What one iteration came to, and how far its rounding errors reach.

    Attributes:
        metrics, gradients: of the iteration; gradients of "student" and "lora".
        metric_noise: standard deviation of every metric under nudges.
        gradient_noise: the same of every parameter's gradient, as a norm.
        unsteady: entries of every gradient that are rounding noise.
    """

    metrics: dict[str, float]
    gradients: dict[str, Flat]
    metric_noise: dict[str, float]
    gradient_noise: dict[ParamPath, float]
    unsteady: dict[str, Flat]


def replay_record(model: StableDiffusion, folder: Path) -> int:
    """Run the recorded iterations; the exit code."""
    record, report = read_record(folder), Report()
    text_image, auxiliary = load_text_image(model, record.options)
    state, frozen, known = _begin(model, record, folder)
    frozen = frozen.replace(**auxiliary)
    initial = {name: _flat(tree) for name, tree in _networks(state).items()}
    step = compiled_step(model, record.options, text_image)
    noisy: dict[str, Flat] = {"student": {}, "lora": {}}  # entries that were noise at some time
    for i, prompts in enumerate(record.prompts):
        ids = jnp.asarray(model.tokenizer(prompts))
        run = partial(
            step, frozen=frozen, input_ids=ids, key=jax.random.key(0), draws=_draws(record, i)
        )
        state, found = _iterate(run, state)
        for name, masks in found.unsteady.items():
            noisy[name] = {path: noisy[name].get(path, False) | m for path, m in masks.items()}
        report.title(f"iteration {i}: losses and gradients")
        _scalars(report, record, i, found)
        for j, name in enumerate(("student", "lora")):
            stored = _by_path(record, f"grad/{2 * i + j:02d}_{name}", known)
            _stored_gradients(report, name, stored, found)
            _norms(report, name, record.param_norms[i][name], found, known)
    _finals(report, record, state, initial, noisy, known)
    return report.finish()


def load_text_image(
    model: StableDiffusion, options: StepOptions
) -> tuple[TextImage | None, dict[str, Any]]:
    """The networks of the CLIP term and their parameters, from `taesd/` and `clip/` of the model.

    Pixels reach CLIP as the source has them: not normalised.
    """
    if options.clip_tau == 0:
        return None, {}
    assert model.folder is not None
    taesd, clip = load_taesd(model.folder / "taesd"), load_clip(model.folder / "clip")
    term = TextImage(taesd.module, clip.module, size=clip.size)
    return term, {"taesd": taesd.params, "clip": clip.params}


def compiled_step(
    model: StableDiffusion, options: StepOptions, text_image: TextImage | None = None
) -> Callable[..., Any]:
    """step(state, frozen, input_ids, key, draws) -> (state, metrics, gradients), jitted."""
    numbers = {name: jnp.float32(getattr(options, name)) for name in NUMBERS}
    shape = replace(options, **dict.fromkeys(NUMBERS, 1.0))
    step = _compiled_step(model.unet, model.text_encoder, model.schedule, shape, text_image)
    return partial(step, numbers)


@lru_cache(maxsize=4)
def _compiled_step(
    unet: UNet,
    text_encoder: CLIPTextEncoder,
    schedule: NoiseSchedule,
    options: StepOptions,
    text_image: TextImage | None,
) -> Callable[..., Any]:
    """One program for all values of NUMBERS."""

    def step(numbers: dict[str, jax.Array], *arguments: Any, **named: Any) -> Any:
        chosen = replace(options, **numbers)
        step = make_step(
            unet, text_encoder, schedule, chosen, text_image=text_image, with_gradients=True
        )
        return step(*arguments, **named)

    return jax.jit(step, compiler_options=COMPILER if jax.default_backend() == "cpu" else None)


def _iterate(run: Callable[..., Any], state: TrainState) -> tuple[TrainState, Iteration]:
    """One iteration, and NUDGES of it from nudged weights to see what rounding does."""
    new_state, *first = run(state)
    results = [first, *(run(_nudge(state, seed))[1:] for seed in range(NUDGES))]
    metrics = [{key: float(value) for key, value in m.items()} for m, _ in results]
    gradients = [{name: _flat(tree) for name, tree in g.items()} for _, g in results]
    noise = {}
    for name, tree in gradients[0].items():
        for path, g in tree.items():
            squares = [np.sum(np.square(other[name][path] - g)) for other in gradients[1:]]
            noise[path] = float(np.sqrt(np.mean(squares)))
    return new_state, Iteration(
        metrics=metrics[0],
        gradients=gradients[0],
        metric_noise={key: float(np.std([m[key] for m in metrics], ddof=1)) for key in metrics[0]},
        gradient_noise=noise,
        unsteady={
            name: {
                path: _unsteady(g, [o[name][path] for o in gradients[1:]]) for path, g in t.items()
            }
            for name, t in gradients[0].items()
        },
    )


def _networks(state: TrainState) -> dict[str, dict]:
    return {"student": state.student, "ema": state.ema, "lora": state.lora}


def _flat(tree: dict) -> Flat:
    return {path: np.asarray(leaf) for path, leaf in flatten_dict(tree).items()}


def _begin(model: StableDiffusion, record: Record, folder: Path) -> tuple[TrainState, Frozen, Flat]:
    """The state before iteration 0, with the recorded LoRA matrices."""
    options, params = record.options, model.params["unet"]
    lora = {lora_path(name): jnp.asarray(v.T) for name, v in record.stored("lora_init").items()}
    try:
        state = init_state(jax.random.key(0), params, options)
    except ValueError as error:
        raise InputError(str(error), file=folder / "record.json") from error
    expected = {path: leaf.shape for path, leaf in flatten_dict(state.lora).items()}
    found = {path: leaf.shape for path, leaf in lora.items()}
    if expected != found:
        wrong = sorted(
            "/".join(p) for p in expected.keys() | found if expected.get(p) != found.get(p)
        )
        raise InputError(
            f"{len(wrong)} LoRA matrices are missing, unexpected or misshapen for this model",
            file=folder / "train.npz",
            key=f"lora_init: {wrong[0]}",
        )
    state = init_state(jax.random.key(0), params, options, unflatten_dict(lora))
    frozen = Frozen(
        params, model.params["text_encoder"], jnp.asarray(model.tokenizer.null_ids, jnp.int32)
    )
    return state, frozen, flatten_dict(params)


def _draws(record: Record, i: int) -> Draws:
    noise, vsd_noise, vsd_t, lora_noise, lora_t, uniform = record.draws[i]
    return Draws(
        noise=jnp.asarray(nhwc(noise)),
        vsd_noise=jnp.asarray(nhwc(vsd_noise)),
        vsd_t=jnp.asarray(vsd_t, jnp.int32),
        lora_noise=jnp.asarray(nhwc(lora_noise)),
        lora_t=jnp.asarray(lora_t, jnp.int32),
        null_uniform=jnp.asarray(uniform, jnp.float32),
    )


def _nudge(state: TrainState, seed: int) -> TrainState:
    """Every weight times 1 +- NUDGE: the same function but for rounding."""
    rng = np.random.default_rng(seed)

    def nudge(x: jax.Array) -> jax.Array:
        return x * (1.0 + NUDGE * rng.choice((-1.0, 1.0), size=x.shape).astype(np.float32))

    return state.replace(
        student=jax.tree.map(nudge, state.student), lora=jax.tree.map(nudge, state.lora)
    )


def _unsteady(gradient: np.ndarray, nudged: list[np.ndarray]) -> np.ndarray:
    """Entries whose gradient is rounding noise; a tensor that is so by half is so altogether."""
    mask = np.zeros(gradient.shape, bool)
    for other in nudged:
        larger = np.maximum(np.abs(gradient), np.abs(other))
        mask |= np.abs(gradient - other) > UNSTEADY * larger
    return np.ones_like(mask) if mask.mean() >= 0.5 else mask


def _scalars(report: Report, record: Record, i: int, found: Iteration) -> None:
    logs = record.logs[i]
    known = {key: ours for key, ours in LOSSES.items() if ours in found.metrics}
    if absent := [key for key in known if key not in logs]:
        raise InputError("missing from the logs", key=absent[0])
    recorded = {ours: logs[key] for key, ours in known.items()}
    for name, norm in zip(("student", "lora"), record.grad_norms[i], strict=True):
        recorded[f"grad_norm/{name}"] = norm
    for key, value in recorded.items():
        noise = NOISES * found.metric_noise[key] / abs(value) if value and key in ROUNDED else 0.0
        report.scalar("loss or global norm", key, found.metrics[key], value, SCALARS, noise)


def _by_path(record: Record, prefix: str, known: Flat) -> dict[str, tuple[ParamPath, np.ndarray]]:
    """Stored arrays in our axis order: torch name -> (path, array)."""
    found = {}
    for name, value in record.stored(prefix).items():
        lora = ".lora_" in name
        path = lora_path(name) if lora else param_path(name, known)
        found[name] = path, value.T if lora else from_torch(value)
    return found


def _stored_gradients(
    report: Report,
    network: str,
    stored: dict[str, tuple[ParamPath, np.ndarray]],
    found: Iteration,
) -> None:
    """By the norm of the difference; a gradient of nothing but noise by its being small."""
    for name, (path, recorded) in stored.items():
        gradient = _same_shape(name, found.gradients[network][path], recorded)
        norms = float(np.linalg.norm(gradient)), float(np.linalg.norm(recorded))
        if found.unsteady[network][path].all():
            share = max(norms) / found.metrics[f"grad_norm/{network}"]
            label = _fit(f"{name}: zero in theory, of the global norm")
            report.row(f"{network} gradient of zero", label, *norms, share, ZERO)
            continue
        difference = float(np.linalg.norm(gradient - recorded))
        error, noise = (
            relative(difference, norms[1]),
            _gradient_noise(found, network, path, norms[1]),
        )
        report.row(f"{network} gradient", _fit(name), *norms, error, GRADIENT, noise)


def _gradient_noise(found: Iteration, network: str, path: ParamPath, norm: float) -> float:
    """What rounding makes of a gradient, of its norm; the LoRA has no difference of near equals."""
    return NOISES * found.gradient_noise[path] / norm if norm and network == "student" else 0.0


def _norms(
    report: Report, network: str, recorded: dict[str, float], found: Iteration, known: Flat
) -> None:
    """The recorded norm of every parameter's gradient: one row, for the worst in its bound."""
    worst, zeros = (-1.0, "", 0.0, 0.0, 0.0, GRADIENT, 0.0), []
    for name, norm in recorded.items():
        path = lora_path(name) if ".lora_" in name else param_path(name, known)
        value = float(np.linalg.norm(found.gradients[network][path]))
        if found.unsteady[network][path].all():
            zeros.append((max(value, norm) / found.metrics[f"grad_norm/{network}"], name))
            continue
        error, noise = (
            relative(abs(value - norm), norm),
            _gradient_noise(found, network, path, norm),
        )
        share = error / max(GRADIENT, min(noise, WIDEST * GRADIENT))
        worst = max(worst, (share, name, value, norm, error, GRADIENT, noise))
    if worst[1]:
        label = f"{network}, worst norm of {len(recorded) - len(zeros)}: {worst[1]}"
        report.row(f"{network} gradient norm by parameter", _fit(label), *worst[2:])
    if zeros:
        share, name = max(zeros)
        report.note(f"{len(zeros)} parameters' gradients are zero in theory; the largest is")
        report.row(f"{network} gradient of zero", _fit(name), share, 0.0, share, ZERO)


def _finals(
    report: Report,
    record: Record,
    state: TrainState,
    initial: dict[str, Flat],
    noisy: dict[str, Flat],
    known: Flat,
) -> None:
    """Final parameters, by the norm of the difference in units of the norm of the change."""
    for network, tree in _networks(state).items():
        final, before = _flat(tree), initial[network]
        masks = noisy["lora" if network == "lora" else "student"]
        report.title(f"{network} after the last iteration: norm of the change")
        for name, (path, recorded) in _by_path(record, f"{network}_final", known).items():
            value, noise = _same_shape(name, final[path], recorded), masks[path]
            changes = [x - before[path] for x in (value, recorded)]
            norms = [float(np.linalg.norm(change)) for change in changes]
            difference = float(np.linalg.norm((changes[0] - changes[1])[~noise]))
            error = relative(difference, norms[1])
            if not noise.all():
                report.row(f"{network} parameter", name, *norms, error, CHANGE)
            if noise.any():
                report.note(
                    f"{name}: {noise.sum()} of {noise.size} entries have a gradient of rounding "
                    f"noise: compared by gradient (change {norms[0]:.2e}, recorded {norms[1]:.2e})"
                )
    _changes(report, record, _flat(state.student), initial["student"], noisy["student"], known)


def _changes(
    report: Report, record: Record, final: Flat, before: Flat, noisy: Flat, known: Flat
) -> None:
    """The recorded norm of every student parameter's change: one row for the worst."""
    worst = (0.0, "", 0.0, 0.0)
    for name, recorded in record.update_norms.items():
        path = param_path(name, known)
        if noisy[path].all():
            continue
        ours = float(np.linalg.norm(final[path] - before[path]))
        error = relative(abs(ours - recorded), recorded)
        worst = max(worst, (error, name, ours, recorded))
    if record.update_norms:
        error, name, ours, recorded = worst
        report.row(
            "student change norm", _fit(f"worst of all: {name}"), ours, recorded, error, CHANGE
        )


def _same_shape(name: str, ours: np.ndarray, recorded: np.ndarray) -> np.ndarray:
    if ours.shape != recorded.shape:
        raise InputError("misshapen", key=name, expected=ours.shape, found=recorded.shape)
    return ours


def _fit(label: str, width: int = 70) -> str:
    return label if len(label) <= width else f"{label[: width - 3]}..."
