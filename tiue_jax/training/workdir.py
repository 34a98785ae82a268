"""The folder of a run: who may write to it, and what was begun in it."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from tiue_jax.io.errors import InputError
from tiue_jax.io.files import write_atomic
from tiue_jax.training.hosts import ALONE, Hosts

RUN_FILE = "run.json"
_LOCK_FILE = ".lock"
_PATIENCE = 10.0  # seconds for a file to be seen on other hosts


@contextmanager
def claim(workdir: Path, hosts: Hosts = ALONE) -> Iterator[None]:
    """Hold `workdir`, made if missing, against other processes of this machine.

    The lock is the kernel's and goes with the process, however that ends. Of several hosts the
    first takes it, and all have to see the folder.

    Raises:
        InputError: another process holds it, or it holds files and no run of ours; or it is not one
            folder on all hosts.
    """
    if hosts.index != 0:
        _check_shared(workdir, hosts)
        yield
        return
    if workdir.exists() and not workdir.is_dir():
        raise InputError("is a file", file=workdir, key="--workdir", expected="a folder")
    ours = (workdir / RUN_FILE).exists() or (workdir / _LOCK_FILE).exists()
    if not ours and workdir.is_dir() and any(workdir.iterdir()):
        raise InputError(
            "output folder is in use",
            file=workdir,
            key="--workdir",
            expected="a new or empty folder, or that of a run to resume",
        )
    workdir.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(workdir / _LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
            raise InputError(
                "a run is going on in this folder",
                file=workdir,
                key="--workdir",
                found=f"process {holder or '?'}",
            ) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        os.fsync(descriptor)
        _check_shared(workdir, hosts)
        yield
    finally:
        os.close(descriptor)


def _check_shared(workdir: Path, hosts: Hosts) -> None:
    """Hold all hosts to see the lock that the first has just taken."""
    holder = hosts.share("workdir claimed", os.getpid())[0]
    seen = hosts.share("workdir seen", _sees(workdir / _LOCK_FILE, str(holder), _PATIENCE))
    if not all(seen):
        raise InputError(
            f"host {seen.index(False)} does not see what host 0 writes here",
            file=workdir,
            key="--workdir",
            expected="one folder that all hosts share",
        )


def _sees(file: Path, content: str, seconds: float) -> bool:
    """Whether `file` gets that content; a network's file system may take a while."""
    deadline = time.monotonic() + seconds
    while not (file.exists() and file.read_text(errors="replace") == content):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def write_run(workdir: Path, description: Mapping[str, Any]) -> None:
    """Write what run this is to `run.json`, for people and for the next `claim`."""
    if jax.process_index() == 0:
        write_atomic(workdir / RUN_FILE, json.dumps(description, indent=2) + "\n")
