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

    Loops: see `_turns`. On TPUs a reduce-scatter is a fusion of an all-reduce and of slices.
    """
    bodies = dict(_computations(hlo))
    times = _times(bodies)
    found = []
    for name, lines in bodies.items():
        for line in lines if times[name] else ():
            match = _COLLECTIVE.search(line) if any(kind in line for kind in KINDS) else None
            if match is None:
                continue
            kind, devices = match[2], _group_size(line)
            shapes, size = _results(*match.groups())
            if name.startswith("all-reduce-scatter"):
                kind, size = "reduce-scatter", size // devices
            found.append(Collective(kind, shapes, size, devices, times[name]))
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
        if "=%" in line or "={%" in line
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
    """Yield (name, lines) of every computation; the entry's name is "".

    An instruction is one line here. A kernel's has more in the text, of which the last begins "}}".
    """
    name: str | None = None
    lines: list[str] = []
    for line in hlo.splitlines():
        if name is None:
            if match := _COMPUTATION.match(line):
                name, lines = "" if match[1] else match[2], []
        elif line.startswith("  "):
            lines.append(line)
        elif line.startswith("}") and not line.startswith("}}"):
            yield name, lines
            name = None
        elif lines:
            lines[-1] += line


def _times(bodies: dict[str, list[str]]) -> dict[str, int]:
    """Return how often each computation runs in one run of the entry.

    A program's text has every computation before those that call it, and the entry last.
    """
    times = dict.fromkeys(bodies, 0)
    if "" in times:
        times[""] = 1
    for name in reversed(bodies):
        for line in bodies[name] if times[name] else ():
            if "=%" not in line and "={%" not in line:
                continue
            loop = _turns(line, bodies[name], bodies) if " while(" in line else 1
            for role, names in _CALLED.findall(line):
                turns = loop if role in ("body", "condition") else 1
                for called in re.findall(r"%([\w.\-]+)", names):
                    if called in times:
                        times[called] += times[name] * turns
    return times


class _Instruction(NamedTuple):
    operation: str
    operands: list[str]
    text: str  # behind the operation's "("


def _instructions(lines: list[str]) -> dict[str, _Instruction]:
    """Return the instructions of a computation by name, and that of its result as ""."""
    found = {}
    for line in lines:
        if match := _INSTRUCTION.match(line):
            name, _, operation, text = match.groups()
            operands = _OPERAND.findall(text.partition(")")[0])
            found[name] = _Instruction(operation, operands, text)
            if line.lstrip().startswith("ROOT "):
                found[""] = found[name]
    return found


def _turns(line: str, lines: list[str], bodies: dict[str, list[str]]) -> int:
    """Return how often a `while` of a computation's `lines` turns.

    The TPU compiler does not tell: then from the constants that its counter begins at, grows by and
    stays below. One turn where it is counted in another way.
    """
    if told := _TRIP_COUNT.search(line):
        return int(told[1])
    called = {role: names.strip("%, ") for role, names in _CALLED.findall(line)}
    loop = next(iter(_instructions([line]).values()))
    caller = _instructions(lines)
    try:
        condition, body = (_instructions(bodies[called[role]]) for role in ("condition", "body"))
        test = condition[""]
        counter, limit = (_made_by(name, condition) for name in test.operands)
        index = _index(counter)
        grown = _made_by(body[""].operands[index], body)
        before, step = (_made_by(name, body) for name in grown.operands)
        if (test.operation, grown.operation) != ("compare", "add") or _index(before) != index:
            return 1
        if "direction=LT" not in test.text:
            return 1
        begin = _made_by(_made_by(loop.operands[0], caller).operands[index], caller)
        return max(math.ceil((_constant(limit) - _constant(begin)) / _constant(step)), 0)
    except (KeyError, IndexError, ValueError):
        return 1


def _made_by(name: str, found: dict[str, _Instruction]) -> _Instruction:
    """Return the instruction that makes a value, behind copies of it."""
    while found[name].operation in ("copy", "bitcast"):
        name = found[name].operands[0]
    return found[name]


def _index(instruction: _Instruction) -> int:
    """Return which part of a tuple is taken; ValueError where none is."""
    if instruction.operation != "get-tuple-element":
        raise ValueError(instruction.operation)
    return int(instruction.text.partition("index=")[2].partition(",")[0])


def _constant(instruction: _Instruction) -> int:
    """Return the value of an integer constant; ValueError where it is none."""
    if instruction.operation != "constant":
        raise ValueError(instruction.operation)
    return int(instruction.text.partition(")")[0])


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
