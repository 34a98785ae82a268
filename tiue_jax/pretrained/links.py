"""Links in model folders: followed within the folder and into the hub's cache, nowhere else.

What is in a model's files comes out again, in the folder that is exported and uploaded. A link in
the folder of a stranger could make that any file of this machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tiue_jax.io.errors import InputError

ENDINGS = (".json", ".safetensors", ".txt")  # of the files that are read
SHARED_BLOBS_MARKER_NAME = ".huggingface-shared-blobs"  # in the folder that all models share


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
        expected = "a file in it (cp -rL makes a copy without links)"
        raise InputError(what, file=path, expected=expected, found=path.resolve())


def is_inside(path: Path, folder: Path) -> bool:
    """Whether `path`, links followed, is in `folder`, or in the cache that `folder` is in.

    The Hugging Face hub's cache keeps `CACHE/models--NAME/snapshots/REVISION/...` as links into
    `CACHE/models--NAME/blobs/`, and large files of all models together in `CACHE/blobs/NN/`.

    Raises:
        OSError, RuntimeError: a circle of links.
    """
    target, home = path.resolve(), folder.resolve()
    if target.is_relative_to(home):
        return True
    for snapshots in (parent for parent in home.parents if parent.name == "snapshots"):
        model = snapshots.parent
        shared = model.parent / "blobs"
        is_shared = target.parent.parent == shared and (shared / SHARED_BLOBS_MARKER_NAME).is_file()
        if target.parent == model / "blobs" or is_shared:
            return True
    return False
