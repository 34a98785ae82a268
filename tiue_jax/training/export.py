"""The student that a training run has made, as a whole model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tiue_jax.diffusion.schedule import TIMESTEP_SPACINGS
from tiue_jax.io.errors import InputError
from tiue_jax.io.files import StrPath
from tiue_jax.pretrained.folder import StableDiffusion, StudentOptions, load_stable_diffusion
from tiue_jax.pretrained.jsonfile import Fields, read_object
from tiue_jax.pretrained.parameters import to_device
from tiue_jax.training.checkpoint import restore_params
from tiue_jax.training.workdir import RUN_FILE


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
        InputError: no checkpoint, no teacher, or files that are not what they should be.
    """
    file = workdir / RUN_FILE
    run = read_object(file)
    config = run.get("config")
    if not isinstance(config, dict):
        raise InputError("does not describe a run", file=file, key="config")
    fields = Fields(config, file)
    student = StudentOptions(
        num_steps=fields.integer("student.num_steps", 0, 1, 1000),
        timestep_spacing=fields.choice("student.timestep_spacing", "", TIMESTEP_SPACINGS),
    )
    folder = Path(teacher or str(config.get("teacher", "")))
    if not folder.is_dir():
        what = "the teacher of this run is not there; name it with --teacher"
        raise InputError(what, file=file, key="teacher", found=str(folder))
    sd = load_stable_diffusion(folder, param_dtype=None, parts=("vae", "text_encoder"), place=place)
    params = jax.tree.map(place, restore_params(workdir, which))
    return replace(sd, params={**sd.params, "unet": params}, student=student)
