"""The folder of a run: who may write to it, and what was begun in it."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from tiue_jax.io.errors import InputError
from tiue_jax.io.files import make_parents, write_atomic
from tiue_jax.pretrained.jsonfile import read_object
from tiue_jax.training.hosts import ALONE, Hosts

RUN_FILE = "run.json"
_LOCK_FILE = ".lock"
_HOLDER_FILE = ".holder"
_CACHE_FOLDER = ".jax_cache"
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
    make_parents(workdir / _LOCK_FILE, key="--workdir")
    descriptor = os.open(workdir / _LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(
                "a run is going on in this folder",
                file=workdir,
                key="--workdir",
                found=f"process {_holder(workdir)}",
            ) from error
        _check_shared(workdir, hosts)
        yield
    finally:
        os.close(descriptor)


def _check_shared(workdir: Path, hosts: Hosts) -> None:
    """Hold all hosts to see what the first has just written: who it is, in a file of its own.

    Not in the lock, which stays open: a bucket that is mounted shows others only files that were
    closed.
    """
    holder = f"{os.getpid()} {secrets.token_hex(8)}\n"
    if hosts.index == 0:
        write_atomic(workdir / _HOLDER_FILE, holder)
    holder = hosts.share("workdir claimed", holder)[0]
    seen = hosts.share("workdir seen", _sees(workdir / _HOLDER_FILE, holder, _PATIENCE))
    if not all(seen):
        raise InputError(
            f"host {seen.index(False)} does not see what host 0 writes here",
            file=workdir,
            key="--workdir",
            expected="one folder that all hosts share",
        )


def _holder(workdir: Path) -> str:
    """Return the number of the process that holds the folder; "?" where it does not say."""
    try:
        return (workdir / _HOLDER_FILE).read_text(errors="replace").split()[0]
    except (OSError, IndexError):
        return "?"


def _sees(file: Path, content: str, seconds: float) -> bool:
    """Whether `file` gets that content; a network's file system may take a while."""
    deadline = time.monotonic() + seconds
    while not (file.exists() and file.read_text(errors="replace") == content):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


@contextmanager
def cache_programs(workdir: Path) -> Iterator[None]:
    """Keep compiled programs in the workdir, where nothing says another place for them.

    Process 0 writes them and all read them (JAX's rule), so on many hosts the folder has to be one
    that all share: then a run that goes on, on these machines or on others, compiles nothing.
    """
    if jax.config.values["jax_compilation_cache_dir"] is not None:
        yield
        return
    jax.config.update("jax_compilation_cache_dir", str(workdir / _CACHE_FOLDER))
    compilation_cache.reset_cache()  # JAX settled at its first program that there is none
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()


def write_run(workdir: Path, description: Mapping[str, Any]) -> None:
    """Write what run this is to `run.json`, for people and for the next `claim`."""
    if jax.process_index() == 0:
        write_atomic(workdir / RUN_FILE, json.dumps(description, indent=2) + "\n")


def read_run(workdir: Path) -> dict[str, Any]:
    """Return what `write_run` wrote.

    Raises:
        InputError: there is no such file, or it does not describe a run.
    """
    file = workdir / RUN_FILE
    run = read_object(file)
    for name in ("config", "teacher", "prompts"):  # an older run may say nothing of the latter two
        if not isinstance(run.get(name, None if name == "config" else {}), dict):
            raise InputError("does not describe a run", file=file, key=name)
    return run
