"""The command as a process, with the real step: stopped, killed, and the same in the end."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from tests import xla
from tests.training.tiny_run import ROOT, make_prompts, make_teacher
from tests.training.toy_step import logged
from tiue_jax.training.checkpoint import restore_params

STEPS, WARM_UP = 20, 2  # and after it the student learns in every second step
PATIENCE = 900  # seconds; the suite may run on a machine that has other work


class Command:
    """`python -m tiue_jax.main` on the tiny teacher; compiles once for the whole suite."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "config.py"
        make_teacher(folder / "teacher")
        make_prompts(folder / "prompts.txt")
        self.config.write_text(
            "import os\n"
            "from tests.training.host_hooks import Path, at_step, signal, tell, until\n"
            "from tests.training.tiny_run import make_config\n"
            f"def get_config():\n"
            f"    folder = Path({str(folder)!r})\n"
            "    config = make_config(folder / 'teacher', folder / 'prompts.txt')\n"
            f"    config.train.lora_warmup = {WARM_UP}\n"
            "    config.train.student_every = 2\n"
            "    exec(os.environ['ACCIDENT'])\n"
            "    return config\n"
        )

    def run(self, workdir: str, *flags: str, accident: str = "") -> tuple[int, str]:
        """Exit code and standard error of a run to which something happens: code of host_hooks."""
        env = os.environ | {
            "ACCIDENT": accident,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": xla.FLAGS,
            "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        done = subprocess.run(
            [
                sys.executable, "-m", "tiue_jax.main", f"--config={self.config}",
                f"--workdir={self.folder / workdir}", f"--config.train.iterations={STEPS}", *flags,
            ],
            cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True, timeout=PATIENCE, check=False,
        )  # fmt: skip
        return done.returncode, done.stderr


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Command:
    return Command(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def whole(command: Command) -> Path:
    """A run of twenty steps that nothing disturbed."""
    code, said = command.run("whole")
    assert code == 0, said
    return command.folder / "whole"


def assert_same_run(a: Path, b: Path) -> None:
    assert logged(a) == logged(b)
    for which in ("student", "ema", "lora"):
        jax.tree.map(
            np.testing.assert_array_equal, restore_params(a, which)[1], restore_params(b, which)[1]
        )
    digests = [
        json.loads((w / "checkpoints" / str(STEPS) / "meta" / "metadata").read_text())["digests"]
        for w in (a, b)
    ]
    assert digests[0] == digests[1]  # of every array: the optimisers' too
    assert {name.split("/")[0] for name in digests[0]} == {
        "step", "student", "ema", "lora", "student_opt", "lora_opt",
    }  # fmt: skip
    for image in ("00000000", "00000010", "00000020"):
        np.testing.assert_array_equal(
            *(np.asarray(Image.open(w / "images" / f"{image}.png")) for w in (a, b))
        )
    for part in ("unet", "vae", "text_encoder"):
        files = [next((w / "student" / part).glob("*.safetensors")).read_bytes() for w in (a, b)]
        assert files[0] == files[1]


def test_training_moves_student_and_lora(whole: Path):
    losses = logged(whole)
    assert len(losses) == STEPS
    learns = range(WARM_UP + 2, STEPS + 1, 2)  # after the LoRA, which starts as its teacher
    assert [line["step"] for line in losses if "loss/vsd" in line] == [*learns]
    assert all(line["loss/vsd"] > 0 for line in losses if "loss/vsd" in line)
    images = [np.asarray(Image.open(p)) for p in sorted((whole / "images").iterdir())]
    assert len(images) == 3
    assert np.any(images[0] != images[2])


def test_ten_steps_kill_9_resume_are_twenty_steps_bit_for_bit(command: Command, whole: Path):
    """Nine prompts in batches of four: the epoch's edges lie within batches 3, 5, 7, ..."""
    workdir = command.folder / "killed"
    committed = workdir / "checkpoints" / "10" / "commit_success.txt"
    ten_saved = f"at_step(12, until(Path({str(committed)!r}).exists))"
    code, said = command.run("killed", accident=f"{ten_saved}; at_step(12, tell(signal.SIGKILL))")
    assert code == -signal.SIGKILL, said
    assert not (workdir / "student").exists()
    code, said = command.run("killed")
    assert code == 0, said
    assert "resumed from step 10, to step 20" in said
    assert_same_run(workdir, whole)


def test_sigterm_saves_exits_75_and_resumes_bit_for_bit(command: Command, whole: Path):
    code, said = command.run("told", accident="at_step(3, tell(signal.SIGTERM))")
    assert code == 75, said
    assert said.strip().splitlines()[-1].startswith("error: told to stop; saved step ")
    workdir = command.folder / "told"
    [saved] = [p.name for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()][-1:]
    code, said = command.run("told")
    assert code == 0, said
    assert int(saved) < STEPS
    assert_same_run(workdir, whole)


def test_changed_config_exits_2_with_one_line(command: Command, whole: Path):
    code, said = command.run("whole", "--config.train.student_lr=0.5")
    assert code == 2
    line = said.strip().splitlines()[-1]
    assert line.startswith(f"error: {whole.resolve()} [train.student_lr]: ")
    assert "train.student_lr was 0.0001, is 0.5" in line


def test_nan_exits_1_and_names_step_and_metric(command: Command):
    code, said = command.run("nan", "--config.train.lora_lr=1e38", "--config.log.every=10")
    assert code == 1, said
    line = said.strip().splitlines()[-1]
    assert line.startswith("error: step ")
    assert " is nan" in line or " is inf" in line
    steps = [p.name for p in (command.folder / "nan" / "checkpoints").iterdir()]
    assert not [s for s in steps if s.isdigit()]
