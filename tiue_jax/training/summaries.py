"""What a run tells: averages of its metrics, metrics.jsonl, TensorBoard, PNG files, a progress bar.

`Summaries` has the methods of clu's MetricWriter, and so can take its place; clu's own needs
TensorFlow to import. TensorBoard's event writer needs neither TensorFlow nor torch.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

import jax
import numpy as np
from clu import metrics as clu_metrics
from jaxtyping import Array
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from tqdm import tqdm

from tiue_jax.io.errors import RunError
from tiue_jax.io.files import write_atomic
from tiue_jax.io.images import Images, encode_png, image_grid

METRICS_FILE = "metrics.jsonl"
IMAGES_FOLDER = "images"
EVENTS_FOLDER = "tensorboard"
_SHOWN = ("loss/vsd", "loss/kl", "loss/lora")  # on the progress bar


class Window:
    """The metrics of the iterations since the last log. They stay on the device until asked for."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._steps: list[int] = []
        self._pending: list[Mapping[str, Array]] = []
        self._values: list[Mapping[str, float]] = []

    def append(self, step: int, metrics: Mapping[str, Array]) -> None:
        """Note the metrics of iteration `step`, without waiting for them."""
        self._steps.append(step)
        self._pending.append(metrics)

    def check(self) -> None:
        """Wait for the device, and hold every number noted so far to be finite.

        Raises:
            RunError: names the first iteration and metric that is not.
        """
        first = len(self._values)
        self._values += jax.device_get(self._pending)
        self._pending = []
        for step, values in zip(self._steps[first:], self._values[first:], strict=True):
            for name, value in sorted(values.items()):
                if not math.isfinite(value):
                    raise RunError(f"step {step}: {name} is {float(value)}")

    def means(self) -> dict[str, float]:
        """Check, return the mean of every metric, and begin a new window. {} for an empty one.

        An iteration that lacks a metric does not count for it.
        """
        self.check()
        names = sorted({name for values in self._values for name in values})
        means = {
            name: clu_metrics.Average.from_model_output(
                np.asarray([v[name] for v in self._values if name in v], np.float32)
            ).compute()
            for name in names
        }
        self._clear()
        return {name: float(mean) for name, mean in means.items()}


class StepClock:
    """Seconds an iteration, from log to log."""

    def __init__(self, step: int) -> None:
        self._step, self._time = step, time.monotonic()

    def lap(self, step: int) -> float | None:
        """Return the mean seconds an iteration since the last call, up to iteration `step`.

        None where there was none since.
        """
        now, done = time.monotonic(), step - self._step
        seconds = (now - self._time) / done if done else None
        self._step, self._time = step, now
        return seconds

    def restart(self, step: int, *, wait_for: Mapping[str, Array]) -> float | None:
        """The same, after waiting for `wait_for`: for an iteration that was compiled first.

        The next lap begins behind it.
        """
        jax.block_until_ready(wait_for)
        return self.lap(step)


class Summaries:
    """Writes scalars to metrics.jsonl and TensorBoard, and images as PNG files and to TensorBoard.

    On the first host; on others it does nothing.

    Args:
        workdir: the run's folder.
        step: the step the run goes on from; what was written for later ones is dropped.
    """

    def __init__(self, workdir: Path, *, step: int = 0) -> None:
        self._on = jax.process_index() == 0
        if not self._on:
            return
        self._images = workdir / IMAGES_FOLDER
        self._images.mkdir(exist_ok=True)
        for picture in self._images.glob("[0-9]" * 8 + "*.png"):
            if int(picture.name[:8]) > step:
                picture.unlink()
        path = workdir / METRICS_FILE
        _drop_later(path, step)
        self._lines: TextIO = path.open("a", encoding="utf-8")
        self._events = EventFileWriter(str(workdir / EVENTS_FOLDER))
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        event = event_pb2.Event(wall_time=time.time(), step=step + 1, session_log=start)
        self._events.add_event(event)  # TensorBoard drops what it has of this step and later ones

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write the scalars of a step: one line of JSON, {"step": ..., NAME: ...}."""
        if not self._on:
            return
        self._lines.write(json.dumps({"step": step, **scalars}) + "\n")
        self._lines.flush()
        values = [
            summary_pb2.Summary.Value(tag=name, simple_value=value)
            for name, value in scalars.items()
        ]
        self._add(step, values)

    def write_images(self, step: int, images: Mapping[str, Images]) -> None:
        """Write a grid of each batch of images: images/STEP.png, or images/STEP_NAME.png."""
        for name, batch in images.items() if self._on else ():
            grid = image_grid(batch)
            png = encode_png(grid)
            suffix = "" if name == "student" else f"_{name}"
            write_atomic(self._images / f"{step:08d}{suffix}.png", png)
            height, width, _ = grid.shape
            image = summary_pb2.Summary.Image(
                height=height, width=width, colorspace=3, encoded_image_string=png
            )
            self._add(step, [summary_pb2.Summary.Value(tag=f"images/{name}", image=image)])

    def _add(self, step: int, values: list[summary_pb2.Summary.Value]) -> None:
        summary = summary_pb2.Summary(value=values)
        event = event_pb2.Event(wall_time=time.time(), step=step, summary=summary)
        self._events.add_event(event)

    def flush(self) -> None:
        """Send everything to the disk, or to the bucket that is mounted in its place."""
        if self._on:
            self._lines.flush()
            os.fsync(self._lines.fileno())  # gcsfuse uploads then, or when the file is closed
            self._events.flush()

    def close(self) -> None:
        """Flush, and write no more."""
        if self._on:
            self._lines.close()
            self._events.close()


def _drop_later(path: Path, step: int) -> None:
    """Leave in a metrics file only whole lines of steps up to `step`."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, TypeError, KeyError):  # half a line, written when the run was killed
            continue
    write_atomic(path, "".join(kept))


def say(line: str) -> None:
    """Print a line on the first host's standard error, above the bar if there is one."""
    if jax.process_index() == 0:
        tqdm.write(line, file=sys.stderr)
        sys.stderr.flush()


class Progress:
    """A bar on a terminal, and a line a log where standard error goes to a file.

    Args:
        total: iterations of the whole run.
        step: iterations done before.
    """

    def __init__(self, total: int, step: int) -> None:
        self._lines = not sys.stderr.isatty()
        self._total = total
        self._bar = tqdm(
            total=total,
            initial=step,
            unit="step",
            disable=self._lines or jax.process_index() != 0,
            dynamic_ncols=True,
        )
        self._done = step

    def update(self, step: int, means: Mapping[str, float], step_seconds: float | None) -> None:
        """Show that `step` iterations are done, their losses and, if it is known, the time left."""
        losses = {name.split("/")[-1]: f"{means[name]:.4g}" for name in _SHOWN if name in means}
        self._bar.set_postfix(losses, refresh=False)
        self._bar.update(step - self._done)
        self._done = step
        if self._lines:
            shown = "  ".join(f"{name} {value}" for name, value in losses.items())
            if step_seconds is not None:
                left = tqdm.format_interval(step_seconds * (self._total - step))
                shown += f"  {step_seconds:.3g} s/step  {left} left"
            say(f"step {step}/{self._total}  {shown}")

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()
