"""Which method a model makes its images by: what its folder says, and what has to be asked for.

| method | passes | what says it |
|---|---|---|
| tiue | one encoder, K decoders | `tiue.json` |
| lcm | K, noise added in between | a UNet that takes the guidance scale, or an LCMScheduler |
| turbo | K Euler steps, trailing | an EulerDiscreteScheduler with trailing timesteps (SD-Turbo's) |
| one-step | one, at timestep 999 | nothing: SwiftBrush and DMD2 folders look like any other |
| teacher | K DDIM steps, guided | nothing: an ordinary Stable Diffusion looks like a student |

The authors' released TiUE students are plain folders too: they have to be told, by name.
"""

from __future__ import annotations

from typing import NamedTuple

from tiue_jax.diffusion.lcm import ORIGINAL_STEPS, TIMESTEP_SCALING
from tiue_jax.pretrained.folder import StableDiffusion


class Method(NamedTuple):
    """How images are made where nothing else is asked for.

    Attributes:
        num_steps: K; that of a tiue student is in its `tiue.json`.
        guidance_scale: w of u + w (c - u), or what an LCM's UNet is told; None: there is no such
            thing, and asking for one is an error.
        spacing: of the timesteps; None: the folder's.
    """

    num_steps: int
    guidance_scale: float | None
    spacing: str | None = None


METHODS: dict[str, Method] = {
    "tiue": Method(4, None),
    "one-step": Method(1, None),
    "turbo": Method(1, 1.0, "trailing"),
    "lcm": Method(4, 8.0),
    "teacher": Method(25, 7.5),
}


def told_method(model: StableDiffusion) -> str | None:
    """Return the method that the folder of `model` says it was made for; None: it does not say."""
    scheduler = model.configs.get("scheduler", {})
    if model.student is not None:
        return "tiue"
    if model.unet.time_cond_dim is not None or scheduler.get("_class_name") == "LCMScheduler":
        return "lcm"
    trailing = model.schedule.timestep_spacing == "trailing"
    karras = scheduler.get("use_karras_sigmas", False)
    if scheduler.get("_class_name") == "EulerDiscreteScheduler" and trailing and not karras:
        return "turbo"
    return None


def choose_method(model: StableDiffusion, name: str = "auto") -> str:
    """Return `name`, or with "auto" what the model's folder says.

    Raises:
        ValueError: an unknown name; "auto" for a folder that does not say; another method for a
            UNet that only LCM sampling can call.
    """
    if name not in ("auto", *METHODS):
        raise ValueError(f"method {name!r}: choose from {sorted(METHODS)} or auto")
    if model.unet.time_cond_dim is not None and name not in ("auto", "lcm"):
        raise ValueError(f"method {name!r}: this UNet takes the guidance scale, as only lcm does")
    chosen = told_method(model) if name == "auto" else name
    if chosen is None:
        raise ValueError(
            "the folder does not say how it makes images (no tiue.json, LCM or trailing Euler "
            "scheduler): choose teacher for an ordinary Stable Diffusion, tiue or one-step for a "
            "student"
        )
    return chosen


def original_steps(model: StableDiffusion) -> int:
    """Return of how many steps the solver was that an LCM was distilled with: 50 if none says.

    Raises:
        ValueError: the scheduler's config says something that is no number of steps, or scales
            timesteps otherwise than every published LCM does.
    """
    scheduler = model.configs.get("scheduler", {})
    scaling = scheduler.get("timestep_scaling", TIMESTEP_SCALING)
    if scaling != TIMESTEP_SCALING:
        raise ValueError(
            f"timestep_scaling {scaling!r} in scheduler_config.json: expected {TIMESTEP_SCALING}, "
            "the one that is computed with"
        )
    value = scheduler.get("original_inference_steps", ORIGINAL_STEPS)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"original_inference_steps {value!r} in scheduler_config.json: a number")
    return value


def default_guidance(model: StableDiffusion, method: str) -> float | None:
    """Return w where none is asked for: an LCM that cannot be told of it (LCM-LoRA) goes without.

    Source: SD-Turbo's and LCM's own model cards; diffusers for the teacher.
    """
    if method == "lcm" and model.unet.time_cond_dim is None:
        return 1.0
    return METHODS[method].guidance_scale
