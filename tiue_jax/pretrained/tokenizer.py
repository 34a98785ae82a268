"""Prompts to token ids: transformers' CLIPTokenizer, with its files checked first.

transformers 5 makes a vocabulary of two tokens where it finds no files, and says nothing: every
prompt would become the same ids. So the files are required, checked against each other, and the
result against the text encoder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Int32
from transformers import CLIPTokenizer

from tiue_jax.io.errors import InputError
from tiue_jax.io.files import StrPath
from tiue_jax.pretrained.jsonfile import dump_object, parse_object, regular_file_size

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
        try:
            self._tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # of the Rust library too, which has no class for its own
            raise InputError(f"not a usable CLIP tokenizer: {error}", file=folder) from error
        self.vocab_size = len(self._tokenizer)
        self._check(folder, vocab, merges, vocab_size)
        if "vocab.json" not in self.files:  # older readers, the authors' code among them, want both
            self.files["vocab.json"] = json.dumps(vocab, ensure_ascii=False).encode()
            lines = "".join(f"{a} {b}\n" for a, b in merges)
            self.files["merges.txt"] = f"#version: 0.2\n{lines}".encode()
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


def _vocab_and_merges(
    files: Mapping[str, bytes], folder: Path
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return the vocabulary and the merges, of vocab.json and merges.txt or of tokenizer.json."""
    if "vocab.json" in files:
        path = folder / "vocab.json"
        vocab: Any = parse_object(files["vocab.json"], path)
        merges: Any = _merge_lines(files["merges.txt"], folder / "merges.txt")
    else:
        path = folder / "tokenizer.json"
        model = parse_object(files["tokenizer.json"], path).get("model")
        model = model if isinstance(model, dict) else {}
        vocab, merges = model.get("vocab"), model.get("merges")
        if not isinstance(merges, list):
            raise InputError("no list of merges", file=path, key="model.merges")
        merges = [m.split(" ") if isinstance(m, str) else m for m in merges]
    if not isinstance(vocab, dict) or not vocab:
        raise InputError("no vocabulary", file=path)
    if not all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in vocab.values()):
        raise InputError("vocabulary is not a map of tokens to ids", file=path)
    if len(set(vocab.values())) != len(vocab):
        raise InputError("two tokens with the same id", file=path)
    for merge in merges:
        right = isinstance(merge, list | tuple) and len(merge) == 2
        if not right or not all(isinstance(half, str) for half in merge):
            raise InputError("not a pair of tokens", file=path, found=repr(merge)[:80])
    return vocab, [(a, b) for a, b in merges]


def _merge_lines(content: bytes, path: Path) -> list[tuple[str, str]]:
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
