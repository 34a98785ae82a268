"""A table of what was compared, and whether all of it is within its bound."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

WIDEST = 10  # times a bound that rounding may widen it


def relative(difference: float, recorded: float) -> float:
    """Of the absolute of what was recorded; infinite for any of 0, and for what is no number."""
    error = difference / abs(recorded) if recorded else (np.inf if difference else 0.0)
    return error if np.isfinite(error) else np.inf


@dataclass
class Report:
    """Prints a row for every comparison and remembers those out of bounds."""

    rows: int = 0
    widened: int = 0
    failures: list[str] = field(default_factory=list)
    worst: dict[str, float] = field(default_factory=dict)

    def title(self, text: str) -> None:
        """Begin a table."""
        print(f"\n{text}\n  {'':<70}{'ours':>14}{'recorded':>14}{'error':>11}{'bound':>9}")

    def row(
        self,
        kind: str,
        name: str,
        ours: float,
        recorded: float,
        error: float,
        bound: float,
        noise: float = 0.0,
    ) -> None:
        """One comparison: `error` passes up to `bound`; not a number never passes.

        Where rounding alone makes `noise`, that is the bound, but at most WIDEST times as wide.
        """
        error = error if np.isfinite(error) else np.inf
        allowed = max(bound, min(noise, WIDEST * bound))
        ok, wide = error <= allowed, allowed > bound
        self.rows += 1
        self.widened += wide
        self.worst[kind] = max(self.worst.get(kind, 0.0), error)
        mark = " widened" * wide + "  <-- FAIL" * (not ok)
        bound = allowed
        print(f"  {name:<70}{ours:>14.6e}{recorded:>14.6e}{error:>11.1e}{bound:>9.0e}{mark}")
        if not ok:
            self.failures.append(f"{name}: error {error:.1e}, bound {bound:.0e}")

    def note(self, text: str) -> None:
        """Something to know that is no comparison."""
        print(f"  {text}")

    def scalar(
        self,
        kind: str,
        name: str,
        ours: float,
        recorded: float,
        bound: float,
        noise: float = 0.0,
    ) -> None:
        """Relative error; where 0 was recorded, ours must be 0."""
        self.row(kind, name, ours, recorded, relative(abs(ours - recorded), recorded), bound, noise)

    def finish(self) -> int:
        """Print the verdict; the exit code."""
        wide = f"; {self.widened} of the bounds were widened to what rounding makes"
        print("\nworst error of each kind:")
        for kind, worst in self.worst.items():
            print(f"  {kind:<40}{worst:.1e}")
        if self.failures:
            print(f"\nFAIL: {len(self.failures)} of {self.rows} comparisons are out of bounds:")
            for failure in self.failures[:20]:
                print(f"  {failure}")
            return 1
        print(f"\nPASS: {self.rows} comparisons are within their bounds{wide * bool(self.widened)}")
        return 0
