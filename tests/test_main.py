"""The command line of main: what it refuses, in one line and with exit code 2, and --help."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

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
}  # fmt: skip


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple]:
    folder = tmp_path_factory.mktemp("main")
    prompts = folder / "prompts.txt"
    prompts.write_text("a cat\n")

    def fill(arg: str) -> str:
        return arg.replace("=P", f"={prompts}").replace("=W", f"={folder / 'run'}")

    cases = [[fill(arg) for arg in args] for args, _ in CASES.values()]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps([*cases, ["--help"]]),
        capture_output=True, text=True, cwd=ROOT, timeout=500, check=True,
    )  # fmt: skip
    lines = [tuple(json.loads(line)) for line in done.stdout.splitlines()]
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


def test_main_is_flags_and_wiring_only():
    assert len((Path(ROOT) / "tiue_jax" / "main.py").read_text().splitlines()) < 100


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
