"""Make images from prompts: a student in one pass, few-step models, or a teacher with guidance.

    python -m tiue_jax.sample --model=assets/tiny-sd-tiue --prompt="a red circle above a blue ring"
    python -m tiue_jax.sample --model=assets/tiny-sd --teacher --guidance_scale=3 --prompt="a heart"
    python -m tiue_jax.sample --model=stabilityai/sd-turbo --prompt_file=prompts.txt --num_images=4
    python -m tiue_jax.sample --model=model.safetensors --tokenizer=FOLDER --method=one-step ...

--model is a diffusers folder, a hub id OWNER/NAME[@REVISION], or a single .safetensors file.
--method=auto reads how it makes images from its own files (tiue.json, an LCM's UNet or scheduler,
SD-Turbo's trailing Euler scheduler); where they do not say, choose:
    tiue      one encoder, --num_steps decoders in parallel: our students and the authors' ones
    one-step  one call at timestep 999: SwiftBrush, DMD2
    turbo     --num_steps Euler steps, trailing: SD-Turbo
    lcm       --num_steps steps with noise in between: LCM, or with --lora LCM-LoRA
    teacher   --num_steps DDIM steps with guidance and a negative prompt; --teacher for short

--out is a new folder: a PNG file an image, grid.png of the first 64, and samples.json with the
prompt and the seed of each. Image number i (from 0, over all prompts) has the seed --seed + i and
depends on its prompt and that seed alone: the same --seed makes it again, in any batch and on any
number of devices, up to rounding (at most 1/255 in a few bytes). Ctrl-C or SIGTERM (exit code 130),
or an error, half-way leaves the images that were made, with "complete": false in samples.json.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from functools import partial

from absl import flags

from tiue_jax.data.prompts import load_prompts, require_text
from tiue_jax.io.errors import InputError, run_command
from tiue_jax.io.files import hidden_folder, new_folder, take_number
from tiue_jax.io.images import GRID_IMAGES, MAX_IMAGES, SampleFolder, stop_as_by_ctrl_c
from tiue_jax.pretrained import model_flags, sampling_flags
from tiue_jax.pretrained.pipeline import MAX_SEED
from tiue_jax.pretrained.sampling_flags import sample_by_flags

FLAGS = flags.FLAGS
flags.DEFINE_string("model", None, "Folder, hub id or single file.")
flags.adopt_module_key_flags(model_flags)
flags.adopt_module_key_flags(sampling_flags)
flags.DEFINE_multi_string("prompt", [], "A prompt; may be given several times.")
flags.DEFINE_string("prompt_file", None, "Prompts, one a line (or .jsonl, .json: see configs).")
flags.DEFINE_string("prompt_field", "", "Where in a JSON object a prompt is; A.B is B in A.")
flags.DEFINE_string("out", None, "Folder to write: new or empty. By default samples/000 and on.")
flags.DEFINE_integer("seed", 0, "Seed of the first image.", 0, MAX_SEED)
flags.DEFINE_integer("num_images", 1, "Images per prompt.", 1)


def main(argv: Sequence[str]) -> None:
    """Read the flags, sample, write the folder."""
    if len(argv) > 1:
        raise InputError("not a flag", key="flags", expected="--prompt=...", found=argv[1])
    if not FLAGS.model:
        raise InputError("is required; see --help", key="--model")
    if not FLAGS.prompt and not FLAGS.prompt_file:
        raise InputError("is required (or --prompt_file); see --help", key="--prompt")
    prompts, seeds = _prompts_and_seeds()
    stop_as_by_ctrl_c()
    settings = {f.name: f.value for f in FLAGS.get_key_flags_for_module(sys.modules[__name__])}
    began = time.monotonic()
    with new_folder(FLAGS.out) if FLAGS.out else hidden_folder("samples") as folder:
        batches = sample_by_flags(FLAGS.model, prompts, seeds)
        loaded = time.monotonic()
        samples = SampleFolder(folder, prompts, seeds, settings)
        failure = samples.fill(batches)
        out = FLAGS.out or take_number(folder)
    if failure is not None:
        print(f"{out}: {len(samples)} of {len(prompts)} images were made", file=sys.stderr)
        raise failure
    load, first, seconds = loaded - began, samples.made_at[0] - loaded, time.monotonic() - began
    parts = f"loading {load:.1f} s, the first batch with compilation {first:.1f} s"
    of = f" of the first {GRID_IMAGES}" if len(samples) > GRID_IMAGES else ""
    print(f"{out}: {len(samples)} images in {seconds:.1f} s ({parts}); {out}/grid.png{of}")


def _prompts_and_seeds() -> tuple[list[str], range]:
    """Return one prompt and one seed an image."""
    prompts = list(FLAGS.prompt)
    for prompt in prompts:
        require_text(prompt, key="--prompt")
    require_text(FLAGS.negative_prompt or "", key="--negative_prompt")
    if FLAGS.prompt_file or FLAGS.prompt_field:
        load = partial(load_prompts, key="--prompt_file", field_key="--prompt_field")
        prompts += load(FLAGS.prompt_file or "", field=FLAGS.prompt_field).texts
    total, first = len(prompts) * FLAGS.num_images, FLAGS.seed
    if total > MAX_IMAGES:
        expected = f"at most {MAX_IMAGES} over all prompts"
        raise InputError("too many images", key="--num_images", expected=expected, found=total)
    if first + total - 1 > MAX_SEED:
        raise InputError("too large for so many images", key="--seed", found=first)
    return [p for p in prompts for _ in range(FLAGS.num_images)], range(first, first + total)


if __name__ == "__main__":
    run_command(main)
