"""Scenes to pixels: signed distances, antialiased over one pixel, with light and a soft shadow."""

from collections.abc import Callable, Sequence

import numpy as np

from examples.tiny_sd.scenes import IMAGE_SIZE, OTHER, Scene, SceneObject

COLOUR_RGB = {
    "red": (218, 40, 44),
    "orange": (246, 132, 24),
    "yellow": (250, 218, 50),
    "green": (44, 158, 66),
    "cyan": (56, 204, 216),
    "blue": (40, 76, 208),
    "purple": (126, 50, 172),
    "pink": (246, 136, 196),
}
BACKGROUND_RGB = {  # two colours: the second is that of every other stripe or check
    "white": ((236, 236, 234), None),
    "grey": ((142, 144, 148), None),
    "black": ((30, 30, 34), None),
    "beige": ((208, 186, 150), None),
    "striped": ((234, 234, 238), (178, 184, 194)),
    "checkered": ((112, 116, 126), (66, 68, 76)),
}
PERIOD = {"striped": 16.0, "checkered": 32.0}  # pixels of a light and a dark band together
PATCH = 40  # pixels: an object with its shadow fits
MARGIN = PATCH // 2
SHADOW_OFFSET = 1.8  # pixels, away from the light
SHADOW_DEPTH = 0.30
CHUNK = 512  # scenes rendered at a time: bounds the memory

Distance = Callable[[np.ndarray, np.ndarray], np.ndarray]


def render(scenes: Sequence[Scene]) -> np.ndarray:
    """Draw scenes. Returns uint8 [n, 64, 64, 3] RGB."""
    out = np.empty((len(scenes), IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    for start in range(0, len(scenes), CHUNK):
        out[start : start + CHUNK] = _render_chunk(scenes[start : start + CHUNK])
    return out


def _render_chunk(scenes: Sequence[Scene]) -> np.ndarray:
    size = IMAGE_SIZE + 2 * MARGIN
    canvas = np.zeros((len(scenes), size, size, 3), np.float32)
    inner = slice(MARGIN, MARGIN + IMAGE_SIZE)
    canvas[:, inner, inner] = _backgrounds(scenes)
    for slot in range(max((len(s.objects) for s in scenes), default=0)):
        drawn = [(i, s.objects[slot], s) for i, s in enumerate(scenes) if len(s.objects) > slot]
        _draw_objects(canvas, drawn)
    return np.clip(canvas[:, inner, inner] + 0.5, 0, 255).astype(np.uint8)


def _backgrounds(scenes: Sequence[Scene]) -> np.ndarray:
    """Lit backgrounds, float32 [n, 64, 64, 3]."""
    light = np.array([s.light for s in scenes], np.float32)[:, None, None]
    strength = np.array([s.light_strength for s in scenes], np.float32)[:, None, None]
    shade = np.array([s.shade for s in scenes], np.float32)[:, None, None]
    grid = (np.arange(IMAGE_SIZE, dtype=np.float32) + 0.5) / (IMAGE_SIZE / 2) - 1
    slope = np.cos(light) * grid[None, None, :] + np.sin(light) * grid[None, :, None]
    bright = shade * (1 + strength * slope)
    base = np.array([BACKGROUND_RGB[s.background][0] for s in scenes], np.float32)
    image = bright[..., None] * base[:, None, None, :]
    for i, scene in enumerate(scenes):
        second = BACKGROUND_RGB[scene.background][1]
        if second is not None:
            mix = _pattern(scene)[..., None]
            change = np.array(second, np.float32) - base[i]
            image[i] += bright[i, :, :, None] * mix * change
    return image


def _pattern(scene: Scene) -> np.ndarray:
    """How much of the second colour each pixel has: [64, 64] in [0, 1]."""
    rows, phase_x, phase_y = scene.pattern
    period = PERIOD[scene.background]
    x, y = _square_wave(phase_x, period), _square_wave(phase_y, period)
    if scene.background == "checkered":
        return x[None, :] * (1 - y[:, None]) + (1 - x[None, :]) * y[:, None]
    ones = np.ones(IMAGE_SIZE, np.float32)
    return np.outer(y, ones) if rows else np.outer(ones, x)


def _square_wave(phase: float, period: float) -> np.ndarray:
    """An antialiased square wave along 64 pixels, in [0, 1]. Phase and period in pixels."""
    place = (np.arange(IMAGE_SIZE, dtype=np.float32) + 0.5 + phase) % period
    edge = period / 4 - np.abs(place - period / 2)  # pixels inside the second stripe
    return np.clip(edge + 0.5, 0, 1)


def _draw_objects(canvas: np.ndarray, drawn: list[tuple[int, SceneObject, Scene]]) -> None:
    """Paint one object into each listed scene (index into canvas, object, scene), in place."""
    for shape in sorted({o.shape for _, o, _ in drawn}):
        group = [d for d in drawn if d[1].shape == shape]
        keep, paint, corners = _patches(shape, [o for _, o, _ in group], [s for *_, s in group])
        for k, (index, _, _) in enumerate(group):
            row, column = corners[k]
            patch = canvas[index, row : row + PATCH, column : column + PATCH]
            patch *= keep[k]
            patch += paint[k]


def _patches(
    shape: str, objects: Sequence[SceneObject], scenes: Sequence[Scene]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw n objects of one shape, each in a patch of its own around its centre.

    Returns:
        What is kept of the ground (shadow and cover) [n, PATCH, PATCH, 1], what is added to it
        [n, PATCH, PATCH, 3], and the patch's first (row, column) in the padded canvas [n, 2].
    """
    x, y, radius, angle, light = np.array(
        [(o.x, o.y, o.radius, o.angle, s.light) for o, s in zip(objects, scenes, strict=True)],
        np.float32,
    ).T[:, :, None, None]
    left, top = np.floor(x).astype(int), np.floor(y).astype(int)
    steps = np.arange(PATCH, dtype=np.float32) + 0.5 - MARGIN
    dx, dy = steps[None, None, :] + left - x, steps[None, :, None] + top - y  # from the centre
    cos, sin = np.cos(angle) / radius, np.sin(angle) / radius
    distance = _distance_function(shape, objects)

    def pixels_outside(dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
        return radius * distance(cos * dx + sin * dy, cos * dy - sin * dx)

    lit_x, lit_y = np.cos(light), np.sin(light)
    cover = np.clip(0.5 - pixels_outside(dx, dy), 0, 1)
    behind = pixels_outside(dx + SHADOW_OFFSET * lit_x, dy + SHADOW_OFFSET * lit_y)
    shadow = SHADOW_DEPTH * np.clip(0.5 - behind / 4.0, 0, 1)
    glow = 1 + 0.10 * (lit_x * dx + lit_y * dy) / radius
    colours = [np.array(COLOUR_RGB[o.colour]) * o.tint for o in objects]
    keep = ((1 - shadow) * (1 - cover))[..., None]
    paint = (glow * cover)[..., None] * np.array(colours, np.float32)[:, None, None, :]
    return keep, paint, np.concatenate([top, left], axis=-1).reshape(len(objects), 2)


def _distance_function(shape: str, objects: Sequence[SceneObject]) -> Distance:
    """Signed distance of a shape of radius about 1 at points (u right, v down), < 0 inside."""
    if shape == OTHER:
        waves = np.array([o.blob for o in objects], np.float32)[:, :, None, None]
        return lambda u, v: _blob(u, v, waves)
    return DISTANCES[shape]


def _circle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.sqrt(u * u + v * v) - 0.94


def _square(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(u), np.abs(v)) - 0.83


def _triangle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    v = v - 0.16
    return np.maximum(v, 0.8660254 * np.abs(u) - 0.5 * v) - 0.60


def _cross(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    u, v = np.abs(u), np.abs(v)
    return np.maximum(np.maximum(u, v) - 0.98, np.minimum(u, v) - 0.33)


def _ring(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.abs(np.sqrt(u * u + v * v) - 0.75) - 0.25


def _heart(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Exact distance of a heart made of a square on its corner and two half circles."""
    scale = 1.66
    x, y = np.abs(u) / scale, 0.56 - v / scale
    lobe = np.sqrt((x - 0.25) ** 2 + (y - 0.75) ** 2) - 0.35355339
    slide = 0.5 * np.maximum(x + y, 0)
    side = np.minimum(x * x + (y - 1) ** 2, (x - slide) ** 2 + (y - slide) ** 2)
    return scale * np.where(x + y > 1, lobe, np.sqrt(side) * np.sign(x - y))


def _blob(u: np.ndarray, v: np.ndarray, waves: np.ndarray) -> np.ndarray:
    """A lumpy outline: radius .8 + sum of cosine harmonics 2.. (amplitude, phase alternating)."""
    angle = np.arctan2(v, u)
    outline = np.full_like(angle, 0.72)
    for k in range(waves.shape[1] // 2):
        outline = outline + waves[:, 2 * k] * np.cos((k + 2) * angle + waves[:, 2 * k + 1])
    return np.sqrt(u * u + v * v) - outline


DISTANCES: dict[str, Distance] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
    "ring": _ring,
    "heart": _heart,
}
