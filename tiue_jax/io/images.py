"""Images as PNG files and as grids."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

Images = UInt8[np.ndarray, "n h w 3"]


def image_grid(images: Images, *, gap: int = 2) -> UInt8[np.ndarray, "H W 3"]:
    """Lay images out row by row on white, as near to a square as their number allows.

    Args:
        images: at least one.
        gap: pixels between them.
    """
    count, height, width, _ = images.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    grid = np.full(
        (rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, dtype=np.uint8
    )
    for i, image in enumerate(images):
        top, left = (i // columns) * (height + gap), (i % columns) * (width + gap)
        grid[top : top + height, left : left + width] = image
    return grid


def encode_png(image: UInt8[np.ndarray, "H W 3"]) -> bytes:
    """Return the bytes of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def write_samples(
    folder: Path,
    images: Images,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: Mapping[str, object],
) -> None:
    """Write a PNG file an image, grid.png, and samples.json into `folder`.

    A file's name is its number and its prompt with everything but a-z and 0-9 replaced: no prompt
    can name another folder.

    Args:
        settings: what it takes to make the images again; JSON values.
    """
    listed = []
    for i, (image, prompt, seed) in enumerate(zip(images, prompts, seeds, strict=True)):
        words = re.sub(r"[^a-z0-9]+", "-", prompt.lower())[:60].strip("-")
        name = f"{i:05d}_{words or 'image'}.png"
        (folder / name).write_bytes(encode_png(image))
        listed.append({"file": name, "prompt": prompt, "seed": seed})
    (folder / "grid.png").write_bytes(encode_png(image_grid(images)))
    text = json.dumps({"settings": settings, "images": listed}, indent=1, ensure_ascii=False)
    # A flag may name a file whose name is not UTF-8: its bytes become JSON's escapes.
    encoded = (text + "\n").encode("utf-8", "backslashreplace")
    (folder / "samples.json").write_bytes(encoded)
