"""The world of the embedded data set: one or two coloured shapes on a background.

A scene is what a picture shows, down to the last pixel (`render.render` has no randomness of its
own). What a caption says about it, and leaves out, is in `captions`.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

IMAGE_SIZE = 64  # pixels

SHAPES = ("circle", "square", "triangle", "cross", "ring", "heart")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
SIZES = ("small", "large")
BACKGROUNDS = ("white", "grey", "black", "beige", "striped", "checkered")
CELLS = (
    "top left", "top", "top right",
    "left", "center", "right",
    "bottom left", "bottom", "bottom right",
)  # fmt: skip
PAIR_LAYOUTS = ("vertical", "horizontal")  # two objects: one above the other, or side by side
LAYOUTS = CELLS + PAIR_LAYOUTS

HELD_OUT_PAIRS = frozenset(
    {
        ("green", "circle"),
        ("orange", "square"),
        ("pink", "triangle"),
        ("cyan", "cross"),
        ("yellow", "ring"),
        ("blue", "heart"),
    }
)  # (colour, shape): never in a training scene

RADII = {"small": (8.0, 9.2), "large": (12.6, 14.0)}  # pixels, uniform
SINGLE_FRACTION = 0.5  # of the scenes have one object
OTHER = "other"  # a shape that is none of SHAPES: only the scene reader's training draws it

Pairs = Literal["seen", "unseen", "all"]


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One shape: centre (x right, y down) and radius in pixels, angle in radians, tint."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float
    angle: float
    tint: tuple[float, float, float]
    blob: tuple[float, ...] = ()  # outline harmonics of an OTHER shape

    @property
    def pair(self) -> tuple[str, str]:
        """(colour, shape), as in HELD_OUT_PAIRS."""
        return self.colour, self.shape


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture's content.

    Args:
        objects: top first where the layout is vertical, left first where it is horizontal.
        layout: one of LAYOUTS: the cell of a single object, or how two objects stand.
        background: one of BACKGROUNDS.
        light: direction the light comes from, radians.
        light_strength: relative change of brightness from the middle to the edge.
        shade: brightness of the background, about 1.
        pattern: (0 columns / 1 rows, phase x, phase y): stripes and checks, pixels.
    """

    objects: tuple[SceneObject, ...]
    layout: str
    background: str
    light: float
    light_strength: float
    shade: float
    pattern: tuple[int, float, float]

    @property
    def is_held_out(self) -> bool:
        """Whether any object is a held-out pair."""
        return any(o.pair in HELD_OUT_PAIRS for o in self.objects)


_PAIRS: dict[str, list[tuple[str, str]]] = {
    "all": [(c, s) for c in COLOURS for s in SHAPES],
    "seen": [(c, s) for c in COLOURS for s in SHAPES if (c, s) not in HELD_OUT_PAIRS],
    "unseen": sorted(HELD_OUT_PAIRS),
}


def sample_scenes(rng: np.random.Generator, n: int, *, pairs: Pairs = "seen") -> list[Scene]:
    """Draw n scenes.

    Args:
        rng: the only source of randomness.
        n: number of scenes.
        pairs: colour-shape pairs allowed. "seen": the training distribution. "all": every pair.
            "unseen": one object is a held-out pair, the other one (if any) is any pair.
    """
    if pairs not in _PAIRS:
        raise ValueError(f"pairs {pairs!r}: choose from {sorted(_PAIRS)}")
    single = rng.random(n) < SINGLE_FRACTION
    first = rng.integers(len(_PAIRS[pairs]), size=n)
    second_pairs = _PAIRS["seen"] if pairs == "seen" else _PAIRS["all"]
    second = rng.integers(len(second_pairs), size=n)
    swap = rng.random(n) < 0.5  # the held-out object is as often second as first
    layout = np.where(single, rng.integers(9, size=n), 9 + rng.integers(2, size=n))
    centres = _centres(rng, layout)
    size, radius, angle, tint = draw_looks(rng, n)
    radius = np.where(single[:, None], radius, np.minimum(radius, 13.4))
    centres = np.clip(centres, radius[..., None] + 1.5, IMAGE_SIZE - radius[..., None] - 1.5)
    surroundings = draw_surroundings(rng, n)
    scenes = []
    for i in range(n):
        kinds = [_PAIRS[pairs][first[i]]]
        if not single[i]:
            kinds.append(second_pairs[second[i]])
            if swap[i]:
                kinds.reverse()
        objects = tuple(
            SceneObject(
                shape, colour, SIZES[size[i, k]],
                float(centres[i, k, 0]), float(centres[i, k, 1]), float(radius[i, k]),
                float(angle[i, k]), tuple(tint[i, k].tolist()),
            )
            for k, (colour, shape) in enumerate(kinds)
        )  # fmt: skip
        scenes.append(Scene(objects, LAYOUTS[layout[i]], *surroundings[i]))
    return scenes


def draw_looks(
    rng: np.random.Generator, n: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Sizes [n, 2] (index into SIZES), radii [n, 2], angles [n, 2] and tints [n, 2, 3]."""
    size = rng.integers(2, size=(n, 2))
    low, high = np.array([RADII[s] for s in SIZES]).T
    radius = rng.uniform(low[size], high[size])
    angle = rng.uniform(-0.14, 0.14, size=(n, 2))
    tint = rng.uniform(0.90, 1.05, size=(n, 2, 1)) + rng.uniform(-0.04, 0.04, size=(n, 2, 3))
    return size, radius, angle, tint


def draw_surroundings(
    rng: np.random.Generator, n: int
) -> list[tuple[str, float, float, float, tuple[int, float, float]]]:
    """(background, light, light_strength, shade, pattern) of n scenes."""
    background = rng.integers(len(BACKGROUNDS), size=n)
    light = rng.uniform(-np.pi, np.pi, size=n)
    strength = rng.uniform(0.02, 0.12, size=n)
    shade = rng.uniform(0.93, 1.03, size=n)
    rows = rng.integers(2, size=n)
    phase = 8 * rng.integers(2, size=(n, 2)) + rng.uniform(-1, 1, size=(n, 2))
    return [
        (
            BACKGROUNDS[background[i]], float(light[i]), float(strength[i]), float(shade[i]),
            (int(rows[i]), float(phase[i, 0]), float(phase[i, 1])),
        )
        for i in range(n)
    ]  # fmt: skip


def _centres(rng: np.random.Generator, layout: np.ndarray) -> np.ndarray:
    """Centres [n, 2 objects, (x, y)] in pixels; the second is unused where the layout is a cell."""
    n = len(layout)
    middle = IMAGE_SIZE / 2
    cell = np.minimum(layout, 8)
    grid = np.stack([cell % 3, cell // 3], axis=-1)
    alone = middle + 16.0 * (grid - 1) + rng.uniform(-2.5, 2.5, size=(n, 2))
    offset = rng.uniform(-9, 9, size=(n, 1)) + rng.uniform(-3, 3, size=(n, 2))  # across the axis
    apart = np.array([-15.5, 15.5]) + rng.uniform(-1.5, 1.5, size=(n, 2))  # along it
    upright = (layout == 9)[:, None]
    x = middle + np.where(upright, offset, apart)
    y = middle + np.where(upright, apart, offset)
    pair = np.stack([x, y], axis=-1)
    single = np.repeat(alone[:, None], 2, axis=1)
    return np.where((layout < 9)[:, None, None], single, pair)
