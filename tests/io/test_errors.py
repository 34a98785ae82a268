"""The error contract, seen from outside: exit codes and the one line on standard error."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tiue_jax.io.errors import InputError, one_line

COMMAND = '''"""Draw a thing.

Usage: command.py --what=circle
"""

import sys
from absl import flags
from ml_collections import config_flags
from tiue_jax.io.errors import InputError, Preempted, RunError, run_command

CONFIG = config_flags.DEFINE_config_file("config", None, "The config file.")
WHAT = flags.DEFINE_string("what", "", "What to draw.")

def main(argv):
    print("running", *argv[1:], CONFIG.value.steps if CONFIG.present else "")
    {body}

if __name__ == "__main__":
    run_command(main)
'''

CONFIG = """from ml_collections import ConfigDict

def get_config():
    return ConfigDict({"steps": 1, "train": {"rate": 0.5}})
"""


@pytest.fixture
def run(tmp_path: Path):
    """Return a function that runs a command with the given body of `main` in `tmp_path`."""
    (tmp_path / "config.py").write_text(CONFIG)

    def run(body: str, *args: str) -> subprocess.CompletedProcess[str]:
        script = tmp_path / "command.py"
        script.write_text(COMMAND.replace("{body}", body))
        return subprocess.run(
            [sys.executable, str(script), *args],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            check=False,
        )

    return run


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, "is wrong"),
        ({"file": "a/b.json"}, "a/b.json: is wrong"),
        ({"file": Path("a"), "line": 3}, "a:3: is wrong"),
        ({"file": "a", "line": 3, "key": "k"}, "a:3 [k]: is wrong"),
        ({"key": "k"}, "[k]: is wrong"),
        ({"file": "a", "expected": "an int", "found": 0}, "a: is wrong, expected an int, found 0"),
        ({"found": "''"}, "is wrong, found ''"),
    ],
)
def test_input_error_names_the_parts_that_are_known(fields: dict, text: str) -> None:
    error = InputError("is wrong", **fields)
    assert str(error) == text
    assert error.what == "is wrong"


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (
            "raise InputError('no field', file='p.jsonl', line=2, key='prompt', found='x')",
            2,
            "error: p.jsonl:2 [prompt]: no field, found 'x'".replace("'x'", "x"),
        ),
        ("raise RunError('loss/vsd is nan at step 3')", 1, "error: loss/vsd is nan at step 3"),
        ("raise FloatingPointError('nan in exp')", 1, "error: nan in exp"),
        ("raise Preempted()", 75, "error: stopped; run the same command again to go on"),
        ("raise KeyboardInterrupt", 130, "error: interrupted"),
        ("open('/nowhere/x')", 1, "error: /nowhere/x: No such file or directory"),
        ("raise OSError(28, 'No space left on device')", 1, "error: No space left on device"),
        (r"raise InputError('a\n b\r\n\n  c')", 2, "error: a b c"),
        (r"raise InputError('bell \x07 \x1b[31m')", 2, r"error: bell \x07 \x1b[31m"),
    ],
)
def test_a_failure_is_one_line_and_an_exit_code(run, raised: str, code: int, line: str) -> None:
    done = run(raised)
    assert (done.returncode, done.stderr) == (code, line + "\n")
    assert done.stdout.startswith("running")


@pytest.mark.parametrize(("body", "code"), [("pass", 0), ("return 0", 0), ("return 3", 3)])
def test_main_chooses_the_exit_code_of_a_run_that_ends(run, body: str, code: int) -> None:
    done = run(body, "--what=x", "rest")
    assert (done.returncode, done.stderr, done.stdout) == (code, "", "running rest \n")


def test_our_own_mistakes_keep_their_traceback(run) -> None:
    done = run("assert 1 == 2, 'numbers'")
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "numbers" in done.stderr


def test_a_device_without_memory_is_a_line_that_says_what_helps(run) -> None:
    done = run("import jax, jax.numpy as jnp; jax.jit(lambda: jnp.ones(2**44))()")
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: a device has too little memory: Out of memory allocating")
    train = ("train.accumulate", "train.remat", "train.batch_size", "mesh.fsdp")
    for option in ("--batch_size", *train):
        assert option in done.stderr


def test_other_errors_of_a_device_keep_their_traceback(run) -> None:
    done = run("import jax; raise jax.errors.JaxRuntimeError('INTERNAL: no program')")
    assert "Traceback" in done.stderr and "INTERNAL: no program" in done.stderr


def test_what_callbacks_raise_is_told_once_in_a_line(run) -> None:
    """As tensorstore's threads do after a failed write: `__del__` can raise to nobody either."""
    body = (
        "Lost = type('Lost', (), {'__del__': lambda self: 1 / 0}); [Lost() for _ in range(9)]; "
        "raise RunError('full')"
    )
    done = run(body)
    told, last = done.stderr.splitlines()
    assert told.endswith("ignored in a callback: ZeroDivisionError: division by zero")
    assert (done.returncode, last) == (1, "error: full")


def test_help_teaches_and_succeeds(run) -> None:
    done = run("pass", "--help")
    assert done.returncode == 0
    assert done.stderr == ""
    assert "Usage: command.py --what=circle" in done.stdout
    assert "What to draw." in done.stdout
    assert "running" not in done.stdout


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (
            ["--waht=1"],
            "Unknown command line flag 'waht'. Did you mean: what; --help lists the flags",
        ),
        (["--config=no.py"], "[--config]: No such file or directory: 'no.py'"),
        (["--config=no.py", "--config.steps=2"], "[--config]: No such file or directory: 'no.py'"),
        (["--config=config.py", "--config.bad=2"], "[--config.bad]: no such config key"),
        (
            ["--config=config.py", "--config.train.bad=2"],
            "[--config.train.bad]: no such config key",
        ),
        (
            ["--config=config.py", "--config.steps=two"],
            "[--config.steps]: invalid literal for int() with base 10: 'two', found 'two'",
        ),
    ],
)
def test_flags_and_configs_at_fault_are_named(run, args: list[str], line: str) -> None:
    done = run("pass", *args)
    assert (done.returncode, done.stderr) == (2, f"error: {line}\n")
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("def get_config(:", "broken.py:1: SyntaxError: invalid syntax"),
        (
            "def get_config():\n    return lost",
            "broken.py:2: NameError: name 'lost' is not defined",
        ),
        ("def get_config():\n    raise ValueError('no')", "[--config]: ValueError: no"),
        (
            "def get_config():\n    return {'steps': 1}",
            "broken.py [--config]: get_config returns no config, expected an "
            "ml_collections.ConfigDict, found dict",
        ),
    ],
)
def test_a_broken_config_file_is_named_with_its_line(
    run, tmp_path: Path, text: str, line: str
) -> None:
    (tmp_path / "broken.py").write_text(text)
    done = run("pass", "--config=broken.py")
    assert (done.returncode, done.stderr) == (2, f"error: {line}\n")


def test_a_file_name_that_is_not_text_can_be_printed(run) -> None:
    done = run(r"print('wrote \udcff')")
    assert (done.returncode, done.stdout, done.stderr) == (0, "running \nwrote \\udcff\n", "")


def test_a_reader_that_has_gone_is_told_of_in_one_line(tmp_path: Path) -> None:
    """As of `| head -1`."""
    script = tmp_path / "command.py"
    script.write_text(COMMAND.replace("{body}", "for i in range(10**6): print(i)"))
    read, write = os.pipe()
    with subprocess.Popen(
        [sys.executable, str(script)],
        stdout=write, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""},
    ) as process:  # fmt: skip
        os.close(write)
        os.read(read, 1)
        os.close(read)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (1, "error: Broken pipe\n")


def test_config_overrides_reach_the_config(run) -> None:
    done = run("pass", "--config=config.py", "--config.steps=7")
    assert (done.returncode, done.stdout, done.stderr) == (0, "running 7\n", "")


def test_one_line_keeps_printable_text_of_any_script() -> None:
    assert one_line("  Zeichen: äß 日本\n\n\tx ") == "Zeichen: äß 日本 x"
