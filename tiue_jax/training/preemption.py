"""Being told to stop: SIGTERM and SIGINT as a question that the loop asks between iterations."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from tiue_jax.training.hosts import ALONE, Hosts

StopRequested = Callable[[int], bool]

_ASKED, _STEPS = "stop", "stop_steps"  # names of exchanges between the hosts
_POLL = 0.5  # seconds


@contextmanager
def catch_signals(hosts: Hosts = ALONE) -> Iterator[StopRequested]:
    """Yield `requested(step)`: whether to save now and end. A second signal kills as ever.

    On several hosts, whichever got the signal, all say yes at the same step: the one after the
    furthest that any had come to. JAX has such an agreement too (`reached_preemption_sync_point`);
    it drops a SIGTERM that comes before the first step of a resumed run, and knows no Ctrl-C.
    """
    received: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def note(number: int, frame: FrameType | None) -> None:
        del frame
        received.append(number)
        signal.signal(number, before[signal.Signals(number)])

    agreement = _Agreement(hosts, received)
    for number in before:
        signal.signal(number, note)
    try:
        yield agreement.reached if hosts.count > 1 else lambda step: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        agreement.end()


class _Agreement:
    """The step at which all hosts stop, found by a thread while the loop goes on."""

    def __init__(self, hosts: Hosts, received: list[int]) -> None:
        self._hosts, self._received = hosts, received
        self._step, self._stop_at = 0, 2**62
        self._lock = threading.Lock()  # held from this host's word until the agreement
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._find, name="preemption", daemon=True)
        if hosts.count > 1:
            self._thread.start()

    def reached(self, step: int) -> bool:
        """Whether to stop at `step`; while the hosts agree on one, no step is passed."""
        with self._lock:
            self._step = step
            return step >= self._stop_at

    def _find(self) -> None:
        while not (self._received or self._hosts.posted(_ASKED)):
            if self._ended.wait(_POLL):
                break
        else:
            self._hosts.post(_ASKED, True)
        with self._lock:
            if self._ended.is_set():  # others may ask of this host later: it passes no further step
                self._hosts.post(_STEPS, self._step)
            else:
                self._stop_at = 1 + max(self._hosts.share(_STEPS, self._step))

    def end(self) -> None:
        """Answer to the others once more, and stop."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
