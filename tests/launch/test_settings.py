"""Options, settings and the error line: what all scripts share."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.launch.pod import LAUNCH, PATIENCE, SCRIPTS, SETTINGS, TOKEN, Pod


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_teaches_and_runs_nothing(pod: Pod, script: str) -> None:
    pod.settings.unlink()  # not even settings are needed
    done = pod.run(script, "--help")
    assert f"launch/{script}.sh [--dry-run" in done.stdout and "Exit code: 0" in done.stdout
    assert len(re.findall(rf"^  .*launch/{script}\.sh", done.stdout, re.M)) >= 2, "an example"
    assert "shellcheck" not in done.stdout and not done.stderr and not pod.calls()


def printed(text: str) -> list[list[str]]:
    """The gcloud commands that a dry run printed, read as a shell would."""
    lines = [shlex.split(line[2:]) for line in text.splitlines() if line.startswith("+ ")]
    assert all(line[:3] == ["gcloud", "compute", "tpus"] for line in lines)
    return [line[3:] for line in lines]


@pytest.mark.parametrize("script", SCRIPTS)
def test_dry_run_runs_nothing(pod: Pod, script: str) -> None:
    done = pod.run(script, "--dry-run", str(pod.settings))
    assert printed(done.stdout) and not done.stderr
    assert not pod.calls() and not (pod.home / ".cache").exists()


def test_dry_run_prints_what_a_run_runs(pod: Pod) -> None:
    hostile = "--config.data.source=a  b'c\"$(touch x);\n* é"
    args = (str(pod.settings), "--", hostile)
    dry = printed_with_newlines(pod.run("train_pod", "--dry-run", *args).stdout)
    pod.run("train_pod", *args)
    asked = [call for call in pod.calls() if call[1] != "describe"]
    assert asked == [call for call in dry if call[1] != "describe"]


def printed_with_newlines(text: str) -> list[list[str]]:
    """As `printed`, where %q wrote $'...' for an argument with a line end."""
    lines = [line[2:] for line in text.splitlines() if line.startswith("+ ")]
    script = "".join(f"printf '%s\\0' {line}; printf '\\1'; " for line in lines)
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, check=True, timeout=PATIENCE
    )
    return [call.split("\0")[3:-1] for call in done.stdout.split("\1")[:-1]]


BAD: dict[str, tuple[dict[str, object], list[str], str]] = {
    "no name": ({"NAME": None}, [], "FILE [NAME]: is required"),
    "no workdir": ({"WORKDIR": None}, [], "FILE [WORKDIR]: is required"),
    "name": ({"NAME": "Tiue_1"}, [], "FILE:1 [NAME]: not usable, expected "),
    "name that is a flag": ({"NAME": "--all"}, [], "FILE:1 [NAME]: not usable, expected "),
    "zone": ({"ZONE": "us-west4"}, [], "FILE:3 [ZONE]: not usable, expected a zone "),
    "project": ({"PROJECT": "x; rm -rf"}, [], "FILE:2 [PROJECT]: not usable, "),
    "accelerator": (
        {"ACCELERATOR_TYPE": "v7x-8"},
        [],
        "FILE:4 [ACCELERATOR_TYPE]: not usable, expected v4-N, ",
    ),
    "no size": (
        {"ACCELERATOR_TYPE": "v4"},
        [],
        "FILE [ACCELERATOR_TYPE]: has no size, expected v4-N",
    ),
    "two sizes": ({}, ["TOPOLOGY=2x2x4"], "FILE [TOPOLOGY]: says the size again, expected "),
    "topology": ({}, ["TOPOLOGY=16"], "FILE:11 [TOPOLOGY]: not usable, expected 2x4 or 2x2x4"),
    "runtime": ({}, ["RUNTIME_VERSION=v2 alpha"], "FILE:11 [RUNTIME_VERSION]: not usable, "),
    "spot": ({"SPOT": "true"}, [], "FILE:5 [SPOT]: not usable, expected yes or no, found 'true'"),
    "repository": ({}, ["REPO=--upload-pack=x"], "FILE:11 [REPO]: not usable, expected an https "),
    "branch": ({}, ["BRANCH=--help"], "FILE:11 [BRANCH]: not usable, expected a branch or tag"),
    "config": ({"CONFIG": "-x.py"}, [], "FILE:6 [CONFIG]: not usable, expected a file such as "),
    "workdir": ({"WORKDIR": "runs/x"}, [], "FILE:7 [WORKDIR]: not usable, expected gs://BUCKET/"),
    "bucket alone": (
        {"WORKDIR": "gs://bucket"},
        [],
        "FILE:7 [WORKDIR]: not usable, expected gs://",
    ),
    "number": ({"POLL_SECONDS": "-1"}, [], "FILE:9 [POLL_SECONDS]: not usable, expected a whole "),
    "flag": ({}, ["CREATE_FLAG=spot"], "FILE:11 [CREATE_FLAG]: not usable, expected a flag "),
    "twice": ({}, ["NAME=other"], "FILE:11 [NAME]: given twice, found it in line 1"),
    "unknown": ({}, ["ZONES=a"], "FILE:11 [ZONES]: no such setting, expected one of "),
    "not a setting": ({}, ["export A=1"], "FILE:11: not a setting, expected KEY=VALUE"),
    "no token file": (
        {},
        ["HF_TOKEN_FILE=/no/such"],
        "FILE [HF_TOKEN_FILE]: cannot be read: /no/such",
    ),
    "a secret": ({}, [f"HF_TOKEN={TOKEN}"], "FILE:11 [HF_TOKEN]: looks like a secret, expected "),
    "another secret": ({}, ["WANDB_API_KEY=x1"], "FILE:11 [WANDB_API_KEY]: a secret has no place "),
    "secret argument": ({}, [f"ARG=--token={TOKEN}"], "FILE:11 [ARG]: looks like a secret, "),
    "secret address": ({}, ["REPO=https://me:pass@x.y/z"], "FILE:11 [REPO]: looks like a secret, "),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings_are_one_line_and_exit_code_2(pod: Pod, case: str) -> None:
    changes, more, expected = BAD[case]
    pod.write(*more, **changes)
    done = pod.run("create_tpu", code=2)
    assert done.stderr.startswith(f"error: {expected.replace('FILE', str(pod.settings), 1)}")
    assert done.stderr.count("\n") == 1 and not done.stdout and not pod.calls()
    assert TOKEN not in done.stderr and "me:pass" not in done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_refuses_bad_settings_and_options(pod: Pod, script: str) -> None:
    done = pod.run(script, "--now", code=2)
    assert done.stderr == "error: [--now]: no such option; --help lists them\n"
    done = pod.run(script, "no-such.env", code=2)
    assert done.stderr.startswith("error: no-such.env: cannot be read, expected a copy of ")
    done = pod.run(script, str(pod.settings), "more\nthan one", code=2)
    assert done.stderr.startswith("error: [more than one]: more than one settings file, ")
    pod.write(ZONE="here")
    assert pod.run(script, code=2).stderr.startswith(f"error: {pod.settings}:3 [ZONE]: ")
    assert not pod.calls()


def test_an_argument_behind_the_dashes_may_hold_no_secret_either(pod: Pod) -> None:
    done = pod.run("train_pod", "--", f"--token={TOKEN}", code=2)
    assert done.stderr.startswith("error: [--]: looks like a secret, ")
    assert TOKEN not in done.stdout + done.stderr and not pod.calls()


def test_settings_are_data(pod: Pod) -> None:
    """Nothing in the file is run, comments and Windows line ends are no trouble."""
    mark = pod.folder / "ran"
    line = f"ARG=--x=$(touch {mark})`touch {mark}`;touch {mark}"
    pod.write("", "# comment", line, "CREATE_FLAG=--labels=a=b c\r")
    (call, _) = printed(pod.run("create_tpu", "--dry-run", str(pod.settings)).stdout)
    assert call[-1] == "--labels=a=b c" and not mark.exists()
    pod.run("setup_tpu", "--dry-run", str(pod.settings))
    assert not mark.exists()


@pytest.mark.parametrize(
    ("accelerator", "more", "expected"),
    [
        ("v4-8", [], ["--accelerator-type=v4-8", "--runtime-version=tpu-ubuntu2204-base"]),
        (
            "v5litepod-64",
            [],
            ["--accelerator-type=v5litepod-64", "--runtime-version=v2-alpha-tpuv5-lite"],
        ),
        ("v5p-128", [], ["--accelerator-type=v5p-128", "--runtime-version=v2-alpha-tpuv5"]),
        ("v6e-8", [], ["--accelerator-type=v6e-8", "--runtime-version=v2-alpha-tpuv6e"]),
        (
            "v4",
            ["TOPOLOGY=2x2x4"],
            ["--type=v4", "--topology=2x2x4", "--runtime-version=tpu-ubuntu2204-base"],
        ),
        ("v6e-8", ["RUNTIME_VERSION=v3"], ["--accelerator-type=v6e-8", "--runtime-version=v3"]),
    ],
)
def test_the_creation_says_what_the_settings_say(
    pod: Pod, accelerator: str, more: list[str], expected: list[str]
) -> None:
    pod.write(*more, ACCELERATOR_TYPE=accelerator, SPOT="no")
    (call, _) = printed(pod.run("create_tpu", "--dry-run", str(pod.settings)).stdout)
    place = ["tiue-test", "--zone=us-west4-a", "--project=my-project"]
    assert call == ["queued-resources", "create", *place, "--node-id=tiue-test", *expected]


def test_the_example_is_usable_as_it_is(pod: Pod) -> None:
    shutil.copy(LAUNCH / "pod.env.example", pod.repository / "launch" / "pod.env")
    done = pod.run("create_tpu", "--dry-run")  # launch/pod.env by default
    text = (LAUNCH / "pod.env.example").read_text()
    for key in (*SETTINGS, "TOPOLOGY", "RUNTIME_VERSION", "ARG", "REPO", "BRANCH", "HF_TOKEN_FILE",
                "CREATE_FLAG", "CREATE_ATTEMPTS", "WAIT_HOURS", "MAX_RESTARTS"):  # fmt: skip
        assert re.search(rf"^(# )?{key}=", text, re.M), key
    assert "--spot" in done.stdout


def test_without_gcloud_it_says_so(pod: Pod) -> None:
    tools = pod.folder / "tools"
    tools.mkdir()
    for name in ("bash", "dirname", "mktemp", "rm", "sort", "ls", "sed"):
        (tools / name).symlink_to(Path(shutil.which(name) or name))
    line, options = pod.command("create_tpu", str(pod.settings))
    options["env"]["PATH"] = str(tools)
    done = subprocess.run(line, **options, capture_output=True, check=False, timeout=PATIENCE)
    assert done.returncode == 2
    assert done.stderr == "error: [gcloud]: is not on PATH, expected the Google Cloud CLI\n"
