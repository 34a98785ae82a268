"""Convert Stable Diffusion models between diffusers' parameters and Flax's, and export students.

    python -m tiue_jax.convert --input=MODEL --output=NEW_FOLDER [--to=flax|diffusers]
    python -m tiue_jax.convert --input=WORKDIR --output=NEW_FOLDER [--which=ema|student|lora]

MODEL is a diffusers folder with .safetensors files (whole, sharded or a variant), a hub id
OWNER/NAME[@REVISION], or a single .safetensors file in the original layout (with --tokenizer). With
--to=flax the folder is written with the weights under Flax names in Flax's axis order:
unet/flax_params.safetensors holds "down_blocks_0/resnets_0/conv1/kernel", and
    flax.traverse_util.unflatten_dict(safetensors.numpy.load_file(FILE), sep="/")
is the tree of parameters. --to=diffusers is the way back, bit for bit. tiue_jax reads both.

WORKDIR is that of a training run (python -m tiue_jax.main): its student (the moving average; see
--which) is written as a diffusers folder with the DDIM scheduler it was trained for, tiue.json,
training.json and a model card; tokenizer, text encoder and VAE are its teacher's (see --teacher).
--which=lora writes the LoRA teacher as pytorch_lora_weights.safetensors, training.json and a card.

Nothing is written unless all is right: keys missing, unexpected or misshapen, truncated files,
and NaN or Inf in a weight are refused, and so is an output folder with something in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from absl import flags

from tiue_jax.io.errors import InputError, run_command
from tiue_jax.pretrained import model_flags
from tiue_jax.pretrained.card import student_card
from tiue_jax.pretrained.folder import folder_form, require_apart, save_stable_diffusion
from tiue_jax.pretrained.hub import push_to_hub
from tiue_jax.pretrained.load import load_model
from tiue_jax.pretrained.names import FORMS
from tiue_jax.training.export import export_lora, is_workdir, load_trained_student

FLAGS = flags.FLAGS
flags.DEFINE_string("input", None, "What to read: a model, or a workdir.")
flags.DEFINE_string("output", None, "Folder to write: new or empty.")
flags.adopt_module_key_flags(model_flags)
flags.DEFINE_enum("to", None, sorted(FORMS), "Form of the weights; by default the other one.")
_DTYPES = ["same", "float32", "float16", "bfloat16"]
flags.DEFINE_enum("dtype", "same", _DTYPES, "Dtype of the weights; same: as in --input, each.")
flags.DEFINE_enum("which", "ema", ["ema", "student", "lora"], "Of a workdir: which weights.")
flags.DEFINE_string("teacher", None, "Of a workdir: the teacher, where it is not where it was.")
flags.DEFINE_string("license", None, "Of the teacher, for the card: openrail++, say.")
flags.DEFINE_string("push_to_hub", None, "OWNER/NAME: upload the result there, privately.")

_UNUSED = {  # flags without effect
    "a model": ("which", "teacher"),
    "a workdir and --which=lora": ("to", "dtype", "teacher", "push_to_hub"),
}


def main(argv: Sequence[str]) -> None:
    """Read --input, check it, write --output."""
    if len(argv) > 1:
        raise InputError("not a flag", key="flags", expected="--input=...", found=argv[1])
    source, target = _required("input"), Path(_required("output"))
    if Path(source).exists():
        require_apart(Path(source), target)
    options, run = model_flags.model_options(), is_workdir(Path(source))
    lora = run and FLAGS.which == "lora"
    kind = "a workdir and --which=lora" if lora else "a workdir" if run else "a model"
    given = {n: FLAGS[n].value for n in _UNUSED.get(kind, ()) if FLAGS[n].value != FLAGS[n].default}
    model_flags.refuse_unused(given | options if run else given, kind)
    if lora:
        print(f"{source} (a workdir) -> {export_lora(Path(source), target, FLAGS.license)}")
        return
    if run:
        sd = load_trained_student(Path(source), FLAGS.which, FLAGS.teacher, place=np.asarray)
    else:
        sd = load_model(source, param_dtype=None, place=np.asarray, **options)
        kind = folder_form(sd.folder).name if sd.folder and sd.folder.is_dir() else "a single file"
    to_flax = kind == "diffusers" and not FLAGS.push_to_hub
    form = FORMS[FLAGS.to or ("flax" if to_flax else "diffusers")]
    if FLAGS.license and sd.training is not None:
        sd = replace(sd, training={**sd.training, "teacher_license": FLAGS.license})
    card = student_card(sd, teacher_license=FLAGS.license, repo_id=FLAGS.push_to_hub)
    if card is None:
        model_flags.refuse_unused({"license": FLAGS.license}, "a model that is no student")
    dtype = None if FLAGS.dtype == "same" else FLAGS.dtype
    save_stable_diffusion(sd, target, dtype=dtype, form=form, card=card)
    print(f"{source} ({kind}) -> {target} ({form.name}, {FLAGS.dtype} dtype)")
    if FLAGS.push_to_hub:
        print(f"uploaded to {push_to_hub(target, FLAGS.push_to_hub)}")


def _required(name: str) -> str:
    if not FLAGS[name].value:
        raise InputError("is required; see --help", key=f"--{name}")
    return str(FLAGS[name].value)


if __name__ == "__main__":
    run_command(main)
