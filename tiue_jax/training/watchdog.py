"""A run that is stuck says so, and where."""

from __future__ import annotations

import faulthandler
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def watchdog(seconds: float | int, *, host: int = 0) -> Iterator[Callable[[int], None]]:
    """Yield `finished(step)`; if it is not called for `seconds`, print what every thread is doing.

    Again after twice, four times, ... the time. The run goes on: it may only be slow. The loop
    calls it when it has given a step to the device, and is held up by the device a few steps later.

    Args:
        seconds: 0: never.
        host: index of this process, named in the message.
    """
    if seconds == 0:
        yield lambda step: None
        return
    ended = threading.Event()
    last: tuple[str, float] = ("the run began", time.monotonic())

    def finished(step: int) -> None:
        nonlocal last
        last = (f"step {step}", time.monotonic())

    def watch() -> None:
        seen, patience = last, seconds
        while not ended.wait(min(1.0, seconds / 4)):
            if last is not seen:
                seen, patience = last, seconds
            idle = time.monotonic() - seen[1]
            if idle >= patience:
                print(
                    f"warning: host {host}: no step finished for {idle:.0f} s, since {seen[0]}; "
                    "it goes on; what every thread is doing:",
                    file=sys.stderr,
                    flush=True,
                )
                faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
                patience *= 2

    thread = threading.Thread(target=watch, name="watchdog", daemon=True)
    thread.start()
    try:
        yield finished
    finally:
        ended.set()
        thread.join()
