"""Prompts to token ids: transformers' CLIPTokenizer, with its files checked first.

transformers 5 makes a vocabulary of two tokens where it finds no files, and says nothing: every
prompt would become the same ids. So the files are required, checked against each other, and the
result against the text encoder. It also takes tokenizer.json before vocab.json and merges.txt, and
reads what a config names: it gets what has been checked, in a folder of its own, and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Int32
from transformers import CLIPTokenizer

from tiue_jax.io.errors import InputError
from tiue_jax.io.files import StrPath
from tiue_jax.pretrained.jsonfile import Fields, dump_object, parse_object, regular_file_size

MAX_FILE_BYTES = 32 << 20  # CLIP's largest file, tokenizer.json, has 3.6 MB
_FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_END = "</w>"  # of a token that ends a word
# The settings that ids depend on, by the file that may hold them.
_SPECIAL_TOKENS = (
    *(f"{name}_token" for name in ("bos", "cls", "eos", "mask", "pad", "sep", "unk")),
    "additional_special_tokens",
    "extra_special_tokens",
)
_SETTINGS = {
    "tokenizer_config.json": (
        *_SPECIAL_TOKENS,
        "added_tokens_decoder",
        "model_max_length",
        "split_special_tokens",
    ),
    "special_tokens_map.json": _SPECIAL_TOKENS,
}
# Settings with which transformers would take tokens from elsewhere.
_REPLACING = ("fast_tokenizer_files", "gguf_file", "init_inputs", "merges", "vocab")

Merges = list[tuple[str, str]]


class Tokenizer:
    """Token ids of a fixed length: begin, the prompt's tokens, end, padding.

    Attributes:
        max_length: length of every row of ids, begin and end included (77 for CLIP).
        vocab_size: number of tokens.
        files: the tokenizer's files, name -> content: what `save` writes.
    """

    def __init__(
        self, folder: StrPath, *, vocab_size: int | None = None, max_length: int = 77
    ) -> None:
        """Read `folder`: vocab.json and merges.txt, or tokenizer.json. Never asks a network.

        Args:
            folder: as in a Stable Diffusion folder's `tokenizer/`.
            vocab_size: the text encoder's, if it is known.
            max_length: number of the text encoder's position embeddings.

        Raises:
            InputError: a file is missing or malformed, or does not fit the others, `vocab_size` or
                `max_length`.
        """
        folder = Path(folder)
        self.files = _read_files(folder)
        self.max_length = max_length
        vocab, merges = _vocab_and_merges(self.files, folder)
        self._tokenizer = _clip_tokenizer(self.files, vocab, merges, folder)
        self.vocab_size = len(self._tokenizer)
        self._check(folder, vocab, merges, vocab_size)
        if "vocab.json" not in self.files:  # older readers, the authors' code among them, want both
            self.files |= _vocabulary_files(vocab, merges)
        if "tokenizer_config.json" not in self.files:
            config = {"model_max_length": max_length, "tokenizer_class": "CLIPTokenizer"}
            self.files["tokenizer_config.json"] = dump_object(config).encode()

    def __call__(self, prompts: Sequence[str]) -> Int32[np.ndarray, "b n"]:
        """Return the ids of `prompts`; warns of every prompt that is cut, with what is cut."""
        ids, cuts = self.encode(prompts)
        for prompt, cut in zip(prompts, cuts, strict=True):
            if cut:
                logging.warning(
                    "prompt is longer than %d tokens; cut off: %r (of a prompt of %d characters)",
                    self.max_length,
                    cut,
                    len(prompt),
                )
        return ids

    def encode(self, prompts: Sequence[str]) -> tuple[Int32[np.ndarray, "b n"], list[str]]:
        """Return the ids of `prompts`, and of each prompt the text behind its last token that fits.

        The empty prompt is a prompt like another: the null prompt of guidance.
        """
        rows = np.full((len(prompts), self.max_length), self._tokenizer.pad_token_id, np.int32)
        cuts: list[str] = []
        if not prompts:
            return rows, cuts
        whole = self._tokenizer(list(prompts), return_offsets_mapping=True, verbose=False)
        found = zip(prompts, whole["input_ids"], whole["offset_mapping"], strict=True)
        for row, (prompt, ids, offsets) in zip(rows, found, strict=True):
            kept = min(len(ids), self.max_length) - 1  # all but the end token
            row[:kept] = ids[:kept]
            row[kept] = self._tokenizer.eos_token_id
            cuts.append(prompt[offsets[kept][0] :].strip() if len(ids) > self.max_length else "")
        return rows, cuts

    @property
    def null_ids(self) -> Int32[np.ndarray, "n"]:
        """Ids of the empty prompt."""
        return self.encode([""])[0][0]

    @property
    def special_ids(self) -> tuple[int, int, int]:
        """Ids of the begin, end and padding tokens."""
        t = self._tokenizer
        return t.bos_token_id, t.eos_token_id, t.pad_token_id

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files into the new folder `folder`."""
        folder.mkdir(parents=True)
        for name, content in self.files.items():
            (folder / name).write_bytes(content)

    def _check(
        self,
        folder: Path,
        vocab: Mapping[str, int],
        merges: Sequence[tuple[str, str]],
        vocab_size: int | None,
    ) -> None:
        """Hold the files, and what transformers made of them, against each other."""
        tokenizer = self._tokenizer
        for what in ("bos_token", "eos_token", "pad_token"):
            if getattr(tokenizer, f"{what}_id") is None:
                raise InputError("no such token", file=folder, key=what)
        known = {*(a + b for a, b in merges), *tokenizer.get_added_vocab()}
        known |= {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token}
        orphans = [t for t in vocab if len(t.removesuffix(_END)) > 1 and t not in known]
        if orphans:
            what = f"{len(orphans)} tokens of the vocabulary come of no merge: merges are truncated"
            raise InputError(what, file=folder, found=repr(orphans[0]))
        if vocab_size is not None and self.vocab_size != vocab_size:
            what = "vocabulary is not the text encoder's"
            raise InputError(
                what, file=folder, expected=f"{vocab_size} tokens", found=self.vocab_size
            )
        length = tokenizer.model_max_length
        if length != self.max_length and length < 10**9:  # transformers: 1e30 where nothing is said
            raise InputError(
                "length of a prompt is not the text encoder's",
                file=folder / "tokenizer_config.json",
                key="model_max_length",
                expected=self.max_length,
                found=length,
            )
        if max(tokenizer.get_vocab().values()) >= self.vocab_size:
            raise InputError("token ids are not 0, 1, 2, ...", file=folder / "vocab.json")


def _read_files(folder: Path) -> dict[str, bytes]:
    """Return the content of the tokenizer's files in `folder`."""
    if not folder.is_dir():
        raise InputError("no such folder: a tokenizer is needed", file=folder)
    files = {}
    for name in _FILES:
        path = folder / name
        if path.exists():
            if regular_file_size(path) > MAX_FILE_BYTES:
                raise InputError("too large", file=path, expected=f"at most {MAX_FILE_BYTES} bytes")
            files[name] = path.read_bytes()
    if "tokenizer.json" not in files:
        for name in ("vocab.json", "merges.txt"):
            if name not in files:
                raise InputError("no such file", file=folder / name)
    elif ("vocab.json" in files) != ("merges.txt" in files):
        missing = "merges.txt" if "vocab.json" in files else "vocab.json"
        raise InputError("no such file", file=folder / missing)
    return files


def _clip_tokenizer(
    files: Mapping[str, bytes], vocab: Mapping[str, int], merges: Merges, folder: Path
) -> CLIPTokenizer:
    """Return transformers' tokenizer of `files`, and of no other file of `folder`."""
    given = _vocabulary_files(vocab, merges)
    if "tokenizer.json" in files:  # which goes first: it has been held against the others
        given["tokenizer.json"] = files["tokenizer.json"]
    for name in (*_SETTINGS, "added_tokens.json"):
        if name in files:
            fields = _settings(parse_object(files[name], folder / name), folder / name)
            given[name] = json.dumps(fields).encode()
    with TemporaryDirectory() as checked:
        for name, content in given.items():
            (Path(checked) / name).write_bytes(content)
        try:
            return CLIPTokenizer.from_pretrained(checked, local_files_only=True)
        except Exception as error:  # of the Rust library too, which has no class for its own
            raise InputError(f"not a usable CLIP tokenizer: {error}", file=folder) from error


def _vocabulary_files(vocab: Mapping[str, int], merges: Merges) -> dict[str, bytes]:
    """Return vocab.json and merges.txt."""
    lines = "".join(f"{a} {b}\n" for a, b in merges)
    return {
        "vocab.json": json.dumps(vocab, ensure_ascii=False).encode(),
        "merges.txt": f"#version: 0.2\n{lines}".encode(),
    }


def _settings(values: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Return the settings in `file` that ids depend on; all of added_tokens.json, which has none.

    Raises:
        InputError: a setting that would replace the vocabulary, or a length that is no number.
    """
    if file.name not in _SETTINGS:
        return dict(values)
    for key in _REPLACING:
        if values.get(key):
            raise InputError("would replace the vocabulary in this folder", file=file, key=key)
    length = values.get("model_max_length")
    if length is not None and (isinstance(length, bool) or not isinstance(length, int | float)):
        raise Fields(values, file).refuse("model_max_length", "a number")
    return {key: values[key] for key in _SETTINGS[file.name] if key in values}


def _vocab_and_merges(files: Mapping[str, bytes], folder: Path) -> tuple[dict[str, int], Merges]:
    """Return the vocabulary and the merges, of vocab.json and merges.txt or of tokenizer.json.

    Raises:
        InputError: they are malformed, or there are both and they contradict each other.
    """
    older = newer = None
    if "vocab.json" in files:
        file = folder / "vocab.json"
        vocab = _check_vocab(parse_object(files["vocab.json"], file), file)
        older = vocab, _merge_lines(files["merges.txt"], folder / "merges.txt")
    if "tokenizer.json" in files:
        file = folder / "tokenizer.json"
        newer = _read_tokenizer_json(files["tokenizer.json"], file)
        if older and newer[0] != older[0]:
            raise InputError("contradicts vocab.json", file=file, key="model.vocab")
        if older and newer[1] != older[1]:
            raise InputError("contradicts merges.txt", file=file, key="model.merges")
    found = older or newer
    assert found is not None
    return found


def _read_tokenizer_json(content: bytes, file: Path) -> tuple[dict[str, int], Merges]:
    """Return the vocabulary and the merges of tokenizer.json."""
    model = parse_object(content, file).get("model")
    model = model if isinstance(model, dict) else {}
    merges = model.get("merges")
    if not isinstance(merges, list):
        raise InputError("no list of merges", file=file, key="model.merges")
    pairs: Merges = []
    for merge in merges:
        halves = merge.split(" ") if isinstance(merge, str) else merge
        right = isinstance(halves, list) and len(halves) == 2
        if not right or not all(isinstance(half, str) for half in halves):
            raise InputError("not a pair of tokens", file=file, found=repr(merge)[:80])
        pairs.append((halves[0], halves[1]))
    return _check_vocab(model.get("vocab"), file), pairs


def _check_vocab(vocab: object, file: Path) -> dict[str, int]:
    """Return `vocab`; raise InputError unless it gives every token an id of its own."""
    if not isinstance(vocab, dict) or not vocab:
        raise InputError("no vocabulary", file=file)
    if not all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in vocab.values()):
        raise InputError("vocabulary is not a map of tokens to ids", file=file)
    if len(set(vocab.values())) != len(vocab):
        raise InputError("two tokens with the same id", file=file)
    return vocab


def _merge_lines(content: bytes, path: Path) -> Merges:
    """Return the pairs of merges.txt: a version line, then two tokens a line."""
    try:
        lines = content.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 text at byte {error.start}", file=path) from error
    merges = []
    for number, line in enumerate(lines, start=1):
        line = line.removesuffix("\r")
        if line and not (number == 1 and line.startswith("#version")):
            halves = line.split(" ")
            if len(halves) != 2 or not all(halves):
                raise InputError("not a pair of tokens", file=path, line=number, found=line[:80])
            merges.append((halves[0], halves[1]))
    return merges
