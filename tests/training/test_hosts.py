"""What hosts share, hold each other to, and leave in a checkpoint; runs are in test_hosts_runs."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import jax
import numpy as np
import pytest

from tests.training import reshard
from tests.training.host_hooks import free_port
from tests.training.tiny_run import ROOT, slurm_environment
from tiue_jax.data.pipeline import position
from tiue_jax.io.errors import InputError
from tiue_jax.training import tpu_compile
from tiue_jax.training import workdir as workdirs
from tiue_jax.training.hosts import ALONE, Hosts, code_version, compiler_options, join
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
import os
from jax._src.clusters import cloud_tpu_cluster
from tiue_jax.io.errors import run_command
from tiue_jax.training import hosts

hosts._TOGETHER = WITHIN
if ON_TPU:  # JAX looked for the chips
    cloud_tpu_cluster.running_in_cloud_tpu_vm = True
    os.environ.pop("TPU_SKIP_MDS_QUERY", None)

def main(argv):
    with hosts.join(**ARGUMENTS) as joined:
        with joined.stop_together():
            print(joined.index, joined.count, joined.share("anything", 7))

run_command(main, ["main.py"])
"""


def join_apart(
    *environments: dict[str, str], within: int = 3, on_tpu: bool = False, **arguments: Any
) -> list[tuple[int, str]]:
    """Return exit code and last line of processes that do nothing but join."""
    values = {"ARGUMENTS": arguments, "WITHIN": within, "ON_TPU": on_tpu}
    code = APART
    for name, value in values.items():
        code = code.replace(name, repr(value))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT, env={"JAX_PLATFORMS": "cpu"} | env,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for env in environments or ({},)
    ]  # fmt: skip
    try:
        texts = [process.communicate(timeout=300) for process in processes]
    finally:
        end(processes)
    return [
        (process.returncode, (err if process.returncode else out).splitlines()[-1])
        for process, (out, err) in zip(processes, texts, strict=True)
    ]


def end(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.parametrize("index", [0, 1])
def test_hosts_that_do_not_come_together_say_so(index: int):
    address = f"127.0.0.1:{free_port()}"
    said = join_apart(coordinator=address, num_processes=2, process_id=index)
    assert said == [(1, f"error: the hosts did not come together at {address} within 3 s")]


def test_an_environment_without_a_cluster_is_refused():
    [(code, said)] = join_apart(multihost=True)
    assert code == 2
    assert said.startswith("error: [--multihost]: no cluster was found in the environment, found ")


def test_a_cluster_may_have_one_host():
    """--multihost on a slice of one host, or a batch job of one task."""
    slurm = slurm_environment(0, 1, free_port())
    assert join_apart(slurm, multihost=True, within=60) == [(0, "0 1 [7]")]


TWO = [(0, "0 2 [7, 7]"), (0, "1 2 [7, 7]")]


def test_the_workers_of_a_tpu_find_each_other_by_its_metadata():
    """As on a TPU VM: each asks a server of its own which worker it is, and who the others are."""
    with ExitStack() as stack:
        servers = [
            stack.enter_context(metadata_server(told_by_google(i, workers=2))) for i in range(2)
        ]
        port = str(free_port())
        environments = [{"GCE_METADATA_IP": s, "JAX_COORDINATOR_PORT": port} for s in servers]
        assert join_apart(*environments, multihost=True, on_tpu=True, within=60) == TWO


def test_the_workers_of_a_tpu_in_kubernetes_find_each_other_by_their_environment():
    with metadata_server({}) as knows_nothing:
        shared = {
            "GCE_METADATA_IP": knows_nothing,
            "TPU_WORKER_HOSTNAMES": "127.0.0.1,127.0.0.1",
            "JAX_COORDINATOR_PORT": str(free_port()),
        }
        environments = [shared | {"TPU_WORKER_ID": str(i)} for i in range(2)]
        assert join_apart(*environments, multihost=True, on_tpu=True, within=60) == TWO


def told_by_google(index: int, workers: int) -> dict[str, str]:
    """What the metadata server tells a worker of a TPU slice."""
    return {
        "agent-worker-number": str(index),
        "worker-network-endpoints": ",".join(f"worker:{i}:127.0.0.1" for i in range(workers)),
        "tpu-env": "ACCELERATOR_TYPE: 'v5litepod-8'\n",
    }


@contextmanager
def metadata_server(attributes: dict[str, str]) -> Iterator[str]:
    """A stand-in for Google's metadata server, at the address yielded."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            folder, _, name = self.path.rpartition("/")
            known = folder == "/computeMetadata/v1/instance/attributes" and name in attributes
            known = known and self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write(attributes[name].encode() if known else b"")

        def log_message(self, *what: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


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


def test_the_others_are_shown_a_file_that_is_closed(tmp_path: Path):
    """A bucket that is mounted shows nothing of the lock, which stays open."""
    with claim(tmp_path, Pair()):
        holder = (tmp_path / workdirs._HOLDER_FILE).resolve()
        assert holder.read_text().split()[0] == str(os.getpid())
        opened = {Path(os.readlink(link)) for link in Path("/proc/self/fd").iterdir()
                  if link.exists()}  # fmt: skip
        assert tmp_path.resolve() / workdirs._LOCK_FILE in opened
        assert holder not in opened
        first = holder.read_text()
    with claim(tmp_path, Pair()):
        assert holder.read_text() != first, "of another run of the same process"


def test_hosts_that_would_compile_another_program_are_told(monkeypatch):
    first = compiler_options()
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_some_option=true")
    with pytest.raises(InputError, match=r"\[LIBTPU_INIT_ARGS\]: the hosts differ"):
        Pair(agree_command=first).agree("command", compiler_options())
    assert first["--effort"] == "UNKNOWN"
    with tpu_compile._optimization_level("O1"):
        assert compiler_options()["--effort"] == "O1"


def test_the_lock_of_another_run_is_not_taken_for_the_first_hosts(tmp_path: Path):
    (tmp_path / "lock").write_text("1")
    assert workdirs._sees(tmp_path / "lock", "1", 0.0)
    assert not workdirs._sees(tmp_path / "lock", "2", 0.0)
    assert not workdirs._sees(tmp_path / "none", "2", 0.0)


# --- checkpoints --------------------------------------------------------------------------------


@contextmanager
def two_hosts(*arguments: object) -> Iterator[list[subprocess.Popen[str]]]:
    port = free_port()
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
        end(processes)


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
        kernel = reshard.kernel_of(found.state)
        assert len({str(shard.index) for shard in kernel.addressable_shards}) == len(devices)
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
