"""Build a small tfds data set of captions in the folder given: `build_captions.py FOLDER`."""

import sys

import numpy as np
import tensorflow_datasets as tfds


class Captions(tfds.core.GeneratorBasedBuilder):
    """Captions in a plain field and in coco_captions' nested one, beside what is none."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "caption": tfds.features.Text(),
            "captions": tfds.features.Sequence({"id": np.int64, "text": tfds.features.Text()}),
            "latin": tfds.features.Text(),  # not UTF-8
            "label": tfds.features.ClassLabel(num_classes=2),
            "image": tfds.features.Tensor(shape=(8, 8, 3), dtype=np.uint8),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        del dl_manager
        return {
            "train": self._generate_examples([f"scene {i}" for i in range(5)]),
            "test": self._generate_examples(["a test"]),
        }

    def _generate_examples(self, captions):
        for i, caption in enumerate(captions):
            views = [{"id": 2 * i + j, "text": f"view {j} of {i}"} for j in range(2)]
            image = np.full((8, 8, 3), i, np.uint8)
            yield (
                i,
                {
                    "caption": caption,
                    "captions": views,
                    "latin": b"caf\xe9",
                    "label": 1,
                    "image": image,
                },
            )


if __name__ == "__main__":
    builder = Captions(data_dir=sys.argv[1], file_format="array_record")
    builder.download_and_prepare()
    assert "tensorflow" not in sys.modules
