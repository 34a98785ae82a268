"""tiny_scenes as a TensorFlow Datasets builder: captioned scenes, 64x64.

    python -m examples.tiny_sd.builder --data_dir=DIR                          # 3 minutes
    tfds.builder("tiny_scenes", data_dir=DIR).as_data_source("train")[0]       # Python, to read

Neither needs TensorFlow: pictures are handed to tfds as PNG files, and the files are array_record.

Split "train" has seen colour-shape pairs only; "test" has the same distribution; "unseen" has an
object of a held-out pair in every picture.
"""

import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import flags
from PIL import Image

from examples.tiny_sd.captions import describe
from examples.tiny_sd.render import render
from examples.tiny_sd.scenes import (
    BACKGROUNDS,
    COLOURS,
    IMAGE_SIZE,
    LAYOUTS,
    SHAPES,
    SIZES,
    Pairs,
    sample_scenes,
)
from tiue_jax.io.errors import run_command

FLAGS = flags.FLAGS
SPLITS: dict[str, tuple[int, int, Pairs]] = {  # examples, seed, colour-shape pairs
    "train": (20_000, 920_001, "seen"),
    "test": (2_000, 920_002, "seen"),
    "unseen": (500, 920_003, "unseen"),
}
CHUNK = 1000  # scenes drawn at a time, each chunk from its own seed


class TinyScenes(tfds.core.GeneratorBasedBuilder):
    """Procedurally drawn captioned scenes, the training data of assets/tiny-sd."""

    name = "tiny_scenes"
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "One or two of six shapes in eight colours, six backgrounds."}

    def __init__(self, *, scale: float = 1.0, **kwargs: Any):
        """As every builder; `scale` in (0, 1] makes smaller splits (for tests)."""
        self._scale = scale
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        objects = {
            "shape": tfds.features.ClassLabel(names=SHAPES),
            "colour": tfds.features.ClassLabel(names=COLOURS),
            "size": tfds.features.ClassLabel(names=SIZES),
            "x": np.float32,
            "y": np.float32,
            "radius": np.float32,
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="One or two coloured shapes on a background, with a caption.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(
                        shape=(IMAGE_SIZE, IMAGE_SIZE, 3), encoding_format="png"
                    ),
                    "caption": tfds.features.Text(),
                    "objects": tfds.features.Sequence(objects),
                    "layout": tfds.features.ClassLabel(names=LAYOUTS),
                    "background": tfds.features.ClassLabel(names=BACKGROUNDS),
                }
            ),
            supervised_keys=None,
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[tuple[str, dict[str, Any]]]]:
        del dl_manager  # nothing is downloaded
        return {
            name: self._generate_examples(max(1, round(number * self._scale)), seed, pairs)
            for name, (number, seed, pairs) in SPLITS.items()
        }

    def _generate_examples(
        self, number: int, seed: int, pairs: Pairs
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield (key, example); the first examples do not depend on their number."""
        for start in range(0, number, CHUNK):
            rng = np.random.default_rng([seed, start])
            scenes = sample_scenes(rng, CHUNK, pairs=pairs)[: number - start]
            images = render(scenes)
            for i, (scene, image) in enumerate(zip(scenes, images, strict=True)):
                yield (
                    f"{start + i:06d}",
                    {
                        "image": _png(image),
                        "caption": describe(scene, rng).text,
                        "objects": [
                            {
                                "shape": o.shape,
                                "colour": o.colour,
                                "size": o.size,
                                "x": o.x,
                                "y": o.y,
                                "radius": o.radius,
                            }
                            for o in scene.objects
                        ],
                        "layout": scene.layout,
                        "background": scene.background,
                    },
                )


def _png(image: np.ndarray) -> io.BytesIO:
    """A PNG file in memory. tfds takes files as they are; to encode arrays it needs TensorFlow."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    file.seek(0)
    return file


def define_flags() -> None:
    """Define this command's flags."""
    flags.DEFINE_string("data_dir", None, "folder of tfds data sets to build in", required=True)
    flags.DEFINE_float("scale", 1.0, "fraction of every split", lower_bound=0, upper_bound=1)


def main(argv: Sequence[str]) -> None:
    """Build the data set as array_record files."""
    del argv
    builder = TinyScenes(data_dir=FLAGS.data_dir, scale=FLAGS.scale, file_format="array_record")
    builder.download_and_prepare()
    print(f"wrote {builder.data_dir}")


if __name__ == "__main__":
    define_flags()
    run_command(main)
