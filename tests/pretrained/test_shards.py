"""Whole files, variants, and shards with an index: what is taken, what is refused, and when."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import UNet2DConditionModel
from safetensors.numpy import load_file, save_file
from transformers import CLIPTextModel

from tests.pretrained.folders import MODEL, bits, copy_model
from tiue_jax.io.errors import InputError
from tiue_jax.pretrained import shards
from tiue_jax.pretrained.folder import load_stable_diffusion
from tiue_jax.pretrained.shards import open_part

NAME = "model.safetensors"
INDEX = "model.safetensors.index.json"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
TENSORS = {name: np.full((2, 3), i, np.float32) for i, name in enumerate("abcd")}
PLACES = {"a": ONE, "b": ONE, "c": TWO, "d": TWO}


def _write(folder: Path, **index: Any) -> Path:
    """Two shards and their index; `index` replaces fields of it."""
    folder.mkdir(exist_ok=True)
    for shard in (ONE, TWO):
        save_file({k: v for k, v in TENSORS.items() if PLACES[k] == shard}, folder / shard)
    fields = {"metadata": {"total_size": 96}, "weight_map": PLACES} | index
    (folder / INDEX).write_text(json.dumps(fields))
    return folder


def test_shards_are_one_set_of_weights(tmp_path: Path) -> None:
    weights = open_part(_write(tmp_path / "m"), NAME)
    assert weights.path == tmp_path / "m" / INDEX
    assert weights.shapes == dict.fromkeys("abcd", (2, 3))
    assert [weights.file(key).name for key in "abcd"] == [ONE, ONE, TWO, TWO]
    assert sorted("dbca", key=weights.position) == list("abcd")
    for key, tensor in TENSORS.items():
        assert weights.dtype(key) == np.float32
        assert np.array_equal(weights.read(key), tensor)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_that_diffusers_and_transformers_save_are_read(
    variant: str | None, tmp_path: Path
) -> None:
    folder = copy_model(tmp_path / "model")
    for part, kind, size in (
        ("unet", UNet2DConditionModel, "3MB"),
        ("text_encoder", CLIPTextModel, "200KB"),
    ):
        shutil.rmtree(folder / part)
        module = kind.from_pretrained(MODEL / part, local_files_only=True)
        module.save_pretrained(folder / part, max_shard_size=size, variant=variant)
        assert len(list((folder / part).glob("*-of-*.safetensors"))) > 1
    parts = ("unet", "text_encoder")
    found = load_stable_diffusion(folder, parts=parts, place=np.asarray)
    expected = load_stable_diffusion(MODEL, parts=parts, place=np.asarray)
    assert bits(found.params) == bits(expected.params)


def test_an_error_names_the_very_shard(tmp_path: Path) -> None:
    folder = _write(tmp_path / "m")
    save_file({"c": TENSORS["c"] * np.nan, "d": TENSORS["d"]}, folder / TWO)
    weights = open_part(folder, NAME)
    weights.read("d")
    with pytest.raises(InputError, match=rf"{TWO} \[c\]: 6 of 6 values are not finite"):
        weights.read("c")


LISTS = {str(i): f"model-{i:05}-of-01001.safetensors" for i in range(1001)}
BAD_INDEX: dict[str, tuple[dict[str, Any], str]] = {
    "climbs": ({"weight_map": PLACES | {"a": f"../m/{ONE}"}}, r"\[a\]: file name leads out"),
    "absolute": ({"weight_map": PLACES | {"a": f"/tmp/{ONE}"}}, r"\[a\]: file name leads out"),
    "backslash": ({"weight_map": PLACES | {"a": f"..\\{ONE}"}}, r"\[a\]: file name leads out"),
    "drive": ({"weight_map": PLACES | {"a": f"C:{ONE}"}}, r"\[a\]: file name leads out"),
    "folder": ({"weight_map": PLACES | {"a": f"sub/{ONE}"}}, r"\[a\]: file name leads out"),
    "NUL": ({"weight_map": PLACES | {"a": "\0.safetensors"}}, r"\[a\]: file name leads out"),
    "surrogate": ({"weight_map": PLACES | {"a": "\ud800.safetensors"}}, "half of a character"),
    "dots": ({"weight_map": PLACES | {"a": ".."}}, r"\[a\]: file name leads out"),
    "empty": ({"weight_map": PLACES | {"a": ""}}, r"\[a\]: file name leads out"),
    "pickle": ({"weight_map": PLACES | {"a": "pytorch_model.bin"}}, r"\[a\]: pickle files can run"),
    "other file": ({"weight_map": PLACES | {"a": "config.json"}}, r"\[a\]: not a safetensors file"),
    "number": ({"weight_map": PLACES | {"a": 3}}, r"\[a\]: not a file name"),
    "list": ({"weight_map": PLACES | {"a": [ONE]}}, r"\[a\]: not a file name"),
    "no map": ({"weight_map": [ONE]}, r"\[weight_map\]: not a map of files"),
    "nothing": ({"weight_map": {}}, r"\[weight_map\]: not a map of files"),
    "many": ({"weight_map": LISTS}, "too many shards, expected at most 1000, found 1001"),
    "missing": ({"weight_map": PLACES | {"a": "x.safetensors"}}, "x.safetensors: no such file"),
    "size": ({"metadata": {"total_size": -1}}, r"\[total_size\]: value is not supported"),
    "text": ({"metadata": {"total_size": "96"}}, r"\[total_size\]: value is not supported"),
    "too much": ({"metadata": {"total_size": 10**6}}, r"\[total_size\]: the shards are smaller"),
    "metadata": ({"metadata": [96]}, r"\[metadata\]: value is not supported"),
}


@pytest.mark.parametrize("fault", BAD_INDEX)
def test_an_index_is_checked_before_a_shard_is_opened(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields, message = BAD_INDEX[fault]
    folder = _write(tmp_path / "m", **fields)
    monkeypatch.setattr(shards, "open_weights", lambda path: pytest.fail(f"{path} is opened"))
    with pytest.raises(InputError, match=message) as error:
        open_part(folder, NAME)
    assert str(folder) in str(error.value) and len(str(error.value)) < 1000


BAD_SHARDS: dict[str, tuple[dict[str, str], str]] = {
    "wrong shard": (PLACES | {"b": TWO}, rf"{ONE} \[b\]: tensor is in another shard .* {TWO}"),
    "not listed": ({k: PLACES[k] for k in "abc"}, rf"{TWO} \[d\]: tensor is not in the index"),
    "listed only": (PLACES | {"e": TWO}, rf"{TWO} \[e\]: the index places it in this file"),
}


@pytest.mark.parametrize("fault", BAD_SHARDS)
def test_shards_are_held_against_their_index(fault: str, tmp_path: Path) -> None:
    places, message = BAD_SHARDS[fault]
    with pytest.raises(InputError, match=message):
        open_part(_write(tmp_path / "m", weight_map=places), NAME)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = _write(tmp_path / "m")
    save_file({k: TENSORS[k] for k in "bcd"}, folder / TWO)
    with pytest.raises(InputError, match=rf"{TWO} \[b\]: tensor is given twice, found {ONE}"):
        open_part(folder, NAME)


def _cache(top: Path) -> Path:
    """The hub's cache: every file of the snapshot is a link into blobs."""
    snapshot, blobs = top / "snapshots" / "0123abc" / "unet", top / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, source in enumerate(sorted(_write(top / "made").iterdir())):
        source.rename(blobs / str(number))
        (snapshot / source.name).symlink_to(f"../../../blobs/{number}")
    return snapshot


def test_links_of_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    weights = open_part(_cache(tmp_path / "models--a--b"), NAME)
    assert np.array_equal(weights.read("d"), TENSORS["d"])
    (tmp_path / "link").symlink_to(tmp_path / "models--a--b/snapshots/0123abc/unet")
    assert open_part(tmp_path / "link", NAME).shapes == weights.shapes


def _link_out(folder: Path) -> None:
    shutil.move(folder / TWO, folder.parent / "elsewhere")
    (folder / TWO).symlink_to("../elsewhere")


def _link_to_another_cache(folder: Path) -> None:
    snapshot = _cache(folder.parent / "other")
    (folder / TWO).unlink()
    (folder / TWO).symlink_to(snapshot / TWO)


def _link_in_a_circle(folder: Path) -> None:
    (folder / TWO).unlink()
    (folder / TWO).symlink_to(TWO)


@pytest.mark.parametrize("link", [_link_out, _link_to_another_cache, _link_in_a_circle])
def test_other_links_that_leave_are_refused(link: Callable[[Path], None], tmp_path: Path) -> None:
    folder = _write(tmp_path / "m")
    link(folder)
    with pytest.raises(InputError, match=r"leads out of its folder through a link|links|resolved"):
        open_part(folder, NAME)


def test_blobs_that_are_a_link_themselves_are_no_cache(tmp_path: Path) -> None:
    snapshot = _cache(tmp_path / "repo")
    (tmp_path / "repo/blobs").rename(tmp_path / "secret")
    (tmp_path / "repo/blobs").symlink_to("../secret")
    with pytest.raises(InputError, match="leads out of its folder through a link"):
        open_part(snapshot, NAME)


def _save(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for number, name in enumerate(names):
        save_file({"w": np.full(2, number, np.float32)}, folder / name)
    return folder


@pytest.mark.parametrize(
    ("files", "variant", "taken"),
    [
        ([NAME, "model.fp16.safetensors"], None, NAME),
        ([NAME, "model.fp16.safetensors"], "fp16", "model.fp16.safetensors"),
        ([NAME, "model.non_ema.safetensors"], "non_ema", "model.non_ema.safetensors"),
        (["model.fp16.safetensors"], None, "model.fp16.safetensors"),
        ([NAME, "model_other.safetensors", "xmodel.fp16.safetensors"], None, NAME),
    ],
)
def test_variants(files: list[str], variant: str | None, taken: str, tmp_path: Path) -> None:
    assert open_part(_save(tmp_path / "m", *files), NAME, variant).path.name == taken


@pytest.mark.parametrize(
    ("files", "variant", "message"),
    [
        (["model.fp16.safetensors", "model.bf16.safetensors"], None, "expected one of bf16, fp16"),
        ([NAME], "fp16", "no variant 'fp16' of model.safetensors, found the plain files"),
        ([], "fp16", "no variant 'fp16' of model.safetensors, found none"),
        ([NAME], "../m/model", "no variant '../m/model'"),
        ([ONE, TWO], None, f"shards without their index, expected {INDEX}, found {ONE}"),
        ([], None, f"{NAME}: no such file"),
    ],
)
def test_variants_that_are_not_there(
    files: list[str], variant: str | None, message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        open_part(_save(tmp_path / "m", *files), NAME, variant)


def test_a_whole_file_beside_an_index_is_refused(tmp_path: Path) -> None:
    folder = _write(tmp_path / "m")
    save_file(TENSORS, folder / NAME)
    with pytest.raises(InputError, match=rf"more than once.*found {NAME}, {INDEX}"):
        open_part(folder, NAME)


@pytest.mark.parametrize(
    "index", ["model.safetensors.index.fp16.json", "model.safetensors.fp16.index.json"]
)
def test_the_index_of_a_variant(index: str, tmp_path: Path) -> None:
    folder = _write(tmp_path / "m")
    (folder / INDEX).rename(folder / index)
    assert open_part(folder, NAME).path.name == index
    assert open_part(folder, NAME, "fp16").shapes == dict.fromkeys("abcd", (2, 3))
    save_file(TENSORS, folder / NAME)
    assert open_part(folder, NAME).path.name == NAME


def test_a_variant_is_loaded_as_a_folder(tmp_path: Path) -> None:
    folder = copy_model(tmp_path / "model")
    file = folder / "text_encoder" / NAME
    half = {k: v.astype(np.float16) for k, v in load_file(file).items()}
    save_file(half, file.with_name("model.fp16.safetensors"))
    load = {"parts": ("text_encoder",), "param_dtype": None, "place": np.asarray}
    found = load_stable_diffusion(folder, variant="fp16", **load).params["text_encoder"]
    assert found["text_model"]["final_layer_norm"]["bias"].dtype == np.float16
    plain = load_stable_diffusion(folder, **load).params["text_encoder"]
    assert plain["text_model"]["final_layer_norm"]["bias"].dtype == np.float32
    with pytest.raises(InputError, match=r"unet: no variant 'fp16' of diffusion_pytorch_model"):
        load_stable_diffusion(folder, variant="fp16")
