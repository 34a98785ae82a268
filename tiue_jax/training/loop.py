"""The training run: read, restore, iterate, export. One page, in the order in which it happens.

A run is a function of its config, teacher and prompts. The same command again goes on from the
newest checkpoint. Precedence: a checkpoint in the workdir > `student.start` > the teacher.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from clu import parameter_overview
from ml_collections import ConfigDict

from tiue_jax.io.errors import InputError, Preempted, RunError
from tiue_jax.pretrained.folder import TRAINING_FILE
from tiue_jax.pretrained.jsonfile import read_object
from tiue_jax.training import sharding
from tiue_jax.training.checkpoint import Checkpoints
from tiue_jax.training.config import check_config, flatten, refuse_changes
from tiue_jax.training.export import export_student
from tiue_jax.training.hosts import ALONE, Hosts, code_version, compiler_options
from tiue_jax.training.preemption import catch_signals
from tiue_jax.training.setup import Iterate, Setup, set_up
from tiue_jax.training.state import TrainState
from tiue_jax.training.summaries import Progress, StepClock, Summaries, Window, say
from tiue_jax.training.validation import make_validation
from tiue_jax.training.watchdog import watchdog
from tiue_jax.training.workdir import RUN_FILE, cache_programs, claim, read_run, write_run

STUDENT_FOLDER = "student"


def train(config: ConfigDict, workdir: Path, hosts: Hosts = ALONE) -> None:
    """Distil `config.teacher` into `workdir/student`; on several hosts, by all of them together.

    Raises:
        InputError: config, teacher, prompts or workdir are not usable, or not those of the run that
            was begun in `workdir`, or not the same on all hosts.
        RunError: a metric or a weight is not finite.
        Preempted: told to stop, and saved.
    """
    check_config(config)
    workdir = workdir.resolve()
    end, log = config.train.iterations, config.log
    with ExitStack() as stack, hosts.stop_together():
        # ---- Read ---------------------------------------------------------------------------
        finished = stack.enter_context(watchdog(log.stuck_after, host=hosts.index))
        hosts.agree("command", flatten(config) | code_version() | compiler_options())
        stack.enter_context(claim(workdir, hosts))
        stack.enter_context(cache_programs(workdir))
        stopping = stack.enter_context(catch_signals(hosts))
        run = set_up(config, say, hosts)
        key_init, key_draws, key_images = jax.random.split(jax.random.key(config.seed), 3)

        # ---- Restore: the newest whole checkpoint, else the teacher's weights ------------------
        checkpoints = Checkpoints(workdir, keep=config.checkpoint.keep, hosts=hosts)
        stack.enter_context(_say_where_to_resume(checkpoints))
        stack.callback(checkpoints.close)  # waits for the last save, however the run ends
        found = checkpoints.restore(
            run.abstract, run.batches, lambda meta: refuse_changes(meta, run.description, workdir)
        )
        exported, noted = (workdir / STUDENT_FOLDER).exists(), (workdir / RUN_FILE).exists()
        if found is None and exported and noted:  # what saved nothing may be begun otherwise
            refuse_changes(read_run(workdir), run.description, workdir)
        state = run.start(key_init) if found is None else found.state
        start = 0 if found is None else found.step
        if found is None or start < end or not noted:  # else what is noted is what was done
            write_run(workdir, run.description)
        _announce(run, state, start, end)

        # ---- What it tells -------------------------------------------------------------------
        summaries, progress = Summaries(workdir, step=start), Progress(end, start)
        stack.callback(summaries.close)
        stack.callback(progress.close)
        draw = None
        if log.summary_every and log.validation_prompts:
            draw = make_validation(
                run.sd, log.validation_prompts, run.options, key_images, run.mesh
            )
        if draw and found is None:
            summaries.write_images(0, {"student": draw(state.ema)})

        # ---- Iterate: nothing waits for the device but logs, images and saves --------------------
        window, clock, compiled = Window(), StepClock(start), set[Iterate]()
        key_draws = _everywhere(run.mesh, key_draws)
        for step in range(start + 1, end + 1):
            ids = next(run.batches)["input_ids"]
            iterate = run.iterate_lora if run.options.is_lora_only(step) else run.iterate
            ids = jax.make_array_from_process_local_data(sharding.batch_sharding(run.mesh), ids)
            with jax.transfer_guard("disallow"):  # nothing crosses but what is said to
                state, metrics = iterate(state, run.frozen, ids, key_draws)
            window.append(step, metrics)
            stop = stopping(step)

            if iterate not in compiled:
                compiled.add(iterate)
                seconds = clock.restart(step, wait_for=metrics)
                if step == start + 1:
                    say(f"first step, with compilation: {seconds:.1f} s")
            if stop or step == end or step % log.every == 0:
                means, seconds = window.means(), clock.lap(step)
                epoch = step * config.train.batch_size / len(run.prompts)
                times = {} if seconds is None else {"time/step_ms": 1000 * seconds}
                summaries.write_scalars(step, means | times | {"epoch": epoch})
                progress.update(step, means, seconds)
            if draw and (step % log.summary_every == 0 or step == end):
                summaries.write_images(step, {"student": draw(state.ema)})
            if stop or step == end or step % config.checkpoint.every == 0:
                window.check()
                checkpoints.save(step, state, run.description, run.batches)
                summaries.flush()
            if stop and step < end:
                raise Preempted(f"told to stop; saved step {step}, the same command goes on")
            finished(step)

        # ---- Export: the moving average, as a diffusers folder ---------------------------------
        if report := run.tokenize.summary():
            say(report)
        made = run.description  # by what: of a run that was done already, what its checkpoint says
        if found is not None and start >= end:
            made = {name: found.meta.get(name) for name in made}
        _export(run, state, workdir, {"step": max(start, end), **made})
        say(f"done: {workdir / STUDENT_FOLDER}")


@contextmanager
def _say_where_to_resume(checkpoints: Checkpoints) -> Iterator[None]:
    """Add the newest checkpoint to the message of a run that fails."""
    try:
        yield
    except RunError as error:
        latest = checkpoints.latest()
        newest = "there is no checkpoint" if latest is None else f"newest checkpoint: step {latest}"
        raise RunError(f"{error}; {newest}") from error


def _announce(run: Setup, state: TrainState, start: int, end: int) -> None:
    """Say what is about to run."""
    count = parameter_overview.count_parameters
    say(f"teacher {run.sd.folder}: UNet of {count(run.frozen.teacher):,} parameters")
    devices = f"{jax.device_count()} {jax.default_backend()} devices"
    if jax.process_count() > 1:
        devices += f" on {jax.process_count()} hosts"
    say(f"LoRA: {count(state.lora):,} parameters; {devices}")
    say(f"state: {sharding.placement(run.abstract, run.mesh)}")
    if run.description["config"]["mesh.shard_teacher"]:
        say(f"teacher: {sharding.placement(run.frozen, run.mesh)}")
    repeats = f" ({run.prompts.repeats:,} repeats left out)" if run.prompts.repeats else ""
    say(f"prompts {run.prompts.source}: {len(run.prompts):,}{repeats}")
    begun = run.description["config"]["student.start"] or "the teacher"
    whence = f"from {begun}" if start == 0 else f"resumed from step {start}"
    say(f"{whence}, to step {end}" if start < end else f"step {start}: nothing is left to do")
    if start < end and run.options.student_updates(end) < 1:
        say(
            f"warning: in {end} iterations the student learns in none: they are the LoRA's alone "
            "(train.lora_warmup, train.student_every)"
        )


def _export(run: Setup, state: TrainState, workdir: Path, training: dict[str, Any]) -> None:
    """Write the EMA student to `workdir/student`, unless this very one is there.

    Another one is moved aside.

    Args:
        training: what made it: step, config, teacher, prompts and code.
    """
    folder = workdir / STUDENT_FOLDER
    params = jax.tree.map(partial(_gather, run.mesh), state.ema)
    if jax.process_index() != 0:
        return
    if folder.exists():
        earlier = _read_training(folder)
        if earlier == training:
            return
        exported = earlier.get("step")
        known = isinstance(exported, int)
        name = f"{STUDENT_FOLDER}_{f'{exported:08d}' if known else 'unknown'}"
        free = next(
            n for i in range(10**6) if not (n := workdir / f"{name}{f'.{i}' * bool(i)}").exists()
        )
        folder.rename(free)
    export_student(
        run.sd,
        params,
        folder,
        num_steps=run.options.num_steps,
        timestep_spacing=run.options.timestep_spacing,
        training=training,
    )


def _gather(mesh: jax.sharding.Mesh, x: jax.Array) -> np.ndarray | None:
    """Return an array of which parts may be on other hosts, on the first; all have to call it."""
    if jax.process_count() > 1:
        x = _everywhere(mesh, x)
    return jax.device_get(x) if jax.process_index() == 0 else None


def _everywhere(mesh: jax.sharding.Mesh, x: jax.Array) -> jax.Array:
    """Return an array whole on every device of the mesh."""
    return jax.jit(_same, out_shardings=jax.NamedSharding(mesh, sharding.REPLICATED))(x)


def _same(x: jax.Array) -> jax.Array:
    return x


def _read_training(folder: Path) -> dict[str, Any]:
    """Return what an export says of how it was made; {} where it does not say."""
    try:
        return read_object(folder / TRAINING_FILE)
    except InputError:
        return {}
