"""The tokenizer is CLIP's: transformers loads it, captions are words, other text falls to bytes."""

import json

import numpy as np
import pytest
from transformers import CLIPTokenizer

from examples.tiny_sd.captions import all_words, caption
from examples.tiny_sd.scenes import sample_scenes
from examples.tiny_sd.tokenizer import END, START, build_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return CLIPTokenizer.from_pretrained(folder)


def test_special_tokens_and_size(tokenizer):
    assert len(tokenizer) <= 1200
    assert tokenizer.model_max_length == 77
    last = len(tokenizer) - 1
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (last - 1, last)
    assert tokenizer.pad_token_id == tokenizer.unk_token_id == last
    assert tokenizer("").input_ids == [last - 1, last]


def test_every_caption_word_is_one_token(tokenizer):
    for word in all_words():
        assert len(tokenizer(word).input_ids) == 3, word


def test_captions_fit_and_come_back(tokenizer):
    rng = np.random.default_rng(0)
    texts = [caption(scene, rng) for scene in sample_scenes(rng, 500)]
    ids = tokenizer(texts).input_ids
    assert max(len(i) for i in ids) < 30
    for text, row in zip(texts, ids, strict=True):
        decoded = tokenizer.decode(row, skip_special_tokens=True).strip()
        assert decoded.replace(" ", "") == text.replace(" ", "")


def test_padding_is_to_77_with_the_end_token(tokenizer):
    ids = tokenizer("a red circle", padding="max_length", truncation=True).input_ids
    assert len(ids) == 77
    assert ids[0] == tokenizer.convert_tokens_to_ids(START)
    assert set(ids[4:]) == {tokenizer.convert_tokens_to_ids(END)}


@pytest.mark.parametrize("text", ["an astronaut riding a horse", "café 日本 42!", "Ünïcödé"])
def test_other_text_has_no_unknown_tokens(tokenizer, text):
    ids = tokenizer(text).input_ids[1:-1]
    assert tokenizer.unk_token_id not in ids
    decoded = tokenizer.decode(ids).replace(" ", "")
    assert decoded == text.lower().replace(" ", "")


def test_upper_case_is_lowered(tokenizer):
    assert tokenizer("A RED Circle").input_ids == tokenizer("a red circle").input_ids


def test_the_files_are_reproducible(folder, tmp_path):
    build_tokenizer(tmp_path)
    for file in folder.iterdir():
        assert file.read_bytes() == (tmp_path / file.name).read_bytes()


def test_ids_are_dense_and_merges_are_in_the_vocabulary(folder):
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("#version")
    for i, line in enumerate(lines[1:]):
        assert vocabulary["".join(line.split())] == 512 + i
    assert np.unique(lines).size == len(lines)
