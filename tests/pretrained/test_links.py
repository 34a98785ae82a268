"""Links in model folders: what they lead to would be exported, and uploaded, with the model."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub.utils._shared_blobs import SHARED_BLOBS_MARKER_NAME, shared_blob_path

from tests.pretrained.folders import MODEL, WEIGHTS, bits, copy_model
from tiue_jax.io.errors import InputError, one_line
from tiue_jax.pretrained import links
from tiue_jax.pretrained.auxiliary import load_clip, load_taesd
from tiue_jax.pretrained.folder import StableDiffusion, load_stable_diffusion
from tiue_jax.pretrained.hub import push_to_hub
from tiue_jax.pretrained.links import require_contained
from tiue_jax.pretrained.load import load_model
from tiue_jax.pretrained.lora_files import FILE_NAME, open_lora

FILES = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/merges.txt",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
)
LEAVES = "a link leads out of the model's folder"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return copy_model(tmp_path / "model")


def _load(folder: Path) -> StableDiffusion:
    return load_stable_diffusion(folder, parts=["text_encoder"], place=np.asarray)


def _move(file: Path, target: Path) -> Path:
    """Leave a link in the place of `file`, which becomes `target`; return `file`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(file, target)
    file.symlink_to(target)
    return file


@pytest.mark.parametrize("name", FILES)
def test_every_file_of_a_model_lies_in_its_folder(name: str, model: Path, tmp_path: Path) -> None:
    file = _move(model / name, tmp_path / "elsewhere")
    with pytest.raises(InputError, match=LEAVES) as error:
        _load(model)
    assert error.value.file == str(file)


@pytest.mark.parametrize("name", ["tiue.json", "training.json", "tokenizer/added_tokens.json"])
def test_so_does_every_file_that_it_may_have(name: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "credentials.json").write_text('{"method": "tiue", "num_steps": 4, "key": "hf_"}')
    (model / name).symlink_to(tmp_path / "credentials.json")
    with pytest.raises(InputError, match=rf"{name}: {LEAVES}"):
        _load(model)


@pytest.mark.parametrize("part", ["scheduler", "text_encoder", "tokenizer", "unet", "vae"])
def test_so_does_every_folder(part: str, model: Path, tmp_path: Path) -> None:
    _move(model / part, tmp_path / "elsewhere")
    with pytest.raises(InputError, match=rf"model/{part}: {LEAVES}"):
        _load(model)


def test_links_within_the_folder_are_followed(model: Path) -> None:
    _move(model / "tokenizer/vocab.json", model / "shared/vocab.json")
    _move(model / "text_encoder/model.safetensors", model / "shared/text")
    _move(model / "vae", model / "shared/vae")
    assert bits(_load(model).params) == bits(_load(MODEL).params)


def test_other_files_may_be_links(model: Path, tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(b"")
    (model / "samples").symlink_to(tmp_path)
    (model / "unet/diffusion_pytorch_model.bin").symlink_to(tmp_path / "large")
    _load(model)


def test_the_folder_itself_may_be_a_link(model: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("model")
    assert bits(_load(tmp_path / "link").params) == bits(_load(model).params)


def _cache(model: Path) -> Path:
    """Make `model` a snapshot as huggingface_hub's cache has it; return it."""
    snapshot = model.parent / "models--a--b/snapshots/0123abc"
    shutil.copytree(model, snapshot)
    blobs = snapshot.parents[1] / "blobs"
    blobs.mkdir()
    files = sorted(path for path in snapshot.rglob("*") if path.is_file())
    for number, file in enumerate(files):
        depth = len(file.relative_to(snapshot).parts)
        file.rename(blobs / str(number))
        file.symlink_to("../" * (depth + 1) + f"blobs/{number}")
    return snapshot


def test_a_snapshot_of_the_hubs_cache_is_read(model: Path) -> None:
    snapshot = _cache(model)
    assert (snapshot / "unet/config.json").is_symlink()
    assert bits(_load(snapshot).params) == bits(_load(model).params)


def _share(snapshot: Path) -> Path:
    """Move the blobs of `snapshot` to the place that all models of the cache share; return it."""
    shared = snapshot.parents[2] / "blobs"
    shared.mkdir()
    (shared / SHARED_BLOBS_MARKER_NAME).write_text("1\n")
    for blob in sorted((snapshot.parents[1] / "blobs").iterdir()):
        name = hashlib.sha256(blob.read_bytes()).hexdigest()
        (shared / name[:2]).mkdir(exist_ok=True)
        blob.rename(shared / name[:2] / name)
        blob.symlink_to(f"../../blobs/{name[:2]}/{name}")
    return shared


def test_what_all_models_of_the_cache_share_is_read(model: Path) -> None:
    """As huggingface_hub 2 stores what it fetches by Xet."""
    snapshot = _cache(model)
    shared = _share(snapshot)
    assert bits(_load(snapshot).params) == bits(_load(model).params)
    (shared / SHARED_BLOBS_MARKER_NAME).unlink()  # then it is a folder like any other
    with pytest.raises(InputError, match=LEAVES):
        _load(snapshot)


def test_the_layout_is_that_of_huggingface_hub(tmp_path: Path) -> None:
    name = "ab" + "0" * 62
    assert shared_blob_path(tmp_path, name) == tmp_path / "blobs" / "ab" / name
    assert links.SHARED_BLOBS_MARKER_NAME == SHARED_BLOBS_MARKER_NAME


def test_a_snapshot_does_not_reach_beyond_its_blobs(model: Path, tmp_path: Path) -> None:
    snapshot = _cache(model)
    (tmp_path / "models--secret/blobs").mkdir(parents=True)
    (tmp_path / "models--secret/blobs/0").write_text("{}")
    (snapshot / "training.json").symlink_to(tmp_path / "models--secret/blobs/0")
    with pytest.raises(InputError, match=LEAVES):
        _load(snapshot)


def test_links_in_a_circle_are_refused(model: Path) -> None:
    (model / "tiue.json").symlink_to("training.json")
    (model / "training.json").symlink_to("tiue.json")
    with pytest.raises(InputError, match="cannot be resolved") as error:
        _load(model)
    assert "Loop" not in one_line(str(error.value))


@pytest.mark.parametrize(("part", "load"), [("taesd", load_taesd), ("clip", load_clip)])
def test_networks_by_themselves_lie_in_their_folders(
    part: str, load: Callable[[Path], object], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(MODEL / part, tmp_path / part, copy_function=shutil.copyfile))
    _move(folder / "config.json", tmp_path / "elsewhere")
    with pytest.raises(InputError, match=rf"config.json: {LEAVES}"):
        load(folder)


def test_a_lora_lies_in_its_folder(tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / FILE_NAME).symlink_to(MODEL / WEIGHTS["vae"])
    with pytest.raises(InputError, match=rf"{FILE_NAME}: {LEAVES}"):
        open_lora(tmp_path / "lora", {})


def test_the_tokenizer_of_a_single_file_lies_in_its_folder(model: Path, tmp_path: Path) -> None:
    _move(model / "tokenizer/special_tokens_map.json", tmp_path / "elsewhere")
    (tmp_path / "one.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=rf"special_tokens_map.json: {LEAVES}"):
        load_model(tmp_path / "one.safetensors", tokenizer=model)


@pytest.mark.parametrize("name", ["README.md", "LICENSE", "unet/config.json"])
def test_nothing_outside_of_the_folder_is_uploaded(
    name: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "tiue_jax.pretrained.hub.HfApi", lambda **_: pytest.fail("the hub is asked")
    )
    (tmp_path / "id_rsa").write_text("secret")
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(tmp_path / "id_rsa")
    with pytest.raises(InputError, match=rf"{name}: {LEAVES}"):
        push_to_hub(model, "owner/new")


def test_a_folder_that_is_not_there_is_left_to_its_reader(tmp_path: Path) -> None:
    require_contained(tmp_path / "nowhere", ("unet",))
