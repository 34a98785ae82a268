"""Files that are whole or not there: atomic writes and new folders."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from tiue_jax.io.errors import InputError

StrPath = str | os.PathLike[str]


def write_atomic(path: StrPath, data: bytes | str) -> None:
    """Write `data` to `path` so that readers, and a crash, see the old file or the new one, whole.

    The bytes go to a temporary name in the same folder, reach the disk, and then take the name.
    Missing parent folders are made. Text is written as UTF-8, line ends as they are.

    Raises:
        InputError: a file lies where a parent folder should be.
        OSError: the write failed; `path` is as it was and nothing is left beside it.
    """
    target = Path(path)
    payload = data.encode("utf-8") if isinstance(data, str) else data
    make_parents(target)
    temporary = _sibling(target)
    try:
        with open(temporary, "xb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    _sync_folder(target.parent)


@contextmanager
def new_folder(path: StrPath) -> Iterator[Path]:
    """Claim `path` for output: fill the yielded folder, and it takes the name when the block ends.

    The yielded folder is a hidden sibling of `path`. If the block raises, it is removed, together
    with the parent folders that were made for it. An empty folder at `path` counts as free.

    Raises:
        InputError: something that is not an empty folder is at `path`, now or when the block ends;
            or a file lies where a parent folder should be.
    """
    target = Path(path).resolve()  # rename would replace a link, and not fill the folder behind it
    require_free(path)
    with hidden_folder(target.parent, target.name) as temporary:
        yield temporary
        _sync_tree(temporary)
        require_free(path)
        if not _rename(temporary, target):
            raise _in_use(path)


@contextmanager
def hidden_folder(parent: StrPath, name: str = "new") -> Iterator[Path]:
    """Yield a new folder in `parent` with a hidden name: fill it, and rename it.

    If it still has that name when the block ends it is removed, and so are the parent folders that
    were made for it, unless something lies in them.

    Args:
        name: becomes a part of the hidden one.

    Raises:
        InputError: a file lies where `parent` or a folder above it should be.
    """
    folder = _sibling(Path(parent) / name)
    made = [above for above in folder.parents if not above.exists()]  # deepest first
    make_parents(folder)
    try:
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for above in made:
            with suppress(OSError):  # not empty
                above.rmdir()
    _sync_folder(folder.parent)


def take_number(folder: Path) -> Path:
    """Rename a full `hidden_folder` to the first free of 000, 001, ... beside it; return that.

    Looking and taking are one step: of several processes, each gets a name of its own.
    """
    _sync_tree(folder)
    names = (folder.with_name(f"{i:03d}") for i in count())
    return next(name for name in names if _rename(folder, name))


def require_free(path: StrPath) -> None:
    """Ask, before long work whose result is to lie there, whether `new_folder(path)` would begin.

    Raises:
        InputError: something that is not an empty folder is at `path`.
    """
    target = Path(path)
    if target.is_dir():
        if any(target.iterdir()):
            raise _in_use(path)
    elif target.exists():
        raise InputError("is a file", file=path, expected="a new or empty folder")


def require_absent(path: StrPath, *, key: str | None = None) -> None:
    """Ask, before long work whose result is to be the file `path`, whether nothing is there.

    Args:
        key: the flag that named `path`, for the message.

    Raises:
        InputError: something is at `path`.
    """
    if os.path.lexists(path):
        raise InputError("is there already", file=path, key=key, expected="a new file")


def make_parents(path: StrPath, *, key: str | None = None) -> None:
    """Make the folders above `path` that are missing.

    Args:
        key: the flag that named `path`, for the message.

    Raises:
        InputError: a file lies where one of them should be.
    """
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        file = next(folder for folder in Path(path).parents if os.path.lexists(folder))
        raise InputError("is a file", file=file, key=key, expected="a folder") from error


def _rename(folder: Path, target: Path) -> bool:
    """Rename in one step, onto nothing or an empty folder; False: something else is there."""
    try:
        os.rename(folder, target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            return False
        raise
    return True


def _sibling(target: Path) -> Path:
    """Return a fresh hidden name in the folder of `target`."""
    return target.parent / f".{target.name[:100]}.{secrets.token_hex(6)}.tmp"


def _in_use(shown: StrPath) -> InputError:
    return InputError("output folder is in use", file=shown, expected="a new or empty folder")


def _sync_tree(folder: Path) -> None:
    """Send every file below `folder`, and the folders themselves, to the disk."""
    for root, _, names in os.walk(folder):
        for name in names:
            file = Path(root) / name
            if file.is_file() and not file.is_symlink():
                with open(file, "rb") as opened:
                    os.fsync(opened.fileno())
        _sync_folder(Path(root))


def _sync_folder(folder: Path) -> None:
    """Send the entries of `folder` to the disk, where the file system knows how to."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
