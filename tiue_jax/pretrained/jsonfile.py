"""JSON files from strangers: bounded, strict, read field by field; errors name file and key."""

from __future__ import annotations

import json
import math
import re
import stat
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from tiue_jax.io.errors import InputError

MAX_CONFIG_BYTES = 1 << 20
MAX_DEPTH = 64  # what can be read must be shown too, from any depth of our own calls
MAX_VALUES = 1 << 19  # CLIP's vocabulary and merges are 200,000; a tensor in a header, 10
MAX_SHOWN = 160  # characters of a key or a name from a file
_SURROGATE = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}|\\u[dD][c-fC-F][0-9a-fA-F]{2}")  # escaped
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*+"?', re.DOTALL)  # to the end where it does not end


def parse_object(text: bytes, file: Path) -> dict[str, Any]:
    """Return the JSON object that is `text`, UTF-8.

    Raises:
        InputError: it is not JSON, not an object, too deep or too long, or has a key twice or a
            number that is not finite.
    """
    depth, values = _extent(text)
    if depth > MAX_DEPTH:
        raise InputError("not usable JSON: nested too deeply", file=file)
    if values > MAX_VALUES:
        what = "not usable JSON: too many values"
        raise InputError(what, file=file, expected=f"at most {MAX_VALUES}", found=values)
    try:
        found = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=lambda pairs: (
                found if len(found := dict(pairs)) == len(pairs) else _refuse_twice(pairs, file)
            ),
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
        )
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 text at byte {error.start}", file=file) from error
    except ValueError as error:
        raise InputError(f"not JSON: {error}", file=file) from error
    if not isinstance(found, dict):
        raise InputError("not a JSON object", file=file, found=type(found).__name__)
    if _SURROGATE.search(text):
        try:
            json.dumps(found, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(
                "not usable JSON: half of a character in a string", file=file
            ) from error
    return found


def _extent(text: bytes) -> tuple[int, int]:
    """Return how deep the brackets of `text` are nested, and about how many values it has.

    What is in strings is left out.
    """
    codes = np.frombuffer(_STRING.sub(b"", text), np.uint8)
    opened = (codes == ord("[")) | (codes == ord("{"))
    steps = opened.astype(np.int8) - ((codes == ord("]")) | (codes == ord("}")))
    depth = np.cumsum(steps, dtype=np.int32).max(initial=0)
    return int(depth), int(np.count_nonzero(opened) + np.count_nonzero(codes == ord(",")))


def _refuse_twice(pairs: list[tuple[str, Any]], file: Path) -> NoReturn:
    counts = Counter(key for key, _ in pairs)
    twice = next(key for key, count in counts.items() if count > 1)
    raise InputError("the same key twice in one JSON object", file=file, key=cut(twice))


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite_float(text: str) -> float:
    """Return the number; Python would take 1e999 for infinity, which no JSON file can hold."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{cut(text)} is beyond the range of numbers")
    return number


def cut(text: str) -> str:
    """Return `text`, a key or a name, short enough for one line of error."""
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."


def read_object(file: Path, max_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """Return the JSON object in `file`.

    Raises:
        InputError: `file` is missing, no regular file, larger than `max_bytes`, or no object.
    """
    size = regular_file_size(file)
    if size > max_bytes:
        raise InputError("too large", file=file, expected=f"at most {max_bytes} bytes", found=size)
    try:
        return parse_object(file.read_bytes(), file)
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", file=file) from error


def dump_object(fields: Mapping[str, Any]) -> str:
    """Return `fields` as diffusers writes its configs: sorted keys, indented by two, a line end."""
    return json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def regular_file_size(file: Path) -> int:
    """Return the size of `file` in bytes.

    Raises:
        InputError: it is missing, or a folder, pipe or device.
    """
    try:
        status = file.stat()
    except OSError as error:
        what = "no such file" if isinstance(error, FileNotFoundError) else error.strerror
        raise InputError(what or "cannot be read", file=file) from error
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or device"
        raise InputError("not a regular file", file=file, expected="a file", found=kind)
    return status.st_size


@dataclass(frozen=True)
class Fields:
    """The fields of one JSON object, read by type and range; every refusal names file and key.

    A method's `default` is taken where the key is absent; a key that is there has to be right.
    """

    values: Mapping[str, Any]
    file: Path

    def refuse(
        self, key: str, expected: object, what: str = "value is not supported"
    ) -> InputError:
        """Return the error to raise for `key`."""
        return InputError(what, file=self.file, key=key, expected=expected, found=self.show(key))

    def show(self, key: str) -> str:
        """Return the value of `key` as JSON, cut to 80 characters."""
        text = json.dumps(self.values.get(key), ensure_ascii=False, default=str)
        return text if len(text) <= 80 else text[:77] + "..."

    def integer(self, key: str, default: int, low: int, high: int) -> int:
        """Return an integer in low..high."""
        value = self.values.get(key, default)
        if not _is_integer(value) or not low <= value <= high:
            raise self.refuse(key, f"an integer in {low}..{high}")
        return value

    def integers(
        self, key: str, default: int | Sequence[int], count: int | None, low: int, high: int
    ) -> tuple[int, ...]:
        """Return `count` integers (None: 1 to 8); a lone integer stands for all of them."""
        value = self.values.get(key, default)
        if _is_integer(value) and count is not None:
            value = [value] * count
        right = isinstance(value, (list, tuple)) and all(_is_integer(v) for v in value)
        right = right and (len(value) == count if count is not None else 1 <= len(value) <= 8)
        if not right or not all(low <= v <= high for v in value):
            length = f"{count}" if count is not None else "1 to 8"
            raise self.refuse(key, f"{length} integers in {low}..{high}")
        return tuple(value)

    def number(self, key: str, default: float, low: float, high: float) -> float:
        """Return a number in low..high."""
        value = self.values.get(key, default)
        right = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not right or not low <= value <= high:
            raise self.refuse(key, f"a number in {low}..{high}")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        """Return true or false; null counts as absent."""
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.refuse(key, "true or false")
        return value

    def choice(self, key: str, default: str, choices: Collection[str]) -> str:
        """Return one of `choices`."""
        value = self.values.get(key, default)
        if not isinstance(value, str) or value not in choices:
            raise self.refuse(key, "one of " + ", ".join(sorted(choices)))
        return value

    def only(self, key: str, supported: Sequence[Any]) -> None:
        """Refuse `key` unless it is absent or one of `supported`, or a list of such values."""
        if key not in self.values:
            return
        value = self.values[key]
        values = value if isinstance(value, list) and value else [value]
        if not all(any(_same(v, s) for s in supported) for v in values):
            raise self.refuse(key, " or ".join(json.dumps(s) for s in supported))


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _same(value: object, supported: object) -> bool:
    """Equal, and neither 0 for false nor 1 for true."""
    return value == supported and isinstance(value, bool) == isinstance(supported, bool)
