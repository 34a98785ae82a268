"""Measure a tiny-sd model: does a picture show what its caption asks for, and is the set lifelike?

    python -m examples.tiny_sd.measure --model=assets/tiny-sd --teacher --guidance_scale=3
    python -m examples.tiny_sd.measure --model=assets/tiny-sd-tiue
    python -m examples.tiny_sd.measure --images=FOLDER       PNG files, by name in prompt order
    python -m examples.tiny_sd.measure --real                rendered scenes: the best there is
    python -m examples.tiny_sd.measure --write_prompts=FILE  the prompts, one per line

Protocol: 1000 captions of scenes with seen colour-shape pairs and 250 with an unseen pair, all
fixed, each naming every colour, shape and position; image i has seed i. Accuracy by the scene
reader. On its features, the pictures of seen pairs are compared with rendered test pictures: by
Frechet distance with 2000 of them (percent of their total variance; real pictures get about 1), by
precision and recall (k = 3), density and coverage (k = 5) with as many as there are pictures.
Compare only numbers of equally many pictures.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path

import numpy as np
from absl import flags
from PIL import Image

from examples.tiny_sd.captions import Request, describe
from examples.tiny_sd.reader import HEADS, Reader, Readings
from examples.tiny_sd.render import render
from examples.tiny_sd.scenes import IMAGE_SIZE, Pairs, Scene, sample_scenes
from tiue_jax.evaluation.frechet import frechet_distance
from tiue_jax.evaluation.manifold import density_coverage, precision_recall
from tiue_jax.io.errors import InputError, run_command
from tiue_jax.io.files import require_absent, write_atomic
from tiue_jax.pretrained.pipeline import load_pipeline

FLAGS = flags.FLAGS
PROMPT_SEED, REFERENCE_SEED = 910_001, 910_002
NUM_SEEN, NUM_UNSEEN, NUM_REFERENCE = 1000, 250, 2000
BATCH = 50  # pictures sampled at a time

# (prompts, one seed each) -> uint8 [n, 64, 64, 3]
SampleFn = Callable[[Sequence[str], Sequence[int]], np.ndarray]

ATTRIBUTES = ("all", "count", "colour", "shape", "size", "position", "relation", "background")
COLUMNS = (  # what the table shows: metric, heading, format
    ("seen/all", "all right", "{:.1%}"),
    ("seen/colour", "colour", "{:.1%}"),
    ("seen/shape", "shape", "{:.1%}"),
    ("seen/size", "size", "{:.1%}"),
    ("seen/position", "position", "{:.1%}"),
    ("seen/relation", "relation", "{:.1%}"),
    ("seen/count", "count", "{:.1%}"),
    ("seen/background", "background", "{:.1%}"),
    ("unseen/all", "unseen pairs", "{:.1%}"),
    ("frechet", "Frechet", "{:.2f}"),
    ("recall", "recall", "{:.2f}"),
    ("coverage", "coverage", "{:.2f}"),
    ("precision", "precision", "{:.2f}"),
    ("density", "density", "{:.2f}"),
    ("seconds_per_image", "s/image", "{:.3f}"),
)


def evaluation_set(
    num_seen: int = NUM_SEEN, num_unseen: int = NUM_UNSEEN
) -> tuple[list[Scene], list[Request]]:
    """The fixed scenes and captions: the first of the seen ones, then the first of the unseen.

    The lists do not depend on how much of them is taken.
    """
    scenes: list[Scene] = []
    requests: list[Request] = []
    wanted: tuple[tuple[Pairs, int, int], ...] = (
        ("seen", num_seen, NUM_SEEN),
        ("unseen", num_unseen, NUM_UNSEEN),
    )
    for pairs, number, most in wanted:
        if not 0 <= number <= most:
            raise ValueError(f"{pairs}: from 0 to {most} prompts, got {number}")
        rng = np.random.default_rng([PROMPT_SEED, pairs == "unseen"])
        drawn = sample_scenes(rng, most, pairs=pairs)
        requests += [describe(scene, rng, complete=True) for scene in drawn][:number]
        scenes += drawn[:number]
    return scenes, requests


@cache
def reference_features(n: int = NUM_REFERENCE) -> np.ndarray:
    """Features of n rendered test pictures of the training distribution (shipped reader)."""
    scenes = sample_scenes(np.random.default_rng(REFERENCE_SEED), n)
    return Reader.load()(render(scenes)).features


def judge(readings: Readings, requests: Sequence[Request]) -> dict[str, np.ndarray]:
    """Whether each picture shows what its caption mentions.

    Of two objects, attributes are judged in the order that fits best; "relation" asks for the
    right axis and for the caption's order to fit at least as well as the other; "all" asks for
    everything at once. With a wrong number of objects all but the background is wrong.

    Returns:
        For each of ATTRIBUTES, float [n]: 1 right, 0 wrong, NaN not mentioned.
    """
    if len(readings) != len(requests):
        raise ValueError(f"{len(readings)} pictures for {len(requests)} captions")
    rows = [_judge_one(_read(readings, i), request) for i, request in enumerate(requests)]
    return {name: np.array([row.get(name, np.nan) for row in rows]) for name in ATTRIBUTES}


def _read(readings: Readings, i: int) -> dict[str, str]:
    """The i-th picture's reading in words."""
    return {name: HEADS[name][readings.labels[name][i]] for name in HEADS}


def _judge_one(seen: Mapping[str, str], request: Request) -> dict[str, bool]:
    """One picture: attribute -> right or wrong, for the attributes that the caption mentions."""
    number = len(request.objects)
    result = {"count": seen["count"] == str(number)}
    orders = [tuple(range(number)), tuple(reversed(range(number)))][:number]
    fits = [_fit(seen, request, order) for order in orders]
    totals = [sum(sum(v) for v in fit.values()) for fit in fits]
    best = fits[int(np.argmax(totals))]
    for name, values in best.items():
        if values:
            result[name] = result["count"] and all(values)
    if request.layout is not None:
        right = result["count"] and seen["layout"] == request.layout
        result["position" if number == 1 else "relation"] = right and totals[0] == max(totals)
    if request.background is not None:
        result["background"] = seen["background"] == request.background
    return result | {"all": all(result.values())}


def _fit(seen: Mapping[str, str], request: Request, order: Sequence[int]) -> dict[str, list[bool]]:
    """Right or wrong for each mentioned value, if slot k shows the caption's object order[k]."""
    fit: dict[str, list[bool]] = {"colour": [], "shape": [], "size": []}
    for slot, index in enumerate(order):
        for name, values in fit.items():
            asked = getattr(request.objects[index], name)
            if asked is not None:
                values.append(seen[f"{name}_{slot}"] == asked)
    return fit


def score(
    images: np.ndarray,
    requests: Sequence[Request],
    *,
    reader: Reader | None = None,
    reference: np.ndarray | None = None,
) -> dict[str, float]:
    """Measure pictures against their captions and against rendered test pictures.

    Args:
        images: uint8 [n, 64, 64, 3], one per request.
        requests: from `evaluation_set` or `captions.describe`.
        reader: the shipped one if None.
        reference: features of real pictures; `reference_features()` if None.

    Returns:
        "seen/X" and "unseen/X" for X in ATTRIBUTES: fraction right of the captions that mention X
        (left out where none does); "frechet", "precision", "recall", "density", "coverage" of the
        pictures with seen pairs (left out where there are fewer than 10).
    """
    reader = reader or Reader.load()
    readings = reader(images)
    verdicts = judge(readings, requests)
    held_out = np.array([r.is_held_out for r in requests], bool)
    result = {}
    for group, chosen in (("seen", ~held_out), ("unseen", held_out)):
        for name, verdict in verdicts.items():
            asked = verdict[chosen & ~np.isnan(verdict)]
            if len(asked):
                result[f"{group}/{name}"] = float(asked.mean())
    features = readings.features[~held_out]
    if len(features) >= 10:
        real = reference_features() if reference is None else reference
        result["frechet"] = frechet_distance(real, features)
        as_many = real[: len(features)]  # a ball's size depends on the number of features
        result |= precision_recall(as_many, features, k=3)._asdict()
        result |= density_coverage(as_many, features, k=5)._asdict()
    return result


def measure(
    sample_fn: SampleFn, requests: Sequence[Request], *, batch_size: int = BATCH
) -> tuple[dict[str, float], np.ndarray]:
    """Sample a picture per request (seed = its index) and score them.

    Returns:
        The metrics of `score` with "seconds_per_image" (in batches of `batch_size`, compilation
        left out), and the pictures.
    """
    prompts = [r.text for r in requests]
    seeds = list(range(len(prompts)))
    if not prompts:
        raise ValueError("no prompts to measure")
    batch_size = min(batch_size, len(prompts))
    sample_fn(prompts[:batch_size], seeds[:batch_size])  # compiles
    images, start = [], time.perf_counter()
    for i in range(0, len(prompts), batch_size):
        # the last batch is filled up from the front, so that its size compiles nothing new
        index = [j % len(prompts) for j in range(i, i + batch_size)]
        batch = sample_fn([prompts[j] for j in index], [seeds[j] for j in index])
        images.append(np.asarray(batch))
    seconds = (time.perf_counter() - start) / (len(images) * batch_size)
    pictures = np.concatenate(images)[: len(prompts)]
    return score(pictures, requests) | {"seconds_per_image": seconds}, pictures


def model_sampler(
    folder: str | Path,
    *,
    teacher: bool,
    num_steps: int | None = None,
    guidance_scale: float | None = None,
) -> SampleFn:
    """Sample from a model folder: a student in one pass, or a teacher by DDIM with guidance.

    Raises:
        InputError: no such model, or one of other pictures; when sampling, settings that make none.
    """
    pipeline = load_pipeline(folder, batch_size=BATCH)
    size = pipeline.model.latent_size * pipeline.model.pixels_per_latent
    if size != IMAGE_SIZE:
        raise InputError("makes pictures of another size", file=folder, expected="64", found=size)
    draw = partial(
        pipeline.sample,
        method="teacher" if teacher else "tiue",
        num_steps=num_steps,
        guidance_scale=guidance_scale,
    )

    def sample(prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        try:
            return draw(prompts, seeds)
        except ValueError as error:
            raise InputError(str(error), file=folder) from error

    return sample


def format_table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """A Markdown table: a line per model, a column per metric that any of them has."""
    columns = [c for c in COLUMNS if any(c[0] in row for row in rows.values())]
    lines = ["| | " + " | ".join(heading for _, heading, _ in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for name, row in rows.items():
        cells = [form.format(row[key]) if key in row else "" for key, _, form in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def read_images(folder: str | Path, number: int) -> np.ndarray:
    """Read `number` 64x64 PNG files in the order of their names; a grid.png is none of them.

    Raises:
        InputError: another number of files, one that is no picture, or one of another size.
    """
    files = sorted(f for f in Path(folder).glob("*.png") if f.name != "grid.png")
    if len(files) != number:
        raise InputError(
            "wrong number of PNG files", file=folder, expected=number, found=len(files)
        )
    images, expected = [], f"{IMAGE_SIZE}x{IMAGE_SIZE}"
    for file in files:
        try:
            with Image.open(file) as image:
                found = f"{image.width}x{image.height}"
                pixels = np.asarray(image.convert("RGB")) if found == expected else None
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise InputError("cannot be read as a picture", file=file) from error
        if pixels is None:
            raise InputError("picture of another size", file=file, expected=expected, found=found)
        images.append(pixels)
    return np.stack(images)


def define_flags() -> None:
    """Define this command's flags."""
    flags.DEFINE_string("model", None, "model folder to sample from")
    flags.DEFINE_bool("teacher", False, "sample by DDIM with guidance, not in one pass")
    flags.DEFINE_integer("num_steps", None, "DDIM steps, or decoder steps of a student")
    flags.DEFINE_float("guidance_scale", None, "guidance of the teacher")
    flags.DEFINE_string("images", None, "folder of PNG files to measure")
    flags.DEFINE_bool("real", False, "measure the rendered scenes themselves")
    flags.DEFINE_string("write_prompts", None, "new file to write the prompts to")
    flags.DEFINE_string("out", None, "new JSON file to write the metrics to")
    flags.DEFINE_integer("num_seen", NUM_SEEN, "prompts with seen pairs", 0, NUM_SEEN)
    flags.DEFINE_integer("num_unseen", NUM_UNSEEN, "prompts with unseen pairs", 0, NUM_UNSEEN)


def main(argv: Sequence[str]) -> None:
    """Measure what the flags name and print the table."""
    del argv
    scenes, requests = evaluation_set(FLAGS.num_seen, FLAGS.num_unseen)
    if not requests:
        raise InputError("no prompts", key="--num_seen, --num_unseen", expected="one or more")
    asked = [name for name in ("model", "images", "real", "write_prompts") if FLAGS[name].value]
    if len(asked) != 1:
        raise InputError(
            "choose one", key="--model, --images, --real or --write_prompts", found=asked or "none"
        )
    for name in ("write_prompts", "out"):
        path = FLAGS[name].value
        if path:
            require_absent(path, key=f"--{name}")
    if FLAGS.write_prompts:
        write_atomic(FLAGS.write_prompts, "".join(f"{r.text}\n" for r in requests))
        return
    if FLAGS.real:
        name, metrics = "rendered", score(render(scenes), requests)
    elif FLAGS.images:
        name, metrics = FLAGS.images, score(read_images(FLAGS.images, len(requests)), requests)
    else:
        sample_fn = model_sampler(
            FLAGS.model,
            teacher=FLAGS.teacher,
            num_steps=FLAGS.num_steps,
            guidance_scale=FLAGS.guidance_scale,
        )
        name, (metrics, _) = FLAGS.model, measure(sample_fn, requests)
    print(format_table({name: metrics}))
    if FLAGS.out:
        write_atomic(FLAGS.out, json.dumps({"name": name, "metrics": metrics}, indent=1) + "\n")


if __name__ == "__main__":
    define_flags()
    run_command(main)
