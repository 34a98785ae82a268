"""What a test's config file does to the process that reads it: a quick step, and accidents.

And the port where the processes meet.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from tests.training.small_step import settled
from tests.training.tiny_run import make_config
from tests.training.toy_step import ToyStep, without_adam
from tiue_jax.data.pipeline import CutReport
from tiue_jax.training import setup, summaries

PATIENCE = 600  # seconds that a host waits before it fails


def free_port() -> int:
    """A port of this machine that nobody has.

    Below those from which the kernel takes one for whoever asks for any (ip_local_port_range): it
    is bound seconds later, and would else be another process's by then.
    """
    for _ in range(100):
        port = random.SystemRandom().randrange(20_000, 32_768)
        with socket.socket() as tried:
            try:
                tried.bind(("", port))
            except OSError:
                continue
            return port
    raise RuntimeError("100 ports, and all are taken")


def configure(folder: Path) -> ConfigDict:
    """Eight iterations of eight prompts, over whatever devices there are."""
    config = make_config(folder / "teacher", folder / "prompts.txt")
    config.train.batch_size = 8
    config.train.iterations = 8
    config.mesh.data = -1
    config.checkpoint.every = 100
    config.log.summary_every = 0
    return config


def use_toy_step() -> None:
    """Put in a step that compiles in no time, without Adam's moments."""
    setup.make_step = ToyStep()
    setup.init_state = without_adam(setup.init_state)


def settle() -> None:
    """Begin with a LoRA that has learnt: at first the VSD loss is a difference of near equals."""
    start = setup.init_state

    def started(*args: Any, **named: Any) -> Any:
        return settled(start(*args, **named), change=0.3)

    setup.init_state = started


def at_step(step: int, do: Callable[[], Any]) -> None:
    """Do something when iteration `step` is given to the devices; 0: at every one."""
    append = summaries.Window.append

    def noted(self: summaries.Window, number: int, metrics: Any) -> None:
        append(self, number, metrics)
        if step in (0, number):
            do()

    summaries.Window.append = noted  # type: ignore[method-assign]


def before_steps(do: Callable[[], Any]) -> None:
    """Do something while the run is set up."""
    load = setup.load_prompts

    def loaded(*args: Any, **named: Any) -> Any:
        do()
        return load(*args, **named)

    setup.load_prompts = loaded


def record_prompts(file: Path) -> None:
    """Write down every prompt that is trained on, in order."""

    class Recorded(CutReport):
        def __call__(self, texts: Sequence[str]) -> Any:
            with file.open("a") as lines:
                lines.writelines(f"{text}\n" for text in texts)
            return super().__call__(texts)

    setup.CutReport = Recorded


def full_disk() -> None:
    """As a disk that has no room for the arrays of a checkpoint, and has for the log."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))


def fail() -> None:
    """As a mistake of ours."""
    raise KeyError("a mistake of ours")


def tell(number: int) -> Callable[[], None]:
    """Get a signal; SIGKILL is what the kernel sends when memory is short."""
    return lambda: os.kill(os.getpid(), number)


def sleep(seconds: float) -> Callable[[], None]:
    """Be slow."""
    return lambda: time.sleep(seconds)


def until(true: Callable[[], bool]) -> Callable[[], None]:
    """Wait until something is true."""

    def wait() -> None:
        end = time.monotonic() + PATIENCE
        while not true():
            if time.monotonic() > end:
                raise TimeoutError(f"waited for {PATIENCE} s")
            time.sleep(0.05)

    return wait


def agreed() -> bool:
    """Whether the hosts know the step at which they stop: what finds it is a thread that ends."""
    return all(thread.name != "preemption" for thread in threading.enumerate())


__all__ = [
    "Path",
    "agreed",
    "at_step",
    "before_steps",
    "configure",
    "fail",
    "full_disk",
    "record_prompts",
    "settle",
    "signal",
    "sleep",
    "tell",
    "until",
    "use_toy_step",
]
