"""scheduler/scheduler_config.json <-> NoiseSchedule.

A scheduler config says two things: what the network was trained with (betas, what it predicts), and
which sampler its authors liked. Ours is DDIM; of the second we take the spacing of the timesteps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from tiue_jax.diffusion.schedule import (
    BETA_SCHEDULES,
    PREDICTION_TYPES,
    TIMESTEP_SPACINGS,
    NoiseSchedule,
    make_schedule,
)
from tiue_jax.io.errors import InputError
from tiue_jax.pretrained.jsonfile import Fields


class Defaults(NamedTuple):
    """What a scheduler class takes for a key that its config leaves out."""

    set_alpha_to_one: bool
    timestep_spacing: str
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    clip_sample: bool = False  # of the classes that have it


# Source: the signatures in diffusers 0.42 (tests/pretrained/test_scheduler.py holds them equal).
# Classes without set_alpha_to_one end at a clean image: true.
SCHEDULERS: dict[str, Defaults] = {
    "DDIMScheduler": Defaults(True, "leading", clip_sample=True),
    "DDPMScheduler": Defaults(True, "leading", clip_sample=True),
    "DPMSolverMultistepScheduler": Defaults(True, "linspace"),
    "DPMSolverSinglestepScheduler": Defaults(True, "linspace"),
    "DEISMultistepScheduler": Defaults(True, "linspace"),
    "EulerAncestralDiscreteScheduler": Defaults(True, "linspace"),
    "EulerDiscreteScheduler": Defaults(True, "linspace"),
    "HeunDiscreteScheduler": Defaults(True, "linspace", 0.00085, 0.012),
    "LCMScheduler": Defaults(True, "leading", 0.00085, 0.012, "scaled_linear"),
    "LMSDiscreteScheduler": Defaults(True, "linspace"),
    "PNDMScheduler": Defaults(False, "leading"),
    "UniPCMultistepScheduler": Defaults(True, "linspace"),
}


_CLIPS = ("DDIMScheduler", "DDPMScheduler", "HeunDiscreteScheduler", "LCMScheduler")


def schedule_from_config(config: Fields) -> NoiseSchedule:
    """Return the noise schedule that `scheduler/scheduler_config.json` describes.

    Raises:
        InputError: an unknown scheduler, or a setting malformed or not implemented here.
    """
    name = config.values.get("_class_name")
    if not isinstance(name, str) or name not in SCHEDULERS:
        expected = "one of " + ", ".join(sorted(SCHEDULERS))
        raise config.refuse("_class_name", expected, "unknown scheduler")
    defaults = SCHEDULERS[name]
    for key in ("rescale_betas_zero_snr", "thresholding"):
        if config.boolean(key, False):
            raise config.refuse(key, "false")
    config.only("trained_betas", (None,))
    if name in _CLIPS and config.boolean("clip_sample", defaults.clip_sample):
        raise InputError(
            "x0 would be clipped at every step, which no latent Stable Diffusion does",
            file=config.file,
            key="clip_sample",
            expected="false",
            found=config.show("clip_sample") if "clip_sample" in config.values else "no such key",
        )
    try:
        return make_schedule(
            config.choice("beta_schedule", defaults.beta_schedule, BETA_SCHEDULES),
            config.number("beta_start", defaults.beta_start, 0.0, 1.0),
            config.number("beta_end", defaults.beta_end, 0.0, 1.0),
            config.integer("num_train_timesteps", 1000, 1, 100_000),
            prediction_type=config.choice("prediction_type", "epsilon", PREDICTION_TYPES),
            steps_offset=config.integer("steps_offset", 0, 0, 1000),
            set_alpha_to_one=config.boolean("set_alpha_to_one", defaults.set_alpha_to_one),
            timestep_spacing=config.choice(
                "timestep_spacing", defaults.timestep_spacing, TIMESTEP_SPACINGS
            ),
        )
    except ValueError as error:
        raise InputError(str(error), file=config.file) from error


def scheduler_config(
    schedule: NoiseSchedule, base: Mapping[str, Any], *, ddim: bool = False
) -> dict[str, Any]:
    """Return the scheduler config of `schedule`.

    Args:
        schedule: what the folder is to say.
        base: the scheduler config it was read from, or with custom betas; its class and its further
            keys are kept. Empty: DDIM with the betas of Stable Diffusion.
        ddim: make it DDIM's, whatever `base` was: a student's sampler.

    Raises:
        ValueError: neither the betas of `base` nor those of Stable Diffusion give `schedule`.
    """
    keep_class = base.get("_class_name") in SCHEDULERS and not ddim
    name = base["_class_name"] if keep_class else "DDIMScheduler"
    defaults = SCHEDULERS[base.get("_class_name", name)]
    betas = {
        "beta_end": base.get("beta_end", defaults.beta_end if base else 0.012),
        "beta_schedule": base.get(
            "beta_schedule", defaults.beta_schedule if base else "scaled_linear"
        ),
        "beta_start": base.get("beta_start", defaults.beta_start if base else 0.00085),
        "num_train_timesteps": schedule.num_train_timesteps,
    }
    if not np.array_equal(make_schedule(**betas).alphas_cumprod, schedule.alphas_cumprod):
        raise ValueError(f"alphas_cumprod are not those of {betas}: give their betas as `base`")
    kept = {key: value for key, value in base.items() if keep_class and value is not None}
    return {
        **kept,
        **betas,
        "_class_name": name,
        "clip_sample": False,
        "prediction_type": schedule.prediction_type,
        "set_alpha_to_one": schedule.set_alpha_to_one,
        "steps_offset": schedule.steps_offset,
        "timestep_spacing": schedule.timestep_spacing,
        "trained_betas": None,
    }
