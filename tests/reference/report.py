"""A table of what was compared, and whether all of it is within its bound."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass
class Report:
    """Prints a row for every comparison and remembers those out of bounds."""

    rows: int = 0
    failures: list[str] = field(default_factory=list)
    worst: dict[str, float] = field(default_factory=dict)

    def title(self, text: str) -> None:
        """Begin a table."""
        print(f"\n{text}\n  {'':<70}{'ours':>14}{'recorded':>14}{'error':>11}{'bound':>9}")

    def row(
        self, kind: str, name: str, ours: float, recorded: float, error: float, bound: float
    ) -> None:
        """One comparison: `error` passes up to `bound`; not a number never passes."""
        ok = bool(error <= bound)
        self.rows += 1
        self.worst[kind] = max(self.worst.get(kind, 0.0), error)
        mark = "" if ok else "  <-- FAIL"
        print(f"  {name:<70}{ours:>14.6e}{recorded:>14.6e}{error:>11.1e}{bound:>9.0e}{mark}")
        if not ok:
            self.failures.append(f"{name}: error {error:.1e}, bound {bound:.0e}")

    def note(self, text: str) -> None:
        """Something to know that is no comparison."""
        print(f"  {text}")

    def scalar(self, kind: str, name: str, ours: float, recorded: float, bound: float) -> None:
        """Relative error; where 0 was recorded, ours must be 0."""
        difference = abs(ours - recorded)
        error = difference / abs(recorded) if recorded else (np.inf if difference else 0.0)
        self.row(kind, name, ours, recorded, error, bound)

    def finish(self) -> int:
        """Print the verdict; the exit code."""
        print("\nworst error of each kind:")
        for kind, worst in self.worst.items():
            print(f"  {kind:<40}{worst:.1e}")
        if self.failures:
            print(f"\nFAIL: {len(self.failures)} of {self.rows} comparisons are out of bounds:")
            for failure in self.failures[:20]:
                print(f"  {failure}")
            return 1
        print(f"\nPASS: {self.rows} comparisons are within their bounds")
        return 0
