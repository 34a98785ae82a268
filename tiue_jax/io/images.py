"""Images as PNG files and as grids."""

from __future__ import annotations

import io
import json
import math
import re
import signal
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from tqdm import tqdm

from tiue_jax.io.files import write_atomic

GRID_IMAGES = 64  # at most in a grid of samples, or that of thousands could not be opened
MAX_IMAGES = 100_000  # in a folder of samples: a file's number has five digits
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


def stop_as_by_ctrl_c() -> None:
    """Let SIGTERM, which batch systems send, stop a command as Ctrl-C does, exit code and all.

    It counts once: timeout(1) sends two, and the second would stop `SampleFolder.fill` saving.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        del frame
        signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)


class SampleFolder:
    """A folder of samples: a PNG file an image as it is made, then grid.png and samples.json.

    A file's name is its number and its prompt with everything but a-z and 0-9 replaced: no prompt
    can name another folder. Every file is whole or not there, whatever stops the writing.

    Attributes:
        made_at: when each batch was made, as `time.monotonic` has it.
    """

    def __init__(
        self,
        folder: Path,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: Mapping[str, object],
    ) -> None:
        """Write nothing yet.

        Args:
            prompts, seeds: one an image, of all that are to be made.
            settings: what it takes to make the images again; JSON values.
        """
        self._folder, self._settings = folder, settings
        self._wanted = list(zip(prompts, seeds, strict=True))
        self._listed: list[dict[str, Any]] = []
        self._first: list[np.ndarray] = []
        self.made_at: list[float] = []

    def __len__(self) -> int:
        """Return the number of images written."""
        return len(self._listed)

    def fill(self, batches: Iterable[UInt8[np.ndarray, "_ h w 3"]]) -> BaseException | None:
        """Write images as they are made, under a progress bar, and finish.

        Returns:
            What stopped it half-way, Ctrl-C too: the folder then holds the images before that. What
            stops it before the first image is raised.
        """
        try:
            with tqdm(desc="images", total=len(self._wanted)) as bar:
                for batch in batches:
                    self.made_at.append(time.monotonic())
                    self.add(batch)
                    bar.update(len(batch))
            self.finish()
        except BaseException as error:
            if not len(self):
                raise
            with suppress(OSError):  # the disk may be full
                self.finish()
            return error
        return None

    def add(self, images: Images) -> None:
        """Write the next images."""
        for image in images:
            prompt, seed = self._wanted[len(self)]
            words = re.sub(r"[^a-z0-9]+", "-", prompt.lower())[:60].strip("-")
            name = f"{len(self):05d}_{words or 'image'}.png"
            write_atomic(self._folder / name, encode_png(image))
            self._listed.append({"file": name, "prompt": prompt, "seed": seed})
            if len(self) <= GRID_IMAGES:
                self._first.append(image)

    def finish(self) -> None:
        """Write samples.json of the images that there are, and grid.png of the first of them."""
        complete = len(self) == len(self._wanted)
        told = {"settings": self._settings, "complete": complete, "images": self._listed}
        text = json.dumps(told, indent=1, ensure_ascii=False) + "\n"
        # A flag may name a file whose name is not UTF-8: its bytes become JSON's escapes.
        write_atomic(self._folder / "samples.json", text.encode("utf-8", "backslashreplace"))
        write_atomic(self._folder / "grid.png", encode_png(image_grid(np.stack(self._first))))
