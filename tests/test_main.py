"""The command line of main: what it refuses, in one line and with exit code 2, and --help."""

import json
import subprocess
import sys

import numpy as np
import pytest

from tests.pretrained.folders import WEIGHTS, copy_model, edit_weights
from tests.training.tiny_run import ROOT

# Importing takes seconds, so one process is the parent of all cases; flags are global, so each case
# is a child of its own.
DRIVER = """
import contextlib, io, json, os, sys
from tiue_jax import main
from tiue_jax.io.errors import run_command
for case in json.load(sys.stdin):
    read, write = os.pipe()
    if os.fork() == 0:
        out, err = io.StringIO(), io.StringIO()
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                run_command(main.main, ["main.py", *case])
        except SystemExit as end:
            os.write(write, json.dumps([end.code, out.getvalue(), err.getvalue()]).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        print(answer.read() or '["died", "", ""]', flush=True)
    os.wait()
"""

TINY = "--config=configs/tiny.py"
CASES: dict[str, tuple[list[str], str]] = {
    "nothing": ([], "error: [--config]: is required"),
    "no workdir": ([TINY], "error: [--workdir]: is required"),
    "unknown flag": (
        [TINY, "--workdir=W", "--steps=3"], "error: Unknown command line flag 'steps'",
    ),
    "unknown key": (
        [TINY, "--workdir=W", "--config.train.bogus=1"],
        "error: [--config.train.bogus]: no such config key",
    ),
    "unknown group": (
        [TINY, "--workdir=W", "--config.bogus.x=1"],
        "error: [--config.bogus.x]: no such config key",
    ),
    "wrong type": (
        [TINY, "--workdir=W", "--config.train.batch_size=many"],
        "error: [--config.train.batch_size]: ",
    ),
    "float for int": (
        [TINY, "--workdir=W", "--config.train.batch_size=1.5"],
        "error: [--config.train.batch_size]: ",
    ),
    "not a bool": (
        [TINY, "--workdir=W", "--config.mesh.shard_teacher=maybe"],
        "error: [--config.mesh.shard_teacher]: ",
    ),
    "no such policy": (
        [TINY, "--workdir=W", "--config.train.remat=maybe"],
        "error: [train.remat]: not usable, expected one of none, attention, matmuls, blocks, found",
    ),
    "no such effort": (
        [TINY, "--workdir=W", "--effort=O9"], "error: [--effort]: value should be one of <O0|O1|",
    ),
    "a group": ([TINY, "--workdir=W", "--config.train=3"], "error: [--config.train]: "),
    "no such config": (["--config=configs/none.py", "--workdir=W"], "error: [--config]: "),
    "out of range": (
        [TINY, "--workdir=W", "--config.train.batch_size=0"],
        "error: [train.batch_size]: not usable, expected 1 to inf, found 0",
    ),
    "a bucket": (
        [TINY, "--workdir=gs://bucket/run"],
        "error: gs://bucket/run [--workdir]: is not a folder; a bucket is mounted as one",
    ),
    "argument": ([TINY, "--workdir=W", "now"], "error: arguments are given as --name=value"),
    "no teacher": (
        [TINY, "--workdir=W", "--config.teacher=nowhere", "--config.data.source=P"],
        "error: nowhere",
    ),
    "no prompts": (
        [TINY, "--workdir=W", "--config.data.source=none.txt"],
        "error: none.txt [data.source]: no such file",
    ),
    "a dict for a config": (
        ["--config=F/dict.py", "--workdir=W"],
        "error: F/dict.py [--config]: get_config returns no config, expected an ml_collections.",
    ),
    "workdir below a file": (
        [TINY, "--workdir=F/prompts.txt/run"],
        "error: F/prompts.txt [--workdir]: is a file, expected a folder",
    ),
    "batch that does not divide": (
        [TINY, "--workdir=W", "--config.train.batch_size=6"],
        "error: [train.batch_size]: batch size 6: expected a positive multiple of the 8 devices",
    ),
    "broken JSON": (
        [TINY, "--workdir=W", "--config.data.source=F/broken.jsonl"],
        "error: F/broken.jsonl:2: broken JSON: ",
    ),
    "half a surrogate pair": (
        [TINY, "--workdir=W", "--config.data.source=F/half.jsonl"],
        "error: F/half.jsonl:1 [prompt]: not UTF-8 text",
    ),
    "prompts of other bytes": (
        [TINY, "--workdir=W", "--config.data.source=F/latin.txt"],
        "error: F/latin.txt:2: not UTF-8 text, expected UTF-8, found byte 0xe9 at column 4",
    ),
    "validation prompt of other bytes": (
        [TINY, "--workdir=W", "--config.log.validation_prompts=('\udcff',)"],
        "error: [log.validation_prompts]: not UTF-8 text",
    ),
    "prompt file of other bytes": (
        [TINY, "--workdir=W", "--config.data.source=p\udcff.txt"],
        "error: [data.source]: not UTF-8 text, expected UTF-8, found '\\udcff' at character 2",
    ),
    "no batch size": (
        ["--config=F/none.py", "--workdir=W"],
        "error: [train.batch_size]: not usable, expected a whole number, found None",
    ),
    "a convolution's LoRA": (
        [TINY, "--workdir=W", "--config.lora.targets=('conv1',)"],
        "error: [lora]: LoRA targets ['conv1']: convolutions; choose dense layers",
    ),
    "NaN in the teacher": (
        [TINY, "--workdir=W", "--config.data.source=P", "--config.teacher=F/teacher"],
        f"error: F/teacher/{WEIGHTS['unet']} [conv_in.bias]: 1 of 32 values are not finite",
    ),
}  # fmt: skip


def with_nan(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    bias = tensors["conv_in.bias"].copy()
    bias[3] = np.nan
    return tensors | {"conv_in.bias": bias}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple]:
    folder = tmp_path_factory.mktemp("main")
    prompts = folder / "prompts.txt"
    prompts.write_text("a cat\n")
    (folder / "dict.py").write_text("def get_config():\n    return {'teacher': 'x'}\n")
    (folder / "none.py").write_text(
        "from configs import tiny\ndef get_config():\n    config = tiny.get_config()\n"
        "    config.train.batch_size = None\n    return config\n"
    )
    (folder / "broken.jsonl").write_text('{"prompt": "a cat"}\n{"prompt": \n')
    (folder / "half.jsonl").write_text(r'{"prompt": "a \ud800"}')
    (folder / "latin.txt").write_bytes(b"a cat\ncaf\xe9\n")
    edit_weights(copy_model(folder / "teacher"), "unet", with_nan)

    def fill(arg: str) -> str:
        arg = arg.replace("=P", f"={prompts}").replace("=W", f"={folder / 'run'}")
        return arg.replace("F/", f"{folder}/")

    cases = [[fill(arg) for arg in args] for args, _ in CASES.values()]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps([*cases, ["--help"]]),
        capture_output=True, text=True, cwd=ROOT, timeout=500, check=True,
    )  # fmt: skip
    lines = [
        tuple(json.loads(line.replace(f"{folder}/", "F/"))) for line in done.stdout.splitlines()
    ]
    return dict(zip([*CASES, "help"], lines, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_wrong_input_is_one_line_and_exit_2(case: str, answers: dict[str, tuple]):
    code, out, err = answers[case]
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith(CASES[case][1])


def test_help_teaches(answers: dict[str, tuple]):
    code, out, err = answers["help"]
    assert (code, err) == (0, "")
    for told in ("--config.train.batch_size=16", "--workdir", "resume", "configs/default.py", "75"):
        assert told in out


def test_the_effort_reaches_the_compiler() -> None:
    """Of all programs, so it is set before anything is compiled."""
    code = """
import jax
from tiue_jax import main
from tiue_jax.io.errors import run_command
main.train = lambda *args: print(jax.config.values["jax_optimization_level"])
run_command(main.main, ["main.py", "--config=configs/tiny.py", "--workdir=W", "--effort=O1"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "O1\n"
