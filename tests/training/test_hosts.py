"""What hosts share, hold each other to, and leave in a checkpoint; runs are in test_hosts_runs."""

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tests.training import reshard
from tests.training.tiny_run import ROOT
from tiue_jax.data.pipeline import position
from tiue_jax.io.errors import InputError
from tiue_jax.training import workdir as workdirs
from tiue_jax.training.hosts import ALONE, Hosts, code_version, join
from tiue_jax.training.workdir import claim

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


class Pair(Hosts):
    """Host 0 of two, of which the second says something else."""

    def __init__(self, **others: Any) -> None:
        super().__init__()
        self.count, self._others_say = 2, others

    def share(self, name: str, value: Any) -> list[Any]:
        return [value, self._others_say.get(name.replace(" ", "_").replace("/", "_"), value)]


# --- flags --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"coordinator": "a:1"}, r"\[--num_processes\]: --coordinator, --num_processes and"),
        ({"process_id": 0, "num_processes": 2}, r"\[--coordinator\]: --coordinator, --num_proc"),
        ({"coordinator": "a:1", "multihost": True}, r"\[--coordinator\]: --multihost finds this"),
        ({"coordinator": "here", "num_processes": 2, "process_id": 0}, "HOST:PORT .* found here"),
        ({"coordinator": "a:99999", "num_processes": 2, "process_id": 0}, r"--coordinator\]: not"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, "expected 0 to 1, found 2"),
        ({"coordinator": "a:1", "num_processes": 0, "process_id": 0}, "expected 1 or more"),
        ({"multihost": True, "timeout": 1.0}, r"\[--host_timeout\]: is too short"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags: dict[str, Any], said: str):
    with pytest.raises(InputError, match=said), join(**flags):
        pass


APART = """
from tiue_jax.io.errors import run_command
from tiue_jax.training import hosts

hosts._TOGETHER = 3

def main(argv):
    with hosts.join(**ARGUMENTS) as joined:
        with joined.stop_together():
            print(joined.index, joined.count, joined.share("anything", 7))

run_command(main, ["main.py"])
"""


def join_apart(env: dict[str, str] | None = None, /, **arguments: Any) -> tuple[int, str]:
    """Return exit code and last line of a process that does nothing but join."""
    done = subprocess.run(
        [sys.executable, "-c", APART.replace("ARGUMENTS", repr(arguments))],
        cwd=ROOT, env={"JAX_PLATFORMS": "cpu"} | (env or {}), capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    return done.returncode, (done.stderr if done.returncode else done.stdout).splitlines()[-1]


@pytest.mark.parametrize("index", [0, 1])
def test_hosts_that_do_not_come_together_say_so(index: int):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    said = join_apart(coordinator=address, num_processes=2, process_id=index)
    assert said == (1, f"error: the hosts did not come together at {address} within 3 s")


def test_an_environment_without_a_cluster_is_refused():
    code, said = join_apart(multihost=True)
    assert code == 2
    assert said.startswith("error: [--multihost]: no cluster was found in the environment, found ")


def test_a_cluster_may_have_one_host():
    """--multihost on a slice of one host, or a batch job of one task."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    slurm = {
        "SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": "1",
        "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "JAX_COORDINATOR_PORT": str(port),
    }  # fmt: skip
    assert join_apart(slurm, multihost=True) == (0, "0 1 [7]")


def test_a_port_that_is_taken_is_refused():
    with socket.create_server(("", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        said = rf"\[--coordinator\]: cannot listen on this port: Address already in use.*{address}"
        with pytest.raises(InputError, match=said):
            with join(coordinator=address, num_processes=2, process_id=0):
                pass


def test_without_flags_a_host_is_alone():
    with join() as hosts:
        assert hosts is ALONE
        assert (hosts.index, hosts.count) == (0, 1)
        assert hosts.share("anything", [1]) == [[1]]
        hosts.agree("anything", {"a": 1})
        hosts.wait("anything")


def test_exceptions_of_a_host_alone_pass():
    with pytest.raises(ZeroDivisionError), join() as hosts, hosts.stop_together():
        _ = 1 / 0


# --- what they hold each other to ---------------------------------------------------------------


def test_differences_are_all_named():
    theirs = {"a": 1, "b": "x", "d": None}
    with pytest.raises(InputError) as caught:
        Pair(agree_test=theirs).agree("test", {"a": 1, "b": "y", "c": 2}, hint="the same")
    assert str(caught.value) == (
        "[b]: the hosts differ: b is 'x' on host 1 and 'y' on host 0; "
        "c is None on host 1 and 2 on host 0, expected the same"
    )
    many = {str(i): i for i in range(9)}
    with pytest.raises(InputError, match="; and 4 more"):
        Pair(agree_test={}).agree("test", many)


def test_code_version_changes_with_any_file(tmp_path: Path, monkeypatch):
    version = code_version()
    assert version["jax"] == jax.__version__
    assert version == code_version()
    (tmp_path / "__init__.py").write_text("")
    monkeypatch.setattr("tiue_jax.__file__", str(tmp_path / "__init__.py"))
    empty = code_version()["source"]
    (tmp_path / "new.py").write_text("")
    assert len({version["source"], empty, code_version()["source"]}) == 3


def test_a_workdir_that_is_not_shared_is_refused(tmp_path: Path):
    expected = "host 1 does not see what host 0 writes here, expected one folder that all hosts"
    with pytest.raises(InputError, match=expected), claim(tmp_path, Pair(workdir_seen=False)):
        pass
    with claim(tmp_path, Pair()):
        pass


def test_the_lock_of_another_run_is_not_taken_for_the_first_hosts(tmp_path: Path):
    (tmp_path / "lock").write_text("1")
    assert workdirs._sees(tmp_path / "lock", "1", 0.0)
    assert not workdirs._sees(tmp_path / "lock", "2", 0.0)
    assert not workdirs._sees(tmp_path / "none", "2", 0.0)


# --- checkpoints --------------------------------------------------------------------------------


@contextmanager
def two_hosts(*arguments: object) -> Iterator[list[subprocess.Popen[str]]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    processes = [
        subprocess.Popen(
            [
                sys.executable, "-m", "tests.training.reshard", f"127.0.0.1:{port}", "2", str(i),
                *map(str, arguments),
            ],
            cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def digests(workdir: Path) -> dict[str, int]:
    meta = workdir / "checkpoints" / str(reshard.STEP) / "meta" / "metadata"
    return json.loads(meta.read_text())["digests"]


def test_checkpoints_are_the_same_on_any_number_of_hosts_and_devices(tmp_path: Path):
    """1 x 8 devices -> 2 x 4 -> 1 x 8, and 1 x 4."""
    one, two = tmp_path / "one", tmp_path / "two"
    batches, wanted = reshard.make_iterator(ALONE), reshard.make_state()
    for _ in range(reshard.STEP):
        next(batches)
    placed = jax.device_put(
        wanted, jax.tree.map(lambda s: s.sharding, reshard.target(jax.devices()))
    )
    reshard.save(one, placed, batches)
    with two_hosts(one, two) as processes:
        for process in processes:
            _, said = process.communicate(timeout=600)
            assert process.returncode == 0, said
    assert digests(one) == digests(two)
    assert json.loads((two / "checkpoints" / str(reshard.STEP) / "meta" / "metadata").read_text())[
        "data"
    ] == {"batch": reshard.STEP, "process_count": 2}
    for devices in (jax.devices(), jax.devices()[:4]):
        found, batches = reshard.restore(two, devices=devices)
        assert found is not None
        assert position(batches) == reshard.STEP
        assert len(found.state.student["split"].addressable_shards) == len(devices)
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(found.state), wanted)


def test_hosts_that_see_other_checkpoints_are_told(tmp_path: Path):
    reshard.save(tmp_path, reshard.make_state(), reshard.make_iterator(ALONE))
    pair = Pair(agree_checkpoints={"checkpoints": []})
    with pytest.raises(InputError, match=r"checkpoints is \[\] on host 1 and \[3\] on host 0, exp"):
        reshard.restore(tmp_path, pair)


def test_a_checkpoint_that_one_host_cannot_read_is_damaged_for_all(tmp_path: Path):
    reshard.save(tmp_path, reshard.make_state(), reshard.make_iterator(ALONE))
    with pytest.raises(InputError, match="none of 1 checkpoints can be read: a bad disk"):
        reshard.restore(tmp_path, Pair(restored_3="a bad disk"))
