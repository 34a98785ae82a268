"""The TPU chips that a program can be compiled for, and what their maker says of them."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

from jax.experimental import topologies

from tiue_jax.io.errors import InputError

GIB = 2**30


class Chip(NamedTuple):
    """Published peaks of one chip.

    Attributes:
        memory: bytes of HBM.
        flops: bf16 operations a second.
        bandwidth: bytes a second between HBM and the chip.
        network: bytes a second that the chip sends to its neighbours over all links together; as
            many arrive at the same time.
        shapes: slices that are offered, "x" between the sides.
        options: how the compiler is asked for one device a chip.
        source: of the numbers.
    """

    memory: int
    flops: float
    bandwidth: float
    network: float
    shapes: tuple[str, ...]
    options: dict[str, Any]
    source: str


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
_DOCS = "cloud.google.com/tpu/docs"

CHIPS: dict[str, Chip] = {
    # Inter-chip bandwidth of v4: six links of 45 GB/s each way (jax-ml.github.io/scaling-book);
    # of the others, half of the bidirectional number of the documentation.
    "v4": Chip(
        32 * GIB, 275e12, 1200e9, 270e9, _CUBES, {"chip_config_name": "megacore"}, f"{_DOCS}/v4"
    ),
    "v5e": Chip(16 * GIB, 197e12, 819e9, 200e9, _FLAT, {}, f"{_DOCS}/v5e"),
    "v5p": Chip(95 * GIB, 459e12, 2765e9, 600e9, _CUBES, {}, f"{_DOCS}/v5p"),
    "v6e": Chip(32 * GIB, 918e12, 1600e9, 400e9, _FLAT, {}, f"{_DOCS}/v6e"),
}


class Slice(NamedTuple):
    """A slice of a TPU pod: its name, its kind of chip, its devices as the compiler knows them."""

    topology: str
    chip: Chip
    devices: list[Any]


def tpu_slice(topology: str) -> Slice:
    """Return the slice called `topology`, such as "v5e:4x4".

    Raises:
        InputError: there is no such slice; the message lists those there are. Or libtpu, which
            holds the compiler, is not installed.
    """
    kind, _, shape = topology.partition(":")
    chip = CHIPS.get(kind)
    if chip is None or shape not in chip.shapes:
        known = "; ".join(f"{name}:{{{','.join(chip.shapes)}}}" for name, chip in CHIPS.items())
        raise InputError("no such slice", key="--topology", expected=known, found=topology)
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there need be no TPU here
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nor has one to be free
    options = dict(chip.options)
    if shape == "1x1":
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
    except Exception as error:  # of several classes, by what is wrong and by version
        raise InputError(
            f"the TPU compiler does not start: {' '.join(str(error).split())[:200]}",
            key="--topology",
            expected='libtpu: pip install "jax[tpu]" (it needs no TPU)',
            found=topology,
        ) from error
    return Slice(topology, chip, list(found.devices))
