from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.conftest import ROOT
from tests.pretrained.folders import MODEL, WEIGHTS
from tiue_jax.io.errors import InputError
from tiue_jax.pretrained.weights import ITEM_BYTES, convert_dtype, open_weights, write_weights


def _tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    drawn = rng.standard_normal((4, 5)).astype(np.float32)
    return {
        "b.weight": drawn,
        "a.half": drawn.astype(np.float16),
        "a.brain": drawn.astype(ml_dtypes.bfloat16),
        "double": drawn.astype(np.float64),
        "scalar": np.array(3, np.float32),
        "nothing": np.zeros((0, 3), np.float32),
    }


def _write(path: Path, tensors: dict[str, np.ndarray]) -> None:
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    write_weights(path, dtypes, shapes, tensors.__getitem__)


def _assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert found.tobytes() == expected.tobytes()


def test_reads_what_safetensors_writes(tmp_path: Path) -> None:
    tensors = _tensors()
    save_file(tensors, tmp_path / "w.safetensors", metadata={"format": "pt"})
    file = open_weights(tmp_path / "w.safetensors")
    assert file.metadata == {"format": "pt"}
    assert file.shapes == {name: tensor.shape for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        _assert_same(file.read(name), tensor)


def test_safetensors_reads_what_we_write(tmp_path: Path) -> None:
    tensors = _tensors()
    _write(tmp_path / "w.safetensors", tensors)
    found = load_file(tmp_path / "w.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        _assert_same(found[name], tensor)


@pytest.mark.parametrize("part", WEIGHTS)
def test_a_file_of_safetensors_comes_out_byte_for_byte(part: str, tmp_path: Path) -> None:
    file = open_weights(MODEL / WEIGHTS[part])
    _write(tmp_path / "w", {name: file.read(name) for name in file.entries})
    assert (tmp_path / "w").read_bytes() == (MODEL / WEIGHTS[part]).read_bytes()


def test_arrays_that_are_not_contiguous_are_written_right(tmp_path: Path) -> None:
    """safetensors 0.8.0's own numpy writer stores these in their memory order: wrong numbers."""
    kernel = np.arange(24, dtype=np.float32).reshape(2, 3, 4).transpose(2, 0, 1)
    assert not kernel.flags.c_contiguous
    _write(tmp_path / "w", {"kernel": kernel, "strided": kernel[::2, :, ::2]})
    found = load_file(tmp_path / "w")
    assert found["kernel"].tolist() == kernel.tolist()
    assert found["strided"].tolist() == kernel[::2, :, ::2].tolist()


def test_what_was_written_is_read_back_and_compared(tmp_path: Path) -> None:
    values = iter([np.zeros(3, np.float32), np.ones(3, np.float32)])
    with pytest.raises(OSError, match="tensor a was not written as it is"):
        write_weights(
            tmp_path / "w", {"a": np.dtype("float32")}, {"a": (3,)}, lambda _: next(values)
        )


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize(("value", "name"), [(np.nan, "NaN"), (-np.inf, "Inf")])
def test_values_that_are_not_finite_are_named(
    dtype: Any, value: float, name: str, tmp_path: Path
) -> None:
    bad = np.ones((3, 4), np.float32)
    bad[1, 2] = bad[2, 0] = value
    save_file({"fine": np.ones(2, np.float32), "bad": bad.astype(dtype)}, tmp_path / "w")
    file = open_weights(tmp_path / "w")
    file.read("fine")
    expected = r"w \[bad\]: 2 of 12 values are not finite, the first at \[1, 2\], found " + name
    with pytest.raises(InputError, match=expected):
        file.read("bad")
    with pytest.raises(InputError, match=r"\[bad\]: 2 of 12 values are not finite"):
        _write(tmp_path / "out", {"bad": bad.astype(dtype)})


def _raw(header: bytes | dict[str, Any], data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def _entry(start: int, stop: int, dtype: str = "F32", shape: Any = (1,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


BAD_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "shorter than its 8-byte length"),
    "short": (b"\x10\0\0", "shorter than its 8-byte length"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
    "header longer than the file": (b"\xff\0\0\0\0\0\0\0{}", "header length does not fit"),
    "header of 2^63 bytes": (b"\xff" * 8 + b"{}", "header length does not fit"),
    "no header": (_raw(b""), "header length does not fit"),
    "not JSON": (_raw(b"{not json}"), "not JSON"),
    "no object": (_raw(b"[1, 2]"), "not a JSON object"),
    "not UTF-8": (_raw(b'{"\xff": 1}'), "not UTF-8"),
    "nested": (_raw(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "nested too deeply"),
    "huge number": (_raw(b'{"a":' + b"9" * 10_000 + b"}"), "not JSON"),
    "key twice": (_raw(b'{"a": 1, "a": 2}'), r"\[a\]: the same key twice"),
    "NaN in the header": (_raw(b'{"a": NaN}'), "NaN is not JSON"),
    "metadata": (_raw({"__metadata__": {"a": 1}}), "__metadata__"),
    "entry": (_raw({"a": 3}), r"\[a\]: header entry is malformed"),
    "unknown dtype": (_raw({"a": _entry(0, 4, "F12")}, b"abcd"), "unknown dtype"),
    "dtype of another kind": (_raw({"a": _entry(0, 4, [])}, b"abcd"), "unknown dtype"),
    "negative size": (_raw({"a": _entry(0, 4, shape=[-1])}, b"abcd"), "shape is malformed"),
    "fraction": (_raw({"a": _entry(0, 4, shape=[1.0])}, b"abcd"), "shape is malformed"),
    "true as a size": (_raw({"a": _entry(0, 4, shape=[True])}, b"abcd"), "shape is malformed"),
    "many axes": (_raw({"a": _entry(0, 4, shape=[1] * 9)}, b"abcd"), "shape is malformed"),
    "overflow": (_raw({"a": _entry(0, 4, shape=[2**40] * 4)}, b"abcd"), "does not fill"),
    "wrong size": (_raw({"a": _entry(0, 4, shape=[2])}, b"abcd"), "does not fill"),
    "backwards": (_raw({"a": _entry(4, 0)}, b"abcd"), "data_offsets are malformed"),
    "overlap": (_raw({"a": _entry(0, 4), "b": _entry(0, 4)}, b"abcd"), "overlap"),
    "hole": (_raw({"a": _entry(4, 8)}, b"abcdefgh"), "a hole before the tensor"),
    "truncated": (_raw({"a": _entry(0, 4), "b": _entry(4, 8)}, b"abcd"), "truncated"),
    "more": (_raw({"a": _entry(0, 4)}, b"abcdefgh"), "bytes behind the last tensor"),
}


@pytest.mark.parametrize("fault", BAD_FILES)
def test_malformed_files_are_refused(fault: str, tmp_path: Path) -> None:
    content, message = BAD_FILES[fault]
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        open_weights(tmp_path / "w.safetensors")
    assert error.value.file == str(tmp_path / "w.safetensors")
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("seed", range(4))
def test_mutated_headers_are_refused_or_harmless(seed: int, tmp_path: Path) -> None:
    """Any bytes for a header: an InputError, or entries that lie within the file."""
    rng = np.random.default_rng(seed)
    whole = (MODEL / WEIGHTS["text_encoder"]).read_bytes()
    file = tmp_path / "w.safetensors"
    end = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(100):
        content = bytearray(whole)
        for place in rng.integers(0, end, rng.integers(1, 4)):
            content[place] = rng.integers(0, 256)
        file.write_bytes(content)
        try:
            found = open_weights(file)
        except InputError:
            continue
        for entry in found.entries.values():
            assert 0 <= entry.start <= entry.stop <= len(content)
            size = int(np.prod(entry.shape)) * ITEM_BYTES[entry.dtype]
            assert size == entry.stop - entry.start


def test_missing_files_folders_pipes_and_pickles_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such file$"):
        open_weights(tmp_path / "w.safetensors")
    with pytest.raises(InputError, match="expected a file, found a folder"):
        open_weights(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="found a pipe or device"):
        open_weights(tmp_path / "pipe")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(InputError, match=r"never read here.*safe_serialization=True"):
        open_weights(tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"no such file; pickle.*found pytorch_model.bin"):
        open_weights(tmp_path / "w.safetensors")


def test_a_weight_of_integers_is_refused(tmp_path: Path) -> None:
    save_file({"position_ids": np.arange(3), "w": np.ones(3, np.float32)}, tmp_path / "w")
    file = open_weights(tmp_path / "w")
    assert file.shapes["position_ids"] == (3,)
    with pytest.raises(InputError, match="dtype is not supported, expected one of F64, F32"):
        file.read("position_ids")


def test_converting_dtypes_rounds_to_even_and_refuses_overflow() -> None:
    file = Path("w")
    array = np.array([1.0, 1 + 2**-9, 1 + 3 * 2**-9], np.float32)
    found = convert_dtype(array, ml_dtypes.bfloat16, file, "a")
    assert found.astype(np.float32).tolist() == [1.0, 1.0, 1 + 2**-7]
    assert convert_dtype(array, np.float32, file, "a") is array
    with pytest.raises(InputError, match=r"too large for float16, expected at most 65504, found"):
        convert_dtype(np.array([1e5], np.float32), np.float16, file, "a")


def test_reading_takes_the_memory_of_one_tensor(tmp_path: Path) -> None:
    """40 tensors of 4 MB, read one after the other: the file never lies in memory whole."""
    tensors = {f"t{i:02}": np.ones((1000, 1000), np.float32) for i in range(40)}
    save_file(tensors, tmp_path / "w")
    script = (
        "import sys; from pathlib import Path;"
        "from tiue_jax.pretrained.weights import open_weights;"
        "status = lambda: Path('/proc/self/status').read_text();"
        "peak = lambda: int(status().split('VmHWM:')[1].split()[0]) // 1024;"
        "Path('/proc/self/clear_refs').write_text('5');"  # the peak is counted from here
        "before = peak(); file = open_weights(Path(sys.argv[1]));"
        "sum(file.read(name).size for name in file.entries);"
        "print(peak() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "w")],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert int(done.stdout) <= 16  # MB; worst seen 5, and 157 with safetensors' reader
