"""The main job in some minutes: distil the embedded teacher, and compare teacher and student.

    make demo       or       python -m examples.tiny_sd.demo [--iterations=N] [--out=FOLDER]

Trains with configs/tiny.py for a short run, by the command that a real training uses, and measures
teacher, student before, student after, and the shipped student on the same prompts and seeds.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path

import numpy as np
from absl import flags
from PIL import Image, ImageDraw

from examples.tiny_sd.captions import Request
from examples.tiny_sd.measure import evaluation_set, format_table, measure, model_sampler
from tiue_jax.io.errors import InputError, RunError, run_command
from tiue_jax.io.files import write_atomic
from tiue_jax.io.images import encode_png

FLAGS = flags.FLAGS
ROOT = Path(__file__).resolve().parents[2]
CONFIG = "configs/tiny.py"
TEACHER, STUDENT = "assets/tiny-sd", "assets/tiny-sd-tiue"
TEACHER_GUIDANCE = 3.0  # more costs Frechet distance, less accuracy: see docs/tiny-sd.md
SHOWN = 10  # prompts in the picture


def define_flags() -> None:
    """Define this command's flags."""
    flags.DEFINE_integer("iterations", 500, "training iterations, LoRA warm-up included", 110)
    flags.DEFINE_integer("num_prompts", 200, "prompts to measure on, at most 1000", SHOWN, 1000)
    flags.DEFINE_string("out", None, "folder of the run; by default runs/demo-000 and on")


def distil(workdir: Path, iterations: int) -> Path:
    """Run the training command; returns the folder of the student it exported."""
    command = [
        *(sys.executable, "-m", "tiue_jax.main", f"--config={CONFIG}", f"--workdir={workdir}"),
        f"--config.train.iterations={iterations}",
    ]
    print("$ python " + " ".join(command[1:]), flush=True)
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    if code:
        raise RunError(f"the training ended with exit code {code}")
    return workdir / "student"


def compare(
    models: Mapping[str, Path], requests: Sequence[Request]
) -> tuple[dict[str, dict[str, float]], dict[str, np.ndarray]]:
    """Measure every model on the same prompts and seeds; returns metrics and images by name."""
    rows, images = {}, {}
    for name, folder in models.items():
        print(f"measuring: {name} ({folder})", flush=True)
        teacher = name.startswith("teacher")
        guidance = TEACHER_GUIDANCE if teacher else None
        sample = model_sampler(folder, teacher=teacher, guidance_scale=guidance)
        rows[name], images[name] = measure(sample, requests)
    return rows, images


def draw_comparison(images: Mapping[str, np.ndarray], prompts: Sequence[str]) -> np.ndarray:
    """Side by side: a row per prompt, a column per model; uint8 [H, W, 3]."""
    side, gap, text_width, head = 128, 6, 330, 22
    width = text_width + len(images) * (side + gap)
    canvas = Image.new("RGB", (width, head + len(prompts) * (side + gap)), "white")
    draw = ImageDraw.Draw(canvas)
    for column, (name, pictures) in enumerate(images.items()):
        left = text_width + column * (side + gap)
        draw.text((left, 5), name, fill="black")
        for row, picture in enumerate(pictures[: len(prompts)]):
            large = Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST)
            canvas.paste(large, (left, head + row * (side + gap)))
    for row, prompt in enumerate(prompts):
        lines: list[str] = []
        line = ""
        for word in prompt.split():
            if draw.textlength(f"{line} {word}") > text_width - 20:
                lines, line = [*lines, line], word
            else:
                line = f"{line} {word}".strip()
        top = head + row * (side + gap) + side // 2 - 8 * len(lines)
        draw.multiline_text((8, top), "\n".join([*lines, line]), fill="black")
    return np.asarray(canvas)


def main(argv: Sequence[str]) -> None:
    """Distil, measure, print the table and the path of the picture."""
    del argv
    for folder in (TEACHER, STUDENT):
        if not (ROOT / folder).exists():
            raise InputError("missing: is this a whole clone?", file=folder)
    free = (f for f in (ROOT / "runs" / f"demo-{i:03d}" for i in count()) if not f.exists())
    workdir = Path(FLAGS.out) if FLAGS.out else next(free)
    after = distil(workdir.resolve(), FLAGS.iterations)
    _, requests = evaluation_set(FLAGS.num_prompts, 0)
    models = {
        "teacher, 25 steps": ROOT / TEACHER,
        "student before": ROOT / TEACHER,
        f"after {FLAGS.iterations} iterations": after,
        "shipped student": ROOT / STUDENT,
    }
    rows, images = compare(models, requests)
    picture = workdir / "comparison.png"
    prompts = [r.text for r in requests[:SHOWN]]
    write_atomic(picture, encode_png(draw_comparison(images, prompts)))
    write_atomic(workdir / "comparison.json", json.dumps(rows, indent=1) + "\n")
    print(f"\n{len(requests)} prompts with seen colour-shape pairs, one seed each\n")
    print(format_table(rows))
    print(f"\nside by side: {picture}")


if __name__ == "__main__":
    define_flags()
    run_command(main)
