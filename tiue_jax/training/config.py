"""From a config to checked options, and what of a config a resumed run may change."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn

import optax
from ml_collections import ConfigDict

from tiue_jax.data.prompts import require_text
from tiue_jax.diffusion.schedule import TIMESTEP_SPACINGS
from tiue_jax.io.errors import InputError
from tiue_jax.models.unet import REMAT_POLICIES
from tiue_jax.training.options import StepOptions

_INFINITY = math.inf
_SEED = (0, 2**32 - 1)

# Inclusive bounds of every number.
_INTEGERS: dict[str, tuple[float, float]] = {
    "seed": _SEED,
    "data.shuffle_seed": _SEED,
    "student.num_steps": (1, 1000),
    "lora.rank": (1, _INFINITY),
    "vsd.t_min": (0, 999),
    "vsd.t_max": (0, 999),
    "kl.batch": (0, _INFINITY),
    "train.iterations": (0, 2**31 - 1),
    "train.batch_size": (1, _INFINITY),
    "train.lora_warmup": (0, _INFINITY),
    "train.student_every": (1, _INFINITY),
    "train.accumulate": (1, _INFINITY),
    "mesh.data": (-1, _INFINITY),
    "mesh.fsdp": (-1, _INFINITY),
    "log.every": (1, _INFINITY),
    "log.summary_every": (0, _INFINITY),
    "log.stuck_after": (0, _INFINITY),
    "checkpoint.every": (1, _INFINITY),
    "checkpoint.keep": (1, _INFINITY),
}
_NUMBERS: dict[str, tuple[float, float]] = {
    "lora.alpha": (1e-9, _INFINITY),
    "vsd.guidance_scale": (0, _INFINITY),
    "vsd.lora_guidance_scale": (0, _INFINITY),
    "kl.weight": (0, _INFINITY),
    "clip.tau": (0, 2),
    "clip.weight": (0, _INFINITY),
    "clip.epochs": (1e-9, _INFINITY),
    "train.student_lr": (0, _INFINITY),
    "train.student_lr_end": (0, 1),
    "train.lora_lr": (0, _INFINITY),
    "train.clip_grad_norm": (1e-30, _INFINITY),
    "train.null_prompt_prob": (0, 1),
    "train.ema_max_decay": (0, 1 - 1e-9),
}
_CHOICES: dict[str, tuple[str, ...]] = {
    "student.timestep_spacing": TIMESTEP_SPACINGS,
    "train.compute_dtype": ("float32", "bfloat16"),
    "train.teacher_dtype": ("float32", "bfloat16"),
    "train.remat": tuple(REMAT_POLICIES),
}
_NOT_EMPTY = {
    "teacher": "the folder of a Stable Diffusion",
    "data.source": "where the prompts are",
    "clip.model": "the folder of a CLIP",
    "clip.taesd": "the folder of a TAESD",
}
_TEXTS = ("data.field", "student.start", *_CHOICES, *_NOT_EMPTY)
_LISTS = ("lora.targets", "log.validation_prompts")
_FLAGS = ("data.deduplicate", "clip.source_faithful", "mesh.shard_teacher")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or _is_integer(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_list_of_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) and text for text in value)


# Key -> what its value is, and whether one is that.
_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(_INTEGERS, ("a whole number", _is_integer)),
    **dict.fromkeys(_NUMBERS, ("a number", _is_number)),
    **dict.fromkeys(_TEXTS, ("text", _is_text)),
    **dict.fromkeys(_LISTS, ("texts", _is_list_of_texts)),
    **dict.fromkeys(_FLAGS, ("True or False", lambda value: isinstance(value, bool))),
}

# What a resumed run may change: how long it runs, where it is computed, what it shows. Teacher and
# prompts are held by their contents and not by their names; the number of iterations is held where
# the learning rate falls towards the last one, and the parts of a batch where each has its CLIP
# term.
_MAY_CHANGE = (
    "teacher",
    "student.start",
    "clip.model",
    "clip.taesd",
    "data.source",
    "data.field",
    "data.deduplicate",
    "train.iterations",
    "train.remat",
    "train.accumulate",
    "mesh.",
    "log.",
    "checkpoint.",
)

# Digests of the teacher that runs begun before 2026-11-26 do not have: not held against those.
_NOT_TOLD_AT_FIRST = (
    "clip_settings",
    "latent_size",
    "taesd_settings",
    "tokenizer_files",
    "unet_settings",
)


def check_config(config: ConfigDict) -> None:
    """Refuse a config with keys missing or unknown, or values of another type or out of range.

    Raises:
        InputError: names the key, what it should be, and what it is.
    """
    values = flatten(config)
    for key in sorted(_KINDS.keys() - values.keys()):
        raise InputError("missing from the config; see configs/default.py", key=key)
    for key in sorted(values.keys() - _KINDS.keys()):
        raise InputError("unknown config key; see configs/default.py", key=key)
    for key, (kind, is_kind) in _KINDS.items():
        _require(key, values[key], kind, is_kind)
    for key in (*_TEXTS, *_LISTS):
        for text in [values[key]] if key in _TEXTS else values[key]:
            require_text(text, key=key)
    for key, (low, high) in (_INTEGERS | _NUMBERS).items():
        _require(key, values[key], f"{low} to {high}", partial(_within, low, high))
    for key in _NUMBERS:
        _require(key, values[key], "a finite number", math.isfinite)
    for key, choices in _CHOICES.items():
        _require(key, values[key], f"one of {', '.join(choices)}", choices.__contains__)
    for key, meaning in _NOT_EMPTY.items():
        _require(key, values[key], f"{meaning}: --config.{key}=...", bool)
    _require("lora.targets", values["lora.targets"], "names of layers: to_q, to_v, ...", bool)
    for key in ("mesh.data", "mesh.fsdp"):
        _require(key, values[key], "-1 or at least 1", lambda v: v != 0)


def _within(low: float | int, high: float | int, value: float | int) -> bool:
    return low <= value <= high


def _require(key: str, value: Any, expected: str, holds: Callable[[Any], bool]) -> None:
    if not holds(value):
        raise InputError("not usable", key=key, expected=expected, found=repr(value))


def step_options(config: ConfigDict, latent_size: int, num_prompts: int = 1) -> StepOptions:
    """Return the options of an iteration. The student's learning rate falls linearly if it falls.

    Args:
        latent_size: side of the latents.
        num_prompts: an epoch's, in which the CLIP term's weight falls.

    Raises:
        InputError: values that contradict each other.
    """
    try:
        options = StepOptions(
            num_steps=config.student.num_steps,
            timestep_spacing=config.student.timestep_spacing,
            latent_size=latent_size,
            guidance_scale=config.vsd.guidance_scale,
            lora_guidance_scale=config.vsd.lora_guidance_scale,
            vsd_t_min=config.vsd.t_min,
            vsd_t_max=config.vsd.t_max,
            lambda_kl=config.kl.weight,
            kl_batch=config.kl.batch or None,
            clip_tau=config.clip.tau,
            clip_weight=config.clip.weight,
            clip_iterations=float(
                math.ceil(config.clip.epochs * num_prompts / config.train.batch_size)
            ),
            student_lr=config.train.student_lr,
            lora_lr=config.train.lora_lr,
            clip_grad_norm=config.train.clip_grad_norm,
            lora_rank=config.lora.rank,
            lora_alpha=config.lora.alpha,
            lora_targets=tuple(config.lora.targets),
            lora_warmup=config.train.lora_warmup,
            student_every=config.train.student_every,
            null_prompt_prob=config.train.null_prompt_prob,
            ema_max_decay=config.train.ema_max_decay,
            accumulate=config.train.accumulate,
        )
    except ValueError as error:
        raise InputError(str(error), key="config") from error
    start, end = config.train.student_lr, config.train.student_lr_end
    if end == 1:
        return options
    updates = max(options.student_updates(config.train.iterations), 1)
    return replace(options, student_lr=optax.linear_schedule(start, start * end, updates))


def flatten(config: ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
    """Return {"train.batch_size": 64, ...}: dotted keys, and values as JSON has them.

    Raises:
        InputError: a value that JSON has not.
    """
    nested = config.to_dict() if isinstance(config, ConfigDict) else config
    found: dict[str, Any] = {}

    def walk(prefix: str, node: Any) -> None:
        if isinstance(node, Mapping):
            for key, value in node.items():
                walk(f"{prefix}.{key}" if prefix else str(key), value)
        else:
            found[prefix] = list(node) if isinstance(node, tuple) else node

    walk("", json.loads(json.dumps(nested, default=_refuse_value)))
    return found


def _refuse_value(value: Any) -> NoReturn:
    raise InputError("a value is neither number, text nor a list", key="config", found=repr(value))


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return {key: (before, now)} for what a resumed run may not change and has.

    Args:
        before, now: descriptions of a run: {"config": flat config, "teacher": {...}, "prompts":
            {...}}, the latter two by digests of their contents.
    """
    config, fixed = now["config"], set()
    if config.get("train.student_lr_end", 1) != 1:  # that it is so is held itself, as is the next
        fixed.add("train.iterations")
    if config.get("clip.tau", 0) > 0:
        fixed.add("train.accumulate")
    free = tuple(key for key in _MAY_CHANGE if key not in fixed)
    held = {}
    for name in ("config", "teacher", "prompts"):
        was, is_now = before.get(name, {}), now[name]
        for key in {**was, **is_now}:
            if name == "teacher" and key in _NOT_TOLD_AT_FIRST and key not in was:
                continue
            if name != "config":
                held[f"{name}: {key}"] = was.get(key), is_now.get(key)
            elif not key.startswith(free):
                held[key] = was.get(key), is_now.get(key)
    return {key: pair for key, pair in sorted(held.items()) if pair[0] != pair[1]}


def refuse_changes(before: Mapping[str, Any], now: Mapping[str, Any], workdir: Any) -> None:
    """Raise InputError with every difference between the run in `workdir` and this command's."""
    changed = changes(before, now)
    if changed:
        listed = "; ".join(f"{key} was {was!r}, is {now!r}" for key, (was, now) in changed.items())
        raise InputError(
            f"the run in this folder was begun otherwise: {listed}",
            file=workdir,
            key=next(iter(changed)),
            expected="the same command as before, or another --workdir",
        )
