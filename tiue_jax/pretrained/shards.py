"""The weight files of one network: a whole file, a variant of it, or shards with an index.

| file | what |
|---|---|
| `model.safetensors` | whole |
| `model.fp16.safetensors` | whole, variant fp16 |
| `model.safetensors.index.json` | index of `model-00001-of-00002.safetensors`, ... |
| `model.safetensors.index.fp16.json` | index of `model.fp16-00001-of-00002.safetensors`, ... |
| `model.safetensors.fp16.index.json` | the same under its former name |

Source: diffusers 0.42 pipelines/pipeline_loading_utils.py::variant_compatible_siblings.
An index is checked before a shard is opened, and every shard's header before a tensor is read.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tiue_jax.io.errors import InputError
from tiue_jax.pretrained.jsonfile import Fields, cut, read_object, regular_file_size
from tiue_jax.pretrained.links import is_inside
from tiue_jax.pretrained.weights import PICKLE_ENDINGS, WAY_OUT, WeightFile, open_weights

MAX_INDEX_BYTES = 16 << 20
MAX_SHARDS = 1000  # the parts of a Stable Diffusion fill one each, or a few


@dataclass(frozen=True)
class Weights:
    """The tensors of one network, in one file or in several; a single file is the one-shard case.

    Attributes:
        path: the file, or the index: what an error about the whole names.
        holders: key -> the file that holds it.
    """

    path: Path
    holders: Mapping[str, WeightFile]

    @classmethod
    def single(cls, file: WeightFile) -> Weights:
        """Return the weights that are all in `file`."""
        return cls(file.path, dict.fromkeys(file.entries, file))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Stored key -> shape."""
        return {key: file.entries[key].shape for key, file in self.holders.items()}

    def file(self, key: str) -> Path:
        """Return the file that holds `key`: what an error about this tensor names."""
        return self.holders[key].path

    def dtype(self, key: str) -> np.dtype:
        """Return the dtype of the weight `key`; raises InputError if that is no float."""
        return self.holders[key].dtype(key)

    def read(self, key: str) -> np.ndarray:
        """Return the weight `key` in its stored dtype; raises as `WeightFile.read`."""
        return self.holders[key].read(key)

    def position(self, key: str) -> tuple[str, int]:
        """Return what to sort keys by, to read them as they lie on the disk."""
        return self.file(key).name, self.holders[key].entries[key].start


def open_part(folder: Path, name: str, variant: str | None = None) -> Weights:
    """Find and check the weights called `name` in `folder`; no tensor is read.

    Args:
        folder: of one network.
        name: of the whole file, `model.safetensors`.
        variant: "fp16", "non_ema", ...: the files of that name and no others. None: the plain
            files; where there are none and just one variant is there, that variant.

    Raises:
        InputError: there are no such weights, or it is not said which of several; an index or a
            file is malformed, or they do not fit each other.
    """
    found = _find(folder, name)
    if variant is None and None not in found and len(found) > 1:
        raise InputError(
            f"no {name}, and variants of which none is asked for",
            file=folder,
            key="variant",
            expected="one of " + ", ".join(sorted(v for v in found if v)),
        )
    if variant is None and None not in found and len(found) == 1:
        variant = next(iter(found))
    if variant not in found:
        return Weights.single(_open_missing(folder, name, variant, found))
    if len(found[variant]) > 1:
        listed = ", ".join(sorted(path.name for path in found[variant]))
        what = "the same weights more than once: which are right is not known"
        raise InputError(what, file=folder, expected="one of them", found=listed)
    (path,) = found[variant]
    return Weights.single(open_weights(path)) if path.suffix != ".json" else _open_index(path)


def _find(folder: Path, name: str) -> dict[str | None, list[Path]]:
    """Return variant (None: plain) -> the whole files and indices that are there."""
    stem, ending = name.rsplit(".", 1)
    stem, word = re.escape(stem), r"([A-Za-z0-9_-]+)"
    patterns = (
        rf"{stem}(?:\.{word})?\.{ending}",
        rf"{stem}\.{ending}\.index(?:\.{word})?\.json",
        rf"{stem}\.{ending}\.{word}\.index\.json",
    )
    found: dict[str | None, list[Path]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        matches = [m for m in (re.fullmatch(p, path.name) for p in patterns) if m]
        if matches and not _is_shard(path.name):
            found.setdefault(matches[0][1], []).append(path)
    return found


def _is_shard(name: str) -> bool:
    return re.search(r"-\d{5}-of-\d{5}\.", name) is not None


def _open_missing(
    folder: Path, name: str, variant: str | None, found: Iterable[str | None]
) -> WeightFile:
    """Say what is there instead of the weights `name` of `variant`."""
    if variant is not None:
        there = ", ".join(sorted(v or "the plain files" for v in found)) or "none"
        raise InputError(f"no variant {variant!r} of {name}", file=folder, found=there)
    stem = name.rsplit(".", 1)[0]
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    shards = [n for n in names if n.startswith(stem) and _is_shard(n) and n.endswith("tensors")]
    if shards:
        what, index = "shards without their index", f"{name}.index.json"
        raise InputError(what, file=folder, expected=index, found=min(shards))
    return open_weights(folder / name)  # which says that it is missing, or only a pickle there


def _open_index(index: Path) -> Weights:
    """Check the index file, then the headers of its shards against it."""
    fields = Fields(read_object(index, MAX_INDEX_BYTES), index)
    placed = fields.values.get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise fields.refuse("weight_map", "parameter -> file, at least one", "not a map of files")
    for key, name in placed.items():
        if not isinstance(name, str):
            raise _entry_error(index, key, "not a file name", "a string", str(name))
    names = sorted(set(placed.values()))
    if len(names) > MAX_SHARDS:
        what = "too many shards"
        raise InputError(what, file=index, expected=f"at most {MAX_SHARDS}", found=len(names))
    first = {name: key for key, name in reversed(placed.items())}
    paths = {name: _shard_path(index, first[name], name) for name in names}
    _check_total_size(fields, sum(regular_file_size(path) for path in paths.values()))
    holders: dict[str, WeightFile] = {}
    for name, path in paths.items():
        shard = replace(open_weights(path), metadata={})  # a thousand of them need not be kept
        _check_shard(shard, name, placed, holders)
        holders |= dict.fromkeys(shard.entries, shard)
    for key, name in placed.items():
        if key not in holders:
            what = "the index places it in this file, which has it not"
            raise InputError(what, file=paths[name], key=cut(key))
    return Weights(index, holders)


def _shard_path(index: Path, key: str, name: str) -> Path:
    """Return the path of the shard `name` if that is a plain name and no link leads elsewhere."""
    refuse = functools.partial(_entry_error, index, key, found=repr(name))
    if name.endswith(PICKLE_ENDINGS):
        raise refuse(WAY_OUT, "a name that ends with .safetensors")
    if not name.isprintable() or any(c in name for c in "/\\:") or not name.strip("."):
        raise refuse("file name leads out of its folder", "a plain file name")
    if not name.endswith(".safetensors"):
        raise refuse("not a safetensors file", "a name that ends with .safetensors")
    path = index.parent / name
    try:
        inside = is_inside(path, index.parent)
    except (OSError, RuntimeError) as error:  # a loop of links
        raise refuse("file name cannot be resolved", "a file") from error
    if not inside:
        raise refuse("file name leads out of its folder through a link", "a file of this folder")
    return path


def _check_total_size(fields: Fields, on_disk: int) -> None:
    """Hold the index's own count of bytes, where it has one, against the size of the shards."""
    metadata = fields.values.get("metadata", {})
    if not isinstance(metadata, dict):
        raise fields.refuse("metadata", "a map")
    notes = Fields(metadata, fields.file)
    if notes.integer("total_size", 0, 0, 1 << 48) > on_disk:
        what = "the shards are smaller: an unfinished download?"
        raise notes.refuse("total_size", f"at most {on_disk} bytes", what)


def _check_shard(
    shard: WeightFile, name: str, placed: Mapping[str, Any], holders: Mapping[str, WeightFile]
) -> None:
    """Check that the index places every tensor of `shard` there, and that no other shard has it."""
    key = next((key for key in shard.entries if placed.get(key) != name), None)
    if key is None:
        return
    if key not in placed:
        raise InputError("tensor is not in the index", file=shard.path, key=cut(key))
    if key in holders:
        what = "tensor is given twice"
        raise InputError(what, file=shard.path, key=cut(key), found=holders[key].path.name)
    what = "tensor is in another shard than its index says"
    raise InputError(what, file=shard.path, key=cut(key), expected=placed[key])


def _entry_error(file: Path, key: str, what: str, expected: str, found: str) -> InputError:
    return InputError(what, file=file, key=cut(key), expected=expected, found=cut(found))
