"""A TPU that the tests play: stand-ins on PATH, settings, and what was recorded."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tiue_jax.io.files import write_atomic

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
REPOSITORY = ("requirements.txt", "configs/tiny.py", "tiue_jax/main.py")  # what a worker is sent
PATIENCE = 300  # seconds; a machine that has other work is slow
SCRIPTS = ("create_tpu", "setup_tpu", "train_pod", "status", "delete_tpu")
TOKEN = "hf_" + "s3cretS3cretS3cret"

SETTINGS: dict[str, Any] = {
    "NAME": "tiue-test",
    "PROJECT": "my-project",
    "ZONE": "us-west4-a",
    "ACCELERATOR_TYPE": "v5litepod-16",
    "SPOT": "yes",
    "CONFIG": "configs/tiny.py",
    "WORKDIR": "gs://bucket/runs/one",
    "RETRY_SECONDS": 0,
    "POLL_SECONDS": 0,
    "GRACE_SECONDS": 0,
}

UV = """#!/usr/bin/env bash
set -euo pipefail
echo "$*" >>"$HOME/uv.log"
if [[ $1 == venv ]]; then mkdir -p venv/bin; ln -s "$TIUE_FAKE/training" venv/bin/python; fi
"""
# A bucket is a folder, mounted by a link. A bucket called flat-... cannot rename folders.
GCSFUSE = """#!/usr/bin/env bash
set -euo pipefail
echo "$*" >>"$HOME/gcsfuse.log"
bucket=${*: -2:1} folder=${*: -1}
[[ -d $TIUE_FAKE/buckets/$bucket ]] || { echo "no such bucket" >&2; exit 1; }
rmdir "$folder"
ln -s "$TIUE_FAKE/buckets/$bucket" "$folder"
"""
MOUNTPOINT = "#!/usr/bin/env bash\n[[ -L $2 ]]\n"
MV = """#!/usr/bin/env bash
if [[ $1 == */gcs/flat-* ]]; then echo "mv: Function not implemented" >&2; exit 1; fi
exec /usr/bin/mv "$@"
"""


@contextmanager
def beside(line: list[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Run a command beside the test, and kill it where the test fails."""
    pipe = subprocess.PIPE
    with subprocess.Popen(line, **options, stdout=pipe, stderr=pipe) as process:
        try:
            yield process
        except BaseException:
            process.kill()
            raise


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until something is true, for as long as PATIENCE."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "waited for too long"
        time.sleep(0.05)


class Pod:
    """The stand-ins, in a folder of the test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fake = folder / "fake"
        self.home = folder / "home"
        self.settings = folder / "pod.env"
        self.repository = folder / "repo sitory"
        for path in ("fake/bin", "fake/worker_bin", "fake/buckets/bucket", "home"):
            (folder / path).mkdir(parents=True)
        shutil.copytree(LAUNCH, self.repository / "launch")
        for name in REPOSITORY:
            (self.repository / name).parent.mkdir(exist_ok=True)
            (self.repository / name).write_text(f"# {name}\n")
        for args in (["init", "-q"], ["add", "."]):
            subprocess.run(["git", *args], cwd=self.repository, check=True, timeout=PATIENCE)
        here = Path(__file__).parent
        for name, source in (("bin/gcloud", "fake_gcloud.py"), ("training", "fake_training.py")):
            script = f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -I -S {here / source} "$@"\n'
            self._executable(name, script)
        for name, text in (
            ("uv", UV),
            ("gcsfuse", GCSFUSE),
            ("mountpoint", MOUNTPOINT),
            ("mv", MV),
        ):
            self._executable(f"worker_bin/{name}", text)
        self.world(generation=0, workers=1, queued=None, node=None, health="HEALTHY")
        self.world(states=[], create=[], delete=[], ssh={})
        self.plan()
        self.write()

    def _executable(self, name: str, text: str) -> None:
        path = self.fake / name
        path.write_text(text)
        path.chmod(0o755)

    def tool(self, name: str, text: str, failures: int = 0, code: int = 1) -> None:
        """Put a tool on the workers: a script that notes its arguments, and fails at first."""
        lines = [
            "#!/usr/bin/env bash",
            "set -euo pipefail",
            f'echo "$*" >>"$HOME/{name}.log"',
            f'(($(wc -l <"$HOME/{name}.log") > {failures})) || exit {code}',
            text,
        ]
        self._executable(f"worker_bin/{name}", "\n".join(lines) + "\n")

    def tool_calls(self, name: str) -> list[str]:
        """How worker 0 called a tool."""
        return (self.worker().parent / f"{name}.log").read_text().splitlines()

    def world(self, **changes: Any) -> dict[str, Any]:
        """Change what there is and what will happen; return it."""
        path = self.fake / "world.json"
        state = (json.loads(path.read_text()) if path.exists() else {}) | changes
        if changes:  # a stand-in may be reading it
            write_atomic(path, json.dumps(state))
        return state

    def plan(self, *codes: Any) -> None:
        """Say how the training ends, start by start: one code, or a list of one a worker."""
        plan = [{"codes": code if isinstance(code, list) else [code]} for code in codes]
        (self.fake / "plan.json").write_text(json.dumps(plan))

    def write(self, *more: str, **changes: Any) -> None:
        """Write the settings file; None leaves a key out."""
        values = SETTINGS | changes
        lines = [f"{key}={value}" for key, value in values.items() if value is not None]
        self.settings.write_text("\n".join([*lines, *more]) + "\n")

    def command(self, script: str, *args: str) -> tuple[list[str], dict[str, Any]]:
        """Return a script's command line and the environment that it runs in."""
        env = {
            "PATH": f"{self.fake / 'bin'}:{Path(sys.executable).parent}:/usr/bin:/bin",
            "HOME": str(self.home),
            "TIUE_FAKE": str(self.fake),
            "HF_TOKEN": TOKEN,
            "LANG": os.environ.get("LANG", "C.UTF-8"),
        }
        line = ["bash", str(self.repository / "launch" / f"{script}.sh"), *args]
        return line, {"cwd": self.folder, "env": env, "text": True}

    def run(self, script: str, *args: str, code: int | None = 0) -> subprocess.CompletedProcess:
        """Run a script on the settings file; `code` is the exit code to see, None for any."""
        if not args or args[0] == "--":
            args = (str(self.settings), *args)
        line, options = self.command(script, *args)
        done = subprocess.run(
            line, **options, capture_output=True, stdin=subprocess.DEVNULL, timeout=PATIENCE,
            check=False,
        )  # fmt: skip
        if code is not None:
            assert done.returncode == code, done.stdout + done.stderr
        return done

    @contextmanager
    def started(self, script: str, *args: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
        """Run a script on the settings file beside the test, and kill it where the test fails."""
        line, common = self.command(script, *args, str(self.settings))
        with beside(line, **common, **options) as process:
            yield process

    def calls(self) -> list[list[str]]:
        """The arguments of every call of gcloud, without the two words that all begin with."""
        path = self.fake / "calls.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line)[2:] for line in lines]

    def actions(self) -> list[str]:
        """What was asked of gcloud and of the workers, without questions for the state."""
        found = []
        for call in self.calls():
            command = next((arg for arg in call if arg.startswith("--command=")), "")
            if "on_worker.sh" in command:
                found.append(shlex.split(command)[2])
            elif call[1] not in ("describe", "ssh"):
                found.append(call[1])
        return found

    def training(self) -> list[dict[str, Any]]:
        """Every start of the training on a worker."""
        path = self.fake / "training.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines]

    def worker(self, index: int = 0) -> Path:
        """Our folder on a worker of the machine that there is now."""
        return self.fake / f"vm{self.world()['generation']}" / str(index) / ".tiue_jax"
