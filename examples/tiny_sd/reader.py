"""The scene reader: a small classifier that says what a 64x64 picture shows.

It judges generated pictures (does the picture show what the caption asked for?), and its last
hidden layer gives the features for the Frechet distance, recall and coverage.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import flax
import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Array, Float, UInt8
from safetensors.numpy import load_file, save_file

from examples.tiny_sd.scenes import (
    BACKGROUNDS,
    COLOURS,
    LAYOUTS,
    OTHER,
    SHAPES,
    SIZES,
    Scene,
)
from tiue_jax.io.errors import InputError

COUNTS = ("0", "1", "2", "3")  # 3: three or more
SLOTS = 2
HEADS: dict[str, tuple[str, ...]] = {
    "count": COUNTS,
    "layout": LAYOUTS,
    "background": BACKGROUNDS,
    **{f"shape_{k}": (*SHAPES, OTHER) for k in range(SLOTS)},
    **{f"colour_{k}": COLOURS for k in range(SLOTS)},
    **{f"size_{k}": SIZES for k in range(SLOTS)},
}
ASSET = Path(__file__).resolve().parents[2] / "assets" / "scene-reader"
WEIGHTS, CONFIG = "reader.safetensors", "config.json"
BATCH = 250  # pictures read at a time


class SceneReader(nn.Module):
    """A plain convolutional network with one classifier per attribute.

    Args:
        widths: channels at 16x16, 8x8 and 4x4.
        num_features: size of the last hidden layer.
    """

    widths: tuple[int, int, int] = (48, 80, 112)
    num_features: int = 128

    @nn.compact
    def __call__(
        self, pixels: Float[Array, "b 64 64 3"]
    ) -> tuple[Float[Array, "b f"], dict[str, Float[Array, "b classes"]]]:
        """Read pictures.

        Args:
            pixels: RGB in [-1, 1].

        Returns:
            Features (unbounded), and logits for each entry of HEADS.
        """
        b = pixels.shape[0]
        x = pixels.reshape(b, 32, 2, 32, 2, 3).transpose(0, 1, 3, 2, 4, 5).reshape(b, 32, 32, 12)
        first, second, third = self.widths
        for i, (width, stride) in enumerate(
            ((first, 2), (first, 1), (second, 2), (second, 1), (third, 2))
        ):
            x = nn.Conv(width, (3, 3), (stride, stride), use_bias=False, name=f"conv_{i}")(x)
            x = nn.GroupNorm(8, epsilon=1e-5, name=f"norm_{i}")(x)
            x = nn.relu(x)
        features = nn.Dense(self.num_features, name="features")(x.reshape(b, -1))
        hidden = nn.relu(features)
        logits = {name: nn.Dense(len(HEADS[name]), name=name)(hidden) for name in HEADS}
        return features, logits


@dataclass(frozen=True)
class Readings:
    """What the reader sees in n pictures.

    Args:
        features: float32 [n, f].
        labels: for each entry of HEADS, class indices [n]. Where count is not 2 the second slot
            says nothing.
    """

    features: np.ndarray
    labels: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.features)


class Reader:
    """The trained reader with its parameters: `Reader.load()(images)`.

    Args:
        model: the network.
        params: its parameters.
        feature_scale: what features are multiplied with, see `calibrated`.
    """

    def __init__(self, model: SceneReader, params: Mapping, feature_scale: float = 1.0):
        self.model = model
        self.params = params
        self.feature_scale = feature_scale
        self._apply = jax.jit(model.apply)

    @classmethod
    def load(cls, folder: str | Path = ASSET) -> "Reader":
        """Read a folder written by `save_reader`.

        Raises:
            InputError: the folder lacks a file, or the file is of another reader.
        """
        folder = Path(folder)
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise InputError("the scene reader's file is missing", file=folder / name)
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        found = {k: tuple(v) for k, v in config["heads"].items()}
        if found != HEADS:
            raise InputError("this reader was trained for other scenes", file=folder / CONFIG)
        model = SceneReader(tuple(config["widths"]), config["num_features"])
        flat = {k: v.astype(np.float32) for k, v in load_file(folder / WEIGHTS).items()}
        params = flax.traverse_util.unflatten_dict(flat, sep="/")
        return cls(model, params, config["feature_scale"])

    def __call__(self, images: UInt8[np.ndarray, "n 64 64 3"]) -> Readings:
        """Read pictures (uint8 RGB), in batches of one fixed size (one compilation)."""
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.shape[1:] != (64, 64, 3):
            raise ValueError(f"expected uint8 [n, 64, 64, 3], got {images.dtype} {images.shape}")
        features: list[np.ndarray] = []
        labels: dict[str, list[np.ndarray]] = {name: [] for name in HEADS}
        for start in range(0, len(images), BATCH):
            batch = images[start : start + BATCH]
            pad = np.zeros((BATCH - len(batch), 64, 64, 3), np.uint8)
            pixels = to_pixels(np.concatenate([batch, pad]))
            feature, logits = jax.device_get(self._apply({"params": self.params}, pixels))
            features.append(self.feature_scale * feature[: len(batch)])
            for name in HEADS:
                labels[name].append(logits[name][: len(batch)].argmax(-1))
        if not features:
            features = [np.zeros((0, self.model.num_features), np.float32)]
            labels = {name: [np.zeros(0, np.int64)] for name in HEADS}
        return Readings(
            np.concatenate(features), {name: np.concatenate(v) for name, v in labels.items()}
        )


def calibrated(reader: Reader, images: UInt8[np.ndarray, "n 64 64 3"]) -> Reader:
    """The reader with features of total variance 100 on these pictures.

    A Frechet distance is then in percent of the variance of real pictures.
    """
    variance = float(np.var(reader(images).features.astype(np.float64), axis=0).sum())
    return Reader(reader.model, reader.params, reader.feature_scale * math.sqrt(100 / variance))


def to_pixels(images: UInt8[np.ndarray, "n h w 3"]) -> Float[np.ndarray, "n h w 3"]:
    """Images in 0..255 to pixels in [-1, 1]."""
    return images.astype(np.float32) / 127.5 - 1


def save_reader(folder: Path, reader: Reader, report: Mapping) -> None:
    """Write the parameters (fp16) and a configuration with the reported accuracies."""
    flat = flax.traverse_util.flatten_dict(jax.device_get(reader.params), sep="/")
    save_file({k: np.ascontiguousarray(v, np.float16) for k, v in flat.items()}, folder / WEIGHTS)
    config = {
        "widths": reader.model.widths,
        "num_features": reader.model.num_features,
        "feature_scale": reader.feature_scale,
        "heads": HEADS,
        "report": report,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def true_labels(scenes: Sequence[Scene]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The right answers for scenes of 0, 1, 2 or 3 objects, and where each is asked.

    Returns:
        Labels: for each entry of HEADS, int32 [n]. Masks: the same, float32, 1 where there is a
        right answer (a layout needs one or two objects, a slot its object) and 0 elsewhere.
    """
    labels = {name: np.zeros(len(scenes), np.int32) for name in HEADS}
    masks = {name: np.zeros(len(scenes), np.float32) for name in HEADS}
    for i, scene in enumerate(scenes):
        answers = {"count": str(min(len(scene.objects), 3)), "background": scene.background}
        if 1 <= len(scene.objects) <= SLOTS:
            answers["layout"] = scene.layout
            for k, obj in enumerate(scene.objects):
                answers |= {
                    f"shape_{k}": obj.shape,
                    f"colour_{k}": obj.colour,
                    f"size_{k}": obj.size,
                }
        for name, answer in answers.items():
            labels[name][i] = HEADS[name].index(answer)
            masks[name][i] = 1
    return labels, masks


def accuracy(readings: Readings, scenes: Sequence[Scene]) -> dict[str, float]:
    """Fraction read rightly: of each attribute where it applies, and "joint": all of a picture."""
    labels, masks = true_labels(scenes)
    right = {name: readings.labels[name] == labels[name] for name in HEADS}
    kinds = {name.split("_")[0] for name in HEADS}
    result = {}
    for kind in sorted(kinds):
        names = [name for name in HEADS if name.split("_")[0] == kind]
        asked = sum(masks[n].sum() for n in names)
        result[kind] = float(sum((right[n] * masks[n]).sum() for n in names) / max(asked, 1))
    result["joint"] = float(np.mean(np.all([right[n] | (masks[n] == 0) for n in HEADS], axis=0)))
    return result
