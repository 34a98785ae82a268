"""A folder of samples: written as the images are made, and kept when something stops that."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tiue_jax.io import images as module
from tiue_jax.io.errors import RunError
from tiue_jax.io.images import GRID_IMAGES, SampleFolder, image_grid


def draw(n: int) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 256, (n, 4, 4, 3), np.uint8)


def sample_folder(folder: Path, n: int) -> SampleFolder:
    return SampleFolder(folder, [f"prompt {i}" for i in range(n)], range(7, 7 + n), {"seed": 7})


def names(n: int) -> list[str]:
    return [f"{i:05d}_prompt-{i}.png" for i in range(n)]


def read(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image)


def test_every_batch_is_on_the_disk_before_the_next_is_made(tmp_path: Path) -> None:
    images, seen = draw(5), []

    def batches() -> Iterator[np.ndarray]:
        for start in (0, 2, 4):
            seen.append(sorted(file.name for file in tmp_path.iterdir()))
            yield images[start : start + 2]

    samples = sample_folder(tmp_path, 5)
    assert samples.fill(batches()) is None
    assert seen == [[], names(2), names(4)]
    assert len(samples.made_at) == 3
    assert sorted(f.name for f in tmp_path.iterdir()) == [*names(5), "grid.png", "samples.json"]
    for name, image in zip(names(5), images, strict=True):
        np.testing.assert_array_equal(read(tmp_path / name), image)
    np.testing.assert_array_equal(read(tmp_path / "grid.png"), image_grid(images))
    told = json.loads((tmp_path / "samples.json").read_text())
    assert (told["settings"], told["complete"]) == ({"seed": 7}, True)
    assert told["images"][4] == {"file": names(5)[4], "prompt": "prompt 4", "seed": 11}


def test_a_grid_is_of_the_first_images(tmp_path: Path) -> None:
    images = draw(GRID_IMAGES + 6)
    assert sample_folder(tmp_path, len(images)).fill([images[:10], images[10:]]) is None
    grid = read(tmp_path / "grid.png")
    np.testing.assert_array_equal(grid, image_grid(images[:GRID_IMAGES]))
    assert len(list(tmp_path.glob("*_*.png"))) == len(images)


@pytest.mark.parametrize("error", [RunError("image 2 is not finite"), KeyboardInterrupt()])
def test_what_stops_it_half_way_leaves_the_images_before(
    tmp_path: Path, error: BaseException
) -> None:
    images = draw(5)

    def batches() -> Iterator[np.ndarray]:
        yield images[:2]
        raise error

    assert sample_folder(tmp_path, 5).fill(batches()) is error
    assert sorted(f.name for f in tmp_path.iterdir()) == [*names(2), "grid.png", "samples.json"]
    np.testing.assert_array_equal(read(tmp_path / "grid.png"), image_grid(images[:2]))
    told = json.loads((tmp_path / "samples.json").read_text())
    assert not told["complete"]
    assert [row["file"] for row in told["images"]] == names(2)


def test_what_stops_it_before_the_first_image_is_raised(tmp_path: Path) -> None:
    def batches() -> Iterator[np.ndarray]:
        raise RunError("image 0 is not finite")
        yield

    with pytest.raises(RunError, match="image 0"):
        sample_folder(tmp_path, 5).fill(batches())
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_whole_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = module.write_atomic

    def full(path: Path, data: Any) -> None:
        if len(list(tmp_path.iterdir())) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, data)

    monkeypatch.setattr(module, "write_atomic", full)
    stopped = sample_folder(tmp_path, 5).fill([draw(5)])
    assert isinstance(stopped, OSError)
    assert sorted(f.name for f in tmp_path.iterdir()) == names(3)
