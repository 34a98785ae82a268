"""Safetensors files: the header is checked before it is believed, tensors stream one at a time.

Format: 8 bytes little-endian header length n, n bytes of JSON {name: {dtype, shape, data_offsets}},
then the data. Nothing here unpickles.

The safetensors package is not used to read or write. Its reader maps the whole file, which stays
resident (measured, 0.8.0: 860 MB for an 800 MB file of 20 tensors read one after the other; 78 MB
here), and its writer wants all tensors at once and corrupts those that are not contiguous
(safetensors#825). tests/pretrained/test_weights.py holds that both read each other's files.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

from tiue_jax.io.errors import InputError
from tiue_jax.pretrained.jsonfile import cut, parse_object, regular_file_size

MAX_HEADER_BYTES = 16 << 20  # SD 1.5's UNet has 90 kB; merged checkpoints carry some MB of notes
MAX_AXES = 8

# Bytes an element, of every dtype a header may name.
ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64"), 8),
}
FLOATS: dict[str, np.dtype] = {  # what a parameter may be stored as, in the order files keep them
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype("<f2"),
}
FLOAT_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}

PICKLE_ENDINGS = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
WAY_OUT = (
    "pickle files can run any code when opened and are never read here: get the model's "
    ".safetensors files, or load it where you trust it and save it with "
    "save_pretrained(folder, safe_serialization=True)"
)


class TensorEntry(NamedTuple):
    """Where one tensor lies: `start` and `stop` are byte offsets from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class WeightFile:
    """A safetensors file whose header has been checked: every entry lies whole within the file."""

    path: Path
    entries: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Stored key -> shape."""
        return {name: entry.shape for name, entry in self.entries.items()}

    def dtype(self, name: str) -> np.dtype:
        """Return the dtype of the weight `name`.

        Raises:
            InputError: it is not one of the float types that weights come in.
        """
        entry = self.entries[name]
        if entry.dtype not in FLOATS:
            expected = "one of " + ", ".join(FLOATS)
            raise InputError(
                "dtype is not supported",
                file=self.path,
                key=name,
                expected=expected,
                found=entry.dtype,
            )
        return FLOATS[entry.dtype]

    def read(self, name: str) -> np.ndarray:
        """Return the weight `name` in its stored dtype; only its own bytes are read.

        Raises:
            InputError: it is no float, holds NaN or Inf, or the file has shrunk since.
        """
        dtype, entry = self.dtype(name), self.entries[name]
        count = (entry.stop - entry.start) // dtype.itemsize
        try:
            raw = np.fromfile(self.path, f"<u{dtype.itemsize}", count, offset=entry.start)
        except OSError as error:
            raise InputError(f"cannot be read: {error}", file=self.path, key=name) from error
        if raw.size != count:
            raise InputError("file ends within the tensor", file=self.path, key=name)
        array = raw.view(dtype).reshape(entry.shape)
        require_finite(array, self.path, name)
        return array


def open_weights(path: Path) -> WeightFile:
    """Check the header of the safetensors file at `path`; no tensor is read.

    Raises:
        InputError: there is no such file, or only a pickle; it is truncated or malformed.
    """
    if path.suffix in PICKLE_ENDINGS:
        raise InputError(WAY_OUT, file=path)
    if not path.exists() and path.parent.is_dir():
        pickles = [p.name for p in path.parent.iterdir() if p.suffix in PICKLE_ENDINGS]
        if pickles:
            raise InputError(f"no such file; {WAY_OUT}", file=path, found=min(pickles))
    size = regular_file_size(path)
    header, data_start = _read_header(path, size)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise InputError("not a map of strings", file=path, key="__metadata__")
    entries = {name: _entry(name, value, path) for name, value in header.items()}
    _require_whole(entries, size - data_start, path)
    placed = {
        name: entry._replace(start=entry.start + data_start, stop=entry.stop + data_start)
        for name, entry in entries.items()
    }
    return WeightFile(path, placed, metadata)


def require_finite(array: np.ndarray, file: Path, key: str) -> None:
    """Raise InputError, naming the first place, if `array` holds NaN or Inf."""
    finite = np.isfinite(array)
    if not finite.all():
        first = [int(i) for i in np.unravel_index(np.argmin(finite), array.shape)]
        value = "NaN" if np.isnan(array[tuple(first)]) else "Inf"
        count = int(array.size - np.count_nonzero(finite))
        what = f"{count} of {array.size} values are not finite, the first at {first}"
        raise InputError(what, file=file, key=key, found=value)


def write_weights(
    path: Path, dtypes: Mapping[str, np.dtype], shapes: Mapping[str, tuple[int, ...]], read: Reader
) -> None:
    """Write a safetensors file tensor by tensor, and read it back to compare every bit.

    The layout is the safetensors package's own (wider dtypes first, then by name), so that a file
    which that package wrote comes out byte for byte.

    Args:
        path: a new file, best within `new_folder`.
        dtypes: key -> dtype to store.
        shapes: key -> shape.
        read: returns the tensor of a key, in that dtype and shape; called twice a key, so that only
            one tensor need be in memory. It need not be contiguous.

    Raises:
        InputError: a value is NaN or Inf; names `path` and the key.
    """
    codes = {name: _code(dtype) for name, dtype in dtypes.items()}
    order = sorted(codes, key=lambda name: (list(FLOATS).index(codes[name]), name))
    with open(path, "xb") as file:
        file.write(_header(order, codes, shapes))
        for name in order:
            array = read(name)
            assert array.shape == tuple(shapes[name]) and array.dtype == dtypes[name], name
            require_finite(array, path, name)
            file.write(np.ascontiguousarray(_bits(array)).data)
        file.flush()
        os.fsync(file.fileno())
    written = open_weights(path)
    assert written.entries.keys() == codes.keys()
    for name in order:
        if not np.array_equal(_bits(written.read(name)), _bits(read(name))):
            raise OSError(f"{path}: tensor {name} was not written as it is")


Reader = Callable[[str], np.ndarray]


def convert_dtype(array: np.ndarray, dtype: DTypeLike, file: Path, key: str) -> np.ndarray:
    """Return `array` in `dtype`, rounded to nearest even; the same array where nothing changes.

    Raises:
        InputError: a finite value becomes infinite (float16 ends at 65504).
    """
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        converted = array.astype(dtype)
    if not np.isfinite(converted).all():
        largest = float(np.abs(array.astype(np.float64)).max())
        limit = float(ml_dtypes.finfo(dtype).max)
        what = f"too large for {np.dtype(dtype).name}"
        raise InputError(what, file=file, key=key, expected=f"at most {limit:g}", found=largest)
    return converted


def _read_header(path: Path, size: int) -> tuple[dict[str, Any], int]:
    """Return the header's JSON object and the offset at which the data starts."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", file=path) from error
    with file:
        first = file.read(8)
        if first.startswith(b"version "):
            what = "a Git LFS pointer, not the file itself: fetch it with `git lfs pull`"
            raise InputError(what, file=path)
        if len(first) < 8:
            raise InputError("not a safetensors file: shorter than its 8-byte length", file=path)
        length = int.from_bytes(first, "little")
        if length > min(size - 8, MAX_HEADER_BYTES) or length < 2:
            raise InputError(
                "not a safetensors file, or truncated: header length does not fit",
                file=path,
                expected=f"2 to {min(size - 8, MAX_HEADER_BYTES)} bytes",
                found=length,
            )
        text = file.read(length)
    if not text.startswith(b"{"):
        raise InputError("not a safetensors file: header is not a JSON object", file=path)
    return parse_object(text, path), 8 + length


def _entry(name: str, value: object, path: Path) -> TensorEntry:
    """Check one entry of the header by itself; offsets stay relative to the data."""
    refuse = functools.partial(_entry_error, name, path)
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise refuse("header entry is malformed", "dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise refuse("unknown dtype", "one of " + ", ".join(ITEM_BYTES), str(dtype)[:40])
    if not _sizes(shape) or len(shape) > MAX_AXES:
        raise refuse("shape is malformed", f"up to {MAX_AXES} sizes", str(shape)[:80])
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise refuse("data_offsets are malformed", "[start, stop]", str(offsets)[:80])
    size = ITEM_BYTES[dtype]
    for axis in shape:
        size *= axis
    if size != offsets[1] - offsets[0]:
        what = f"{dtype} {shape} does not fill its data_offsets"
        raise refuse(what, f"{size} bytes", offsets[1] - offsets[0])
    return TensorEntry(dtype, tuple(shape), offsets[0], offsets[1])


def _entry_error(
    name: str, path: Path, what: str, expected: object, found: object = None
) -> InputError:
    return InputError(what, file=path, key=cut(name), expected=expected, found=found)


def _sizes(value: object) -> bool:
    """Whether `value` is a list of integers in 0 .. 2^48 - 1."""
    return isinstance(value, list) and all(
        isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 1 << 48 for v in value
    )


def _require_whole(entries: Mapping[str, TensorEntry], data_bytes: int, path: Path) -> None:
    """Check that the tensors fill the data, one behind the other, without holes or overlaps."""
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != position:
            what = "tensors overlap" if entry.start < position else "a hole before the tensor"
            raise _entry_error(name, path, what, position, entry.start)
        position = entry.stop
    if position != data_bytes:
        what = "truncated" if position > data_bytes else "bytes behind the last tensor"
        expected = f"{position} bytes of data"
        raise InputError(what, file=path, expected=expected, found=data_bytes)


def _header(
    order: list[str], codes: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
) -> bytes:
    """Return length and header for tensors that follow in `order`."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in order:
        size = ITEM_BYTES[codes[name]] * int(np.prod(shapes[name], dtype=np.int64))
        header[name] = {
            "dtype": codes[name],
            "shape": list(shapes[name]),
            "data_offsets": [position, position + size],
        }
        position += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _code(dtype: np.dtype) -> str:
    return FLOAT_NAMES[np.dtype(dtype).name]


def _bits(array: np.ndarray) -> np.ndarray:
    """Return `array` seen as unsigned integers: NaN-proof to compare, and writable for bfloat16."""
    return array.view(f"<u{array.dtype.itemsize}")
