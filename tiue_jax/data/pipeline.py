"""Prompts as an endless, deterministic, checkpointable sequence of token batches (grain).

Example n of a run is prompt `shuffle(seed + epoch)[n mod N]`, epoch = n // N for N prompts, and
batch s holds examples s B .. (s + 1) B - 1 for a batch size B over all hosts. A batch is thus a
function of (seed, s) alone: every prompt comes once an epoch, a batch may straddle two epochs, and
host h of H takes the h-th contiguous part of each batch, whatever H is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np
from jaxtyping import Int32

from tiue_jax.data.prompts import Prompts

Tokenize = Callable[[Sequence[str]], Int32[np.ndarray, "b n"]]
Encode = Callable[[Sequence[str]], tuple[Int32[np.ndarray, "b n"], list[str]]]

_EPOCHS = 2**31  # endless; of None, grain's len() overflows with a batch of one
_READ = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)  # tokenising is microseconds


def make_batches(
    prompts: Prompts,
    tokenize: Tokenize,
    *,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator[dict[str, Any]]:
    """Return the endless iterator of this host's part of every batch.

    Args:
        prompts: what to iterate over; a batch may be larger than it.
        tokenize: texts to int32 token ids; called from grain's reading thread.
        batch_size: B, over all hosts; divisible by `process_count`.
        seed: of the shuffle, in 0..2**32 - 1.
        process_index, process_count: which host this is, of how many.

    Returns:
        An iterator of {"input_ids": int32 [B / H, n], "prompts": the B / H texts}. Its state is
        the number of the next batch: `seek` puts it anywhere, also under another `process_count`.

    Raises:
        ValueError: the batch does not divide by the number of hosts, or an argument out of range.
    """
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(f"batch_size {batch_size} does not divide by {process_count} processes")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index {process_index}: choose 0..{process_count - 1}")
    local = batch_size // process_count
    mine = slice(process_index * local, (process_index + 1) * local)

    def encode(batch: list[str]) -> dict[str, Any]:
        texts = batch[mine]
        return {"input_ids": tokenize(texts), "prompts": texts}

    shuffled = grain.MapDataset.source(prompts.texts).seed(seed).shuffle(seed=seed).repeat(_EPOCHS)
    batches = shuffled.batch(batch_size, batch_fn=list).map(encode)
    return iter(batches.to_iter_dataset(_READ))


def seek(batches: grain.DatasetIterator, step: int) -> None:
    """Make `batches` continue with batch number `step`, from 0."""
    batches.set_state({"next_index": step})


def position(batches: grain.DatasetIterator) -> int:
    """Return the number of the batch that comes next."""
    return int(batches.get_state()["next_index"])


class CutReport:
    """A tokenizer that tells of prompts too long for it: the first few in full, all in number.

    Args:
        encode: texts to (token ids, what was cut off each text: "" for nothing).
        say: called with a line for a person.
        shown: how many prompts are told of one by one.
    """

    def __init__(self, encode: Encode, say: Callable[[str], None], *, shown: int = 3) -> None:
        self._encode = encode
        self._say = say
        self._shown = shown
        self._cut: set[str] = set()  # prompts come again, with every epoch

    def __call__(self, texts: Sequence[str]) -> Int32[np.ndarray, "b n"]:
        """Return the token ids of `texts`."""
        ids, cuts = self._encode(texts)
        for text, cut in zip(texts, cuts, strict=True):
            if cut and text not in self._cut:
                self._cut.add(text)
                if len(self._cut) <= self._shown:
                    self._say(
                        f"warning: prompt is longer than {ids.shape[1]} tokens, "
                        f"cut off: {cut!r} of {text!r}"
                    )
        return ids

    def summary(self) -> str:
        """One line on all prompts that were cut so far, or ""."""
        if not self._cut:
            return ""
        count = len(self._cut)
        return (
            f"warning: {count} prompt{'s' * (count > 1)} longer than the tokenizer takes were cut"
        )
