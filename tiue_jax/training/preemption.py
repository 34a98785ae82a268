"""Being told to stop: SIGTERM and SIGINT as a question that the loop asks between iterations."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import jax
from jax.experimental import multihost_utils

StopRequested = Callable[[int], bool]


@contextmanager
def catch_signals() -> Iterator[StopRequested]:
    """Yield `requested(step)`: whether to save now and end. A second signal kills as ever.

    On several hosts all of them say yes at the same step: JAX's coordination service has taken over
    SIGTERM there, and has to be asked at every step.
    """
    received: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def note(number: int, frame: FrameType | None) -> None:
        del frame
        received.append(number)
        signal.signal(number, before[signal.Signals(number)])

    def requested(step: int) -> bool:
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return bool(received)

    several = jax.process_count() > 1
    for number in before if not several else ():
        signal.signal(number, note)
    try:
        yield requested
    finally:
        for number, handler in before.items() if not several else ():
            signal.signal(number, handler)
