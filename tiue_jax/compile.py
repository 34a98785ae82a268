"""Compile for a TPU slice, without a TPU: does a run fit, what does it compute, move and send?

    python -m tiue_jax.compile --config=configs/sd15.py --topology=v5e:2x4 --config.mesh.fsdp=8
    python -m tiue_jax.compile --config=configs/sd15.py --topology=v6e:2x4 --what=sample

Nothing is read but the config: --shapes names the teacher's networks. Needs libtpu, whose compiler
runs on any machine: pip install "jax[tpu]". Full-size training takes it half an hour and 15 GB on
two cores at --effort=O1, which searches no tilings; at O2, as a run compiles unless it
is given --effort=O1 too, it was not done after 105 minutes. --nocompile tells parameters and
operations in a minute. LIBTPU_INIT_ARGS gives it options, as it does in a run. Exit code 1: it does
not fit; the line says what would help.

The figures are the compiler's and arithmetic, not a run's. "At least" is what the chip's published
peaks allow; the traffic counts what the compiler keeps on chip too, so its time is an estimate and
no minimum. docs/scaling.md shows them for the paper's run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from tiue_jax.io.errors import InputError, RunError, run_command
from tiue_jax.io.files import require_absent, write_atomic
from tiue_jax.models.variants import VARIANTS, variant
from tiue_jax.training.chips import tpu_slice
from tiue_jax.training.config import flatten
from tiue_jax.training.tpu_compile import EFFORTS, PROGRAMS, advice, compile_program, outline

_CONFIG = config_flags.DEFINE_config_file("config", None, "A config, as of tiue_jax.main.")
_SHAPES = flags.DEFINE_enum(
    "shapes", "sd15", sorted(VARIANTS), "The teacher's networks, whatever --config says."
)
_TOPOLOGY = flags.DEFINE_string("topology", "v5e:2x4", "KIND:SHAPE of the slice.")
_WHAT = flags.DEFINE_enum("what", "train", sorted(PROGRAMS), "An iteration, or a batch of images.")
_COMPILE = flags.DEFINE_bool("compile", True, "False: only parameters and flops, in a minute.")
_EFFORT = flags.DEFINE_enum("effort", "O1", EFFORTS, "The compiler's. O2 is a run's, and slow.")
_OUT = flags.DEFINE_string("out", None, "New JSON file to write, also where it does not fit.")
_TEXT = flags.DEFINE_string("text", None, "New file for the compiled program's text, gzipped.")
flags.mark_flags_as_required(["config"])


def main(argv: Sequence[str]) -> None:
    """Compile, print, write."""
    if len(argv) > 1:
        raise InputError("arguments are given as --name=value", found=" ".join(argv[1:]))
    for flag in (_OUT, _TEXT):
        if flag.value:
            require_absent(flag.value, key=f"--{flag.name}")
    where = tpu_slice(_TOPOLOGY.value)
    asked = _CONFIG.value, variant(_SHAPES.value), where, _WHAT.value
    known = outline(*asked)
    count, batch_size = len(where.devices), _CONFIG.value.train.batch_size
    print(f"{where.topology}: {count} chips, {_SHAPES.value}, batch {batch_size}; on each chip:")
    for name, size in known.parameters.items():
        print(f"  {name:<12} {size / 1e9:9.3f} GB")
    compute = known.flops / where.chip.flops
    print(f"  flops        {known.flops / 1e12:9.3f} T, at least {compute:.4f} s", flush=True)
    if not _COMPILE.value:
        return
    told = {"shapes": _SHAPES.value, "config": flatten(_CONFIG.value)}
    try:
        report = compile_program(*asked, _EFFORT.value, known, _TEXT.value)
    except RunError as error:
        refused = {"topology": where.topology, "chips": count, "what": _WHAT.value}
        refused |= {"parameters": known.parameters, "flops": known.flops, "refused": str(error)}
        _write(refused | {"effort": _EFFORT.value} | told)
        raise
    bounds = report.bounds(where.chip)
    for name in ("arguments", "outputs", "aliased", "temporaries", "peak"):
        print(f"  {name:<12} {getattr(report, name) / 1e9:9.3f} GB")
    taken = report.peak / report.memory
    print(f"  memory       {report.memory / 1e9:9.3f} GB, {taken:.0%} taken")
    traffic, sent = report.bytes_accessed / 1e9, report.network_bytes / 1e9
    print(f"  traffic      {traffic:9.3f} GB, {bounds['memory']:.4f} s if it were all of HBM")
    print(f"  network      {sent:9.3f} GB, at least {bounds['network']:.4f} s")
    for kind, entry in sorted(report.collectives.items()):
        print(f"    {kind}: {entry['times']} a run, {entry['bytes'] / 1e6:.1f} MB")
    print(f"  compiled in  {report.seconds:9.0f} s")
    _write(report.to_json() | told | {"bounds": bounds})
    if report.peak > report.memory:
        helps = advice(_CONFIG.value, report.chips, _WHAT.value)
        raise RunError(f"{report.topology}: does not fit; what would help: {helps}")


def _write(content: dict[str, Any]) -> None:
    if _OUT.value:
        write_atomic(_OUT.value, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
