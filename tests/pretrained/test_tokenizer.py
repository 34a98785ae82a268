from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import CLIPTokenizer

from tests.pretrained.folders import MODEL, edit_json
from tiue_jax.io.errors import InputError
from tiue_jax.pretrained.tokenizer import Tokenizer

PROMPTS = [
    "a red cube on the blue table",
    "a photo of a waterfall surrounded by rocks",
    "",
    "   A\tRed\n\nCUBE ",
    "héllo wörld, 世界 🎨!",
    "it's 3,14 o'clock; don't <|endoftext|> stop",
    "word " * 75,
    "word " * 200,
    "é" * 300,
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(MODEL / "tokenizer", vocab_size=525)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the reference tokenizer."""
    return Path(shutil.copytree(MODEL / "tokenizer", tmp_path / "t", copy_function=shutil.copyfile))


def _theirs(folder: Path, prompts: list[str]) -> np.ndarray:
    tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    options = {"padding": "max_length", "max_length": 77, "truncation": True}
    return tokenizer(prompts, return_tensors="np", **options)["input_ids"]


def test_ids_are_those_of_transformers(tokenizer: Tokenizer) -> None:
    ids, _ = tokenizer.encode(PROMPTS)
    assert ids.dtype == np.int32
    assert ids.tolist() == _theirs(MODEL / "tokenizer", PROMPTS).tolist()


def test_ids_are_those_of_the_recorded_run(tokenizer: Tokenizer) -> None:
    recorded = np.load(MODEL.parent / "sampling.npz")["input_ids"]
    assert tokenizer(PROMPTS[:2]).tolist() == recorded.tolist()


def test_the_empty_prompt_is_the_null_prompt(tokenizer: Tokenizer) -> None:
    assert tokenizer.null_ids.tolist() == [523] + [524] * 76
    assert tokenizer([""]).tolist() == [tokenizer.null_ids.tolist()]
    assert tokenizer([]).shape == (0, 77)


def test_long_prompts_are_cut_with_a_warning_that_says_what(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    whole = "a " * 75
    with caplog.at_level(logging.WARNING, logger="absl"):
        tokenizer([whole, "a red cube"])
        assert not caplog.records
        ids = tokenizer(["a red cube", whole + "red Cube & é"])
    assert [record.getMessage() for record in caplog.records] == [
        "prompt is longer than 77 tokens; cut off: 'red Cube & é' (of a prompt of 162 characters)"
    ]
    assert ids[1].tolist() == [523] + tokenizer([whole])[0, 1:76].tolist() + [524]


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
def test_padding_is_the_folders(pad: str, folder: Path) -> None:
    """SD 2.x pads with "!", token 0."""
    edit_json(folder / "tokenizer_config.json", pad_token=pad)
    (folder / "special_tokens_map.json").unlink()
    ids = Tokenizer(folder, vocab_size=525)(PROMPTS[:3])
    assert ids.tolist() == _theirs(folder, PROMPTS[:3]).tolist()
    assert set(ids[2, 2:].tolist()) == {524 if pad.startswith("<") else 0}


def test_saved_files_give_the_same_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "t")
    for file in (MODEL / "tokenizer").iterdir():
        assert (tmp_path / "t" / file.name).read_bytes() == file.read_bytes()


def test_a_folder_saved_by_transformers_5_has_only_tokenizer_json(tmp_path: Path) -> None:
    theirs = CLIPTokenizer.from_pretrained(MODEL / "tokenizer", local_files_only=True)
    theirs.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new" / "vocab.json").exists()
    ours = Tokenizer(tmp_path / "new", vocab_size=525)
    expected = _theirs(MODEL / "tokenizer", PROMPTS).tolist()
    assert ours.encode(PROMPTS)[0].tolist() == expected
    ours.save(tmp_path / "old")  # older readers want vocab.json and merges.txt
    (tmp_path / "old" / "tokenizer.json").unlink()
    assert Tokenizer(tmp_path / "old").encode(PROMPTS)[0].tolist() == expected


def test_vocab_and_merges_are_enough(folder: Path) -> None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink()
    ours = Tokenizer(folder, vocab_size=525)
    assert ours.encode(PROMPTS)[0].tolist() == _theirs(MODEL / "tokenizer", PROMPTS).tolist()
    assert json.loads(ours.files["tokenizer_config.json"])["model_max_length"] == 77


def test_transformers_makes_two_tokens_of_an_empty_folder(tmp_path: Path) -> None:
    """The trap itself; if this fails, transformers has mended it."""
    assert len(CLIPTokenizer.from_pretrained(tmp_path, local_files_only=True)) == 2
    with pytest.raises(InputError, match=r"vocab.json: no such file"):
        Tokenizer(tmp_path)


def test_missing_files_are_named(folder: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        Tokenizer(folder / "nowhere")
    (folder / "merges.txt").unlink()
    with pytest.raises(InputError, match=r"merges.txt: no such file"):
        Tokenizer(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.json", b"{}", "no vocabulary"),
        ("vocab.json", b"[1]", "not a JSON object"),
        ("vocab.json", b'{"a": "b"}', "not a map of tokens to ids"),
        ("vocab.json", b'{"a": 1, "b": 1}', "two tokens with the same id"),
        ("vocab.json", b'{"a": 0, "b": 1}', "tokenizer"),
        ("merges.txt", b"#version: 0.2\nr e x\n", r"merges.txt:2: not a pair of tokens"),
        ("merges.txt", b"#version: 0.2\n\xff \xfe\n", "not UTF-8"),
        ("merges.txt", b"#version: 0.2\nr e\n", "come of no merge: merges are truncated"),
        ("merges.txt", b"#version: 0.2\n", "come of no merge: merges are truncated"),
        ("merges.txt", b"#version: 0.2\nzzz qqq\n", "not a usable CLIP tokenizer"),
        ("tokenizer_config.json", b"{", "tokenizer_config.json: not JSON"),
        (
            "tokenizer_config.json",
            b'{"added_tokens_decoder": {}, "pad_token": [3]}',
            "not a usable CLIP tokenizer",
        ),
        ("tokenizer_config.json", b'{"added_tokens_decoder": 3}', "not a usable CLIP tokenizer"),
        ("special_tokens_map.json", b"[]", "special_tokens_map.json: not a JSON object"),
        ("added_tokens.json", b"{", "added_tokens.json: not JSON"),
        ("tokenizer.json", b"{}", "tokenizer.json .model.merges.: no list of merges"),
    ],
)
def test_malformed_files_are_refused(name: str, content: bytes, message: str, folder: Path) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        Tokenizer(folder)


@pytest.mark.parametrize(
    ("length", "message"),
    [
        ("64", "expected 77, found 64"),
        ('"77"', 'expected a number, found "77"'),
        ("[77]", r"expected a number, found \[77\]"),
        ("true", "expected a number, found true"),
    ],
)
def test_a_length_that_is_not_the_text_encoders_is_refused(
    length: str, message: str, folder: Path
) -> None:
    (folder / "tokenizer_config.json").write_text(f'{{"model_max_length": {length}}}')
    with pytest.raises(
        InputError, match=rf"tokenizer_config.json \[model_max_length\]: .*{message}"
    ):
        Tokenizer(folder)


def _write_tokenizer_json(folder: Path, file: Path) -> dict[str, Any]:
    """Write `folder`'s tokenizer.json, as transformers saves it, to `file`; return it."""
    theirs = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    theirs.backend_tokenizer.save(str(file))
    return json.loads(file.read_text(encoding="utf-8"))


def test_a_tokenizer_json_that_agrees_changes_nothing(folder: Path) -> None:
    _write_tokenizer_json(folder, folder / "tokenizer.json")
    ours = Tokenizer(folder, vocab_size=525)
    assert ours.encode(PROMPTS)[0].tolist() == _theirs(MODEL / "tokenizer", PROMPTS).tolist()
    assert "tokenizer.json" in ours.files


def _truncate_merges(model: dict[str, Any]) -> None:
    model["merges"] = model["merges"][:-3]


def _swap_ids(model: dict[str, Any]) -> None:
    a, b = list(model["vocab"])[300:302]
    model["vocab"] |= {a: model["vocab"][b], b: model["vocab"][a]}


@pytest.mark.parametrize(
    ("edit", "key"), [(_truncate_merges, "model.merges"), (_swap_ids, "model.vocab")]
)
def test_a_tokenizer_json_that_contradicts_the_other_files_is_refused(
    edit: Callable[[dict[str, Any]], None], key: str, folder: Path
) -> None:
    """transformers would take it, and never look at vocab.json and merges.txt."""
    file = folder / "tokenizer.json"
    content = _write_tokenizer_json(folder, file)
    edit(content["model"])
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match=rf"tokenizer.json \[{key}\]: .*contradicts"):
        Tokenizer(folder, vocab_size=525)


def test_no_file_that_a_config_names_is_read(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    content = _write_tokenizer_json(folder, tmp_path / "x/tokenizer.4.0.json")
    _swap_ids(content["model"])
    (tmp_path / "x/tokenizer.4.0.json").write_text(json.dumps(content))
    named = ["../x/tokenizer.4.0.json"]
    edit_json(folder / "tokenizer_config.json", fast_tokenizer_files=named)
    with pytest.raises(InputError, match=r"tokenizer_config.json \[fast_tokenizer_files\]"):
        Tokenizer(folder, vocab_size=525)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("key", ["vocab", "merges", "gguf_file", "init_inputs"])
def test_no_tokens_are_taken_from_a_config(key: str, name: str, folder: Path) -> None:
    edit_json(folder / name, **{key: {"a": 0}})
    with pytest.raises(InputError, match=rf"{name} \[{key}\]: would replace"):
        Tokenizer(folder, vocab_size=525)


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer.model", "tekken.json"])
def test_other_files_in_the_folder_are_not_read(name: str, folder: Path) -> None:
    (folder / name).write_bytes(b"\xff")
    ours = Tokenizer(folder, vocab_size=525)
    assert ours.encode(PROMPTS)[0].tolist() == _theirs(MODEL / "tokenizer", PROMPTS).tolist()


@pytest.mark.parametrize("alone", [False, True])
def test_added_tokens_are_those_of_transformers(alone: bool, folder: Path) -> None:
    """A word that textual inversion has added, in the older files and in tokenizer.json alone."""
    edit_json(folder / "tokenizer_config.json", added_tokens_decoder=...)
    (folder / "added_tokens.json").write_text('{"<sks>": 525}')
    prompts = ["a <sks> cube", *PROMPTS]
    expected = _theirs(folder, prompts).tolist()
    assert 525 in expected[0]
    if alone:
        theirs = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        folder = folder.parent / "new"
        theirs.save_pretrained(folder)
    ours = Tokenizer(folder, vocab_size=526)
    assert ours.encode(prompts)[0].tolist() == expected
    ours.save(folder.parent / "again")
    assert (
        Tokenizer(folder.parent / "again", vocab_size=526).encode(prompts)[0].tolist() == expected
    )


@pytest.mark.parametrize("vocab_size", [2, 524, 526, 49408])
def test_another_text_encoders_vocabulary_is_refused(vocab_size: int) -> None:
    with pytest.raises(InputError, match=f"expected {vocab_size} tokens, found 525"):
        Tokenizer(MODEL / "tokenizer", vocab_size=vocab_size)
