"""What a run takes from its teacher, as digests: by them a change of it is noticed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from tiue_jax.data.prompts import Prompts
from tiue_jax.diffusion.schedule import NoiseSchedule
from tiue_jax.diffusion.text_image import TextImage
from tiue_jax.io.errors import InputError
from tiue_jax.pretrained.folder import StableDiffusion
from tiue_jax.training.checkpoint import inspect_arrays
from tiue_jax.training.state import Frozen

_SHOWN_PROMPTS = 256  # whose token ids are in a digest


def cast(tree: Any, dtype: DTypeLike) -> Any:
    """Return the tree in another float type; arrays that are of it already are not copied."""
    return jax.tree.map(lambda x: x.astype(dtype, copy=False), tree)


def digest_teacher(
    sd: StableDiffusion,
    frozen: Frozen,
    prompts: Prompts,
    *,
    student: Any = None,
    text_image: TextImage | None = None,
) -> dict[str, str]:
    """Return part -> digest of all that a run takes from the teacher, whatever file it was in.

    Args:
        sd: the teacher, its modules in the run's compute dtype, its VAE in float32.
        frozen: what training reads of it.
        student: parameters that the student starts as, where they are not the teacher's.
        text_image: of the CLIP term, where there is one.
    """
    ids, _ = sd.tokenizer.encode([*prompts.texts[:_SHOWN_PROMPTS], ""])
    found = {
        **digest_rest(sd, frozen.text_encoder),
        "unet": _network(sd.unet, frozen.teacher),
        "tokenizer": _digest([_vocabulary(sd), ids.tolist()]),
    }
    if student is not None:
        found["student"] = _digest(inspect_arrays(student)[0])
    if text_image is not None:
        pixels = [text_image.mean, text_image.std]
        found["taesd"] = _digest(inspect_arrays(frozen.taesd)[0])
        found["taesd_settings"] = _digest(repr(text_image.taesd))
        found["clip"] = _digest(inspect_arrays(frozen.clip)[0])
        found["clip_settings"] = _digest([repr(text_image.clip), pixels])
    return found


def digest_rest(sd: StableDiffusion, text_encoder: Any) -> dict[str, str]:
    """Return part -> digest of what an exported student has from its teacher.

    Args:
        sd: as for `digest_teacher`; the UNet's parameters are not read.
        text_encoder: its parameters as the run keeps them.
    """
    return {
        "text_encoder": _network(sd.text_encoder, text_encoder),
        "vae": _network(sd.vae, sd.params["vae"]),
        "tokenizer_files": _digest([_vocabulary(sd), sd.tokenizer.null_ids.tolist()]),
        "schedule": _schedule(sd.schedule),
        "unet_settings": _digest(repr(sd.unet)),
        "latent_size": str(sd.latent_size),
    }


def refuse_another_teacher(
    sd: StableDiffusion,
    digests: Mapping[str, Any],
    *,
    compute_dtype: DTypeLike,
    teacher_dtype: DTypeLike,
) -> None:
    """Hold a teacher against the digests of a run: all but its UNet's parameters.

    Args:
        sd: loaded in whatever types its files have.
        digests: of `digest_teacher`; an older run has fewer, and what it lacks is not held.
        compute_dtype, teacher_dtype: the run's.

    Raises:
        InputError: names the first part that differs.
    """
    modules = {name: module.clone(dtype=compute_dtype) for name, module in sd.modules.items()}
    params = cast(sd.params, jnp.float32)
    as_loaded = replace(sd, **modules, params=params)
    for part, digest in digest_rest(as_loaded, cast(params["text_encoder"], teacher_dtype)).items():
        if digests.get(part, digest) != digest:
            raise InputError(
                f"is not the teacher of this run: another {part}",
                file=sd.folder,
                key="--teacher",
                expected=f"the folder or revision that the run began with, {digests[part]}",
                found=digest,
            )


def _network(module: nn.Module, params: Any) -> str:
    """Of its settings and of every parameter."""
    return _digest([repr(module), inspect_arrays(params)[0]])


def _vocabulary(sd: StableDiffusion) -> list[str]:
    files = sd.tokenizer.files
    return [hashlib.sha256(files[name]).hexdigest() for name in ("vocab.json", "merges.txt")]


def _schedule(schedule: NoiseSchedule) -> str:
    return _digest({**vars(schedule), "alphas_cumprod": schedule.alphas_cumprod.tolist()})


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
