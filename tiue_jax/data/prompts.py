"""Where prompts come from: text, JSON lines, COCO captions, tfds data sets, as one list of texts.

The whole list is held in memory (JourneyDB's 1.4 M captions: about 0.3 GB), so that shuffling,
deduplication and the digest that guards a resume are the same for every source.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from tiue_jax.io.errors import InputError

TFDS_PREFIX = "tfds:"
_TFDS_FIELDS = ("caption", "captions.text", "prompt", "text")  # the first that a data set has
_COCO_FIELD = "caption"
_JSONL_FIELD = "prompt"
# At the ends of texts: what `str.strip` takes, byte order marks and spaces of no width.
_BLANK = "".join(c for c in map(chr, range(0x3001)) if c.isspace()) + "\ufeff\u200b"


@dataclass(frozen=True)
class Prompts:
    """The prompts of a source, in its order, without blank ones.

    Attributes:
        texts: at least one; stripped of surrounding white space, U+FEFF and U+200B.
        source: the source as it was named.
        repeats: how many were left out because the same text came before.
    """

    texts: tuple[str, ...]
    source: str
    repeats: int = 0

    def __len__(self) -> int:
        return len(self.texts)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the texts in order: equal if a run would see the same prompts."""
        digest = hashlib.sha256()
        for text in self.texts:
            encoded = text.encode("utf-8")
            digest.update(len(encoded).to_bytes(8, "little"))
            digest.update(encoded)
        return digest.hexdigest()


def load_prompts(
    source: str,
    *,
    field: str = "",
    deduplicate: bool = False,
    key: str = "data.source",
    field_key: str = "data.field",
) -> Prompts:
    """Read all prompts of `source`.

    Args:
        source: a `.txt` file (a prompt a line), a `.jsonl` file (an object a line), a `.json` file
            in the form of COCO's captions, or `tfds:NAME[:split][:field]` for a prepared tfds data
            set (NAME as tfds knows it, or the folder of a prepared version; split "train").
        field: where in an object the text is; dots go inwards ("Task2.Caption" is JourneyDB's).
            Empty takes "prompt" of JSON lines, "caption" of COCO's JSON, and of a data set the
            first of "caption", "captions.text", "prompt", "text" that it has.
        deduplicate: keep only the first of equal texts.
        key, field_key: the config keys or flags that name source and field, for messages.

    Raises:
        InputError: the source is missing, empty, broken, or without the field; with file and line.
    """
    raws = _read(source, field, key, field_key)
    texts = [text for raw in raws if (text := raw.strip(_BLANK))]
    if not texts:
        raise InputError("holds no prompts", file=source, expected="at least one that is not blank")
    kept = tuple(dict.fromkeys(texts)) if deduplicate else tuple(texts)
    return Prompts(kept, source, repeats=len(texts) - len(kept))


def require_text(text: str, **place: Any) -> None:
    """Refuse a text that no tokenizer takes: one with half of a surrogate pair.

    JSON can hold one as an escape, and a command line that is not UTF-8 becomes some.

    Args:
        place: file, line and key of the text, as for `InputError`.

    Raises:
        InputError: the text cannot be written as UTF-8.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        found = f"{text[error.start]!a} at character {error.start + 1}"
        raise InputError("not UTF-8 text", **place, expected="UTF-8", found=found) from error


def _read(source: str, field: str, key: str, field_key: str) -> Iterator[str]:
    if source.startswith(TFDS_PREFIX):
        return _read_tfds(source, field, key, field_key)
    path = Path(source)
    reader = _READERS.get(path.suffix.lower())
    choices = f"one of {', '.join(sorted(_READERS))}, or {TFDS_PREFIX}NAME[:split][:field]"
    if not source:
        raise InputError("no prompt source is given", key=key, expected=choices)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "no such file"
        raise InputError(what, file=source, key=key, expected=choices)
    if reader is None:
        raise InputError("unknown kind of prompt file", file=source, key=key, expected=choices)
    return reader(path, field, field_key)


def _read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, text) for the lines that are not blank."""
    with path.open("rb") as file:
        first, second = file.readline(), file.readline()
        # Bare CRs end lines where no LF is before the end; elsewhere they are space in a line,
        # so that an error's number is that of sed and grep.
        lines: Iterable[bytes] = chain([first, second], file) if second else first.splitlines()
        for number, raw in enumerate(lines, start=1):
            encoding = "utf-8-sig" if number == 1 else "utf-8"
            if text := _decode(raw, encoding, file=path, line=number).strip(_BLANK):
                yield number, text


def _decode(raw: bytes, encoding: str = "utf-8", **place: Any) -> str:
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        found = f"byte 0x{error.object[error.start]:02x} at column {error.start + 1}"
        raise InputError("not UTF-8 text", **place, expected="UTF-8", found=found) from error


def _read_text(path: Path, field: str, field_key: str) -> Iterator[str]:
    del field, field_key  # a line has no fields
    return (text for _, text in _read_lines(path))


def _read_jsonl(path: Path, field: str, field_key: str) -> Iterator[str]:
    for number, line in _read_lines(path):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # ValueError: a number of 5000 digits, too
            raise InputError(f"broken JSON: {error}", file=path, line=number) from error
        yield from _pick(record, field or _JSONL_FIELD, field_key, file=path, line=number)


def _read_coco(path: Path, field: str, field_key: str) -> Iterator[str]:
    try:
        document = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"broken JSON: {error}", file=path) from error
    records = document.get("annotations") if isinstance(document, dict) else None
    if not isinstance(records, list):
        raise InputError(
            "not COCO captions", file=path, key="annotations", expected="a list of captions"
        )
    for record in records:
        yield from _pick(record, field or _COCO_FIELD, field_key, file=path)


def _pick(
    record: Any, field: str, field_key: str, *, file: str | Path, line: int | None = None
) -> tuple[str, ...]:
    """Return the text, or texts, at `field` of a decoded JSON object."""
    place: dict[str, Any] = {"file": file, "line": line, "key": field}
    said_by = f"what {field_key} names (empty: the usual field)"
    value = record
    for name in field.split("."):
        if not isinstance(value, dict):
            found = f"{type(value).__name__} where {name!r} should be in an object"
            raise InputError("field is missing", **place, expected=said_by, found=found)
        if name not in value:
            found = f"the fields {', '.join(map(str, list(value)[:8]))}" if value else "no fields"
            raise InputError("field is missing", **place, expected=said_by, found=found)
        value = value[name]
    texts = tuple(value) if isinstance(value, list) else (value,)
    for text in texts:
        if not isinstance(text, str):
            found = f"{type(text).__name__} {text!r}"[:80]
            raise InputError("field is not text", **place, expected="text", found=found)
        require_text(text, **place)
    return texts


def _read_tfds(source: str, field: str, key: str, field_key: str) -> Iterator[str]:
    """Yield the texts of one field. Reads only that field's bytes into Python: images stay packed.

    The builder is made from the prepared files and not from its code, because the code of many
    builders (coco_captions among them) imports TensorFlow.
    """
    name, split, named = _parse_tfds(source, key)
    import tensorflow_datasets as tfds  # seconds to import; only where it is asked for

    builder = _open_tfds(name, source, key)
    features = builder.info.features
    field = named or field or next((f for f in _TFDS_FIELDS if _is_text(features, f)), "")
    if not field or not _is_text(features, field):
        raise InputError(
            "data set has no such text field",
            file=source,
            key=field or key,
            expected=f"a field of text, named by {field_key} or as {TFDS_PREFIX}NAME:SPLIT:FIELD",
            found=f"the fields {', '.join(sorted(features))}",
        )
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    try:
        rows = builder.as_data_source(split=split, deserialize_method=raw)
    except (ValueError, NotImplementedError) as error:
        raise InputError(
            f"cannot be read: {error}",
            file=source,
            expected="a split it has, prepared with --file_format=array_record",
        ) from error
    outer, *inner = field.split(".")
    only = tfds.features.FeaturesDict({outer: features[outer]})
    for index in range(len(rows)):
        try:  # the files are opened here, and not before
            value = only.deserialize_example_np(rows[index])[outer]
        except Exception as error:  # array_record, tfds and protobuf raise of every kind
            raise InputError(
                f"cannot be read: {error}", file=source, key=f"example {index}"
            ) from error
        for name in inner:
            value = value[name]
        for raw in [value] if isinstance(value, bytes) else value:
            yield _decode(raw, file=source, key=f"{field} of example {index}")


def _parse_tfds(source: str, key: str) -> tuple[str, str, str]:
    """Split `tfds:NAME[:split][:field]` into name, split ("train" if not said) and field ("")."""
    parts = re.split(r":(?![^\[]*\])", source.removeprefix(TFDS_PREFIX))  # train[:2] is one part
    if not parts[0] or len(parts) > 3:
        raise InputError(
            "not a tfds source",
            file=source,
            key=key,
            expected="tfds:NAME[:split][:field]",
        )
    name, split, field = (parts + ["", ""])[:3]
    return name, split or "train", field


def _open_tfds(name: str, source: str, key: str) -> Any:
    """Return the read-only builder of a prepared data set, by its name or its folder."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import read_only_builder

    try:
        if Path(name).is_dir():
            return tfds.builder_from_directory(name)
        data_dir = os.environ.get("TFDS_DATA_DIR")  # tfds itself looks only when it is imported
        return read_only_builder.builder_from_files(name, data_dir=data_dir)
    except Exception as error:  # tfds raises many kinds for "not there"
        raise InputError(
            "no such prepared data set",
            file=source,
            key=key,
            expected=(
                "one built before (`tfds build NAME --file_format=array_record`) in "
                "$TFDS_DATA_DIR or ~/tensorflow_datasets, or the folder of a version"
            ),
        ) from error


def _is_text(features: Any, field: str) -> bool:
    """Whether there is a dotted `field`, and it is a text or a sequence of texts."""
    import tensorflow_datasets as tfds

    found, sequences = features, 0
    for name in field.split("."):
        try:
            found = found[name]
        except (KeyError, TypeError):
            return False
        if isinstance(found, tfds.features.Sequence):
            found, sequences = found.feature, sequences + 1
    scalar = isinstance(found, tfds.features.Tensor) and found.shape == ()
    return scalar and np.dtype(found.np_dtype).kind == "O" and sequences <= 1


_READERS: dict[str, Callable[[Path, str, str], Iterator[str]]] = {
    ".txt": _read_text,
    ".jsonl": _read_jsonl,
    ".json": _read_coco,
}
