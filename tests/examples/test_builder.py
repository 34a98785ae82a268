"""The tfds data set builds, and reads back, without TensorFlow."""

import sys
import warnings

import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the packages that tfds imports
    import tensorflow_datasets as tfds

    from examples.tiny_sd.builder import SPLITS, TinyScenes, training_examples

from examples.tiny_sd.scenes import COLOURS, HELD_OUT_PAIRS, SHAPES, sample_scenes


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("tfds")
    builder = TinyScenes(data_dir=path, scale=0.002, file_format="array_record")
    builder.download_and_prepare()
    return path


def _source(data_dir, split):
    return tfds.builder("tiny_scenes", data_dir=data_dir).as_data_source(split)


def test_reads_by_name_without_tensorflow(data_dir):
    source = _source(data_dir, "train")
    assert len(source) == round(SPLITS["train"][0] * 0.002)
    example = source[0]
    assert (example["image"].shape, example["image"].dtype) == ((64, 64, 3), np.uint8)
    assert isinstance(example["caption"], bytes)
    assert "tensorflow" not in sys.modules


def test_examples_are_the_generators(data_dir, tmp_path):
    """Pictures survive their PNG files; tfds shuffles, so captions are compared sorted."""
    number, seed, pairs = SPLITS["train"]
    builder = TinyScenes(data_dir=tmp_path, scale=0.002)
    made = dict(builder._generate_examples(round(number * 0.002), seed, pairs))
    assert list(made) == [f"{i:06d}" for i in range(len(made))]
    captions = sorted(e["caption"] for e in made.values())
    assert sorted(e["caption"].decode() for e in _source(data_dir, "train")) == captions


def test_first_examples_do_not_depend_on_the_number(tmp_path):
    builder = TinyScenes(data_dir=tmp_path)
    few = list(builder._generate_examples(3, 1, "seen"))
    more = list(builder._generate_examples(1200, 1, "seen"))
    assert len({key for key, _ in more}) == 1200
    for (key, a), (other, b) in zip(few, more, strict=False):
        assert key == other
        assert a["image"].getvalue() == b["image"].getvalue()
        assert a["objects"] == b["objects"]


def test_training_reads_the_data_set(data_dir):
    """Scenes are read back as drawn: captions of theirs can be drawn again."""
    source = _source(data_dir, "train")
    found = training_examples(data_dir, 100)
    drawn = sample_scenes(np.random.default_rng([SPLITS["train"][1], 0]), 1000)[: len(source)]

    def told(scene):
        objects = tuple(
            (o.shape, o.colour, o.size, round(o.x, 3), round(o.y, 3), round(o.radius, 3))
            for o in scene.objects
        )
        return objects, scene.layout, scene.background

    assert len({told(scene) for scene in found.scenes}) == 100
    assert {told(scene) for scene in found.scenes} <= {told(scene) for scene in drawn}
    for i in (0, 99):
        np.testing.assert_array_equal(found.images[i], source[i]["image"])
        assert found.captions[i] == source[i]["caption"].decode()


def test_held_out_pairs_are_in_their_split_only(data_dir):
    def shown(example):
        objects = example["objects"]
        return {
            (COLOURS[c], SHAPES[s])
            for c, s in zip(objects["colour"], objects["shape"], strict=True)
        }

    assert not any(shown(e) & HELD_OUT_PAIRS for e in _source(data_dir, "train"))
    assert all(shown(e) & HELD_OUT_PAIRS for e in _source(data_dir, "unseen"))
