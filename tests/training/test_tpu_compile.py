"""Compiling without weights: the report, what does not fit, and the TPU compiler on a small UNet.

`make` puts libtpu into a folder of its own (.venv/tpu): in the environment, JAX would look for a
TPU at every start.
"""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from configs import sd15, tiny
from tests.conftest import ROOT
from tests.training import small_step
from tiue_jax.io.errors import InputError
from tiue_jax.models.vae import AutoencoderKL
from tiue_jax.models.variants import Variant
from tiue_jax.training import tpu_compile
from tiue_jax.training.chips import CHIPS, Slice, tpu_slice
from tiue_jax.training.hlo import collectives, totals
from tiue_jax.training.tpu_compile import (
    advice,
    compile_program,
    outline,
    training_program,
)

COMPILER = Path(sys.prefix) / "tpu"
SMALL = Variant(
    small_step.unet(),
    AutoencoderKL(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_groups=4),
    small_step.text_encoder(),
    latent_size=small_step.SIZE,
)


def config(**changes):
    found = tiny.get_config()
    found.train.batch_size = 8
    found.lora.rank = 2
    with found.unlocked():
        for key, value in changes.items():
            found.update_from_flattened_dict({key.replace("__", "."): value})
    return found


@pytest.mark.parametrize("name", ["v99:3x5", "v5e:3x5", "v5e", "v4:2x2"])
def test_a_slice_that_is_none_lists_those_there_are(name: str) -> None:
    with pytest.raises(InputError) as caught:
        tpu_slice(name)
    text = str(caught.value)
    assert text.startswith("[--topology]: no such slice, expected v4:{2x2x1,")
    assert "v5e:{1x1,2x2,2x4,4x4" in text and text.endswith(f"found {name}")


def test_without_the_compiler_it_says_what_to_install() -> None:
    done = run("--topology=v5e:2x4", path=str(ROOT))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(
        "error: [--topology]: the TPU compiler does not start: "
    )
    assert 'pip install "jax[tpu]"' in done.stderr


def test_what_cannot_be_compiled_is_refused() -> None:
    devices = jax.devices()
    with pytest.raises(InputError, match=r"\[train.batch_size\]: batch size 12: expected a pos"):
        training_program(config(train__batch_size=12), SMALL, devices)
    with pytest.raises(InputError, match=r"\[train.batch_size\]: .*8 devices times train.accumul"):
        training_program(config(train__accumulate=2), SMALL, devices)
    with pytest.raises(InputError, match=r"\[mesh\]: mesh data -1 x fsdp 3: expected 8 devices"):
        training_program(config(mesh__fsdp=3), SMALL, devices)


@pytest.mark.parametrize("what", ["train", "sample"])
def test_report_of_a_small_program(what: str, tmp_path: Path) -> None:
    """Everything but the TPU's own compiler: on eight CPU devices."""
    where = Slice("cpu:8", CHIPS["v5e"], jax.devices())
    text = tmp_path / "text.gz"
    report = compile_program(config(mesh__fsdp=4), SMALL, where, what, "O1", text_to=str(text))
    assert totals(collectives(gzip.decompress(text.read_bytes()).decode())) == report.collectives
    assert jax.config.values["jax_optimization_level"] == "UNKNOWN", "as it was"
    told = json.loads(json.dumps(report.to_json()))
    assert (told["chips"], told["batch_size"], told["what"]) == (8, 8, what)
    assert told["effort"] == "O1"
    assert report.peak == (report.arguments + report.outputs - report.aliased + report.temporaries)
    # The VAE's encoder is not needed for sampling, nor passed.
    assert 0.8 < report.arguments / sum(report.parameters.values()) < 1.1
    bounds = report.bounds(CHIPS["v5e"])
    assert bounds["compute"] == report.flops / 197e12
    assert all(bounds[name] > 0 for name in ("compute", "memory"))
    if what == "train":
        assert report.aliased >= 0.9 * report.parameters["state"]  # it is donated
        assert bounds["network"] > 0
        assert {"all-gather", "all-reduce"} <= set(report.collectives)
    else:
        assert not report.collectives and bounds["network"] == 0


def test_the_clip_term_is_part_of_the_program() -> None:
    """ViT-B/32 has 151,277,313 parameters with the scale of its logits, which ours is without."""
    where = Slice("cpu:8", CHIPS["v5e"], jax.devices())
    without = outline(config(), SMALL, where, "train")
    small = SMALL._replace(text_encoder=SMALL.text_encoder.clone(vocab_size=49408))
    found = outline(config(clip__tau=0.35, clip__source_faithful=False), small, where, "train")
    frozen = found.program.arguments[1]
    sizes = [sum(x.size for x in jax.tree.leaves(t)) for t in (frozen.clip, frozen.taesd)]
    assert sizes[0] == 151_277_312 - 512 * (77 - SMALL.text_encoder.max_length)
    assert 2.4e6 < sizes[1] < 2.5e6
    assert {x.dtype for x in jax.tree.leaves(frozen.clip)} == {jnp.dtype("float32")}
    assert found.parameters["teacher"] > without.parameters["teacher"] + 4 * sum(sizes)
    assert found.flops > without.flops + 1e9  # an image of ViT-B/32 alone takes some 4e9


def test_what_does_not_fit_says_what_would_help() -> None:
    where = Slice("v5e:2x4", CHIPS["v5e"], list(range(8)))
    big = sd15.get_config()
    big.mesh.fsdp = 2
    message = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
        "hbm. Used 26.29G of 15.75G hbm. Exceeded hbm capacity by 10.54G."
    )
    assert tpu_compile._refusal(message, big, where, "train") == (
        "v5e:2x4: does not fit: it takes 26.29 GiB of 15.75 GiB a chip; what would help: "
        "--config.mesh.fsdp=8, --config.train.accumulate=2, --config.train.batch_size=32"
    )
    big.train.remat, big.train.teacher_dtype, big.mesh.shard_teacher = "none", "float32", False
    assert advice(big, 8, "train").startswith(
        "--config.train.remat=blocks, --config.mesh.fsdp=8, --config.mesh.shard_teacher=True, "
        "--config.train.teacher_dtype=bfloat16, --config.train.accumulate=2"
    )
    assert "batch_size below 64" in advice(big, 8, "sample")
    big.train.batch_size = 8
    assert "accumulate" not in advice(big, 8, "train")
    unsized = tpu_compile._refusal("RESOURCE_EXHAUSTED: no\n size", big, where, "train")
    assert unsized.startswith("v5e:2x4: does not fit (RESOURCE_EXHAUSTED: no size); what would")
    assert "does not compile: INTERNAL: no" in tpu_compile._refusal(
        "INTERNAL:  no", big, where, "train"
    )


TOO_LARGE = """
import sys
import jax
from tests.training.test_tpu_compile import SMALL
from tiue_jax import compile as command
from tiue_jax.io.errors import RunError, run_command
from tiue_jax.training.chips import CHIPS, Slice

def refuse(*arguments):
    raise RunError("cpu:8: does not fit: as the compiler says")

tiny_chip = CHIPS["v5e"]._replace(memory=1000)
command.tpu_slice = lambda name: Slice(name, tiny_chip, jax.devices())
command.variant = lambda name: SMALL
if "refused" in sys.argv[0]:
    command.compile_program = refuse
run_command(command.main)
"""


@pytest.mark.parametrize("how", ["compiled", "refused"])
def test_the_command_ends_with_1_where_it_does_not_fit_and_keeps_what_is_known(
    how: str, tmp_path: Path
) -> None:
    """Compiled for eight CPU devices, said to have a kilobyte each."""
    script, out = tmp_path / f"{how}.py", tmp_path / "report.json"
    script.write_text(TOO_LARGE)
    done = subprocess.run(
        [
            sys.executable, str(script), f"--config={ROOT}/configs/tiny.py", "--topology=cpu:8",
            "--what=sample", "--config.train.batch_size=8", f"--out={out}",
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    said = done.stderr.splitlines()[-1]
    told = json.loads(out.read_text())
    assert (told["chips"], told["what"], told["config"]["train.batch_size"]) == (8, "sample", 8)
    assert told["flops"] > 0 and told["parameters"]["parameters"] > 0
    if how == "refused":
        assert said == "error: cpu:8: does not fit: as the compiler says"
        assert told["refused"] == said.removeprefix("error: ")
    else:
        assert said == (
            "error: cpu:8: does not fit; what would help: --config.train.batch_size below 8, or "
            "a larger --topology"
        )
        assert told["peak"] > told["memory"] == 1000


def run(*flags: str, path: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("TPU_")}
    env |= {"PYTHONPATH": path, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, "-m", "tiue_jax.compile", f"--config={ROOT}/configs/tiny.py", *flags],
        env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip


SMALL_TPU = """
import json
from tests.training.test_tpu_compile import SMALL, config
from tiue_jax.training.chips import tpu_slice
from tiue_jax.training.tpu_compile import compile_program
import sys
report = compile_program(config(mesh__fsdp=4, train__compute_dtype="bfloat16"), SMALL,
                         tpu_slice("v5e:2x2"), sys.argv[1], "O1")
print(json.dumps(report.to_json()))
"""


@pytest.mark.parametrize("what", ["sample", pytest.param("train", marks=pytest.mark.slow)])
def test_the_tpu_compiler_takes_it(what: str) -> None:
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{COMPILER}", "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", SMALL_TPU, what],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    print(f"compiled in {told['seconds']:.0f} s by {told['compiler']}")
    assert (told["topology"], told["chips"]) == ("v5e:2x2", 4)
    assert 0 < told["arguments"] < told["peak"] < 1e9
    if what == "sample":
        assert not told["collectives"]
        return
    assert told["aliased"] >= 0.9 * told["parameters"]["state"]
    kinds = {"all-gather", "all-reduce", "reduce-scatter", "collective-permute"}
    assert set(told["collectives"]) <= kinds


@pytest.mark.slow
def test_the_command_for_the_embedded_teacher(tmp_path) -> None:
    out = tmp_path / "report.json"
    done = run(
        "--shapes=tiny", "--topology=v5e:2x2", "--config.train.batch_size=16", f"--out={out}",
        path=f"{ROOT}:{COMPILER}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "v5e:2x2: 4 chips, tiny, batch 16; on each chip:" in done.stdout
    assert json.loads(out.read_text())["chips"] == 4


def test_parameters_and_flops_need_no_compiling(tmp_path) -> None:
    out = tmp_path / "report.json"
    done = run(
        "--shapes=tiny", "--topology=v5e:2x2", "--config.train.batch_size=16", "--nocompile",
        f"--out={out}", path=f"{ROOT}:{COMPILER}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [line.split()[0] for line in done.stdout.splitlines()]
    assert lines == ["v5e:2x2:", "state", "teacher", "flops"]
    assert not out.exists()


def test_an_earlier_report_is_not_replaced(tmp_path) -> None:
    out = tmp_path / "report.json"
    out.write_text("earlier")
    done = run("--shapes=tiny", f"--out={out}", path=str(ROOT))
    said = f"error: {out} [--out]: is there already, expected a new file\n"
    assert (done.returncode, done.stderr, out.read_text()) == (2, said, "earlier")
