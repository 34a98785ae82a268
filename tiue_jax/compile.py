"""Compile the training iteration for a TPU slice, without a TPU: does it fit, what does it send?

    python -m tiue_jax.compile --config=configs/sd15.py --shapes=sd15 --topology=v5e:2x4 \
        --config.train.batch_size=8 --config.mesh.fsdp=8

No weights are read: --shapes names the teacher's. Needs libtpu (pip install libtpu), whose compiler
runs on any machine; a full-size step takes it half an hour on two cores. Prints bytes a chip,
flops and collectives, and writes them to --out as JSON. These are the compiler's figures.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from tiue_jax.io.errors import InputError, run_command
from tiue_jax.io.files import write_atomic
from tiue_jax.models.variants import VARIANTS, variant
from tiue_jax.training.config import flatten
from tiue_jax.training.tpu_compile import compile_step

_CONFIG = config_flags.DEFINE_config_file("config", None, "A config, as of tiue_jax.main.")
_SHAPES = flags.DEFINE_enum("shapes", "sd15", sorted(VARIANTS), "The teacher's networks.")
_TOPOLOGY = flags.DEFINE_string("topology", "v5e:2x4", "KIND:SHAPE of the slice.")
_OUT = flags.DEFINE_string("out", None, "JSON file to write.")
flags.mark_flags_as_required(["config"])


def main(argv: Sequence[str]) -> None:
    """Compile, print, write."""
    if len(argv) > 1:
        raise InputError("arguments are given as --name=value", found=" ".join(argv[1:]))
    report = compile_step(_CONFIG.value, variant(_SHAPES.value), _TOPOLOGY.value)
    print(f"{report.topology}: {report.chips} chips, batch {report.batch_size}, a chip:")
    for name in ("arguments", "outputs", "aliased", "temporaries", "peak"):
        print(f"  {name:<12}{getattr(report, name) / 1e9:9.3f} GB")
    print(
        f"  flops       {report.flops / 1e12:9.3f} T, accessed {report.bytes_accessed / 1e9:.1f} GB"
    )
    for kind, entry in sorted(report.collectives.items()):
        print(f"  {kind}: {entry['count']} in the program, {entry['bytes'] / 1e6:.1f} MB")
    print(f"  compiled in {report.seconds:.0f} s")
    if _OUT.value:
        config = {"shapes": _SHAPES.value, "config": flatten(_CONFIG.value)}
        write_atomic(_OUT.value, json.dumps(report.to_json() | config, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
