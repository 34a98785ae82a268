"""Pixels of scenes: colours, areas, antialiasing, backgrounds, independence of the batch."""

from dataclasses import replace

import numpy as np
import pytest

from examples.tiny_sd import render as renderer
from examples.tiny_sd.render import BACKGROUND_RGB, COLOUR_RGB, DISTANCES, render
from examples.tiny_sd.scenes import BACKGROUNDS, COLOURS, SHAPES, Scene, SceneObject, sample_scenes


def _scene(shape="circle", colour="red", background="white", **changes):
    obj = SceneObject(shape, colour, "large", 32.0, 32.0, 13.0, 0.0, (1.0, 1.0, 1.0))
    return Scene((replace(obj, **changes),), "center", background, 0.0, 0.0, 1.0, (0, 0.0, 0.0))


def test_tables_name_every_word():
    assert (set(COLOUR_RGB), set(BACKGROUND_RGB), set(DISTANCES)) == (
        set(COLOURS),
        set(BACKGROUNDS),
        set(SHAPES),
    )


def test_colours_are_far_apart():
    """At least 60 of 441 in RGB between any two, backgrounds included: jitter moves one by 25."""
    points = np.array(
        [*COLOUR_RGB.values(), *(rgb for pair in BACKGROUND_RGB.values() for rgb in pair if rgb)],
        float,
    )[: len(COLOURS) + 4]  # the four plain backgrounds
    distance = np.linalg.norm(points[:, None] - points[None], axis=-1)
    assert distance[~np.eye(len(points), dtype=bool)].min() > 60


@pytest.mark.parametrize("colour", COLOURS)
def test_the_middle_has_the_objects_colour(colour):
    image = render([_scene(colour=colour)])[0]
    # light falls off by 10 % over the radius: half a pixel of it, and rounding; worst seen 1
    np.testing.assert_allclose(image[32, 32], COLOUR_RGB[colour], atol=2)


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_corners_have_the_backgrounds_colours(background):
    image = render([_scene(background=background)])[0].astype(int)
    corner = {tuple(image[y, x]) for x in (2, 10, 18) for y in (2, 10, 18)}
    assert corner == {rgb for rgb in BACKGROUND_RGB[background] if rgb is not None}


@pytest.mark.parametrize(
    ("shape", "area"),
    [
        ("circle", np.pi * 0.94**2),
        ("square", (2 * 0.83) ** 2),
        ("triangle", 3 * np.sqrt(3) * 0.6**2),
        ("cross", 4 * 0.98 * 0.33 * 2 - 4 * 0.33**2),
        ("ring", np.pi * (1.0**2 - 0.5**2)),
        ("heart", 1.66**2 * (0.5 + np.pi * 0.125)),
    ],
)
@pytest.mark.parametrize("offset", [0.0, 0.37])
def test_shapes_have_their_area(shape, area, offset):
    """A blue shape on black: the blue it adds is its area, edges included."""
    scene = _scene(shape, "blue", "black", x=32 + offset, y=32 - offset)
    image = render([scene])[0].astype(float)
    black, blue = BACKGROUND_RGB["black"][0][2], COLOUR_RGB["blue"][2]
    covered = np.clip((image[..., 2] - black) / (blue - black), 0, 1.2).sum()
    # edges are antialiased to first order, shadows darken the ground: worst seen 2.1 %
    assert covered == pytest.approx(area * 13**2, rel=0.03)


def test_edges_are_antialiased():
    image = render([_scene("circle", "blue", "black")])[0][..., 2]
    between = (image > 50) & (image < 180)
    assert between.sum() > 30


def test_a_picture_does_not_depend_on_its_batch(monkeypatch):
    scenes = sample_scenes(np.random.default_rng(0), 40, pairs="all")
    whole = render(scenes)
    np.testing.assert_array_equal(whole[7], render([scenes[7]])[0])
    monkeypatch.setattr(renderer, "CHUNK", 7)
    np.testing.assert_array_equal(render(scenes), whole)


def test_no_scenes_and_no_objects():
    assert render([]).shape == (0, 64, 64, 3)
    empty = replace(_scene(), objects=())
    assert (render([empty])[0] == BACKGROUND_RGB["white"][0]).all()
