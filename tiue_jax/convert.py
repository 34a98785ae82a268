"""Convert Stable Diffusion folders between diffusers' parameters and Flax's, and export students.

    python -m tiue_jax.convert --input=FOLDER --output=NEW_FOLDER [--to=flax|diffusers]
    python -m tiue_jax.convert --input=WORKDIR --output=NEW_FOLDER

FOLDER is a diffusers folder with .safetensors files (model_index.json, unet/, vae/, text_encoder/,
tokenizer/, scheduler/). With --to=flax the same folder is written with the weights under Flax names
in Flax's axis order: unet/flax_params.safetensors holds "down_blocks_0/resnets_0/conv1/kernel", and
    flax.traverse_util.unflatten_dict(safetensors.numpy.load_file(FILE), sep="/")
is the tree of parameters. --to=diffusers is the way back, bit for bit. tiue_jax reads both.

WORKDIR is that of a training run (python -m tiue_jax.main): its student (the moving average; see
--which) is written as a diffusers folder that `diffusers` loads, with the DDIM scheduler it was
trained for; tokenizer, text encoder and VAE are its teacher's (see --teacher).

Nothing is written unless all is right: keys missing, unexpected or misshapen, truncated files,
and NaN or Inf in a weight are refused, and so is an output folder with something in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags

from tiue_jax.io.errors import InputError, run_command
from tiue_jax.pretrained.folder import (
    folder_form,
    load_stable_diffusion,
    require_apart,
    save_stable_diffusion,
)
from tiue_jax.pretrained.names import FORMS
from tiue_jax.training.export import is_workdir, load_trained_student

_INPUT = flags.DEFINE_string("input", None, "Folder to read: diffusers, Flax, or a workdir.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder to write: new or empty.")
_TO = flags.DEFINE_enum(
    "to", None, sorted(FORMS), "Form of the weights; by default the one that --input does not have."
)
_DTYPE = flags.DEFINE_enum(
    "dtype",
    "same",
    ["same", "float32", "float16", "bfloat16"],
    "Dtype of the weights; same: as in --input, each.",
)
_WHICH = flags.DEFINE_enum(
    "which", "ema", ["ema", "student"], "Of a workdir: the student's moving average, or itself."
)
_TEACHER = flags.DEFINE_string(
    "teacher", None, "Of a workdir: the teacher's folder, where it is not where the run found it."
)


def main(argv: Sequence[str]) -> None:
    """Read --input, check it, write --output."""
    if len(argv) > 1:
        raise InputError("not a flag", key="flags", expected="--input=...", found=argv[1])
    source, target = _required(_INPUT), _required(_OUTPUT)
    require_apart(source, target)
    if is_workdir(source):
        sd = load_trained_student(source, _WHICH.value, _TEACHER.value, place=np.asarray)
        found = "a workdir"
    else:
        sd = load_stable_diffusion(source, param_dtype=None, place=np.asarray)
        found = folder_form(source).name
    form = FORMS[_TO.value or ("flax" if found == "diffusers" else "diffusers")]
    dtype = None if _DTYPE.value == "same" else _DTYPE.value
    save_stable_diffusion(sd, target, dtype=dtype, form=form)
    print(f"{source} ({found}) -> {target} ({form.name}, {_DTYPE.value} dtype)")


def _required(flag: flags.FlagHolder[str | None]) -> Path:
    if not flag.value:
        raise InputError("is required; see --help", key=f"--{flag.name}")
    return Path(flag.value)


if __name__ == "__main__":
    run_command(main)
