"""The tfds data set builds, and reads back, without TensorFlow."""

import re
import sys
import warnings

import numpy as np
import pytest
from PIL import Image

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the packages that tfds imports
    import tensorflow_datasets as tfds

    from examples.tiny_sd.builder import SPLITS, TinyScenes, build, training_examples

from examples.tiny_sd.captions import caption
from examples.tiny_sd.render import render
from examples.tiny_sd.scenes import COLOURS, HELD_OUT_PAIRS, SHAPES, sample_scenes
from tiue_jax.io.errors import InputError

SCALE = 0.002


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("tfds")
    build(path, SCALE)
    return path


@pytest.fixture(scope="module")
def drawn():
    """The scenes of the train split, the picture of each and the caption of each."""
    number, seed, pairs = SPLITS["train"]
    rng = np.random.default_rng([seed, 0])
    scenes = sample_scenes(rng, 1000, pairs=pairs)[: round(number * SCALE)]
    return scenes, render(scenes), [caption(scene, rng) for scene in scenes]


def _source(data_dir, split):
    return tfds.builder("tiny_scenes", data_dir=data_dir).as_data_source(split)


def test_reads_by_name_without_tensorflow(data_dir):
    source = _source(data_dir, "train")
    assert len(source) == round(SPLITS["train"][0] * SCALE)
    example = source[0]
    assert (example["image"].shape, example["image"].dtype) == ((64, 64, 3), np.uint8)
    assert isinstance(example["caption"], bytes)
    assert "tensorflow" not in sys.modules


def test_the_generator_s_pictures_and_captions_are_the_scenes(tmp_path, drawn):
    _, seed, pairs = SPLITS["train"]
    _, pictures, captions = drawn
    made = dict(TinyScenes(data_dir=tmp_path)._generate_examples(len(captions), seed, pairs))
    assert list(made) == [f"{i:06d}" for i in range(len(captions))]
    for example, picture, text in zip(made.values(), pictures, captions, strict=True):
        with Image.open(example["image"]) as image:
            np.testing.assert_array_equal(np.asarray(image), picture)
        assert example["caption"] == text


def test_rows_are_the_pictures_with_their_captions(data_dir, drawn):
    """Through the PNG files, byte for byte; tfds shuffles, so they are compared sorted."""
    _, pictures, captions = drawn
    found = [(e["caption"].decode(), e["image"].tobytes()) for e in _source(data_dir, "train")]
    assert sorted(found) == sorted(
        (text, picture.tobytes()) for text, picture in zip(captions, pictures, strict=True)
    )


def test_a_data_set_of_another_scale_is_refused(data_dir):
    folder = re.escape(str(data_dir / "tiny_scenes" / "1.1.0"))
    said = f"{folder}: holds another number of examples in split 'train'; delete it or take another"
    with pytest.raises(InputError, match=f"{said} folder, expected 180, found 120"):
        build(data_dir, 0.003)
    with pytest.raises(InputError, match=f"{said} folder, expected 121 or more, found 120"):
        training_examples(data_dir, 121)
    assert build(data_dir, SCALE) == data_dir / "tiny_scenes" / "1.1.0"


def test_first_examples_do_not_depend_on_the_number(tmp_path):
    builder = TinyScenes(data_dir=tmp_path)
    few = list(builder._generate_examples(3, 1, "seen"))
    more = list(builder._generate_examples(1200, 1, "seen"))
    assert len({key for key, _ in more}) == 1200
    for (key, a), (other, b) in zip(few, more, strict=False):
        assert key == other
        assert a["image"].getvalue() == b["image"].getvalue()
        assert a["objects"] == b["objects"]


def test_training_reads_the_data_set(data_dir, drawn):
    """Scenes are read back as drawn, each with its picture and caption."""
    found = training_examples(data_dir, 100)
    scenes, pictures, captions = drawn

    def told(scene):
        objects = tuple(
            (o.shape, o.colour, o.size, round(o.x, 3), round(o.y, 3), round(o.radius, 3))
            for o in scene.objects
        )
        return objects, scene.layout, scene.background

    places = {told(scene): i for i, scene in enumerate(scenes)}
    order = [places[told(scene)] for scene in found.scenes]
    assert len(set(order)) == 100
    np.testing.assert_array_equal(found.images, pictures[order])
    assert found.captions == [captions[i] for i in order]


def test_held_out_pairs_are_in_their_split_only(data_dir):
    def shown(example):
        objects = example["objects"]
        return {
            (COLOURS[c], SHAPES[s])
            for c, s in zip(objects["colour"], objects["shape"], strict=True)
        }

    assert not any(shown(e) & HELD_OUT_PAIRS for e in _source(data_dir, "train"))
    assert all(shown(e) & HELD_OUT_PAIRS for e in _source(data_dir, "unseen"))
