"""Captions say what they claim to mention, nothing else, and nothing false."""

import numpy as np
import pytest

from examples.tiny_sd.captions import (
    CELL_PHRASES,
    RELATIONS,
    SIZE_WORDS,
    all_words,
    caption,
    describe,
)
from examples.tiny_sd.prompts import training_prompts
from examples.tiny_sd.scenes import BACKGROUNDS, COLOURS, HELD_OUT_PAIRS, SHAPES, sample_scenes


def _described(n=3000, seed=0, **options):
    rng = np.random.default_rng(seed)
    scenes = sample_scenes(rng, n, pairs="all")
    return scenes, [describe(scene, rng, **options) for scene in scenes]


def _words(text):
    return text.replace(",", " ").replace(":", " ").split()


def test_mentions_are_true_of_the_scene():
    for scene, request in zip(*_described(), strict=True):
        assert len(request.objects) == len(scene.objects)
        for said, obj in zip(request.objects, scene.objects, strict=True):
            for name in ("shape", "colour", "size"):
                assert getattr(said, name) in (None, getattr(obj, name))
        assert request.layout in (None, scene.layout)
        assert request.background in (None, scene.background)


def test_the_text_has_the_mentioned_words_and_no_others():
    for request in _described()[1]:
        words = _words(request.text)
        for values, name in ((SHAPES, "shape"), (COLOURS, "colour")):
            said = sorted(filter(None, (getattr(o, name) for o in request.objects)))
            assert sorted(w for w in words if w in values) == said
        sizes = [o.size for o in request.objects if o.size]
        said = [s for w in words for s, options in SIZE_WORDS.items() if w in options]
        assert sorted(said) == sorted(sizes)
        grounds = [w for w in words if w in BACKGROUNDS]
        assert grounds == ([request.background] if request.background else [])


def test_places_and_relations_are_said_only_if_mentioned():
    for request in _described()[1]:
        if len(request.objects) == 1:
            found = {
                cell for cell, ways in CELL_PHRASES.items() for way in ways if way in request.text
            }
            assert request.layout in found if request.layout else not found
        else:
            found = {
                layout
                for layout, sides in RELATIONS.items()
                for side in sides
                for way in side
                if f" {way} " in request.text
            }
            assert found == ({request.layout} if request.layout else set())


def test_relations_have_the_right_way_round():
    """Named second, the top or left object has the inverse relation before it."""
    checked = 0
    for request in _described()[1]:
        colours = [o.colour for o in request.objects]
        if len(colours) < 2 or request.layout is None or None in colours:
            continue
        if colours[0] != colours[1]:
            words = _words(request.text)
            forward = words.index(colours[0]) < words.index(colours[1])
            ways = RELATIONS[request.layout][0 if forward else 1]
            assert any(f" {way} " in request.text for way in ways), request
            checked += 1
    assert checked > 500


def test_complete_captions_name_every_colour_shape_and_place():
    for scene, request in zip(*_described(500, complete=True), strict=True):
        assert [(o.colour, o.shape) for o in request.objects] == [o.pair for o in scene.objects]
        assert request.layout == scene.layout
        assert request.is_held_out == scene.is_held_out


def test_every_attribute_is_sometimes_left_out():
    requests = _described()[1]
    for name in ("shape", "colour", "size"):
        share = np.mean([getattr(o, name) is None for r in requests for o in r.objects])
        assert 0.03 < share < 0.6
    for name in ("layout", "background"):
        assert 0.1 < np.mean([getattr(r, name) is None for r in requests]) < 0.6


def test_all_words_is_all_words():
    said = {w for request in _described()[1] for w in _words(request.text)}
    assert said <= set(all_words())


def test_captions_vary():
    rng = np.random.default_rng(0)
    (scene,) = sample_scenes(rng, 1)
    assert len({caption(scene, rng) for _ in range(300)}) > 100


def test_training_prompts_are_different_and_of_seen_pairs():
    prompts = training_prompts(2000)
    assert len(set(prompts)) == 2000
    assert prompts[:500] == training_prompts(500)
    for colour, shape in HELD_OUT_PAIRS:
        assert not any(f"{colour} {shape}" in prompt for prompt in prompts)


@pytest.mark.parametrize("article", ["a", "an"])
def test_articles(article):
    vowels = set("aeiou")
    for request in _described(500)[1]:
        words = _words(request.text)
        for word, following in zip(words, words[1:], strict=False):
            if word == article:
                assert (following[0] in vowels) == (article == "an")
