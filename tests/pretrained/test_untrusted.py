"""Files from strangers: one line of error each, in bounded time and memory, and never a traceback.

tests/pretrained/test_weights.py has the malformed headers, test_shards.py the indices.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from tests.pretrained.folders import MODEL, WEIGHTS, copy_model, edit_json
from tests.pretrained.test_weights import BAD_FILES
from tiue_jax.io.errors import InputError, one_line
from tiue_jax.models.clip import CLIPTextEncoder
from tiue_jax.models.unet import UNet
from tiue_jax.models.variants import VARIANTS
from tiue_jax.pretrained import parameters
from tiue_jax.pretrained.folder import load_stable_diffusion
from tiue_jax.pretrained.jsonfile import _extent, parse_object
from tiue_jax.pretrained.names import DIFFUSERS, FLAX, Layout
from tiue_jax.pretrained.parameters import MAX_TENSORS, ParamFile, param_shapes
from tiue_jax.pretrained.shards import Weights
from tiue_jax.pretrained.sizes import Size, network_size
from tiue_jax.pretrained.weights import (
    MAX_HEADER_BYTES,
    TensorEntry,
    WeightFile,
    open_weights,
    write_weights,
)

MAX_SECONDS = 5.0  # of a core that others crowd; an idle one needs less than 2
MAX_GROWTH = 1000  # MB


def _status(field: str) -> int:
    """A field of /proc/self/status in MB."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) // 1024


@contextmanager
def bounded(seconds: float = MAX_SECONDS) -> Iterator[None]:
    """Hold what happens inside to `seconds` of this process and to MAX_GROWTH of memory."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    memory, begin = _status("VmRSS"), time.process_time()
    yield
    assert time.process_time() - begin < seconds
    assert _status("VmHWM") - memory < MAX_GROWTH


def _assert_one_line(error: InputError, *parts: str) -> None:
    text = str(error)
    assert text == one_line(text) and len(text) < 1000
    for part in parts:
        assert part in text


Make = Callable[[Path], Any]


def _spoil(value: float) -> bytes:
    return save({"fine": np.ones(3, np.float32), "a": np.array([1, value], np.float32)})


def _header(text: bytes, data: bytes = b"") -> bytes:
    return len(text).to_bytes(8, "little") + text + data


def _write(content: bytes) -> Make:
    return lambda path: path.write_bytes(content)


MALFORMED: dict[str, tuple[Make, str]] = {
    **{name: (_write(content), "") for name, (content, _) in BAD_FILES.items()},
    "NaN": (_write(_spoil(np.nan)), "[a]: 1 of 2 values are not finite"),
    "Inf": (_write(_spoil(-np.inf)), "[a]: 1 of 2 values are not finite"),
    "folder": (lambda path: path.mkdir(), "found a folder"),
    "pipe": (lambda path: os.mkfifo(path), "found a pipe or device"),
    "circle of links": (lambda path: path.symlink_to(path.name), ""),
    "link to nothing": (lambda path: path.symlink_to("nothing"), "no such file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "found a pipe or device"),
    "header over the limit": (
        _write(_header(b"{" + b" " * MAX_HEADER_BYTES + b"}")),
        f"expected 2 to {MAX_HEADER_BYTES} bytes",
    ),
    "nested behind its limit": (
        _write(_header(b'{"a":' + b"[" * 64 + b"]" * 64 + b"}")),
        "nested too deeply",
    ),
    "nested shape": (
        _write(
            _header(
                b'{"a":{"dtype":"F32","data_offsets":[0,4],"shape":'
                + b"[" * 60
                + b"]" * 60
                + b"}}",
                b"abcd",
            )
        ),
        "[a]: shape is malformed",
    ),
    "name of a million letters": (
        _write(_header(b'{"' + b"x" * 10**6 + b'":3}')),
        "xxx...]: header entry is malformed",
    ),
    "name twice, of a million letters": (
        _write(_header(b'{"' + b"x" * 10**6 + b'":3,"' + b"x" * 10**6 + b'":3}')),
        "xxx...]: the same key twice",
    ),
    "line ends in a name": (
        _write(_header(b'{"a\\nerror: \\u001b[31m":3}')),
        "header entry is malformed",
    ),
    "half a character": (_write(_header(b'{"\\ud800":3}')), "malformed"),
}


@pytest.mark.parametrize("fault", MALFORMED)
def test_malformed_weights_are_one_line_naming_file_and_tensor(fault: str, tmp_path: Path) -> None:
    make, message = MALFORMED[fault]
    file = tmp_path / "w.safetensors"
    make(file)
    with bounded(), pytest.raises(InputError) as error:
        weights = open_weights(file)
        for key in weights.entries:
            weights.read(key)
    text = one_line(str(error.value))
    assert text.startswith(str(file)) and message in text and len(text) < 1000
    if fault in BAD_FILES and r"\[a\]" in BAD_FILES[fault][1]:
        assert error.value.key == "a"
    if fault in ("overlap", "hole", "unknown dtype", "wrong size", "backwards", "overflow"):
        assert error.value.key in ("a", "b")


SHAPES = {
    ("conv_in", "kernel"): (3, 3, 2, 4),
    ("conv_in", "bias"): (4,),
    ("conv_norm_out", "scale"): (5,),
    ("mid_block", "attentions_0", "proj_in", "kernel"): (2, 7),
}


def _mutate(content: bytes, end: int, rng: np.random.Generator) -> bytes:
    """One to three faults in the first `end` bytes: length and header."""
    changed = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        place, kind = int(rng.integers(0, end)), rng.integers(0, 6)
        if kind == 0:
            changed[place] ^= 1 << int(rng.integers(0, 8))
        elif kind == 1:
            changed[place] = int(rng.integers(0, 256))
        elif kind == 2:
            del changed[place : place + int(rng.integers(1, 9))]
        elif kind == 3:
            changed[place:place] = rng.bytes(int(rng.integers(1, 9)))
        elif kind == 4:  # another piece of the header, in which its words come again
            start = int(rng.integers(8, end))
            changed[place:place] = content[start : start + int(rng.integers(1, 60))]
        else:
            digits = [i for i in range(8, end) if chr(changed[i]).isdigit()]
            place = digits[int(rng.integers(0, len(digits)))] if digits else place
            number = str(rng.choice([0, 1, -1, 7, 48, 2**31, 2**48, 2**63, 10**30, 0.5]))
            changed[place : place + 1] = number.encode()
    if rng.integers(0, 2):  # as long as it says, so that the fault is read
        grown = len(changed) - len(content)
        changed[:8] = max(0, end - 8 + grown).to_bytes(8, "little")
    return bytes(changed)


def test_ten_thousand_mutated_headers_are_refused_or_harmless(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    layout = Layout("unet", SHAPES, FLAX)
    tensors = {"/".join(p): rng.standard_normal(s).astype(np.float32) for p, s in SHAPES.items()}
    dtypes = {key: tensor.dtype for key, tensor in tensors.items()}
    file = tmp_path / "w.safetensors"
    write_weights(file, dtypes, {"/".join(p): s for p, s in SHAPES.items()}, tensors.__getitem__)
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    loaded, slowest = 0, 0.0
    with bounded(seconds=120):
        for number in range(10_000):
            file.write_bytes(_mutate(content, end, rng))
            begin = time.process_time()
            try:
                weights = Weights.single(open_weights(file))
                keys = layout.match(weights.shapes, file)
                found = {key: weights.read(key) for key in keys.values()}
            except InputError as error:
                assert str(error).startswith(str(file)), number
            else:
                loaded += 1
                assert found.keys() == tensors.keys()
                for key, tensor in tensors.items():
                    assert found[key].dtype == tensor.dtype, number
                    assert found[key].tobytes() == tensor.tobytes(), number
            slowest = max(slowest, time.process_time() - begin)
    assert slowest < MAX_SECONDS
    assert 10 < loaded < 1000  # most break the JSON; counted 53


HUGE_HEADERS = {
    "objects": b'{"a":[' + b"{}," * (MAX_HEADER_BYTES // 3 - 4) + b"{}]}",
    "lists": b'{"a":[' + b"[]," * (MAX_HEADER_BYTES // 3 - 4) + b"[]]}",
    "numbers": b'{"a":[' + b"1.5," * (MAX_HEADER_BYTES // 4 - 4) + b"1]}",
    "entries": b"{%s}" % b",".join(b'"%06x":{}' % i for i in range(MAX_HEADER_BYTES // 12 - 4)),
    "quotes": b'{"a":"' + b'\\"' * (MAX_HEADER_BYTES // 2 - 8),
    "brackets": b'{"a":' + b"[" * (MAX_HEADER_BYTES - 16),
}


@pytest.mark.parametrize("kind", HUGE_HEADERS)
def test_headers_of_the_largest_size_take_bounded_time_and_memory(
    kind: str, tmp_path: Path
) -> None:
    file = tmp_path / "w.safetensors"
    file.write_bytes(_header(HUGE_HEADERS[kind]))
    with bounded(), pytest.raises(InputError) as error:
        open_weights(file)
    _assert_one_line(error.value, str(file))


@pytest.mark.parametrize(
    ("text", "extent"),
    [
        (b"[[1, 2]]", (2, 3)),
        (b'{"[[[": "\\"[[,"}', (1, 1)),
        (b'["[[[,', (1, 1)),
        (b"]][", (0, 1)),
        (b"", (0, 0)),
    ],
)
def test_what_is_in_strings_is_not_counted(text: bytes, extent: tuple[int, int]) -> None:
    assert _extent(text) == extent


def test_json_of_the_deepest_level_can_be_shown() -> None:
    with pytest.raises(InputError, match="nested too deeply"):
        parse_object(b'{"a":' + b"[" * 64 + b"]" * 64 + b"}", Path("f"))
    assert parse_object(b'{"a":' + b"[" * 63 + b"]" * 63 + b"}", Path("f"))


WIDE = {"block_out_channels": [8192] * 4, "attention_head_dim": 8}
DEEP = {
    "block_out_channels": [8192] * 8,
    "down_block_types": ["CrossAttnDownBlock2D"] * 8,
    "up_block_types": ["CrossAttnUpBlock2D"] * 8,
    "layers_per_block": 16,
    "sample_size": 128,
}
LONG = {**DEEP, "block_out_channels": [32] * 8}
VAE_DEEP = {
    "block_out_channels": [64] * 8,
    "down_block_types": ["DownEncoderBlock2D"] * 8,
    "up_block_types": ["UpDecoderBlock2D"] * 8,
    "layers_per_block": 16,
}
HOSTILE: dict[str, tuple[str, dict[str, Any], str]] = {
    "negative": ("unet", {"block_out_channels": [-32, 32, 64, 64]}, "integers in 1..8192"),
    "zero": ("unet", {"block_out_channels": [0, 32, 64, 64]}, "integers in 1..8192"),
    "huge": ("unet", {"block_out_channels": [10**30] * 4}, "integers in 1..8192"),
    "too huge to show": ("unet", {"block_out_channels": [10**4000] * 4}, "integers in 1..8192"),
    "fraction": ("unet", {"layers_per_block": 1.5}, "[layers_per_block]"),
    "true": ("unet", {"layers_per_block": True}, "[layers_per_block]"),
    "many levels": ("unet", {"block_out_channels": [32] * 10_000}, "1 to 8 integers"),
    "many layers": ("unet", {"layers_per_block": 10**6}, "in 1..16"),
    "infinite": ("unet", {"norm_eps": 1e308 * 10}, "not JSON"),
    "class": ("unet", {"_class_name": "os.system"}, "another kind of network"),
    "unknown": ("unet", {"x" * 10**5: "y" * 10**5}, "unknown setting"),
    "wide": ("unet", WIDE, "far more parameters than there are"),
    "deep": ("unet", DEEP, "far more tensors than there are"),
    "long": ("unet", LONG, "far more tensors than there are"),
    "deep VAE": ("vae", VAE_DEEP, "far more tensors than there are"),
    "wide VAE": ("vae", {"block_out_channels": [8192] * 4}, "far more parameters than"),
    "layers of text": ("text_encoder", {"num_hidden_layers": 64}, "far more tensors than"),
    "wide text": ("text_encoder", {"intermediate_size": 65536}, "far more parameters than"),
    "vocabulary": ("text_encoder", {"vocab_size": 10**12}, "[vocab_size]"),
    "positions": ("text_encoder", {"max_position_embeddings": 10**9}, "[max_position"),
    "steps": ("scheduler", {"num_train_timesteps": 10**9}, "[num_train_timesteps]"),
}


def _config(folder: Path, part: str) -> Path:
    return folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_model(tmp_path_factory.mktemp("untrusted") / "model")


def _refused(model: Path, part: str, content: bytes) -> InputError:
    """Load with `content` as a config; nothing may be traced, and no parameter read."""
    file = _config(model, part)
    before = file.read_bytes()
    file.write_bytes(content)
    parts = ["unet"] if part == "scheduler" else [part]
    try:
        with pytest.MonkeyPatch.context() as patch, bounded():
            traced = lambda module: pytest.fail(f"{module} is traced")  # noqa: E731
            patch.setattr(parameters, "param_shapes", traced)
            with pytest.raises(InputError) as error:
                load_stable_diffusion(model, parts=parts)
    finally:
        file.write_bytes(before)
    return error.value


@pytest.mark.parametrize("fault", HOSTILE)
def test_hostile_configs_are_refused_before_the_network_is_made(fault: str, model: Path) -> None:
    part, changes, message = HOSTILE[fault]
    fields = json.loads(_config(model, part).read_text()) | changes
    text = str(10**4000) if fault == "too huge to show" else ""
    if text:
        fields["block_out_channels"] = ["HERE"]
    content = json.dumps(fields).replace('"HERE"', text).encode()
    _assert_one_line(_refused(model, part, content), str(model / part), message)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "scheduler"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON"),
        (b"[]", "not a JSON object"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b'{"a":' * 10**5 + b"1" + b"}" * 10**5, "nested too deeply"),
        (b'{"x":' + b"[" * 60 + b"]" * 60 + b', "_class_name": "x"}', ""),
        (b'{"a": 1' + b" " * 2**20 + b"}", "too large, expected at most 1048576 bytes"),
        (b'{"a": 1, "a": 2}', "[a]: the same key twice"),
        (b'{"_a": 1e999, "_class_name": "x"}', "1e999 is beyond the range of numbers"),
    ],
)
def test_configs_that_are_none(part: str, content: bytes, message: str, model: Path) -> None:
    if part == "text_encoder" and b"_class_name" in content:
        content = content.replace(b"_class_name", b"model_type")
    _assert_one_line(_refused(model, part, content), str(_config(model, part)), message)


@pytest.mark.parametrize(
    "name", ["model_index.json", "tiue.json", "tokenizer/vocab.json", "tokenizer/merges.txt"]
)
@pytest.mark.parametrize(
    "content", [b"", b"\xff", b'{"a":' * 10**5, b"[]", b'{"<|endoftext|>": 1e999}']
)
def test_the_other_files_of_a_folder(name: str, content: bytes, tmp_path: Path) -> None:
    folder = copy_model(tmp_path / "model")
    (folder / name).write_bytes(content)
    with bounded(), pytest.raises(InputError) as error:
        load_stable_diffusion(folder, parts=[])
    assert one_line(str(error.value)).startswith(str(folder))


def test_no_more_tensors_than_can_be_traced() -> None:
    """Though the weights are as many: what is in the file is as hostile as its config."""
    unet = UNet(
        block_out_channels=(32,) * 8,
        cross_attention=(True,) * 8,
        num_heads=(8,) * 8,
        layers_per_block=16,
    )
    size = network_size(unet)
    assert size is not None and size.tensors > MAX_TENSORS
    entries = {str(i): TensorEntry("F32", (10**6,), 0, 0) for i in range(size.tensors)}
    weights = Weights.single(WeightFile(Path("w"), entries, {}))
    with bounded(), pytest.raises(InputError, match=f"at most {MAX_TENSORS}"):
        ParamFile.fit(weights, unet, "unet", DIFFUSERS)


@pytest.mark.parametrize(
    ("variant", "part", "size"),
    [  # as diffusers and transformers count them: tests/models/test_sizes.py
        ("sd15", "unet", Size(686, 859_520_964)),
        ("sd15", "vae", Size(248, 83_653_863)),
        ("sd15", "text_encoder", Size(196, 123_060_480)),
        ("sd21", "unet", Size(686, 865_910_724)),
        ("sd21", "text_encoder", Size(372, 340_387_840)),
    ],
)
def test_sizes_of_published_networks(variant: str, part: str, size: Size) -> None:
    assert network_size(getattr(VARIANTS[variant], part)) == size


def test_sizes_of_small_networks_are_those_traced() -> None:
    odd = UNet(
        block_out_channels=(32, 64),
        cross_attention=(False, True),
        num_heads=(4, 4),
        layers_per_block=1,
        context_dim=24,
        time_cond_dim=8,
    )
    for module in (odd, VARIANTS["tiny"].vae, CLIPTextEncoder(99, 32, 48, 2, 2, 17)):
        shapes = param_shapes(module).values()
        parameters = sum(int(np.prod(shape)) for shape in shapes)
        assert network_size(module) == Size(len(shapes), parameters)


def test_a_sound_folder_is_none_of_this(model: Path) -> None:
    for part, name in WEIGHTS.items():
        assert (model / name).read_bytes() == (MODEL / name).read_bytes(), part
    edit_json(model / "unet/config.json", anything=None)  # what newer versions add, not set
    load_stable_diffusion(model, parts=["text_encoder"])
