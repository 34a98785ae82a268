"""The student that a training run has made, as a whole model: read, and written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tiue_jax.diffusion.schedule import TIMESTEP_SPACINGS
from tiue_jax.io.errors import InputError
from tiue_jax.io.files import StrPath, new_folder
from tiue_jax.pretrained.card import lora_card, student_card
from tiue_jax.pretrained.folder import (
    TRAINING_FILE,
    StableDiffusion,
    StudentOptions,
    load_stable_diffusion,
    save_stable_diffusion,
)
from tiue_jax.pretrained.hub import is_repo_id, resolve_model
from tiue_jax.pretrained.jsonfile import Fields, dump_object
from tiue_jax.pretrained.lora_files import save_lora
from tiue_jax.pretrained.parameters import Params, to_device
from tiue_jax.training.checkpoint import restore_params
from tiue_jax.training.digests import refuse_another_teacher
from tiue_jax.training.workdir import RUN_FILE, read_run


def is_workdir(folder: Path) -> bool:
    """Whether `folder` is that of a training run."""
    return (folder / RUN_FILE).is_file()


def load_trained_student(
    workdir: Path,
    which: str = "ema",
    teacher: StrPath | None = None,
    *,
    place: Callable[[np.ndarray], Any] = to_device,
) -> StableDiffusion:
    """Return the student of the newest checkpoint in `workdir`; but for the UNet it is its teacher.

    Args:
        workdir: the folder of a run.
        which: "ema" or "student".
        teacher: its folder, where it is not where the run found it.
        place: what becomes of each parameter, as for `load_stable_diffusion`.

    Raises:
        InputError: no checkpoint, no teacher or another one than the run's, or files that are not
            what they should be.
    """
    file = workdir / RUN_FILE
    run = read_run(workdir)
    config = run["config"]
    fields = Fields(config, file)
    student = StudentOptions(
        num_steps=fields.integer("student.num_steps", 0, 1, 1000),
        timestep_spacing=fields.choice("student.timestep_spacing", "", TIMESTEP_SPACINGS),
    )
    name = str(teacher or config.get("teacher", ""))
    if not Path(name).is_dir() and not is_repo_id(name.partition("@")[0]):
        what = "the teacher of this run is not there; name it with --teacher"
        raise InputError(what, file=file, key="teacher", found=name)
    parts = ("vae", "text_encoder")
    sd = load_stable_diffusion(resolve_model(name), param_dtype=None, parts=parts, place=place)
    refuse_another_teacher(
        sd,
        run.get("teacher", {}),
        compute_dtype=_dtype(fields, "train.compute_dtype"),
        teacher_dtype=_dtype(fields, "train.teacher_dtype"),
    )
    step, params = restore_params(workdir, which)
    return replace(
        sd,
        params={**sd.params, "unet": jax.tree.map(place, params)},
        student=student,
        training={"step": step, **run},
    )


def _dtype(fields: Fields, key: str) -> np.dtype:
    return jnp.dtype(fields.choice(key, "float32", ("float32", "bfloat16")))


def export_student(
    sd: StableDiffusion,
    params: Params,
    folder: StrPath,
    *,
    num_steps: int,
    timestep_spacing: str,
    training: Mapping[str, Any] | None = None,
    dtype: str | None = "float32",
) -> None:
    """Write the student whose UNet has `params` as a diffusers folder; the rest is its teacher's.

    Args:
        sd: the teacher, loaded whole.
        params: of the student's UNet (its EMA, as a rule).
        folder: new or empty.
        num_steps, timestep_spacing: what the student was trained for.
        training: step, config, teacher and prompts, for `training.json` and the model card.
        dtype: as for `save_stable_diffusion`.

    Raises: as `save_stable_diffusion`.
    """
    student = StudentOptions(num_steps, timestep_spacing)
    whole = replace(sd, params={**sd.params, "unet": params}, student=student, training=training)
    save_stable_diffusion(whole, folder, dtype=dtype, card=student_card(whole))


def export_lora(workdir: Path, folder: StrPath, teacher_license: str | None = None) -> Path:
    """Write the LoRA teacher of the newest checkpoint as diffusers' LoRA file; return the file.

    Args:
        workdir: the folder of a run.
        folder: new or empty; training.json and a model card go beside the file.
        teacher_license: for the card.

    Raises:
        InputError: no checkpoint, or `folder` is in use.
    """
    file = workdir / RUN_FILE
    run = read_run(workdir)
    alpha = Fields(run["config"], file).number("lora.alpha", -1.0, 1e-9, 1e9)
    step, lora = restore_params(workdir, "lora")
    training = {"step": step, **run}
    with new_folder(folder) as out:
        name = save_lora(lora, alpha, out).name
        (out / TRAINING_FILE).write_text(dump_object(training), encoding="utf-8")
        card = lora_card(training, teacher_license=teacher_license)
        (out / "README.md").write_text(card, encoding="utf-8")
    return Path(folder) / name
