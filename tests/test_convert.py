"""`python -m tiue_jax.convert`, as it is run: exit code, line on stderr, what is on the disk."""

from __future__ import annotations

import errno
import json
import os
import resource
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from absl import flags
from safetensors.numpy import load_file, save_file

from tests.conftest import ROOT
from tests.pretrained.folders import MODEL, WEIGHTS, bits, copy_model, edit_json, edit_weights
from tests.pretrained.original import make_sd2, sd2_tensors
from tests.training.made_run import make_workdir
from tiue_jax.pretrained import model_flags
from tiue_jax.pretrained.folder import StudentOptions, load_stable_diffusion
from tiue_jax.pretrained.lora_files import load_lora
from tiue_jax.pretrained.parameters import param_shapes

UNET = WEIGHTS["unet"]
_MODEL_FLAGS = ("revision", "variant", "tokenizer", "prediction_type", "lora")
Edit = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]


class Done(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def convert(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Done]]:
    """Run the command in this process (importing JAX takes longer than converting the model)."""
    known = set(flags.FLAGS)  # those of model_flags among them: a module is imported once
    assert known.issuperset(_MODEL_FLAGS), model_flags

    def run(*args: str) -> Done:
        for name in _MODEL_FLAGS:
            flags.FLAGS[name].unparse()
        monkeypatch.setattr(sys, "argv", ["convert", *args])
        with pytest.raises(SystemExit) as stop:
            runpy.run_module("tiue_jax.convert", run_name="__main__", alter_sys=True)
        for name in set(flags.FLAGS) - known:
            delattr(flags.FLAGS, name)
        printed = capsys.readouterr()
        return Done(int(stop.value.code or 0), printed.out, printed.err)

    yield run
    flags.FLAGS.unparse_flags()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return copy_model(tmp_path / "model")


def _files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_to_flax_and_back_is_bit_for_bit(
    convert: Callable[..., Done], model: Path, tmp_path: Path
) -> None:
    before = _files(model)
    done = convert(f"--input={model}", f"--output={tmp_path / 'flax'}")
    assert (done.code, done.err) == (0, "")
    assert done.out == f"{model} (diffusers) -> {tmp_path / 'flax'} (flax, same dtype)\n"
    stored = load_file(tmp_path / "flax/unet/flax_params.safetensors")
    kernel = load_file(MODEL / UNET)["down_blocks.0.resnets.0.conv1.weight"]
    ours = stored["down_blocks_0/resnets_0/conv1/kernel"]
    assert np.array_equal(ours, kernel.transpose(2, 3, 1, 0))
    done = convert(f"--input={tmp_path / 'flax'}", f"--output={tmp_path / 'back'}")
    assert (done.code, done.err) == (0, "")
    for name in WEIGHTS.values():
        assert (tmp_path / "back" / name).read_bytes() == (MODEL / name).read_bytes()
    assert _files(model) == before


def test_dtype_and_form_are_options(
    convert: Callable[..., Done], model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "half"
    assert (
        convert(f"--input={model}", f"--output={out}", "--to=diffusers", "--dtype=float16")[0] == 0
    )
    tensors = load_file(out / UNET)
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype("float16")}
    assert (out / UNET).stat().st_size < 0.51 * (MODEL / UNET).stat().st_size


def test_help_teaches(convert: Callable[..., Done]) -> None:
    done = convert("--help")
    assert done.code == 0
    assert "python -m tiue_jax.convert --input=MODEL --output=NEW_FOLDER" in done.out
    for flag in ("--input", "--output", "--to", "--dtype", "--which", "--teacher", "--revision"):
        assert flag in done.out


def test_the_lora_of_a_run_is_exported(
    convert: Callable[..., Done], model: Path, tmp_path: Path
) -> None:
    trees, out = make_workdir(tmp_path / "run", model), tmp_path / "lora"
    done = convert(f"--input={tmp_path / 'run'}", f"--output={out}", "--which=lora")
    assert (done.code, done.err) == (0, "")
    names = ["README.md", "pytorch_lora_weights.safetensors", "training.json"]
    assert sorted(f.name for f in out.iterdir()) == names
    assert "after 1 iterations" in (out / "README.md").read_text()
    for flag in ("--revision=x", "--push_to_hub=a/b", "--dtype=float16", "--to=flax",
                 "--teacher=x"):  # fmt: skip
        done = convert(f"--input={tmp_path / 'run'}", f"--output={out}2", "--which=lora", flag)
        said = f"error: [{flag.partition('=')[0]}]: has no use with a workdir and --which=lora"
        assert done.code == 2 and done.err.startswith(said) and done.err.count("\n") == 1
        assert not Path(f"{out}2").exists()
    unet = load_stable_diffusion(MODEL, parts=()).unet
    lora, alpha = load_lora(out / "pytorch_lora_weights.safetensors", param_shapes(unet))
    assert alpha == 3.0
    assert bits(lora) == bits(trees["lora"])
    merged = convert(
        f"--input={MODEL}", f"--output={tmp_path / 'merged'}",
        f"--lora={out / 'pytorch_lora_weights.safetensors'}:0.5",
    )  # fmt: skip
    assert merged.code == 0, merged.err
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    found = load_file(tmp_path / "merged/unet/flax_params.safetensors")
    before = load_file(MODEL / UNET)[layer].T
    pair = trees["lora"]["mid_block"]["attentions_0"]["transformer_blocks_0"]["attn1"]["to_q"]
    update = 0.5 * 3.0 / 2 * np.asarray(pair["a"]) @ np.asarray(pair["b"])
    after = found["mid_block/attentions_0/transformer_blocks_0/attn1/to_q/kernel"]
    assert np.abs(after - before - update).max() < 1e-5


def test_a_single_file_becomes_a_folder(
    convert: Callable[..., Done], model: Path, tmp_path: Path
) -> None:
    folder, file = make_sd2(tmp_path / "sd2"), tmp_path / "one.safetensors"
    save_file({k: np.ascontiguousarray(v) for k, v in sd2_tensors(folder).items()}, file)
    args = (f"--input={file}", f"--output={tmp_path / 'out'}", "--prediction_type=v_prediction")
    done = convert(*args)
    assert done.code == 2 and "a single file holds no tokenizer" in done.err
    done = convert(*args, f"--tokenizer={model}")  # an SD 1.x's
    assert done.code == 2 and "tokenizer [--tokenizer]: the model is an SD 2.x" in done.err
    done = convert(*args, f"--tokenizer={folder}")
    assert (done.code, done.err) == (0, "")
    ours, theirs = (
        load_stable_diffusion(path, param_dtype=None, place=np.asarray)
        for path in (tmp_path / "out", folder)
    )
    assert bits(ours.params) == bits(theirs.params)


def test_the_student_of_a_run_is_exported(
    convert: Callable[..., Done], model: Path, tmp_path: Path
) -> None:
    trees = make_workdir(tmp_path / "run", model)
    done = convert(f"--input={tmp_path / 'run'}", f"--output={tmp_path / 'ema'}")
    assert (done.code, done.err) == (0, "")
    found = load_stable_diffusion(tmp_path / "ema", place=np.asarray)
    assert found.student == StudentOptions(num_steps=2, timestep_spacing="trailing")
    assert bits(found.params["unet"]) == bits(trees["ema"])
    for part in ("vae", "text_encoder"):
        assert (tmp_path / "ema" / WEIGHTS[part]).read_bytes() == (
            MODEL / WEIGHTS[part]
        ).read_bytes()
    told = json.loads((tmp_path / "ema" / "training.json").read_text())
    assert (told["step"], told["config"]["lora.alpha"]) == (1, 3.0)
    card = (tmp_path / "ema" / "README.md").read_text()
    assert "its decoder at 2 timesteps" in card and "trained for 1 iterations" in card
    again = convert(f"--input={tmp_path / 'ema'}", f"--output={tmp_path / 'flax'}")
    assert again.code == 0  # a student comes through another form whole
    again = convert(f"--input={tmp_path / 'flax'}", f"--output={tmp_path / 'back'}")
    assert again.code == 0
    licensed = (f"--input={tmp_path / 'flax'}", f"--output={tmp_path / 'licensed'}")
    assert convert(*licensed, "--license=openrail++").code == 0
    assert 'license: "openrail++"' in (tmp_path / "licensed" / "README.md").read_text()
    assert _files(tmp_path / "back") == _files(tmp_path / "ema")
    moved = model.rename(tmp_path / "moved")
    args = (f"--input={tmp_path / 'run'}", f"--output={tmp_path / 'raw'}", "--which=student")
    done = convert(*args)
    assert done.code == 2
    assert "the teacher of this run is not there; name it with --teacher" in done.err
    assert convert(*args, f"--teacher={moved}").code == 0
    raw = load_stable_diffusion(tmp_path / "raw", parts=("unet",), place=np.asarray)
    assert bits(raw.params["unet"]) == bits(trees["student"])


def test_a_student_is_not_exported_with_another_teacher(
    convert: Callable[..., Done], model: Path, tmp_path: Path
) -> None:
    """One of the same shapes that predicts v, as 2.1 beside 2.1-base."""
    make_workdir(tmp_path / "run", model)
    other = copy_model(tmp_path / "other")
    edit_json(other / "scheduler/scheduler_config.json", prediction_type="v_prediction")
    args = (f"--input={tmp_path / 'run'}", f"--output={tmp_path / 'out'}", f"--teacher={other}")
    done = convert(*args)
    said = f"error: {other} [--teacher]: is not the teacher of this run: another schedule, expected"
    assert done.code == 2 and done.err.startswith(said) and done.err.count("\n") == 1
    assert not (tmp_path / "out").exists()
    file = tmp_path / "run" / "run.json"  # of an older version, next
    file.write_text(json.dumps({"config": json.loads(file.read_text())["config"]}))
    assert convert(*args).code == 0


def _truncate(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


def _tensors(edit: Edit, part: str = "unet") -> Callable[[Path], Any]:
    return lambda model: edit_weights(model, part, edit)


def _nan(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    tensors["mid_block.resnets.0.conv1.bias"][5] = np.nan
    return tensors


BAD_INPUT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no index": (
        lambda m: (m / "model_index.json").unlink(),
        "model: not a Stable Diffusion folder: no model_index.json",
    ),
    "no weights": (lambda m: (m / UNET).unlink(), f"{UNET}: no such file"),
    "no config": (lambda m: (m / "vae/config.json").unlink(), "vae/config.json: no such file"),
    "no tokenizer": (lambda m: (m / "tokenizer/merges.txt").unlink(), "merges.txt: no such file"),
    "no scheduler": (
        lambda m: (m / "scheduler/scheduler_config.json").unlink(),
        "scheduler/scheduler_config.json: no such file",
    ),
    "only a pickle": (
        lambda m: (m / UNET).rename((m / UNET).with_suffix(".bin")),
        "pickle files can run any code when opened and are never read here",
    ),
    "truncated weights": (lambda m: _truncate(m / UNET, 5_000_000), f"{UNET}: truncated"),
    "truncated header": (lambda m: _truncate(m / UNET, 100), "header length does not fit"),
    "empty weights": (lambda m: _truncate(m / UNET, 0), "shorter than its 8-byte length"),
    "truncated config": (lambda m: _truncate(m / "unet/config.json", 99), "config.json: not JSON"),
    "missing key": (
        _tensors(lambda t: {k: v for k, v in t.items() if k != "conv_in.bias"}),
        f"{UNET}: keys do not fit the unet: 1 missing (conv_in.bias)",
    ),
    "misshapen key": (
        _tensors(lambda t: t | {"conv_in.bias": np.ones(31, np.float32)}),
        "1 misshapen (conv_in.bias (expected [32], found [31]))",
    ),
    "unexpected key": (
        _tensors(lambda t: t | {"add_embedding.bias": np.ones(3, np.float32)}),
        "1 unexpected (add_embedding.bias)",
    ),
    "faults in another part": (
        _tensors(lambda t: {k: v for k, v in t.items() if "q_proj" not in k}, "text_encoder"),
        "6 missing (text_model.encoder.layers.0.self_attn.q_proj.bias, ",
    ),
    "NaN": (
        _tensors(_nan),
        f"{UNET} [mid_block.resnets.0.conv1.bias]: 1 of 64 values are not finite, the first at [5]",
    ),
    "weights of integers": (
        _tensors(lambda t: {k: v.astype(np.int32) for k, v in t.items()}),
        "dtype is not supported",
    ),
    "another model": (
        lambda m: edit_json(m / "model_index.json", _class_name="StableDiffusionXLPipeline"),
        "another kind of model",
    ),
    "another network": (
        lambda m: edit_json(m / "unet/config.json", dual_cross_attention=True),
        "[dual_cross_attention]: value is not supported, expected false, found true",
    ),
}


@pytest.mark.parametrize("fault", BAD_INPUT)
def test_bad_input_is_one_line_and_nothing_is_written(
    fault: str, convert: Callable[..., Done], model: Path, tmp_path: Path
) -> None:
    spoil, message = BAD_INPUT[fault]
    spoil(model)
    before = _files(tmp_path)
    done = convert(f"--input={model}", f"--output={tmp_path / 'deep/out'}")
    assert done.code == 2, done
    assert done.err.startswith("error: ") and done.err.count("\n") == 1
    assert message in done.err
    assert str(model) in done.err
    assert done.out == ""
    assert _files(tmp_path) == before
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--output={out}"], "[--input]: is required; see --help"),
        (["--input={model}"], "[--output]: is required; see --help"),
        (["--input={model}", "--output={out}", "--to=onnx"], "[--to]: value should be one of"),
        (
            ["--input={model}", "--output={out}", "--dtype=int8"],
            "[--dtype]: value should be one of",
        ),
        (
            ["--input={model}", "--output={out}", "--dtyp=float16"],
            "Unknown command line flag 'dtyp'",
        ),
        (["--input={model}", "--output={out}", "more"], "[flags]: not a flag"),
        (["--input={model}/nowhere", "--output={out}"], "no such folder"),
        (["--input={model}/model_index.json", "--output={out}"], "a single file"),
        (["--input={model}/unet", "--output={out}"], "no model_index.json"),
        (["--input={model}", "--output={model}"], "output is the input"),
        (["--input={model}", "--output={model}/../model"], "output is the input"),
        (["--input={model}", "--output={model}/out"], "lie within each other"),
        (["--input={model}", "--output={used}"], "used: output folder is in use"),
        (["--input={model}", "--output={used}/file"], "file: is a file"),
        (["--input={used}", "--output={out}"], "used [config]: not a run"),
        (["--input={model}", "--output={used}/file/x"], "used/file: is a file, expected a folder"),
        (
            ["--input={model}", "--output={out}", "--teacher=x"],
            "[--teacher]: has no use with a model, found x",
        ),
        (
            ["--input={model}", "--output={out}", "--which=student"],
            "[--which]: has no use with a model, found student",
        ),
        (
            ["--input={model}", "--output={out}", "--license=mit"],
            "[--license]: has no use with a model that is no student, found mit",
        ),
    ],
)
def test_wrong_flags_and_folders(
    args: list[str], message: str, convert: Callable[..., Done], model: Path, tmp_path: Path
) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used/file").write_text("mine")
    if "not a run" in message:
        (tmp_path / "used/run.json").write_text(json.dumps({"config": 3}))
        message = "used/run.json [config]: does not describe a run"
    before = _files(tmp_path)
    names = {"model": str(model), "out": str(tmp_path / "out"), "used": str(tmp_path / "used")}
    done = convert(*(arg.format(**names) for arg in args))
    assert done.code == 2, done
    assert done.err.startswith("error: ") and done.err.count("\n") == 1
    assert message in done.err
    assert _files(tmp_path) == before
    assert not (tmp_path / "out").exists()


@contextmanager
def _small_files() -> Iterator[None]:
    """No file may grow beyond 2 MB: as a disk that is full midway."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def _no_space_at_the_end() -> Iterator[None]:
    """A disk that says that it is full when what was written is to reach it."""

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", full)
        yield


def _earlier_output(model: Path) -> Path:
    """What an earlier conversion left beside the output to be."""
    return copy_model(model.parent / "earlier")


@pytest.mark.parametrize(
    ("full", "message"),
    [(_small_files, "File too large"), (_no_space_at_the_end, "No space left on device")],
)
def test_a_full_disk_leaves_input_and_earlier_output_whole(
    full: Callable[[], AbstractContextManager[None]],
    message: str,
    convert: Callable[..., Done],
    model: Path,
    tmp_path: Path,
) -> None:
    _earlier_output(model)
    before = _files(tmp_path)
    with full():
        done = convert(f"--input={model}", f"--output={tmp_path / 'deep/out'}")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("error: ") and done.err.count("\n") == 1
    assert message in done.err
    assert _files(tmp_path) == before
    assert not (tmp_path / "deep").exists()
    assert convert(f"--input={model}", f"--output={tmp_path / 'deep/out'}").code == 0


KILLED_MIDWAY = """
import runpy, sys, time
from tiue_jax.pretrained import weights
check = weights.require_finite

def slow(array, file, key):
    check(array, file, key)
    if ".tmp" in str(file) and key.startswith("mid_block"):
        print("midway", flush=True)
        time.sleep(600)

weights.require_finite = slow
runpy.run_module("tiue_jax.convert", run_name="__main__", alter_sys=True)
"""


def test_a_killed_conversion_leaves_input_and_earlier_output_whole(
    convert: Callable[..., Done], model: Path, tmp_path: Path
) -> None:
    earlier, out = _earlier_output(model), tmp_path / "out"
    before, beside = _files(model), _files(earlier)
    args = [f"--input={model}", f"--output={out}"]
    with subprocess.Popen(
        [sys.executable, "-c", KILLED_MIDWAY, *args], stdout=subprocess.PIPE, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"midway\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()
    (partial,) = tmp_path.glob(".out.*.tmp")  # hidden, and no model: it has no model_index.json
    assert not (partial / "model_index.json").exists()
    assert (_files(model), _files(earlier)) == (before, beside)
    assert convert(*args).code == 0  # what is left behind is not in the way
    assert convert(f"--input={out}", f"--output={tmp_path / 'back'}").code == 0
    for name in WEIGHTS.values():
        assert (tmp_path / "back" / name).read_bytes() == before[name]
