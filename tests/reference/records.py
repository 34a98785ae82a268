"""Reading what the reference recorded: record.json, train.npz, sampling.npz; NCHW, torch names.

Anything missing, misshapen or not supported is an `InputError` that names file and key.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tiue_jax.io.errors import InputError
from tiue_jax.training.options import StepOptions

KINDS = ("randn", "randn_like", "randint", "randn_like", "randint", "random")
LOSSES = {
    "step_loss_vsd": "loss/vsd",
    "step_loss_textclip": "loss/clip",  # before its weight; where there is such a term
    "step_loss_lora": "loss/lora",
}
ParamPath = tuple[str, ...]

_OPTIMIZER = re.compile(r"Adam\(([\d.e+-]+), ([\d.e+-]+), eps=([\d.e+-]+)\), no weight decay")
_NUMBER = r"([\d.e+-]+)"
_CLIP_WEIGHT = re.compile(
    rf"{_NUMBER} \* \(1 - step / steps_per_epoch\), steps_per_epoch = {_NUMBER}, step = 0\b.*"
)
_EMA = re.compile(
    r"decay = min\(([\d.e+-]+), \(1\+n\)/\(10\+n\)\) with n = optimizer steps so far - 1,"
    r" and decay = 0 where n <= 0"
)


@dataclass(frozen=True, eq=False)
class Record:
    """A recorded training run.

    Attributes:
        options: of every iteration.
        prompts: per iteration, those of its batch.
        draws: per iteration, six arrays in the order of KINDS.
        logs, grad_norms: per iteration; of grad_norms (student, lora).
        param_norms: per iteration, {"student", "lora"}: norm of every parameter's gradient.
        update_norms: student parameter -> norm of its change over all iterations.
        arrays: everything stored, by key.
    """

    options: StepOptions
    prompts: list[list[str]]
    draws: list[list[np.ndarray]]
    logs: list[dict[str, float]]
    grad_norms: list[tuple[float, float]]
    param_norms: list[dict[str, dict[str, float]]]
    update_norms: dict[str, float]
    arrays: Mapping[str, np.ndarray]

    def stored(self, prefix: str) -> dict[str, np.ndarray]:
        """The arrays under `prefix/`, by the rest of their key."""
        start = prefix + "/"
        return {k[len(start) :]: v for k, v in self.arrays.items() if k.startswith(start)}


def read_arrays(file: Path) -> dict[str, np.ndarray]:
    """All arrays of an npz file."""
    try:
        with open(file, "rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            return {key: arrays[key] for key in arrays.files}
    except FileNotFoundError as error:
        raise InputError("no such file", file=file) from error
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise InputError(f"not a readable npz file ({error})", file=file) from error


def read_record(folder: Path) -> Record:
    """Read record.json and train.npz.

    Raises:
        InputError: see above.
    """
    file = folder / "record.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        raw = content["options"]
    except FileNotFoundError as error:
        raise InputError("no such file", file=file) from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"not a JSON file ({error})", file=file) from error
    except (KeyError, TypeError) as error:
        raise InputError("missing", file=file, key="options") from error
    arrays = read_arrays(folder / "train.npz")
    try:
        return _record(content, raw, arrays, file)
    except KeyError as error:
        raise InputError("missing", file=file, key=str(error.args[0])) from error
    except (TypeError, ValueError, IndexError) as error:
        raise InputError(f"malformed ({error})", file=file) from error


def _record(content: dict, raw: dict, arrays: dict[str, np.ndarray], file: Path) -> Record:
    batch, count = int(raw["batch"]), len(content["logs"])
    prompts = content["prompts"]
    for key, found, expected in (
        ("prompts", len(prompts), batch * count),
        ("draw_kinds", content["draw_kinds"], list(KINDS) * count),
        ("grad_norms", [name for name, _ in content["grad_norms"]], ["student", "lora"] * count),
    ):
        if found != expected:
            raise InputError("wrong", file=file, key=key, expected=expected, found=found)
    draws = [
        [_draw(arrays, 6 * i + j, kind, batch, file) for j, kind in enumerate(KINDS)]
        for i in range(count)
    ]
    norms = [value for _, value in content["grad_norms"]]
    per_parameter = content.get("per_parameter_grad_norm") or [{}] * (2 * count)
    return Record(
        options=_options(raw, draws[0][0].shape, file),
        prompts=[prompts[i * batch : (i + 1) * batch] for i in range(count)],
        draws=draws,
        logs=content["logs"],
        grad_norms=list(zip(norms[::2], norms[1::2], strict=True)),
        param_norms=[
            {"student": per_parameter[2 * i], "lora": per_parameter[2 * i + 1]}
            for i in range(count)
        ],
        update_norms={
            name: update
            for name, (_, update) in content.get("student_final_norm_and_update_norm", {}).items()
        },
        arrays=arrays,
    )


def _draw(
    arrays: dict[str, np.ndarray], number: int, kind: str, batch: int, file: Path
) -> np.ndarray:
    key = f"draw/{number:03d}_{kind}"
    where = file.with_name("train.npz")
    if key not in arrays:
        raise InputError("missing", file=where, key=key)
    value = arrays[key]
    shape = () if kind == "random" else (batch,)
    if value.shape[: len(shape)] != shape or value.ndim != {"random": 0, "randint": 1}.get(kind, 4):
        raise InputError("misshapen", file=where, key=key, found=value.shape)
    return value


def _options(raw: dict, noise_shape: tuple[int, ...], file: Path) -> StepOptions:
    """The record's hyperparameters as ours."""
    optimizer = _OPTIMIZER.fullmatch(raw["optimizer"])
    ema = _EMA.fullmatch(raw["ema"])
    for key, match in (("optimizer", optimizer), ("ema", ema)):
        if match is None:
            raise InputError("not understood", file=file, key=f"options.{key}", found=raw[key])
    if raw["precision"] != "float32":
        raise InputError(
            "not supported", file=file, key="options.precision", found=raw["precision"]
        )
    tau, weight, clip_iterations = float(raw.get("clip_tau", 0.0)), 0.0, 1.0
    if tau > 0:
        clip = _CLIP_WEIGHT.fullmatch(raw["clip_weight"])
        if clip is None:
            found = raw["clip_weight"]
            raise InputError("not understood", file=file, key="options.clip_weight", found=found)
        weight, clip_iterations = map(float, clip.groups())
    b1, b2, eps = map(float, optimizer.groups())
    return StepOptions(
        num_steps=len(raw["timesteps"]),
        timesteps=tuple(int(t) for t in raw["timesteps"]),
        t_enc=int(raw["t_enc"]),
        latent_size=int(noise_shape[-1]),
        guidance_scale=float(raw["guidance_scale"]),
        lambda_kl=float(raw["lambda_kl"]),
        clip_tau=tau,
        clip_weight=weight,
        clip_iterations=clip_iterations,
        student_lr=float(raw["student_lr"]),
        lora_lr=float(raw["lora_lr"]),
        adam_b1=b1,
        adam_b2=b2,
        adam_eps=eps,
        clip_grad_norm=float(raw["clip_grad_norm"]),
        lora_rank=int(raw["lora_rank"]),
        lora_alpha=float(raw["lora_alpha"]),
        lora_targets=tuple(_joined(str(name).split("."))[-1] for name in raw["lora_targets"]),
        null_prompt_prob=float(raw["null_prompt_threshold"]),
        ema_max_decay=float(ema.group(1)),
    )


def param_path(name: str, known: Mapping[ParamPath, Any]) -> ParamPath:
    """`up_blocks.0.resnets.1.conv1.weight` -> (up_blocks_0, resnets_1, conv1, kernel).

    Written apart from the package's own conversion, so that the two check each other.
    """
    *modules, leaf = name.split(".")
    parts = _joined(modules)
    leaves = (leaf,) if leaf != "weight" else ("kernel", "scale")
    for candidate in leaves:
        if (*parts, candidate) in known:
            return (*parts, candidate)
    raise InputError("the model has no such parameter", key=name)


def _joined(modules: list[str]) -> list[str]:
    """[down_blocks, 0, conv] -> [down_blocks_0, conv]."""
    parts: list[str] = []
    for module in modules:
        if module.isdigit() and parts:
            parts[-1] += f"_{module}"
        else:
            parts.append(module)
    return parts


def lora_path(name: str) -> ParamPath:
    """`....to_q.lora_A.default.weight` -> (..., to_q, a)."""
    match = re.fullmatch(r"(.+)\.lora_([AB])\.(?:default\.)?weight", name)
    if match is None:
        raise InputError("not the name of a LoRA matrix", key=name)
    return (*_joined(match.group(1).split(".")), match.group(2).lower())


def from_torch(value: np.ndarray) -> np.ndarray:
    """[out, in, kh, kw] to [kh, kw, in, out], [out, in] to [in, out]."""
    return {2: lambda v: v.T, 4: lambda v: v.transpose(2, 3, 1, 0)}.get(value.ndim, lambda v: v)(
        value
    )


def nhwc(value: np.ndarray) -> np.ndarray:
    """[..., c, h, w] to [..., h, w, c]."""
    return np.ascontiguousarray(np.moveaxis(value, -3, -1))
