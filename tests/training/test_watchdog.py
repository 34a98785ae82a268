"""A stuck run says so, again ever more rarely, and says nothing when it is not stuck."""

import threading
import time
from collections.abc import Callable
from functools import partial
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest

from tiue_jax.training import watchdog as module
from tiue_jax.training.watchdog import watchdog


def told(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("warning: ")]


class Clock:
    """Seconds that pass as the watchdog waits for them: a busy machine changes nothing.

    `at` holds what happens at a second.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, until: float) -> None:
        self.now, self.until = 0.0, until
        self.begun, self.over = threading.Event(), threading.Event()
        self.at: dict[float, Callable[[], None]] = {}
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(module, "threading", SimpleNamespace(Event=self.event, Thread=Thread))

    def event(self) -> Any:
        ended = threading.Event()

        def wait(seconds: float) -> bool:
            assert self.begun.wait(60)
            self.now = round(self.now + seconds, 6)
            self.at.pop(self.now, lambda: None)()
            if self.now > self.until:
                self.over.set()
                return ended.wait()
            return False

        return SimpleNamespace(wait=wait, set=ended.set)


def stuck_here(clock: Clock) -> None:
    clock.begun.set()
    assert clock.over.wait(60)


def test_a_stuck_step_is_told_of_with_stacks_and_ever_more_rarely(capfd, monkeypatch):
    clock = Clock(monkeypatch, until=30)
    with watchdog(4, host=3):
        stuck_here(clock)
    said = capfd.readouterr().err
    assert told(said) == [
        f"warning: host 3: no step finished for {seconds} s, since the run began; it goes on; "
        "what every thread is doing:"
        for seconds in (4, 8, 16)
    ]
    assert said.count("in stuck_here") == 3


def test_a_step_begins_the_wait_again(capfd, monkeypatch):
    clock = Clock(monkeypatch, until=19)
    with watchdog(4) as finished:
        clock.at = {float(second): partial(finished, second) for second in (3, 6, 9, 12)}
        stuck_here(clock)
    assert [line.split(": ")[2].split(";")[0] for line in told(capfd.readouterr().err)] == [
        "no step finished for 4 s, since step 12"
    ]


@pytest.mark.parametrize("seconds", [0, 60])
def test_nothing_is_told_of_a_run_that_is_not_stuck(capfd, seconds: int):
    with watchdog(seconds) as finished:
        finished(1)
        time.sleep(0.3)
    assert capfd.readouterr().err == ""
