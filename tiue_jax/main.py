"""Distil a Stable Diffusion teacher into a student that draws an image in one pass.

    python -m tiue_jax.main --config=configs/tiny.py --workdir=runs/tiny

The config says everything (configs/default.py lists and explains every key); any of it can be
overridden: --config.train.batch_size=16 --config.data.source=prompts.txt. The order is the command
line's: --config first.

In the workdir come metrics.jsonl, tensorboard/ (`tensorboard --logdir=WORKDIR`), images/ (the
validation prompts, always from the same noise), checkpoints/, .jax_cache/ (compiled programs, so
that a run that goes on compiles nothing; unless JAX_COMPILATION_CACHE_DIR names another folder),
and at the end student/: an ordinary diffusers folder, for
`python -m tiue_jax.sample --model=WORKDIR/student`.

The same command again resumes the run bit for bit, or begins again where nothing was saved yet. A
config, teacher or prompts that have changed are refused. What may change: where teacher, prompts,
student.start, clip.model and clip.taesd are found, but not what they hold (data.field and
data.deduplicate likewise); train.remat; log, checkpoint and mesh; train.iterations where the
learning rate is constant; train.accumulate where there is no CLIP term. SIGTERM and Ctrl-C save
first (exit code 75); a second one does not wait. A loss or weight that is not finite is not saved
and ends the run (exit code 1), as does a device with too little memory.

On many hosts the same command runs on each, with one workdir that all share, and --multihost on TPU
pods and where SLURM, Kubernetes or Open MPI started it; elsewhere with, on host I of N,

    --coordinator=HOST0:PORT --num_processes=N --process_id=I

The hosts first compare config, code, compiler options, prompts and teacher. A signal to one stops
all at the same step; if one fails or dies, all stop. A checkpoint goes on on any number of hosts
and devices.
"""

from collections.abc import Sequence
from pathlib import Path

import jax
from absl import flags
from ml_collections import config_flags

from tiue_jax.io.errors import InputError, run_command
from tiue_jax.training.hosts import join
from tiue_jax.training.loop import train

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "What to train: a file of configs/, or your own.", lock_config=True
)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: a new one, or one to resume.")
COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, on all hosts.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many hosts run this command.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
MULTIHOST = flags.DEFINE_bool(
    "multihost", False, "Find the hosts in the environment: TPU pod, SLURM, Kubernetes, Open MPI."
)
HOST_TIMEOUT = flags.DEFINE_float(
    "host_timeout", 60.0, "Seconds without a sign of life after which a host counts as dead."
)
EFFORT = flags.DEFINE_enum(
    "effort", None, ["O0", "O1", "O2", "O3"], "The compiler's, the same on all hosts. O1 is sooner"
    " done than O2, JAX's default for TPUs, and may run slower: docs/scaling.md."
)  # fmt: skip
flags.mark_flags_as_required(["config", "workdir"])


def main(argv: Sequence[str]) -> None:
    """Run one distillation."""
    if len(argv) > 1:
        raise InputError("arguments are given as --name=value", found=" ".join(argv[1:]))
    workdir = str(WORKDIR.value)
    if "://" in workdir:
        raise InputError(
            "is not a folder; a bucket is mounted as one (docs/launch.md)",
            file=workdir,
            key="--workdir",
        )
    if EFFORT.value is not None:
        jax.config.update("jax_optimization_level", EFFORT.value)
    with join(
        coordinator=COORDINATOR.value,
        num_processes=NUM_PROCESSES.value,
        process_id=PROCESS_ID.value,
        multihost=MULTIHOST.value,
        timeout=HOST_TIMEOUT.value,
    ) as hosts:
        train(CONFIG.value, Path(workdir), hosts)


if __name__ == "__main__":
    run_command(main)
