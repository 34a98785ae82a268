"""Replay what the reference recorded, and compare number by number.

    python tests/reference/replay.py --model DIR --sampling FILE    one pass of the student
    python tests/reference/replay.py --model DIR --record DIR       whole training iterations

DIR of --model is a Stable Diffusion 1.x or 2.x in the diffusers layout; tests/reference/README.md
describes the files. Exit code 0: everything within its bound; 1: something is not; 2: bad input.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from tests.reference.iterations import replay_record
from tests.reference.records import nhwc, read_arrays, read_record
from tests.reference.report import Report
from tiue_jax.diffusion.ddim import closed_form
from tiue_jax.diffusion.student import encode_once, student_forward
from tiue_jax.io.errors import InputError, run_command
from tiue_jax.pretrained.folder import StableDiffusion, load_stable_diffusion

LATENTS = 1e-5  # of the recorded values' root mean square, where that is above 1
IMAGES = 1 / 255  # of the range of an image


def replay_sampling(model: StableDiffusion, file: Path) -> int:
    """Compare context, shared features, noise predictions, latents and images."""
    arrays, report = read_arrays(file), Report()
    counts = sorted(int(key.split("/")[1]) for key in arrays if key.startswith("timesteps/"))
    for key in ("noise", "input_ids"):
        if key not in arrays:
            raise InputError("missing", file=file, key=key)
    if not counts:
        raise InputError("no timesteps/K", file=file)
    noise = jnp.asarray(nhwc(arrays["noise"]))
    context = model.text_encoder.apply(
        {"params": model.params["text_encoder"]}, jnp.asarray(arrays["input_ids"], jnp.int32)
    )
    if "context" in arrays:
        report.title("text encoder")
        _arrays(report, "context", "context", context, arrays["context"])
    _features(report, model, noise, context, arrays, counts)
    for count in counts:
        _pass(report, model, noise, context, arrays, count)
    return report.finish()


def _arrays(report: Report, kind: str, name: str, ours: jax.Array, recorded: np.ndarray) -> None:
    """Largest difference, in units of the recorded root mean square where that is above 1."""
    ours = np.asarray(ours)
    if ours.shape != recorded.shape:
        raise InputError("misshapen", key=name, expected=ours.shape, found=recorded.shape)
    rms = [float(np.sqrt(np.mean(np.square(x.astype(np.float64))))) for x in (ours, recorded)]
    error = float(np.max(np.abs(ours - recorded))) / max(1.0, rms[1])
    report.row(kind, f"{name} (rms)", *rms, error, LATENTS)


def _features(
    report: Report,
    model: StableDiffusion,
    noise: jax.Array,
    context: jax.Array,
    arrays: dict[str, np.ndarray],
    counts: list[int],
) -> None:
    """The shared features, at whichever first timestep they were recorded."""
    recorded = {k.split("/")[1]: nhwc(v) for k, v in arrays.items() if k.startswith("encoder/")}
    if not recorded:
        return
    encode = jax.jit(lambda p, z, y, t: encode_once(model.unet, p, z, y, t))
    candidates = []
    for t_enc in sorted({int(arrays[f"timesteps/{count}"][0]) for count in counts}, reverse=True):
        features = encode(model.params["unet"], noise, context, t_enc)
        ours = {f"skip_{i:02d}": skip for i, skip in enumerate(features.skips)}
        ours["mid"] = features.mid
        if ours.keys() != recorded.keys():
            raise InputError(
                "other features", key="encoder", expected=sorted(ours), found=sorted(recorded)
            )
        distance = sum(float(jnp.sum(jnp.abs(ours[name] - recorded[name]))) for name in ours)
        candidates.append((distance, t_enc, ours))
    _, t_enc, ours = min(candidates, key=lambda candidate: candidate[0])
    report.title(f"encoder at t_enc = {t_enc}")
    for name in sorted(recorded):
        _arrays(report, "feature", f"encoder/{name}", ours[name], recorded[name])


def _pass(
    report: Report,
    model: StableDiffusion,
    noise: jax.Array,
    context: jax.Array,
    arrays: dict[str, np.ndarray],
    count: int,
) -> None:
    """One K: noise predictions, latents, images, of the recorded parallel and sequential runs."""
    timesteps = np.asarray(arrays[f"timesteps/{count}"], np.int32)
    S, E = closed_form(model.schedule, timesteps)

    @jax.jit
    def run(params, noise, context):
        x0, eps = student_forward(
            model.unet, params["unet"], noise, context, timesteps, timesteps[0], S, E
        )
        vae_latents = x0 / model.vae.scaling_factor
        return x0, eps, model.vae.apply({"params": params["vae"]}, vae_latents, method="decode")

    x0, eps, pixels = run(model.params, noise, context)
    images = np.clip(np.asarray(pixels) * 127.5 + 128.0, 0, 255).astype(np.uint8)
    report.title(f"student, K = {count}: timesteps {', '.join(map(str, timesteps))}")
    for mode in ("parallel", "sequential"):
        start = f"K{count}/{mode}/"
        found = {k[len(start) :]: nhwc(v) for k, v in arrays.items() if k.startswith(start)}
        for name, recorded in found.items():
            if name == "eps":
                _arrays(report, "eps", start + name, jnp.moveaxis(eps, 1, 0), recorded)
            elif name == "latents":
                _arrays(report, "latents", start + name, x0, recorded)
            elif name == "pixels":
                error = float(np.max(np.abs(np.asarray(pixels) - recorded))) / 2
                means = float(jnp.mean(pixels)), float(recorded.mean())
                report.row("image", f"{start}{name} (mean)", *means, error, IMAGES)
            elif name == "uint8":
                error = float(np.max(np.abs(images.astype(int) - recorded.astype(int)))) / 255
                means = float(images.mean()), float(recorded.mean())
                report.row("image", f"{start}{name} (mean)", *means, error, IMAGES)


def main(argv: list[str]) -> int:
    """Check the flags, load the model, replay."""
    jax.config.update("jax_default_matmul_precision", "highest")
    if len(argv) > 1:
        raise InputError("unexpected argument", found=argv[1])
    folder, sampling, record = (flags.FLAGS[name].value for name in ("model", "sampling", "record"))
    if folder is None or (sampling is None) == (record is None):
        raise InputError("give --model and one of --sampling and --record")
    parts = ("unet", "text_encoder") if sampling is None else ("unet", "vae", "text_encoder")
    if record is not None:
        read_record(Path(record))  # before the model: what is wrong with it is quickly said
    model = load_stable_diffusion(Path(folder), parts=parts)
    if sampling is not None:
        return replay_sampling(model, Path(sampling))
    return replay_record(model, Path(record))


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "a Stable Diffusion folder in the diffusers layout")
    flags.DEFINE_string("sampling", None, "an npz file: one pass of the student")
    flags.DEFINE_string("record", None, "a folder with record.json and train.npz")
    run_command(main)
