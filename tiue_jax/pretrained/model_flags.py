"""The flags that name a model, for every command that takes one; `adopt_module_key_flags` them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from absl import flags

from tiue_jax.diffusion.schedule import PREDICTION_TYPES
from tiue_jax.io.errors import InputError

_REVISION = flags.DEFINE_string("revision", None, "Of a hub id: branch, tag or commit.")
_VARIANT = flags.DEFINE_string("variant", None, "Which weights, where there are several: fp16...")
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "Of a single file: a folder with a tokenizer.")
_PREDICTION_TYPE = flags.DEFINE_enum(
    "prediction_type", None, PREDICTION_TYPES, "Of a single file: what its UNet predicts."
)
_LORA = flags.DEFINE_multi_string("lora", [], "A LoRA file to merge in: FILE or FILE:SCALE.")


def model_options() -> dict[str, Any]:
    """Return what those flags say, as arguments of `load_model`."""
    return {
        "revision": _REVISION.value,
        "variant": _VARIANT.value,
        "tokenizer": _TOKENIZER.value,
        "prediction_type": _PREDICTION_TYPE.value,
        "loras": tuple(_LORA.value),
    }


def refuse_unused(options: Mapping[str, Any], what: str) -> None:
    """Raise InputError for the first of `options` that is given, and has no use with `what`."""
    for name, value in options.items():
        if value:
            flag = "--lora" if name == "loras" else f"--{name}"
            raise InputError(f"has no use with {what}", key=flag, found=value)
