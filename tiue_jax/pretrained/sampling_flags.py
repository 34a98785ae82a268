"""The flags that say how images are made, and the making by them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from absl import flags

from tiue_jax.diffusion.schedule import TIMESTEP_SPACINGS
from tiue_jax.io.errors import InputError
from tiue_jax.io.images import Images
from tiue_jax.pretrained.methods import METHODS
from tiue_jax.pretrained.model_flags import model_options
from tiue_jax.pretrained.pipeline import Pipeline, load_pipeline

_DEFAULT_STEPS = ", ".join(f"{name} {m.num_steps}" for name, m in METHODS.items())
_DEFAULT_GUIDANCE = ", ".join(
    f"{name} {m.guidance_scale:g}" for name, m in METHODS.items() if m.guidance_scale is not None
)
_METHOD = flags.DEFINE_enum("method", "auto", ["auto", *METHODS], "How images are made: see above.")
_TEACHER = flags.DEFINE_bool("teacher", False, "The same as --method=teacher.")
_STEPS = flags.DEFINE_integer(
    "num_steps", None, f"Decoders or steps. By default what tiue.json says, or {_DEFAULT_STEPS}.", 1
)
_SPACING = flags.DEFINE_enum(
    "timestep_spacing", None, TIMESTEP_SPACINGS, "Of the timesteps. By default as the model says."
)
_GUIDANCE = flags.DEFINE_float(
    "guidance_scale",
    None,
    f"w of the methods with guidance; 1: none. By default {_DEFAULT_GUIDANCE}; LCM-LoRA 1.",
    0,
)
flags.register_validator(
    _GUIDANCE, lambda w: w is None or math.isfinite(w), "expected a finite number"
)
_NEGATIVE = flags.DEFINE_string("negative_prompt", None, "What guidance leads away from.")
_BATCH = flags.DEFINE_integer("batch_size", 8, "Images made at a time.", 1)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the computation.")
_DECODER = flags.DEFINE_enum("decoder", "vae", ["vae", "taesd"], "taesd: faster, less sharp.")
_TAESD = flags.DEFINE_string(
    "taesd", "madebyollin/taesd", "With --decoder=taesd: its folder or hub id."
)
# Settings that an error may be about.
_SETTINGS = ("num_steps", "timestep_spacing", "guidance_scale", "negative_prompt")


def sample_by_flags(model: str, prompts: Sequence[str], seeds: Sequence[int]) -> Iterator[Images]:
    """Load `model`, and then make its images a batch at a time, as they are asked for.

    Raises:
        InputError: there is no such model, or, with the first batch, the flags make no image of it.
    """
    if _TEACHER.value and _METHOD.value not in ("auto", "teacher"):
        raise InputError("contradicts --teacher", key="--method", found=_METHOD.value)
    pipeline = load_pipeline(
        model,
        dtype=_DTYPE.value,
        batch_size=_BATCH.value,
        taesd=_TAESD.value if _DECODER.value == "taesd" else None,
        **model_options(),
    )
    return _batches(pipeline, model, prompts, seeds)


def _batches(
    pipeline: Pipeline, model: str, prompts: Sequence[str], seeds: Sequence[int]
) -> Iterator[Images]:
    try:
        yield from pipeline.sample_batches(
            prompts,
            seeds,
            method="teacher" if _TEACHER.value else _METHOD.value,
            num_steps=_STEPS.value,
            timestep_spacing=_SPACING.value,
            guidance_scale=_GUIDANCE.value,
            negative_prompt=_NEGATIVE.value,
        )
    except ValueError as error:
        text = str(error)
        key = next((f"--{name}" for name in _SETTINGS if text.startswith(name)), "--method")
        raise InputError(text, file=model, key=key) from error
