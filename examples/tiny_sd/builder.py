"""tiny_scenes as a TensorFlow Datasets builder: captioned scenes, 64x64.

    python -m examples.tiny_sd.builder --data_dir=DIR                          # some minutes
    tfds.builder("tiny_scenes", data_dir=DIR).as_data_source("train")[0]       # Python, to read

Neither needs TensorFlow: pictures are handed to tfds as PNG files, and the files are array_record.

Split "train" has seen colour-shape pairs only; "test" has the same distribution; "unseen" has an
object of a held-out pair in every picture.
"""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from absl import flags
from jaxtyping import UInt8
from PIL import Image
from tqdm import tqdm

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
    Scene,
    SceneObject,
    sample_scenes,
)
from tiue_jax.io.errors import InputError, run_command
from tiue_jax.io.files import StrPath

FLAGS = flags.FLAGS
SPLITS: dict[str, tuple[int, int, Pairs]] = {  # examples, seed, colour-shape pairs
    "train": (60_000, 920_001, "seen"),
    "test": (2_000, 920_002, "seen"),
    "unseen": (500, 920_003, "unseen"),
}
CHUNK = 1000  # scenes drawn at a time, each chunk from its own seed


class TinyScenes(tfds.core.GeneratorBasedBuilder):
    """Procedurally drawn captioned scenes, the training data of assets/tiny-sd."""

    name = "tiny_scenes"
    VERSION = tfds.core.Version("1.1.0")
    RELEASE_NOTES = {
        "1.0.0": "One or two of six shapes in eight colours, six backgrounds.",
        "1.1.0": "60,000 scenes in train, the first 20,000 as before.",
    }

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
            name: self._generate_examples(self.num_examples(name), seed, pairs)
            for name, (_, seed, pairs) in SPLITS.items()
        }

    def num_examples(self, split: str) -> int:
        """The number of examples that a split is built with."""
        return max(1, round(SPLITS[split][0] * self._scale))

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


class Examples(NamedTuple):
    """Examples of the data set.

    Attributes:
        scenes: with what captions say and where objects are; light, tint and the like, which the
            data set does not hold, are 0 or 1.
    """

    images: UInt8[np.ndarray, "n 64 64 3"]
    captions: list[str]
    scenes: list[Scene]


def build(data_dir: StrPath, scale: float = 1.0) -> Path:
    """Build the data set as array_record files, unless it is there; return its folder.

    Raises:
        InputError: `data_dir` holds a data set of another scale.
    """
    builder = TinyScenes(data_dir=data_dir, scale=scale, file_format="array_record")
    builder.download_and_prepare()
    for name in SPLITS:
        found, expected = builder.info.splits[name].num_examples, builder.num_examples(name)
        if found != expected:
            raise _other_number(builder, name, expected, found)
    return Path(builder.data_dir)


def training_examples(data_dir: Path, number: int) -> Examples:
    """The first `number` rows of the train split in `data_dir`; the data set is built if need be.

    Reads everything into memory, 12 kB an example.

    Raises:
        InputError: `data_dir` holds a data set of fewer rows.
    """
    builder = TinyScenes(data_dir=data_dir, file_format="array_record")
    builder.download_and_prepare()
    source = builder.as_data_source("train")
    if len(source) < number:
        raise _other_number(builder, "train", f"{number} or more", len(source))
    images, captions, scenes = np.empty((number, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8), [], []
    for i in tqdm(range(number), "read", unit="scene", mininterval=5):
        row = source[i]
        images[i] = row["image"]
        captions.append(row["caption"].decode())
        scenes.append(_scene(row))
    return Examples(images, captions, scenes)


def _other_number(builder: TinyScenes, split: str, expected: object, found: int) -> InputError:
    """Of a data set that was there: tfds reuses one of any scale, and builds nothing."""
    return InputError(
        f"holds another number of examples in split {split!r}; delete it or take another folder",
        file=builder.data_dir,
        expected=expected,
        found=found,
    )


def _scene(row: dict[str, Any]) -> Scene:
    objects = {name: np.asarray(values).tolist() for name, values in row["objects"].items()}
    found = tuple(
        SceneObject(
            SHAPES[objects["shape"][k]], COLOURS[objects["colour"][k]], SIZES[objects["size"][k]],
            objects["x"][k], objects["y"][k], objects["radius"][k],
            angle=0.0, tint=(1.0, 1.0, 1.0),
        )
        for k in range(len(objects["shape"]))
    )  # fmt: skip
    layout, background = LAYOUTS[row["layout"]], BACKGROUNDS[row["background"]]
    return Scene(found, layout, background, 0.0, 0.0, 1.0, (0, 0.0, 0.0))


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
    """Build the data set."""
    del argv
    print(f"wrote {build(FLAGS.data_dir, FLAGS.scale)}")


if __name__ == "__main__":
    define_flags()
    run_command(main)
