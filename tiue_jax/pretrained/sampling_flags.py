"""The flags that say how images are made, and the making by them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from absl import flags
from tqdm import tqdm

from tiue_jax.io.errors import InputError
from tiue_jax.io.images import Images
from tiue_jax.pretrained.methods import METHODS
from tiue_jax.pretrained.model_flags import model_options
from tiue_jax.pretrained.pipeline import load_pipeline

_METHOD = flags.DEFINE_enum("method", "auto", ["auto", *METHODS], "How images are made: see above.")
_TEACHER = flags.DEFINE_bool("teacher", False, "The same as --method=teacher.")
_STEPS = flags.DEFINE_integer("num_steps", None, "Decoders or steps; by default the method's.", 1)
_GUIDANCE = flags.DEFINE_float("guidance_scale", None, "w, where there is one; 1: no guidance.", 0)
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
_SETTINGS = ("num_steps", "guidance_scale", "negative_prompt")  # that an error may be about


class Sampled(NamedTuple):
    """The images, and the seconds that loading took and that the first batch took after it."""

    images: Images
    load_seconds: float
    first_seconds: float


def sample_by_flags(model: str, prompts: Sequence[str], seeds: Sequence[int]) -> Sampled:
    """Load `model` and make its images, with a progress bar.

    Raises:
        InputError: there is no such model, or the flags make no image of it.
    """
    if _TEACHER.value and _METHOD.value not in ("auto", "teacher"):
        raise InputError("contradicts --teacher", key="--method", found=_METHOD.value)
    began = time.monotonic()
    pipeline = load_pipeline(
        model,
        dtype=_DTYPE.value,
        batch_size=_BATCH.value,
        taesd=_TAESD.value if _DECODER.value == "taesd" else None,
        **model_options(),
    )
    loaded = time.monotonic()
    first = []

    def progress(batches: Iterator[Any], total: int) -> Iterator[Any]:
        for batch in tqdm(batches, "batches", total):
            yield batch
            first.append(time.monotonic() - loaded)

    try:
        images = replace(pipeline, progress=progress).sample(
            prompts,
            seeds,
            method="teacher" if _TEACHER.value else _METHOD.value,
            num_steps=_STEPS.value,
            guidance_scale=_GUIDANCE.value,
            negative_prompt=_NEGATIVE.value,
        )
    except ValueError as error:
        text = str(error)
        key = next((f"--{name}" for name in _SETTINGS if text.startswith(name)), "--method")
        raise InputError(text, file=model, key=key) from error
    return Sampled(images, loaded - began, first[0])
