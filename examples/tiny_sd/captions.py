"""Captions of scenes, and what a caption asks for.

A caption leaves attributes out at random; whatever it does not mention may be anything. `describe`
gives the text together with what it mentions (`Request`), which is what accuracy is judged on.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from examples.tiny_sd.scenes import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT_PAIRS,
    SHAPES,
    Scene,
)

MENTION = {  # how often a caption mentions an attribute
    "shape": 0.94,
    "colour": 0.94,
    "size": 0.5,
    "cell": 0.75,
    "relation": 0.8,
    "background": 0.5,
}
SIZE_WORDS = {"small": ("small", "small", "little", "tiny"), "large": ("large", "large", "big")}
CELL_PHRASES = {
    "top left": ("at the top left", "in the top left corner", "in the upper left"),
    "top": ("at the top", "near the top"),
    "top right": ("at the top right", "in the top right corner", "in the upper right"),
    "left": ("at the left", "on the left side"),
    "center": ("in the center", "in the middle"),
    "right": ("at the right", "on the right side"),
    "bottom left": ("at the bottom left", "in the bottom left corner", "in the lower left"),
    "bottom": ("at the bottom", "near the bottom"),
    "bottom right": ("at the bottom right", "in the bottom right corner", "in the lower right"),
}
BACKGROUND_PHRASES = (
    "on a {} background",
    "on a {} background",
    "with a {} background",
    "in front of a {} background",
)
RELATIONS = {  # layout: (first then second, second then first)
    "vertical": (("above", "over", "on top of"), ("below", "under", "beneath")),
    "horizontal": (("left of", "to the left of"), ("right of", "to the right of")),
}
# {thing}: an object. {place}: " at the top left" or nothing. {ground}: " on a ... background" or
# nothing. {lead_place}, {lead_ground}: the same at the head of the sentence: "at the top, ".
SINGLE_TEMPLATES = (
    "{thing}{place}{ground}",
    "{thing}{place}{ground}",
    "{thing}{place}{ground}",
    "a picture of {thing}{place}{ground}",
    "an image of {thing}{place}{ground}",
    "there is {thing}{place}{ground}",
    "{lead_place}{thing}{ground}",
    "{lead_ground}{thing}{place}",
    "{lead_place}there is {thing}{ground}",
    "a drawing that shows {thing}{place}{ground}",
)
PAIR_TEMPLATES = (
    "{first} {relation} {second}{ground}",
    "{first} {relation} {second}{ground}",
    "{first} {relation} {second}{ground}",
    "a picture of {first} {relation} {second}{ground}",
    "an image of {first} {relation} {second}{ground}",
    "there is {first} {relation} {second}{ground}",
    "{lead_ground}{first} {relation} {second}",
    "{first} that is {relation} {second}{ground}",
    "a drawing that shows {first} {relation} {second}{ground}",
)
UNRELATED_TEMPLATES = (
    "{first} and {second}{ground}",
    "{first} and {second}{ground}",
    "{first} with {second}{ground}",
    "a picture of {first} and {second}{ground}",
    "two shapes: {first} and {second}{ground}",
    "{lead_ground}{first} and {second}",
    "a drawing that shows {first} and {second}{ground}",
)


@dataclass(frozen=True, slots=True)
class ObjectRequest:
    """What a caption says of one object; None where it says nothing."""

    shape: str | None
    colour: str | None
    size: str | None


@dataclass(frozen=True, slots=True)
class Request:
    """A caption and what it mentions.

    Args:
        text: the caption.
        objects: in the scene's canonical order (top or left first). Where `layout` is None and
            there are two objects, either order is right.
        layout: one of `scenes.LAYOUTS`, or None.
        background: one of `scenes.BACKGROUNDS`, or None.
    """

    text: str
    objects: tuple[ObjectRequest, ...]
    layout: str | None
    background: str | None

    @property
    def is_held_out(self) -> bool:
        """Whether it names a colour-shape pair that training never showed."""
        return any((o.colour, o.shape) in HELD_OUT_PAIRS for o in self.objects)


def describe(scene: Scene, rng: np.random.Generator, *, complete: bool = False) -> Request:
    """Say what a scene shows.

    Args:
        scene: the scene.
        rng: chooses the phrasing and what is left out.
        complete: mention every colour, shape, position and relation (size and background stay
            optional).
    """
    draw = rng.random(16)  # one call: the cost of a caption is in its draws
    mentions = tuple(
        ObjectRequest(
            obj.shape if complete or draw[3 * k] < MENTION["shape"] else None,
            obj.colour if complete or draw[3 * k + 1] < MENTION["colour"] else None,
            obj.size if draw[3 * k + 2] < MENTION["size"] else None,
        )
        for k, obj in enumerate(scene.objects)
    )
    background = scene.background if draw[6] < MENTION["background"] else None
    ground = _pick(BACKGROUND_PHRASES, draw[7]).format(background) if background else ""
    fields = {
        "ground": f" {ground}" if ground else "",
        "lead_ground": f"{ground}, " if ground else "",
    }
    things = [_thing(m, draw[8 + k], draw[10 + k]) for k, m in enumerate(mentions)]
    said = complete or draw[12] < MENTION["cell" if len(things) == 1 else "relation"]
    layout = scene.layout if said else None
    if len(things) == 1:
        place = _pick(CELL_PHRASES[layout], draw[13]) if layout else ""
        fields |= {
            "thing": things[0],
            "place": f" {place}" if place else "",
            "lead_place": f"{place}, " if place else "",
        }
        template = _pick(SINGLE_TEMPLATES, draw[14])
    else:
        swap = draw[15] < 0.5
        fields["first"], fields["second"] = reversed(things) if swap else things
        if layout is None:
            template = _pick(UNRELATED_TEMPLATES, draw[14])
        else:
            fields["relation"] = _pick(RELATIONS[layout][int(swap)], draw[13])
            template = _pick(PAIR_TEMPLATES, draw[14])
    return Request(template.format(**fields), mentions, layout, background)


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Return a caption of a scene (`describe` without what it mentions)."""
    return describe(scene, rng).text


def all_words() -> list[str]:
    """Return every word that a caption can have, sorted (commas and colons left out)."""
    phrases: list[str] = [*COLOURS, *SHAPES, *BACKGROUNDS, "a", "an", "object", "shape", "one"]
    phrases += SINGLE_TEMPLATES + PAIR_TEMPLATES + UNRELATED_TEMPLATES + BACKGROUND_PHRASES
    phrases += [w for words in SIZE_WORDS.values() for w in words]
    phrases += [p for options in CELL_PHRASES.values() for p in options]
    phrases += [p for sides in RELATIONS.values() for side in sides for p in side]
    words: set[str] = set()
    for phrase in phrases:
        words.update(
            w for w in phrase.replace("{", " {").replace("}", "} ").split() if "{" not in w
        )
    return sorted({w.strip(",:") for w in words} - {""})


def _thing(request: ObjectRequest, noun: float, size: float) -> str:
    """Return a noun phrase: "a large red circle", "a small object", "a circle"."""
    words = []
    if request.size:
        words.append(_pick(SIZE_WORDS[request.size], size))
    if request.colour:
        words.append(request.colour)
    words.append(request.shape or _pick(("object", "shape"), noun))
    article = "an" if words[0][0] in "aeiou" else "a"
    return f"{article} {' '.join(words)}"


def _pick(options: Sequence[str], u: float) -> str:
    """Choose by a uniform number in [0, 1)."""
    return options[int(u * len(options))]
