"""The command that writes the distillation prompts."""

import subprocess
import sys

from examples.tiny_sd.prompts import training_prompts


def test_command_writes_a_new_file_only(tmp_path):
    command = [sys.executable, "-m", "examples.tiny_sd.prompts", "--number=3"]
    command.append(f"--out={tmp_path / 'prompts.txt'}")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    written = (tmp_path / "prompts.txt").read_text(encoding="utf-8")
    assert written.splitlines() == training_prompts(3)
    done = subprocess.run([*command, "--number=4"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    said = "prompts.txt [--out]: is there already, expected a new file"
    assert done.stderr == f"error: {tmp_path}/{said}\n"
    assert (tmp_path / "prompts.txt").read_text(encoding="utf-8") == written
