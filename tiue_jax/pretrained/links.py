"""Links in model folders: followed within the folder and into the hub's cache, nowhere else.

What is in a model's files comes out again, in the folder that is exported and uploaded. A link in
the folder of a stranger could make that any file of this machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tiue_jax.io.errors import InputError

ENDINGS = (".json", ".safetensors", ".txt")  # of the files that are read


def require_contained(folder: Path, parts: Sequence[str] = ()) -> None:
    """Check the links among the files of a model that are read, before the first is.

    Args:
        folder: of the model; it may be a link itself.
        parts: the folders in it that are read; those that are not there are passed over.

    Raises:
        InputError: a link leads out of `folder`.
    """
    for place in (folder, *(folder / part for part in parts)):
        require_inside(place, folder)
        for path in sorted(place.iterdir()) if place.is_dir() else ():
            if path.suffix in ENDINGS:
                require_inside(path, folder)


def require_inside(path: Path, folder: Path) -> None:
    """Raise InputError unless `path`, which is in `folder`, leads to something in `folder`."""
    try:
        inside = is_inside(path, folder)
    except (OSError, RuntimeError) as error:
        raise InputError("a circle of links, which cannot be resolved", file=path) from error
    if not inside:
        what = "a link leads out of the model's folder"
        raise InputError(what, file=path, expected="a file in it", found=path.resolve())


def is_inside(path: Path, folder: Path) -> bool:
    """Whether `path`, links followed, is in `folder`, or in the cache that `folder` is in.

    The cache of the Hugging Face hub keeps `snapshots/REVISION/...` as links into its `blobs/`.

    Raises:
        OSError, RuntimeError: a circle of links.
    """
    target, home = path.resolve(), folder.resolve()
    return target.is_relative_to(home) or target.parent in _blob_folders(home)


def _blob_folders(folder: Path) -> list[Path]:
    """Return the `blobs` beside a `snapshots` that holds `folder`, which is resolved."""
    tops = (parent.parent for parent in folder.parents if parent.name == "snapshots")
    return [top / "blobs" for top in tops if (top / "blobs").is_dir()]
