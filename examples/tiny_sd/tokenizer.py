"""The tokenizer of tiny-sd: a real CLIP byte-level BPE whose merges come from our captions.

Every word of a caption is one token; any other text falls back to bytes and common pieces.
"""

import json
from pathlib import Path

from examples.tiny_sd.captions import all_words

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
MAX_LENGTH = 77
EXTRA_WORDS = (  # not in captions, so that a user's wording is not cut into letters
    *"the and or of on in to by with at is are it its this one two three next behind".split(),
    *"photo picture image drawing painting beautiful high quality low bad blurry nothing".split(),
    *"star diamond oval rectangle moon brown gold silver dark light bright plain dotted".split(),
)


def build_tokenizer(folder: str | Path) -> None:
    """Write vocab.json, merges.txt, tokenizer_config.json and special_tokens_map.json.

    The files are CLIPTokenizer's: `transformers.CLIPTokenizer.from_pretrained(folder)` reads them
    offline. Ids: 256 bytes, 256 bytes at the end of a word, one per merge, then start and end.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    merges = _learn_merges(sorted({*all_words(), *EXTRA_WORDS}))
    letters = list(byte_letters().values())
    tokens = [*letters, *(c + WORD_END for c in letters), *("".join(m) for m in merges), START, END]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    assert len(vocabulary) == len(tokens), "two merges give the same token"
    lines = ["#version: 0.2", *(" ".join(m) for m in merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": MAX_LENGTH,
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": END,
    }
    special = {k: config[k] for k in ("bos_token", "eos_token", "unk_token", "pad_token")}
    for name, content in (
        ("vocab.json", vocabulary),
        ("tokenizer_config.json", config),
        ("special_tokens_map.json", special),
    ):
        text = json.dumps(content, ensure_ascii=False, indent=None if "vocab" in name else 2)
        (folder / name).write_text(text + "\n", encoding="utf-8")


def _learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, commonest pair first, until every word is one token.

    Every word counts once: the order of merges matters only where words share pieces.
    """
    pieces = [[*word[:-1], word[-1] + WORD_END] for word in words]
    merges: list[tuple[str, str]] = []
    while True:
        counts: dict[tuple[str, str], int] = {}
        for word in pieces:
            for pair in zip(word, word[1:], strict=False):
                counts[pair] = counts.get(pair, 0) + 1
        if not counts:
            return merges
        best = max(sorted(counts), key=counts.__getitem__)
        merges.append(best)
        pieces = [_merge(word, best) for word in pieces]


def _merge(word: list[str], pair: tuple[str, str]) -> list[str]:
    """Join every occurrence of a pair, left to right."""
    out: list[str] = []
    for piece in word:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return out


def byte_letters() -> dict[int, str]:
    """GPT-2's printable letter for each byte, in the order of CLIP's vocabulary.

    Bytes that print keep their own character; the others take code points from 256 on.
    """
    printing = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in printing]
    return {b: chr(b) for b in printing} | {b: chr(256 + i) for i, b in enumerate(hidden)}
