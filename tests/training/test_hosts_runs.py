"""Two processes with four devices each as one run: alike, killed, told to stop, failing, differing.

Real processes of the real command on the loopback. Only the first test has the real step.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from PIL import Image

from tests import xla
from tests.training import host_hooks
from tests.training.tiny_run import (
    PROMPTS,
    ROOT,
    make_prompts,
    make_teacher,
    slurm_environment,
)
from tests.training.toy_step import logged, steps_of
from tiue_jax.pretrained.folder import load_stable_diffusion
from tiue_jax.training import setup
from tiue_jax.training.checkpoint import restore_params
from tiue_jax.training.loop import train

PATIENCE = 1800  # seconds; the suite may run on a machine that has other work
HOST_TIMEOUT = 10  # seconds without a sign of life, where a death is to be noticed
DEATH_NOTICED = f"--host_timeout={HOST_TIMEOUT}"
TOY = "use_toy_step()"

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


class Ended(NamedTuple):
    """How a host ended: exit code, standard error, and when (monotonic seconds)."""

    code: int
    said: str
    time: float

    @property
    def last(self) -> str:
        return self.said.strip().splitlines()[-1]


class Launcher:
    """Starts hosts on the tiny teacher, and never leaves one behind."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        make_teacher(folder / "teacher")
        make_prompts(folder / "prompts.txt")

    def run(
        self,
        workdir: str,
        hooks: Sequence[str],
        *flags: str,
        roots: Sequence[Path] = (ROOT, ROOT),
        slurm: bool = False,
    ) -> list[Ended]:
        """Run a host for every entry of `hooks`: the lines of code that its config begins with.

        Args:
            roots: the folder each is started in.
            slurm: find the hosts in the environment, instead of by flags.
        """
        port, count, processes, logs = host_hooks.free_port(), len(hooks), [], []
        with contextlib.ExitStack() as stack:
            for i, lines in enumerate(hooks):
                config = self.folder / f"{workdir}_{i}.py"
                config.write_text(
                    f"from tests.training.host_hooks import *\n{lines}\n"
                    f"def get_config():\n    return configure(Path({str(self.folder)!r}))\n"
                )
                found = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}"]
                found += [f"--process_id={i}"]
                if count == 1 or slurm:
                    found = ["--multihost"] if slurm else []
                log = stack.enter_context((self.folder / f"{workdir}_{i}.log").open("w+"))
                process = subprocess.Popen(
                    [
                        sys.executable, "-m", "tiue_jax.main", f"--config={config}",
                        f"--workdir={self.folder / workdir}", "--host_timeout=60",
                        *found, *flags,
                    ],
                    cwd=roots[i], env=environment(i, count, port), stdout=log, stderr=log,
                )  # fmt: skip
                stack.callback(process.wait)
                stack.callback(process.kill)
                processes.append(process)
                logs.append(log)
            times = wait_for(processes)
            for log in logs:
                log.seek(0)
            return [
                Ended(p.returncode, log.read(), t)
                for p, log, t in zip(processes, logs, times, strict=True)
            ]


def environment(i: int, count: int, port: int) -> dict[str, str]:
    return os.environ | slurm_environment(i, count, port) | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{xla.FLAGS} --xla_force_host_platform_device_count={8 // count}",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(ROOT),  # for tests; `-m` puts the folder of the start before it
    }  # fmt: skip


def wait_for(processes: list[subprocess.Popen[bytes]]) -> list[float]:
    """Return when each process ended."""
    started, ended = time.monotonic(), dict.fromkeys(range(len(processes)), 0.0)
    while not all(ended.values()):
        assert time.monotonic() - started < PATIENCE, "a host hangs"
        for i, process in enumerate(processes):
            if not ended[i] and process.poll() is not None:
                ended[i] = time.monotonic()
        time.sleep(0.05)
    return list(ended.values())


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Launcher:
    return Launcher(tmp_path_factory.mktemp("hosts"))


def go_on(launcher: Launcher, workdir: str) -> Path:
    """Continue a run of toy steps, or begin one, in this process, on eight devices."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("init_state", "make_step"):
            patch.setattr(setup, name, getattr(setup, name))  # to be put back
        host_hooks.use_toy_step()
        train(host_hooks.configure(launcher.folder), launcher.folder / workdir)
    return launcher.folder / workdir


@pytest.fixture(scope="module")
def undisturbed(launcher: Launcher) -> Path:
    """A run of toy steps on one host, to the end."""
    return go_on(launcher, "undisturbed")


def assert_same_run(found: Path, wanted: Path) -> None:
    """This process compiles with other options than the hosts: worst seen 2e-7, one rounding."""
    assert [line["step"] for line in logged(found)] == [line["step"] for line in logged(wanted)]
    for a, b in zip(logged(found), logged(wanted), strict=True):
        assert a == pytest.approx(b, rel=2e-6)
    students = [restore_params(workdir)[1] for workdir in (found, wanted)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), *students)


def test_two_hosts_of_four_devices_are_one_of_eight(launcher: Launcher):
    flags = "--config.train.iterations=3", "--config.log.summary_every=3"
    files = [launcher.folder / f"read_{i}.txt" for i in range(2)]
    record = [f"settle(); record_prompts(Path({str(file)!r}))" for file in files]
    for end in launcher.run("two", record, *flags):
        assert end.code == 0, end.said
    [end] = launcher.run("one", ["settle()"], *flags)
    assert end.code == 0, end.said
    one, two = launcher.folder / "one", launcher.folder / "two"

    # Sums over hosts come in another order.
    assert [line["step"] for line in logged(two)] == [1, 2, 3]
    for a, b in zip(logged(one), logged(two), strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_allclose(b[name], a[name], rtol=1e-5, err_msg=name)
    students = [load_stable_diffusion(w / "student").params["unet"] for w in (one, two)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, atol=2e-5), *students)
    for name in ("00000000.png", "00000003.png"):
        images = [np.asarray(Image.open(w / "images" / name), int) for w in (one, two)]
        assert np.abs(images[0] - images[1]).max() <= 1

    # One of them wrote. Each read its half of every batch, every prompt once an epoch.
    assert len(list((two / "tensorboard").iterdir())) == 1
    halves = [np.reshape(f.read_text().splitlines()[:12], (3, 4)) for f in files]
    examples = np.concatenate(halves, axis=1).ravel().tolist()
    assert sorted(examples[:9]) == sorted(PROMPTS)
    assert sorted(examples[9:18]) == sorted(PROMPTS)


def test_a_host_that_is_killed_stops_the_others_and_the_run_resumes(
    launcher: Launcher, undisturbed: Path
):
    slowly = f"{TOY}; at_step(0, sleep(0.5))"
    hooks = [slowly, f"{slowly}; at_step(7, tell(signal.SIGKILL))"]
    survivor, killed = launcher.run("killed", hooks, "--config.checkpoint.every=2", DEATH_NOTICED)
    assert killed.code == -signal.SIGKILL
    assert survivor.code == 1
    assert survivor.last.startswith(f"error: host 1 of 2 gave no sign of life for {HOST_TIMEOUT} s")
    assert "\nF" not in survivor.said, "no dump of JAX's"
    assert survivor.time - killed.time < HOST_TIMEOUT + 30
    assert steps_of(launcher.folder / "killed")  # one at least was committed
    assert_same_run(go_on(launcher, "killed"), undisturbed)


def test_a_disk_that_is_full_ends_the_run_and_is_named(launcher: Launcher):
    committed = launcher.folder / "full" / "checkpoints" / "2" / "commit_success.txt"
    hooks = [f"{TOY}; at_step(3, until(Path({str(committed)!r}).exists)); at_step(3, full_disk)"]
    [end] = launcher.run("full", hooks, "--config.checkpoint.every=2")
    assert end.code == 1, end.said
    assert "Traceback" not in end.said, "of Orbax's and tensorstore's threads"
    lines = end.said.splitlines()  # of these threads too
    [told] = [
        line for line in lines if line.startswith("error: a checkpoint cannot be written to ")
    ]
    assert told.endswith("; newest checkpoint: step 2")
    assert steps_of(launcher.folder / "full") == [2]
    restore_params(launcher.folder / "full")


def test_losing_the_host_that_coordinates_is_told_too(launcher: Launcher):
    hooks = [f"{TOY}; at_step(3, tell(signal.SIGKILL))", TOY]
    killed, survivor = launcher.run("leaderless", hooks, DEATH_NOTICED)
    assert killed.code == -signal.SIGKILL
    assert survivor.code == 1
    assert survivor.last.startswith("error: host 0, which coordinates, is lost; the same command")
    assert survivor.time - killed.time < HOST_TIMEOUT + 30


def test_a_signal_to_one_saves_the_same_step_on_all(launcher: Launcher, undisturbed: Path):
    """SIGTERM between steps; then Ctrl-C of a resumed run before its first step.

    The steps go on while the hosts agree on one, but not to the last.
    """
    slowly = f"{TOY}; at_step(0, sleep(0.3)); at_step(5, until(agreed))"
    hooks = [slowly, f"{slowly}; at_step(2, tell(signal.SIGTERM))"]
    ends = launcher.run("told", hooks)
    [saved] = steps_of(launcher.folder / "told")
    assert 2 <= saved <= 5
    for end in ends:
        assert end.code == 75, end.said
        assert end.last == f"error: told to stop; saved step {saved}, the same command goes on"

    quickly = f"{TOY}; at_step(7, until(agreed))"
    hooks = [f"{quickly}; before_steps(tell(signal.SIGINT))", quickly]
    ends = launcher.run("told", hooks, slurm=True)
    again = steps_of(launcher.folder / "told")[-1]
    assert saved < again < 8
    for end in ends:
        assert end.code == 75, end.said
        assert end.last == f"error: told to stop; saved step {again}, the same command goes on"
    assert_same_run(go_on(launcher, "told"), undisturbed)


def test_an_exception_on_one_stops_all_with_its_traceback_last(launcher: Launcher):
    other, failed = launcher.run("failed", [TOY, f"{TOY}; at_step(3, fail)"])
    assert failed.code == other.code == 1
    assert failed.last == "KeyError: 'a mistake of ours'"
    assert "host_hooks.py" in failed.said and failed.said.count("Traceback") == 1
    assert other.last == "error: host 1 failed: KeyError: 'a mistake of ours'"
    assert "Traceback" not in other.said
    assert abs(failed.time - other.time) < 20


def test_hosts_of_other_config_and_code_are_told_before_step_0(launcher: Launcher):
    copy = launcher.folder / "copy"
    shutil.copytree(ROOT / "tiue_jax", copy / "tiue_jax")
    with (copy / "tiue_jax" / "diffusion" / "losses.py").open("a") as file:
        file.write("# another version\n")
    rate = "import configs.default as d; get = d.get_config\n"
    rate += "import tests.training.host_hooks as h; plain = configure\n"
    rate += "def configure(folder):\n    c = plain(folder)\n    c.kl.weight = 7.0\n    return c\n"
    ends = launcher.run("differing", [TOY, rate], roots=(ROOT, copy))
    for end in ends:
        assert end.code == 2, end.said
        assert end.last.startswith("error: [kl.weight]: the hosts differ: kl.weight is 7.0 on host")
        assert "; source is '" in end.last
    assert not (launcher.folder / "differing").exists()


def test_hosts_of_other_prompts_are_told_before_step_0(launcher: Launcher):
    other = launcher.folder / "elsewhere"
    other.mkdir()
    (other / "tiue_jax").symlink_to(ROOT / "tiue_jax")
    make_prompts(other / "list.txt", PROMPTS[::-1])
    here = launcher.folder / "here"
    here.mkdir()
    (here / "tiue_jax").symlink_to(ROOT / "tiue_jax")
    make_prompts(here / "list.txt")
    ends = launcher.run("misread", [TOY, TOY], "--config.data.source=list.txt", roots=(here, other))
    for end in ends:
        assert end.code == 2, end.said
        assert "[prompts: sha256]: the hosts differ: prompts: sha256 is " in end.last
    assert not (launcher.folder / "misread" / "checkpoints").exists()
