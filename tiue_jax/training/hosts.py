"""Many hosts as one run: who they are, what they must agree on, and how they stop together.

Every process ("host") runs the same program on its own devices. What they tell each other beside
the devices' collectives goes through the key-value store of JAX's coordination service, which lives
in process 0. Each host has one record there, renewed every second by a thread, and the same thread
reads those of the others. So a host notices, though its main thread hangs in a collective, that

- another one failed: it prints that host's message and exits with that host's code;
- another one is gone without a word (killed, out of memory, no network): it says so and exits 1.

`jax._src` is imported here alone: JAX's public modules have no key-value store and no barrier that
does not need the devices.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import flax
import jax
from jax._src import distributed

import tiue_jax
from tiue_jax.io.errors import EXIT_FAILED, InputError, Preempted, RunError, describe, one_line

_KEYS = "tiue_jax"  # prefix of every key of ours
_BEAT = 1.0  # seconds between two signs of life
_GRACE = 2.0  # seconds for this host to fail by itself when another has: then all have the cause
_FAREWELL = 10.0  # seconds that process 0, which holds the key-value store, waits for the others
_TOGETHER = 300  # seconds for all hosts to be there
_SHOWN = 5  # differences in one message
_LOST = "host 0, which coordinates, is lost"
_AGAIN = "the same command on all hosts goes on from the newest checkpoint"


@dataclass(frozen=True)
class _Record:
    """What a host says of itself. `phase`: running, done (ready to end well) or left (exiting)."""

    beat: int = 0
    phase: str = "running"
    failed: bool = False
    code: int = 0
    message: str = ""


class Hosts:
    """The hosts of a run, as one of them sees the others. Without a client: this one alone.

    Args:
        client: JAX's client of the coordination service.
        timeout: seconds without a sign of life after which a host counts as dead.
    """

    def __init__(self, client: Any = None, *, timeout: float = 60.0) -> None:
        self.index, self.count = 0, 1
        if client is not None:
            self.index = distributed.global_state.process_id
            self.count = distributed.global_state.num_processes
        self._client = client if self.count > 1 else None
        self._timeout = timeout
        self._lock = threading.Lock()  # of the record, and of who may decide how this host ends
        self._record = _Record()
        self._others: dict[int, _Record] = {}
        self._silent = dict.fromkeys(set(range(self.count)) - {self.index}, 0)  # beats missed
        self._failed_for = 0.0  # seconds since another host said that it failed
        self._end = threading.Event()

    # ---- What they agree on ------------------------------------------------------------------

    def share(self, name: str, value: Any) -> list[Any]:
        """Return the `value` (JSON) of every host, in their order; waits until all have come here.

        Args:
            name: of this exchange; each is used once.
        """
        if self._client is None:
            return [value]
        self._client.key_value_set(f"{_KEYS}/{name}/{self.index}", json.dumps(value))
        while len(found := self._read(name)) < self.count:
            time.sleep(0.05)  # a host that fails or dies meanwhile ends this process: see _watch
        return [json.loads(found[i]) for i in range(self.count)]

    def post(self, name: str, value: Any) -> None:
        """Leave this host's part of an exchange without waiting for the others'."""
        if self._client is not None:
            key = f"{_KEYS}/{name}/{self.index}"
            self._client.key_value_set(key, json.dumps(value), allow_overwrite=True)

    def posted(self, name: str) -> bool:
        """Whether any host has left its part of an exchange."""
        return bool(self._read(name))

    def wait(self, name: str) -> None:
        """Go on when every host has come here."""
        self.share(name, None)

    def agree(self, name: str, content: Mapping[str, Any], *, hint: str = "") -> None:
        """Hold every host to have the same `content`.

        Raises:
            InputError: on every host, with the keys that differ, where, and from what.
        """
        first, *others = self.share(f"agree/{name}", dict(content))
        differing = [
            (key, f"{key} is {theirs.get(key)!r} on host {i} and {first.get(key)!r} on host 0")
            for i, theirs in enumerate(others, 1)
            for key in sorted(first.keys() | theirs.keys())
            if theirs.get(key) != first.get(key)
        ]
        if differing:
            more = len(differing) - _SHOWN
            listed = "; ".join(text for _, text in differing[:_SHOWN])
            listed += f"; and {more} more" if more > 0 else ""
            raise InputError(
                f"the hosts differ: {listed}", key=differing[0][0], expected=hint or None
            )

    def _read(self, name: str) -> dict[int, str]:
        if self._client is None:
            return {}
        found = self._client.key_value_dir_get(f"{_KEYS}/{name}/")
        return {int(key.rsplit("/", 1)[1]): value for key, value in found}

    # ---- How they end ------------------------------------------------------------------------

    @contextmanager
    def stop_together(self) -> Iterator[None]:
        """Tell the others of an exception, which passes on if all of them have one too.

        If they have not, they are told, and this process exits here, its traceback last: what it
        would do on its way out waits for hosts that are no more.
        """
        try:
            yield
        except Preempted:  # all hosts have agreed to it
            raise
        except BaseException as error:
            if self._client is not None and not self._record.failed:
                self._fail(error)
            raise

    def _fail(self, error: BaseException) -> None:
        code, message = describe(error) or (EXIT_FAILED, _last_line(error))
        self._say_of_me(failed=True, code=code, message=message)
        while not all(i in self._others and self._has_ended(i) for i in self._silent):
            time.sleep(0.05)  # one that is dead ends this process: see _watch
        if not all(self._others[i].failed for i in self._silent):
            self._leave(code, message if describe(error) else "", error)

    def _has_ended(self, i: int) -> bool:
        return self._others[i].failed or self._others[i].phase == "left"

    def finish(self) -> None:
        """Wait until every host is ready to end, and take leave of the coordination service."""
        if self._client is not None:
            self._say_of_me(phase="done")
            while not all(i in self._others and self._is_done(i) for i in self._silent):
                time.sleep(0.05)
            self._end.set()
        jax.distributed.shutdown()

    def _is_done(self, i: int) -> bool:
        return self._others[i].phase == "done"

    def _say_of_me(self, **what: Any) -> None:
        """Renew this host's record, with changes."""
        with self._lock:
            if self._record.phase == "left":  # another thread is ending this process
                threading.Event().wait()
            self._record = replace(self._record, beat=self._record.beat + 1, **what)
            self.post("hosts", asdict(self._record))

    def watch(self) -> None:
        """Renew this host's record and look at the others', every second, until the end."""
        lost = 0
        while not self._end.wait(_BEAT):
            try:
                self._say_of_me()
                self._look()
                lost = 0
            except Exception as error:  # of gRPC; the store is in process 0
                lost += 1
                if lost * _BEAT > self._timeout and not self._end.is_set():
                    self._leave(EXIT_FAILED, f"{_LOST}: {_last_line(error)}")

    def _look(self) -> None:
        found = {i: _Record(**json.loads(text)) for i, text in self._read("hosts").items()}
        for i in self._silent:
            heard = found.get(i) != self._others.get(i)
            self._silent[i] = 0 if heard else self._silent[i] + 1
        self._others = found
        failed = [i for i in self._silent if i in found and found[i].failed]
        if failed and not self._record.failed:
            self._failed_for += _BEAT
            if self._failed_for > _GRACE:
                what = "; ".join(f"host {i} failed: {found[i].message}" for i in failed)
                self._leave(found[failed[0]].code, what)
        dead = [
            str(i)
            for i, beats in self._silent.items()
            if beats * _BEAT > self._timeout and (i not in found or found[i].phase == "running")
        ]
        if dead:
            self._leave(
                EXIT_FAILED,
                f"host {', '.join(dead)} of {self.count} gave no sign of life for "
                f"{self._timeout:g} s: killed, out of memory or out of reach; {_AGAIN}",
            )

    def _leave(self, code: int, message: str, error: BaseException | None = None) -> NoReturn:
        """Say why and end this process at once; process 0 after the others, which need its store.

        The main thread may hang in a collective that cannot be interrupted: no clean-up is waited
        for. A checkpoint that is being written is not committed then, and the one before counts.
        """
        with self._lock:
            if self._record.phase == "left":
                threading.Event().wait()
            self._record = replace(self._record, beat=self._record.beat + 1, phase="left")
        if error is not None and not message:
            traceback.print_exception(error)
        else:
            print(f"error: {one_line(message)}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        try:
            self.post("hosts", asdict(self._record))
            deadline = time.monotonic() + _FAREWELL
            while self.index == 0 and time.monotonic() < deadline:
                found = {i: json.loads(text) for i, text in self._read("hosts").items()}
                gone = (beats * _BEAT > self._timeout for beats in self._silent.values())
                left = (i in found and found[i]["phase"] == "left" for i in self._silent)
                if all(a or b for a, b in zip(gone, left, strict=True)):
                    time.sleep(_BEAT / 2)  # from their last word to their exit
                    break
                time.sleep(0.05)
        finally:
            os._exit(code)

    def explain_abort(self) -> str:
        """Say why JAX's C++ client may have aborted this process."""
        if self._record.phase == "left":  # another thread is ending this process
            threading.Event().wait()
        return "JAX aborted for the reason above" if self.index == 0 else f"{_LOST}; {_AGAIN}"


ALONE = Hosts()


@contextmanager
def join(
    *,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    multihost: bool = False,
    timeout: float = 60.0,
) -> Iterator[Hosts]:
    """Join this process to the others of its run, before JAX is used at all; alone without flags.

    Args:
        coordinator: HOST:PORT of process 0; with `num_processes` and `process_id`.
        multihost: take all three from the environment: TPU metadata, SLURM, Kubernetes, Open MPI.
        timeout: seconds without a sign of life after which a host counts as dead.

    Raises:
        InputError: flags that do not go together, or no cluster in the environment.
        RunError: the others cannot be reached.
    """
    explicit = _check_flags(coordinator, num_processes, process_id, multihost, timeout)
    if not explicit and not multihost:
        yield ALONE
        return
    # SIGTERM is ours (preemption.py): JAX's own handler loses one that comes before the first step.
    jax.config.update("jax_enable_preemption_service", False)
    hosts: Hosts | None = None

    def explain() -> str:
        where = f" at {coordinator}" if coordinator else ""
        apart = f"the hosts did not come together{where} within {_TOGETHER} s"
        return apart if hosts is None else hosts.explain_abort()

    with _abort_handled(explain):
        _initialize(explicit, timeout)
        hosts = Hosts(distributed.global_state.client, timeout=timeout)
        if hosts.count > 1:
            threading.Thread(target=hosts.watch, name="hosts", daemon=True).start()
        try:
            with hosts.stop_together():
                yield hosts
        finally:  # on all hosts alike: one that failed alone has ended in stop_together
            hosts.finish()


def _initialize(explicit: Mapping[str, Any], timeout: float) -> None:
    try:
        jax.distributed.initialize(
            **explicit,
            initialization_timeout=_TOGETHER,
            heartbeat_timeout_seconds=int(5 * timeout),  # ours tells better, and first
        )
    except ValueError as error:
        what = "no cluster was found in the environment"
        raise InputError(what, key="--multihost", found=one_line(str(error))) from error
    except RuntimeError as error:
        raise RunError(f"cannot join the other hosts: {_last_line(error)}") from error


@contextmanager
def _abort_handled(explain: Callable[[], str]) -> Iterator[None]:
    """Where JAX's C++ client aborts the process, say why in our words and exit 1.

    It does so when process 0 is gone or never came. A handler set by Python's `signal` would run
    too late, in the main thread; this one runs at once in the thread that aborts.
    """

    def handle(number: int) -> None:
        del number
        os.write(2, f"error: {explain()}\n".encode())
        os._exit(EXIT_FAILED)

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(handle)
    library = ctypes.CDLL(None)
    library.signal(signal.SIGABRT, handler)
    try:
        yield
    finally:
        library.signal(signal.SIGABRT, None)


def _check_flags(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    multihost: bool,
    timeout: float,
) -> dict[str, Any]:
    """Return the arguments of `jax.distributed.initialize` that the flags give."""
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if timeout < 2 * _BEAT:
        raise InputError("is too short", key="--host_timeout", expected="2 or more", found=timeout)
    if len(missing) == len(given):
        return {}
    if multihost:
        key = next(name for name in given if name not in missing)
        raise InputError("--multihost finds this out by itself", key=f"--{key}", expected="one")
    if missing:
        what = "--coordinator, --num_processes and --process_id go together"
        raise InputError(what, key=f"--{missing[0]}", found="nothing")
    assert coordinator is not None and num_processes is not None and process_id is not None
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        what, expected = "not an address", "HOST:PORT of process 0"
        raise InputError(what, key="--coordinator", expected=expected, found=coordinator)
    if num_processes < 1:
        raise InputError("not usable", key="--num_processes", expected="1 or more")
    if not 0 <= process_id < num_processes:
        expected = f"0 to {num_processes - 1}"
        raise InputError("not usable", key="--process_id", expected=expected, found=process_id)
    if process_id == 0:
        try:  # JAX's service would end in a segmentation fault
            socket.create_server(("", int(port))).close()
        except OSError as error:
            what = f"cannot listen on this port: {error.strerror}"
            raise InputError(what, key="--coordinator", found=coordinator) from error
    return {
        "coordinator_address": coordinator,
        "num_processes": num_processes,
        "process_id": process_id,
    }


def code_version() -> dict[str, str]:
    """Return what says which code this is: versions, and a digest of the package's files."""
    package = Path(tiue_jax.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package).as_posix()}\n".encode() + path.read_bytes())
    return {
        "tiue_jax": tiue_jax.__version__,
        "source": digest.hexdigest()[:16],
        "jax": jax.__version__,
        "flax": flax.__version__,
    }


def compiler_options() -> dict[str, str]:
    """Return what else decides which program a host compiles: all have to run the same one."""
    names = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
    effort = str(jax.config.values["jax_optimization_level"])
    return {**{name: os.environ.get(name, "") for name in names}, "--effort": effort}


def _last_line(error: BaseException) -> str:
    """Return an exception in one line, as the last of its traceback."""
    text = traceback.format_exception_only(error)[-1].strip() if str(error) else repr(error)
    return one_line(text)[:500]
