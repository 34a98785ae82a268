"""Training on the workers: started, followed, resumed; what arrives there, and what may not."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.launch.fake_gcloud import end_run
from tests.launch.pod import PATIENCE, TOKEN, Pod, wait_for

HOSTILE = [
    "--config.a=two  words",
    "--config.b='single' \"double\" \\back",
    "--config.c=$(touch pwned)`touch pwned`$HOME",
    "--config.d=line one\nline two\n",
    "--config.e=a;touch pwned;b & c | d > e",
    "--config.f=* ? [a] {b,c} ~ # ! é",
    "-",
]


def test_from_nothing_to_done(pod: Pod) -> None:
    """Hostile strings arrive on every worker as they are, from the file and from the command."""
    pod.world(workers=2)
    in_file = [arg for arg in HOSTILE if "\n" not in arg and arg != "-"]
    more = [f"ARG={arg}" for arg in in_file]
    pod.write(*more, WORKDIR='gs://bucket/a run; $(touch pwned)\'s "x"')
    data = "--config.data.source=gs://bucket/in put.txt"
    done = pod.run("train_pod", "--", *HOSTILE, data)
    assert pod.actions() == [
        "create", "ready", "scp", "scp", "setup", "state", "start", "follow", "settle",
    ]  # fmt: skip
    assert [run["machine"] for run in sorted(pod.training(), key=lambda run: run["machine"])] == [
        "vm1/0", "vm1/1",
    ]  # fmt: skip
    for run in pod.training():
        mount = pod.fake / run["machine"] / "gcs" / "bucket"
        assert run["argv"] == [
            "-m",
            "tiue_jax.main",
            "--config=configs/tiny.py",
            f'--workdir={mount}/a run; $(touch pwned)\'s "x"',
            "--multihost",
            *in_file,
            *HOSTILE,
            f"--config.data.source={mount}/in put.txt",
        ]
        assert run["code"] == ["configs", "launch", "requirements.txt", "tiue_jax"]
        assert run["cache"] is None, "tiue_jax keeps what it compiled in the workdir"
    assert not list(pod.folder.rglob("pwned"))
    assert "attempt 0: step 1/2\n" in done.stdout and done.stdout.count("step 1/2") == 1
    assert done.stderr.splitlines()[-1] == "launch: tiue-test: done"


def test_a_preempted_worker_leads_to_a_restart(pod: Pod) -> None:
    """Twice: while it is followed, and before it is even started."""
    pod.plan("hang", 0)
    pod.world(workers=2, ssh={"follow": ["preempt"], "start": [None, "preempt"]})
    done = pod.run("train_pod", "--", "--config.seed=1")
    begin = ["create", "ready", "scp", "scp", "setup", "state", "start"]
    again = ["delete", *begin]
    assert pod.actions() == [*begin, "follow", *again, *again, "follow", "settle"]
    machines = sorted(run["machine"] for run in pod.training())
    assert machines == ["vm1/0", "vm1/1", "vm3/0", "vm3/1"]
    commands = {tuple(run["argv"][4:]) for run in pod.training()}
    assert commands == {("--multihost", "--config.seed=1")}, "the same command"
    assert "the TPU is gone (SUSPENDED); restart 2 of at most 100" in done.stderr


def test_a_failure_that_was_a_preemption_is_a_restart(pod: Pod) -> None:
    """The other workers fail with 1 when one is gone, before the state says so."""
    pod.plan(1, 0)
    pod.write(GRACE_SECONDS=PATIENCE)
    with pod.started("train_pod") as run:
        wait_for(lambda: pod.actions()[-1:] == ["settle"])
        calls = len(pod.calls())
        wait_for(lambda: len(pod.calls()) > calls + 2)  # it asks for the state, and it is READY
        (pod.fake / "preempt").touch()
        _, errors = run.communicate(timeout=PATIENCE)
    assert run.returncode == 0, errors
    assert "the TPU is gone" in errors and pod.actions().count("create") == 2


def test_a_saved_run_goes_on_where_the_tpu_stayed(pod: Pod) -> None:
    pod.world(workers=2)
    pod.plan(75, [75, 134], ["die", 1], 0)  # cut off while it saves; killed, and missed
    done = pod.run("train_pod")
    assert pod.actions().count("create") == pod.actions().count("setup") == 1
    assert len(pod.training()) == 8
    assert done.stderr.count("told to stop, and saved; restart") == 2
    assert done.stderr.count("the training was killed; restart 3 of") == 1
    assert re.findall("attempt . *: step", done.stdout) == [f"attempt {i}: step" for i in range(4)]


@pytest.mark.parametrize(("codes", "code"), [([1, 2], 2), ([1, 1], 1)])
def test_bad_input_and_failures_are_passed_on_and_not_repeated(
    pod: Pod, codes: int | list[int], code: int
) -> None:
    pod.world(workers=2)
    pod.plan(codes)
    done = pod.run("train_pod", code=code)
    assert pod.actions().count("start") == 1 and len(pod.training()) == 2
    assert done.stderr.splitlines()[-1].startswith("error: tiue-test: ")


def test_a_run_that_is_killed_is_tried_again_some_times(pod: Pod) -> None:
    pod.plan(*["die"] * 9)
    done = pod.run("train_pod", code=1)
    assert len(pod.training()) == 4
    assert done.stderr.splitlines()[-1] == "error: tiue-test: killed 4 times soon after its start"


def test_restarts_have_a_limit(pod: Pod) -> None:
    pod.write("MAX_RESTARTS=2")
    pod.plan(*[75] * 9)
    done = pod.run("train_pod", code=75)
    assert len(pod.training()) == 3
    assert "error: [MAX_RESTARTS]: given up after 2 restarts; the same command" in done.stderr


@pytest.mark.parametrize("code", [0, 1])
def test_a_lost_connection_is_no_end(pod: Pod, code: int) -> None:
    """What runs is joined, what ended meanwhile is judged, and a start sent twice is one start."""
    pod.world(workers=2, ssh={"follow": ["drop", "drop"], "start": ["again"]})
    pod.plan(code)
    done = pod.run("train_pod", code=code)
    lost = ["follow", "ready", "state"]
    assert pod.actions()[-9:] == ["start", *lost, *lost, "follow", "settle"]
    assert len(pod.training()) == 2
    assert done.stderr.count("connection lost, the training goes on") == 2
    assert done.stdout.count("step 1/2") == 1


@pytest.fixture
def impatient(pod: Pod) -> Pod:
    """A pod whose train_pod.sh gives up after two connections lost in a row."""
    train = pod.repository / "launch" / "train_pod.sh"
    train.write_text(train.read_text().replace("MAX_RECONNECTS=20", "MAX_RECONNECTS=2"))
    return pod


def test_connections_that_are_lost_one_by_one_have_no_limit(impatient: Pod) -> None:
    impatient.world(ssh={"follow": ["drop"] * 4})
    done = impatient.run("train_pod")
    assert done.stderr.count("connection lost, the training goes on") == 4


def test_connections_that_are_lost_in_a_row_have_a_limit(impatient: Pod) -> None:
    impatient.plan("wait")
    impatient.world(ssh={"follow": ["drop"], "ready": [None, *["drop"] * 4]})
    done = impatient.run("train_pod", code=255)
    assert done.stderr.count("connection lost, the training goes on") == 2
    assert done.stderr.splitlines()[-1] == "error: tiue-test: no connection to the workers"


def test_a_second_stop_does_not_end_the_save(pod: Pod) -> None:
    """gcloud repeats an ssh that broke; to the training a second signal means not to save."""
    pod.plan("save", 0)
    pod.tool("sleep", 'echo "$1 $PPID" >>"$HOME/waiting"; exec /usr/bin/sleep "$@"')
    with pod.started("train_pod") as run:
        wait_for(lambda: len(pod.training()) == 1 and pod.actions()[-1] == "follow")
        with pod.started("train_pod", "--stop") as first:
            wait_for(lambda: "saves" in (pod.worker() / "log").read_text())
            with pod.started("train_pod", "--stop") as second:
                wait_for(lambda: stops_waiting(pod) == 2 or (pod.worker() / "code").exists())
                (pod.fake / "may_end").touch()
                for stop in (first, second):  # both until the end
                    assert stop.communicate(timeout=PATIENCE)[0] == "tiue-worker stopped\n"
        _, errors = run.communicate(timeout=PATIENCE)
    assert (pod.worker() / "code").read_text() == "75\n", "it has saved"
    assert run.returncode == 75 and "stopped; the same command goes on" in errors
    assert len(pod.training()) == 1, "and is not started again"


def stops_waiting(pod: Pod) -> int:
    """How many have looked for a run, have signalled or not, and wait for its end."""
    waiting = pod.worker().parent / "waiting"
    lines = set(waiting.read_text().splitlines()) if waiting.exists() else set()
    return sum(line.startswith("0.2 ") for line in lines)  # others than `await` sleep otherwise


def test_a_stop_before_the_first_step_is_no_crash(pod: Pod) -> None:
    pod.plan("begin", 0)
    with pod.started("train_pod") as run:
        wait_for(lambda: len(pod.training()) == 1 and pod.actions()[-1] == "follow")
        wait_for(lambda: "step 1/2" in (pod.worker() / "log").read_text())
        assert pod.run("train_pod", "--stop", str(pod.settings)).stdout == "tiue-worker stopped\n"
        _, errors = run.communicate(timeout=PATIENCE)
    assert (pod.worker() / "code").read_text() == "143\n"
    assert run.returncode == 75 and "the same command goes on" in errors
    assert len(pod.training()) == 1, "and is not started again"


def test_ctrl_c_leaves_the_training_and_stop_ends_it(pod: Pod) -> None:
    pod.plan("wait", 0)
    with pod.started("train_pod", start_new_session=True) as run:
        wait_for(lambda: len(pod.training()) == 1 and pod.actions()[-1] == "follow")
        subprocess.run(["kill", "-INT", "--", f"-{run.pid}"], check=True, timeout=PATIENCE)
        _, errors = run.communicate(timeout=PATIENCE)
    assert run.returncode == 130 and "the training goes on" in errors
    assert "running" in pod.run("status").stdout
    refused = pod.run("setup_tpu", code=2)
    assert "a training runs here, expected none" in refused.stderr

    with pod.started("train_pod") as run:
        wait_for(lambda: pod.actions().count("follow") == 2)
        stopped = pod.run("train_pod", "--stop", str(pod.settings))
        _, errors = run.communicate(timeout=PATIENCE)
    assert stopped.stdout == "tiue-worker stopped\n"
    assert run.returncode == 75 and "stopped; the same command goes on" in errors
    assert len(pod.training()) == 1, "joined, not started"
    pod.run("train_pod")
    assert len(pod.training()) == 2, "and the same command goes on"


def test_workers_that_lost_their_peers_are_ended(pod: Pod) -> None:
    """Worker 1 hangs after worker 0 was told to stop: nothing may hold the chips for long."""
    train = pod.repository / "launch" / "train_pod.sh"
    train.write_text(train.read_text().replace("SETTLE_SECONDS=180", "SETTLE_SECONDS=0"))
    pod.world(workers=2)
    pod.plan([75, "hang"], 0)
    pod.run("train_pod")
    assert len(pod.training()) == 4


def test_a_restarted_machine_is_set_up_and_started_again(pod: Pod) -> None:
    """Its files are there; its mounts and processes are not, and a stranger has the number."""
    pod.run("train_pod")
    here = pod.worker()
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with subprocess.Popen(["sleep", "600"], start_new_session=True) as stranger:
        try:
            (here / "code").unlink()
            (here / "pid").write_text(f"{stranger.pid} another-boot\n")
            assert "training on worker 0: lost" in pod.run("status").stdout
            (here / "pid").write_text(f"{stranger.pid} {boot}\n")  # even then it is not signalled
            stop = ["bash", str(here / "on_worker.sh"), "stop", "0"]
            env = {"HOME": str(here.parent), "PATH": "/usr/bin:/bin"}
            subprocess.run(stop, env=env, check=False, capture_output=True, timeout=PATIENCE)
            assert stranger.poll() is None, "a stranger was signalled"
        finally:
            stranger.kill()
    (here / "pid").write_text(f"{stranger.pid} another-boot\n")
    (here.parent / "gcs" / "bucket").unlink()
    pod.run("train_pod")
    assert pod.actions().count("setup") == 2 and len(pod.training()) == 2


@pytest.mark.parametrize("number", ["0", "1", "-1", "", "x", "PID", "GROUP"])
def test_the_stand_ins_signal_no_stranger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: str
) -> None:
    """killpg(1) would kill every process of the machine that runs the tests."""
    called: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "killpg", lambda *args: called.append(args))
    number = {"PID": str(os.getpid()), "GROUP": str(os.getpgrp())}.get(number, number)
    (tmp_path / "pid").write_text(f"{number} boot\n")
    end_run(str(tmp_path / "pid"))
    assert not called


def test_secrets_travel_in_a_file(pod: Pod) -> None:
    token = pod.home / "token"
    token.write_text(TOKEN)
    token.chmod(0o644)
    pod.write("HF_TOKEN_FILE=~/token")
    refused = pod.run("train_pod", code=2)
    assert "[HF_TOKEN_FILE]: others may read it, expected mode 600" in refused.stderr
    token.chmod(0o600)
    pod.plan(75, 0)
    file = str(pod.settings)
    outputs = [pod.run("train_pod"), pod.run("status"), pod.run("train_pod", "--stop", file)]
    outputs += [pod.run(name, "--dry-run", file) for name in ("setup_tpu", "train_pod")]
    assert all(TOKEN not in done.stdout + done.stderr for done in outputs)
    assert {run["token"] for run in pod.training()} == {TOKEN}, "it has arrived"
    assert (pod.worker() / "hf_token").stat().st_mode & 0o777 == 0o600
    assert pod.worker().stat().st_mode & 0o777 == 0o700
    assert TOKEN not in (pod.fake / "calls.jsonl").read_text()
    assert TOKEN not in str([run["argv"] for run in pod.training()])
    holders = {path.name for path in files_with(TOKEN, pod.folder)}
    assert holders == {"token", "hf_token", "training.jsonl"}, "the last is the test's own"


def files_with(text: str, folder: Path) -> list[Path]:
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return [path for path in files if text.encode() in path.read_bytes()]


def test_a_folder_that_all_share_needs_no_bucket(pod: Pod) -> None:
    pod.write(WORKDIR=f"{pod.folder}/shared")
    pod.run("train_pod")
    assert {run["argv"][3] for run in pod.training()} == {f"--workdir={pod.folder}/shared"}
    assert not (pod.worker().parent / "gcsfuse.log").exists()
