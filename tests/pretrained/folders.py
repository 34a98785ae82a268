"""Model folders for tests: the reference model, and copies of it with one thing changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

MODEL = Path(__file__).parents[1] / "reference" / "model"
WEIGHTS = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}


def copy_model(target: Path) -> Path:
    """Copy the reference model to `target`, writable."""
    shutil.copytree(MODEL, target, copy_function=shutil.copyfile)
    return target


def edit_weights(
    folder: Path, part: str, edit: Callable[[dict[str, np.ndarray]], Mapping[str, np.ndarray]]
) -> Path:
    """Replace the tensors of a part by what `edit` makes of them; return the file."""
    file = folder / WEIGHTS[part]
    tensors = {k: np.ascontiguousarray(v) for k, v in edit(load_file(file)).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    return file


def edit_json(file: Path, **changes: Any) -> Path:
    """Set keys of a JSON file; `...` removes a key."""
    fields = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in fields.items() if v is not ...}))
    return file


def bits(tree: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[str, bytes]]:
    """Return path -> (dtype and shape, bytes) of every parameter: equal is bit for bit."""
    found = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            found |= bits(value, f"{prefix}{name}/")
        else:
            array = np.asarray(value)
            found[prefix + name] = (f"{array.dtype}{array.shape}", array.tobytes())
    return found
