"""What scenes are drawn: pairs held out, layouts that hold, everything inside of the picture."""

import numpy as np
import pytest

from examples.tiny_sd.scenes import (
    BACKGROUNDS,
    CELLS,
    COLOURS,
    HELD_OUT_PAIRS,
    LAYOUTS,
    RADII,
    SHAPES,
    sample_scenes,
)

N = 4000


def _scenes(pairs="seen", n=N, seed=0):
    return sample_scenes(np.random.default_rng(seed), n, pairs=pairs)


def test_held_out_pairs_take_one_colour_of_every_shape():
    assert {shape for _, shape in HELD_OUT_PAIRS} == set(SHAPES)
    assert len({colour for colour, _ in HELD_OUT_PAIRS}) == len(HELD_OUT_PAIRS)
    assert {colour for colour, _ in HELD_OUT_PAIRS} < set(COLOURS)


def test_training_scenes_never_show_a_held_out_pair():
    shown = {o.pair for scene in _scenes() for o in scene.objects}
    assert shown == {(c, s) for c in COLOURS for s in SHAPES} - HELD_OUT_PAIRS


def test_unseen_scenes_always_show_one_and_all_scenes_show_every_pair():
    assert all(scene.is_held_out for scene in _scenes("unseen"))
    assert {o.pair for scene in _scenes("all") for o in scene.objects} == {
        (c, s) for c in COLOURS for s in SHAPES
    }


def test_a_wrong_choice_of_pairs_lists_the_choices():
    with pytest.raises(ValueError, match="'all', 'seen', 'unseen'"):
        _scenes("none", n=1)


def test_the_same_seed_draws_the_same_scenes():
    assert _scenes(n=50) == _scenes(n=50)
    assert _scenes(n=50) != _scenes(n=50, seed=1)


def test_attributes_are_balanced():
    scenes = _scenes()
    for values, got in (
        (LAYOUTS[:9], [s.layout for s in scenes if len(s.objects) == 1]),
        (LAYOUTS[9:], [s.layout for s in scenes if len(s.objects) == 2]),
        (BACKGROUNDS, [s.background for s in scenes]),
    ):
        shares = np.array([got.count(v) for v in values]) / len(got)
        # five standard deviations of the rarest (1 of 9 cells, 2000 scenes): 5 * .007
        np.testing.assert_allclose(shares, 1 / len(values), atol=0.036)


def test_objects_lie_inside_and_where_the_layout_says():
    for scene in _scenes("all"):
        for o in scene.objects:
            low, high = RADII[o.size]
            assert low <= o.radius <= high
            assert o.radius + 1 <= min(o.x, o.y)
            assert max(o.x, o.y) <= 63 - o.radius
        first, last = scene.objects[0], scene.objects[-1]
        if scene.layout == "vertical":
            assert last.y - first.y > 2 * abs(last.x - first.x)
        elif scene.layout == "horizontal":
            assert last.x - first.x > 2 * abs(last.y - first.y)
        else:
            column, row = int(first.x // (64 / 3)), int(first.y // (64 / 3))
            assert CELLS[3 * row + column] == scene.layout


def test_two_objects_do_not_touch():
    for scene in _scenes():
        if len(scene.objects) == 2:
            a, b = scene.objects
            # a radius bounds a shape but for corners of squares and triangles, which reach 1.2
            assert np.hypot(a.x - b.x, a.y - b.y) > 0.95 * (a.radius + b.radius)
