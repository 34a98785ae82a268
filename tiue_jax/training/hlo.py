"""Reading a compiled program's text: which collectives it runs, how often, of how many bytes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_COLLECTIVE = re.compile(rf"= (.+?) ({'|'.join(KINDS)})(-start)?\(")
_CALLED = re.compile(r"(\w+)=\{?((?:%[\w.\-]+(?:, )?)+)\}?")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.+?) ([\w\-]+)\((.*)$")
_OPERAND = re.compile(r"%([\w.\-]+)")
_GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,]+)\}|\[\d+,(\d+)\])")
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[(.*?)\].*?\{('.*?)\}")
_FREE = ("parameter", "tuple", "get-tuple-element", "bitcast", "constant", "while", "conditional")
_ARRAY = re.compile(r"\b(pred|[a-z]+?(\d+)\w*)\[([\d,]*)\]")


class Collective(NamedTuple):
    """A collective of a program.

    Attributes:
        kind: one of KINDS.
        shapes: of the arrays that it gives out, on one device.
        bytes: of all of them together.
        devices: that take part in one of its groups.
        times: how often one run of the program comes by, loops counted.
    """

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    bytes: int
    devices: int
    times: int


def collectives(hlo: str) -> list[Collective]:
    """Return every collective of a compiled program, in the order of its text.

    A loop whose number of turns the compiler does not tell is counted as one turn.
    """
    bodies = dict(_computations(hlo))
    times = _times(bodies)
    found = []
    for name, lines in bodies.items():
        for line in lines:
            match = _COLLECTIVE.search(line)
            if match and times.get(name):
                shapes, size = _results(*match.groups())
                found.append(Collective(match[2], shapes, size, _group_size(line), times[name]))
    return found


def moved_bytes(found: list[Collective]) -> float:
    """Return the bytes that one device sends for all these collectives, done in rings.

    With n devices in a group and s bytes given out: all-gather and all-to-all s (n - 1) / n,
    reduce-scatter s (n - 1), all-reduce twice s (n - 1) / n, collective-permute s.
    """
    shares = {
        "all-gather": lambda n: (n - 1) / n,
        "all-to-all": lambda n: (n - 1) / n,
        "reduce-scatter": lambda n: n - 1.0,
        "all-reduce": lambda n: 2 * (n - 1) / n,
        "collective-permute": lambda n: 1.0,
    }
    moved = (one.times * one.bytes * shares[one.kind](one.devices) for one in found)
    return float(sum(moved))


def loop_share(hlo: str) -> float:
    """Return the program's memory traffic over that with every loop's body counted once.

    Of each instruction outside of fusions, what it reads and what it writes.
    """
    bodies = dict(_computations(hlo))
    fused = {
        name
        for lines in bodies.values()
        for line in lines
        for role, names in _CALLED.findall(line)
        if role in ("calls", "to_apply")
        for name in re.findall(r"%([\w.\-]+)", names)
    }
    traffic = {name: _traffic(lines) for name, lines in bodies.items() if name not in fused}
    times = _times(bodies)
    once = sum(size for name, size in traffic.items() if times[name])
    return sum(size * times[name] for name, size in traffic.items()) / once if once else 1.0


def totals(found: list[Collective]) -> dict[str, dict[str, int]]:
    """Return kind -> {"count": in the text, "times": run, "bytes": given out in all runs}."""
    sums: dict[str, dict[str, int]] = {}
    for one in found:
        entry = sums.setdefault(one.kind, {"count": 0, "times": 0, "bytes": 0})
        entry["count"] += 1
        entry["times"] += one.times
        entry["bytes"] += one.times * one.bytes
    return sums


def _computations(hlo: str) -> Iterator[tuple[str, list[str]]]:
    """Yield (name, lines) of every computation; the entry's name is ""."""
    name: str | None = None
    lines: list[str] = []
    for line in hlo.splitlines():
        if name is None:
            if match := _COMPUTATION.match(line):
                name, lines = "" if match[1] else match[2], []
        elif line.startswith("}"):
            yield name, lines
            name = None
        else:
            lines.append(line)


def _times(bodies: dict[str, list[str]]) -> dict[str, int]:
    """Return how often each computation runs in one run of the entry.

    A program's text has every computation before those that call it, and the entry last.
    """
    times = dict.fromkeys(bodies, 0)
    if "" in times:
        times[""] = 1
    for name in reversed(bodies):
        for line in bodies[name] if times[name] else ():
            trips = _TRIP_COUNT.search(line)
            for role, names in _CALLED.findall(line):
                turns = int(trips[1]) if trips and role in ("body", "condition") else 1
                for called in re.findall(r"%([\w.\-]+)", names):
                    if called in times:
                        times[called] += times[name] * turns
    return times


def _traffic(lines: list[str]) -> int:
    """Return the bytes that a computation's instructions read and write."""
    sizes: dict[str, int] = {}
    total = 0
    for line in lines:
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        name, results, operation, arguments = match.groups()
        sizes[name] = _size(_ARRAY.findall(results))
        if operation not in _FREE:
            total += sizes[name]
            total += sum(sizes.get(operand, 0) for operand in _OPERAND.findall(arguments))
    return total


def _group_size(line: str) -> int:
    """Return how many devices a collective's groups have; 2 where it does not say."""
    if match := _GROUPS.search(line):
        return len(match[1].split(",")) if match[1] else int(match[2])
    if match := _MESH_GROUPS.search(line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", match[2]))
    return 2


def _size(arrays: list[tuple[str, str, str]]) -> int:
    return sum(
        math.prod(int(side) for side in shape.split(",") if side)
        * (1 if dtype == "pred" else max(int(bits) // 8, 1))
        for dtype, bits, shape in arrays
    )


def _results(results: str, kind: str, start: str | None) -> tuple[tuple[tuple[int, ...], ...], int]:
    """Return shapes and bytes of what a collective gives out.

    The asynchronous start of all-gather and collective-permute gives (operands, results, ...).
    """
    arrays = _ARRAY.findall(results)
    if start and kind == "all-gather":
        arrays = arrays[len(arrays) // 2 :]
    elif start and kind == "collective-permute":
        arrays = arrays[1:2]
    shapes = tuple(tuple(int(side) for side in shape.split(",") if side) for _, _, shape in arrays)
    return shapes, _size(arrays)
