"""What set-up brings to the workers, what it refuses, and what it tries again."""

from __future__ import annotations

import os
import signal
import subprocess
import tarfile
import time

import pytest

from tests.launch.pod import GCSFUSE, PATIENCE, UV, Pod


def test_setup_copies_what_git_tracks_and_keeps_it(pod: Pod) -> None:
    """Uncommitted changes are copied, untracked and deleted files are not."""
    (pod.repository / "secrets.txt").write_text("x")
    (pod.repository / "tiue_jax" / "main.py").write_text("changed\n")
    (pod.repository / "launch" / "status.sh").unlink()
    pod.run("create_tpu")
    pod.run("setup_tpu")
    package = pod.home / ".cache" / "tiue_jax" / "tiue-test.tgz"
    with tarfile.open(package) as archive:
        names = archive.getnames()
    assert {"requirements.txt", "configs/tiny.py", "tiue_jax/main.py"} < set(names)
    assert "secrets.txt" not in names and "launch/status.sh" not in names
    main = pod.worker() / "source" / "tiue_jax" / "main.py"
    assert main.read_text() == "changed\n"
    (pod.repository / "tiue_jax" / "main.py").write_text("changed again\n")
    os.utime(package, (then := time.mktime((2025, 3, 4, 5, 6, 7, 0, 0, -1)), then))
    done = pod.run("setup_tpu", "--keep-source", str(pod.settings))
    assert main.read_text() == "changed\n"
    assert "launch: tiue-test: the code is that of 2025-03-04 05:06:07; " in done.stderr
    assert "the code is that of" not in pod.run("setup_tpu").stderr
    assert main.read_text() == "changed again\n"
    assert "-r source/requirements.txt jax[tpu]" in (pod.worker().parent / "uv.log").read_text()
    mounted = (pod.worker().parent / "gcsfuse.log").read_text()
    assert mounted.count("\n") == 1, "once"
    assert "--metadata-cache-ttl-secs=0 " in mounted and "--rename-dir-limit=0 " in mounted
    assert "--enable-streaming-writes=false " in mounted, "fsync publishes"
    pod.write(CONFIG="configs/mine.py")
    done = pod.run("setup_tpu", code=2)
    assert done.stderr.endswith("would not be copied, found 'configs/mine.py'\n")


def test_a_new_tpu_begins_with_the_code_of_then(pod: Pod) -> None:
    """A restart after a preemption keeps the package, the end of the TPU does not."""
    changed = pod.repository / "tiue_jax" / "main.py"
    sent = []
    for text, how in (("1", "preempted"), ("2", "deleted"), ("3", "gone"), ("4", "")):
        changed.write_text(text)
        pod.run("train_pod")
        sent.append((pod.worker() / "source" / "tiue_jax" / "main.py").read_text())
        if how == "preempted":
            pod.world(queued="SUSPENDED", node="PREEMPTED")
        elif how == "gone":  # by other means, and delete_tpu.sh finds none
            pod.world(queued=None, node=None)
        if how in ("deleted", "gone"):
            pod.run("delete_tpu")
    assert sent == ["1", "1", "3", "4"]


def test_setup_clones_a_repository(pod: Pod) -> None:
    pod.run("create_tpu")
    clone = pod.fake / "worker_bin" / "git"
    clone.write_text('#!/bin/sh\necho "$@" >"$HOME/git.log"\nfor to; do :; done; mkdir "$to"\n')
    clone.chmod(0o755)
    pod.write("REPO=https://example.com/x y.git".replace(" ", "%20"), "BRANCH=v1.0")
    pod.run("setup_tpu")
    line = (pod.worker().parent / "git.log").read_text()
    assert line.endswith("--depth=1 --branch=v1.0 -- https://example.com/x%20y.git source.new\n")
    assert not (pod.worker() / "source.tgz").exists()


def test_a_bucket_whose_folders_cannot_be_renamed_is_refused(pod: Pod) -> None:
    (pod.fake / "buckets" / "flat-one").mkdir()
    pod.write(WORKDIR="gs://flat-one/run")
    done = pod.run("train_pod", code=2)
    assert "error: gs://flat-one [WORKDIR]: folders cannot be renamed in this bucket" in done.stderr
    assert not pod.training() and not list((pod.fake / "buckets" / "flat-one").iterdir())
    assert not (pod.worker() / "ready").exists()


def test_a_setup_that_fails_passes_its_code_on(pod: Pod) -> None:
    pod.run("create_tpu")
    pod.world(ssh={"setup": [17]})
    pod.run("setup_tpu", code=17)
    pod.world(ssh={"shell": ["drop", "drop"]})  # a node that has just come up
    assert pod.run("setup_tpu").stderr.count("no connection; trying again") == 2
    pod.world(ssh={"shell": ["drop"] * 5})
    pod.run("setup_tpu", code=255)


def test_a_clone_is_tried_again(pod: Pod) -> None:
    pod.run("create_tpu")
    pod.tool("git", 'for to; do :; done; mkdir "$to"', failures=2, code=128)
    pod.write("REPO=https://example.com/x")
    pod.run("setup_tpu")
    assert len(pod.tool_calls("git")) == 3


def test_packages_are_tried_again(pod: Pod) -> None:
    """pip, which fetches uv, and uv for Python and for the packages."""
    pod.run("create_tpu")
    body = UV.partition("pipefail\n")[2]
    fails = '(($(grep -c "^$1" "$HOME/uv.log") > 2)) || exit 2\n'
    pod.tool("uv", fails + body.replace('echo "$*" >>"$HOME/uv.log"\n', ""))
    (pod.fake / "worker_bin" / "uv").rename(pod.fake / "uv")
    fetch = 'mkdir -p "$HOME/.local/bin"; cp "$TIUE_FAKE/uv" "$HOME/.local/bin/"'
    pod.tool("python3", fetch, failures=2)
    pod.run("setup_tpu")
    assert pod.tool_calls("python3") == ["-m pip install --quiet --user uv"] * 3
    assert [line.split()[0] for line in pod.tool_calls("uv")] == ["venv"] * 3 + ["pip"] * 3


def test_gcsfuse_is_installed_with_patience(pod: Pod) -> None:
    """A machine that has just come up holds the locks of apt, and names are not resolved yet."""
    pod.run("create_tpu")
    (pod.fake / "worker_bin" / "gcsfuse").rename(pod.fake / "gcsfuse")
    pod.tool("lsb_release", "echo jammy")
    pod.tool("curl", 'echo key >"$3"', failures=2, code=6)
    sudo = """
    for verb in update 'install -qq'; do
      [[ $* != *"600 $verb"* ]] || (($(grep -c "600 $verb" "$HOME/sudo.log") > 2)) || exit 100
    done
    [[ $* != *"-y gcsfuse" ]] || cp "$TIUE_FAKE/gcsfuse" "$TIUE_FAKE/worker_bin/"
    """
    pod.tool("sudo", sudo)
    pod.run("setup_tpu")
    assert len(pod.tool_calls("curl")) == 3 and len(pod.tool_calls("gcsfuse")) == 1
    apt = "apt-get -o DPkg::Lock::Timeout=600"
    key, source, *packages = pod.tool_calls("sudo")
    assert key == "install -m 644 apt.key /usr/share/keyrings/cloud.google.asc"
    assert source == "install -m 644 gcsfuse.list /etc/apt/sources.list.d/gcsfuse.list"
    assert packages == [f"{apt} update -qq"] * 3 + [f"{apt} install -qq -y gcsfuse"] * 3
    assert " gcsfuse-jammy main\n" in (pod.worker() / "gcsfuse.list").read_text()


@pytest.mark.parametrize(("tool", "calls"), [("uv", 3), ("tar", 1), ("gcsfuse", 1), ("main", 1)])
def test_a_tool_that_ends_with_2_has_found_no_bad_input(pod: Pod, tool: str, calls: int) -> None:
    pod.run("create_tpu")
    pod.tool(tool, "", failures=99, code=2)
    if tool == "main":
        (pod.fake / "worker_bin" / tool).rename(pod.fake / "training")
    done = pod.run("setup_tpu", code=1)
    assert len(pod.tool_calls(tool)) == calls
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert (" failed 3 times, " if calls == 3 else ": set-up failed: ") in error
    assert ("tiue_jax.main --help" if tool == "main" else tool) in error
    assert not (pod.worker() / "ready").exists()


@pytest.mark.parametrize(
    ("codes", "code", "setups"), [([17, 1], 0, 3), ([1] * 5, 1, 3), ([2], 2, 1), (["drop"], 0, 2)]
)
def test_train_pod_sets_up_again(pod: Pod, codes: list[int | str], code: int, setups: int) -> None:
    pod.world(ssh={"setup": codes})
    done = pod.run("train_pod", code=code)
    assert pod.actions().count("setup") == setups and pod.actions().count("create") == 1
    assert len(pod.training()) == (code == 0)
    again = 0 if codes in ([2], ["drop"]) else 2
    assert done.stderr.count("the set-up failed (exit code ") == again


def test_a_tpu_that_goes_away_in_its_setup_is_created_again(pod: Pod) -> None:
    pod.world(ssh={"setup": ["gone"]})
    done = pod.run("train_pod")
    assert pod.actions().count("setup") == pod.actions().count("create") == 2
    assert "the TPU is gone (SUSPENDED); restart 1 of" in done.stderr
    assert "the set-up failed" not in done.stderr


def test_two_setups_at_once_are_one_after_the_other(pod: Pod) -> None:
    """gcloud repeats an ssh that broke, and what it began goes on."""
    pod.run("create_tpu")
    pod.tool("tar", 'sleep 0.5; /usr/bin/tar "$@"; echo end >>"$HOME/tar.log"')
    pod.world(ssh={"setup": ["twice"]})
    pod.run("setup_tpu")
    unpack = "-C source.new -xzf source.tgz"
    assert pod.tool_calls("tar") == [unpack, "end", unpack, "end"]


def test_what_a_setup_leaves_running_does_not_hold_its_lock(pod: Pod) -> None:
    pod.run("create_tpu")
    stays = 'sleep 600 >/dev/null 2>&1 &\necho $! >"$HOME/daemon"'
    pod.tool("gcsfuse", f"{GCSFUSE}\n{stays}")
    pod.run("setup_tpu")
    flock = ["flock", "-n", str(pod.worker() / "setup.lock"), "true"]
    free = subprocess.run(flock, check=False, timeout=PATIENCE)
    os.kill(int((pod.worker().parent / "daemon").read_text()), signal.SIGKILL)
    assert free.returncode == 0
