"""Make images from prompts: a student in one pass, or a teacher by DDIM with guidance.

    python -m tiue_jax.sample --model=assets/tiny-sd-tiue --prompt="a red circle above a blue ring"
    python -m tiue_jax.sample --model=assets/tiny-sd --teacher --prompt="a large green ring"
    python -m tiue_jax.sample --model=assets/tiny-sd-tiue --prompt_file=prompts.txt --num_images=4

--out is a new folder: a PNG file an image, grid.png, and samples.json with the prompt and the seed
of each. Image number i (from 0, over all prompts) has the seed --seed + i and depends on its prompt
and that seed alone, not on the batch or the number of devices: the same --seed makes it again.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path

from absl import flags
from tqdm import tqdm

from tiue_jax.data.prompts import load_prompts
from tiue_jax.io.errors import InputError, run_command
from tiue_jax.io.files import new_folder
from tiue_jax.io.images import Images, write_samples
from tiue_jax.pretrained.pipeline import MAX_SEED, Pipeline, load_pipeline

FLAGS = flags.FLAGS
flags.DEFINE_string("model", None, "Model folder: a student's, or a Stable Diffusion's.")
flags.DEFINE_multi_string("prompt", [], "A prompt; may be given several times.")
flags.DEFINE_string("prompt_file", None, "Prompts, one a line (or .jsonl, .json: see configs).")
flags.DEFINE_string("out", None, "Folder to write: new or empty. By default samples/000 and on.")
flags.DEFINE_integer("seed", 0, "Seed of the first image.", 0, MAX_SEED)
flags.DEFINE_integer("num_images", 1, "Images per prompt.", 1)
flags.DEFINE_integer(
    "num_steps", None, "Decoder steps of a student, or DDIM steps of a teacher.", 1
)
flags.DEFINE_integer("batch_size", 8, "Images made at a time.", 1)
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the computation.")
flags.DEFINE_bool("teacher", False, "Sample by DDIM with guidance (25 steps), not in one pass.")
flags.DEFINE_float("guidance_scale", 7.5, "With --teacher: w; 1 is no guidance.")
flags.DEFINE_string("negative_prompt", "", "With --teacher: what guidance leads away from.")


def main(argv: Sequence[str]) -> None:
    """Read the flags, sample, write the folder."""
    if len(argv) > 1:
        raise InputError("not a flag", key="flags", expected="--prompt=...", found=argv[1])
    if not FLAGS.model:
        raise InputError("is required; see --help", key="--model")
    if not FLAGS.prompt and not FLAGS.prompt_file:
        raise InputError("is required (or --prompt_file); see --help", key="--prompt")
    prompts = [*FLAGS.prompt, *(load_prompts(FLAGS.prompt_file).texts if FLAGS.prompt_file else ())]
    prompts = [prompt for prompt in prompts for _ in range(FLAGS.num_images)]
    seeds = range(FLAGS.seed, FLAGS.seed + len(prompts))
    if seeds[-1] > MAX_SEED:
        raise InputError("too large for so many images", key="--seed", found=FLAGS.seed)
    out = Path(FLAGS.out) if FLAGS.out else _free_folder(Path("samples"))
    with new_folder(out) as folder:
        pipeline = load_pipeline(FLAGS.model, dtype=FLAGS.dtype, batch_size=FLAGS.batch_size)
        began = time.monotonic()
        images = _sample(pipeline, prompts, seeds)
        seconds = time.monotonic() - began
        settings = {f.name: f.value for f in FLAGS.get_key_flags_for_module(sys.modules[__name__])}
        write_samples(folder, images, prompts, seeds, settings)
    print(f"{out}: {len(images)} images in {seconds:.1f} s, compilation included; {out}/grid.png")


def _sample(pipeline: Pipeline, prompts: Sequence[str], seeds: Sequence[int]) -> Images:
    """One pass, or DDIM with --teacher; settings that make no image become InputErrors."""
    pipeline = replace(pipeline, progress=lambda batches, n: iter(tqdm(batches, "batches", n)))
    try:
        if FLAGS.teacher:
            return pipeline.sample_teacher(
                prompts,
                seeds,
                num_steps=FLAGS.num_steps or 25,
                guidance_scale=FLAGS.guidance_scale,
                negative_prompt=FLAGS.negative_prompt,
            )
        if pipeline.model.student is None and FLAGS.num_steps is None:
            what = "no student (no tiue.json): give --teacher, or --num_steps for one pass anyway"
            raise InputError(what, file=FLAGS.model)
        return pipeline.sample(prompts, seeds, num_steps=FLAGS.num_steps)
    except ValueError as error:
        raise InputError(str(error), key="--num_steps", found=FLAGS.num_steps) from error


def _free_folder(parent: Path) -> Path:
    """Return the first of parent/000, parent/001, ... that is not there."""
    return next(f for f in (parent / f"{i:03d}" for i in count()) if not f.exists())


if __name__ == "__main__":
    run_command(main)
