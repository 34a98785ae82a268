"""That a run notices another teacher, and not the same one in other files."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from tests.pretrained.folders import edit_json
from tests.training.tiny_run import PROMPTS, make_teacher
from tiue_jax.data.prompts import Prompts
from tiue_jax.diffusion.text_image import TextImage
from tiue_jax.io.errors import InputError
from tiue_jax.models.clip import CLIP
from tiue_jax.models.taesd import AutoencoderTiny
from tiue_jax.pretrained.folder import load_stable_diffusion, save_stable_diffusion
from tiue_jax.training.digests import cast, digest_teacher, refuse_another_teacher
from tiue_jax.training.state import Frozen

DTYPES = {"compute_dtype": jnp.dtype("bfloat16"), "teacher_dtype": jnp.dtype("bfloat16")}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("digests") / "teacher")


def digests_of(folder: Path, **options: Any) -> dict[str, str]:
    """As `set_up` has them of a run in bfloat16."""
    sd = load_stable_diffusion(folder, dtype=DTYPES["compute_dtype"], place=np.ascontiguousarray)
    unet, text = (cast(sd.params[n], DTYPES["teacher_dtype"]) for n in ("unet", "text_encoder"))
    frozen = Frozen(unet, text, jnp.asarray(sd.tokenizer.null_ids))
    if "text_image" in options:
        frozen = replace(frozen, taesd={"a": np.zeros(1)}, clip={"a": np.ones(1)})
    return digest_teacher(sd, frozen, Prompts(PROMPTS, "nine"), **options)


def hold(folder: Path, digests: dict[str, str]) -> None:
    """As `convert` does."""
    parts = ("vae", "text_encoder")
    sd = load_stable_diffusion(folder, param_dtype=None, parts=parts, place=np.asarray)
    refuse_another_teacher(sd, digests, **DTYPES)


def test_the_same_teacher_in_other_files_is_the_same(teacher: Path, tmp_path: Path) -> None:
    hold(teacher, digests_of(teacher))
    save_stable_diffusion(load_stable_diffusion(teacher), tmp_path / "half", dtype="float16")
    half = load_stable_diffusion(tmp_path / "half")
    save_stable_diffusion(half, tmp_path / "full", dtype="float32")
    assert digests_of(tmp_path / "half") == digests_of(tmp_path / "full")
    for run, named in (("half", "half"), ("half", "full"), ("full", "half")):
        hold(tmp_path / named, digests_of(tmp_path / run))


def swap_words(folder: Path) -> None:
    """Two words that no prompt has."""
    vocab = json.loads((folder / "vocab.json").read_text())
    first, second = sorted(vocab)[-2:]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (folder / "tokenizer.json").unlink(missing_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab))


CHANGES: dict[str, Callable[[Path], Any]] = {
    "schedule": lambda m: edit_json(
        m / "scheduler/scheduler_config.json", prediction_type="v_prediction"
    ),
    "vae": lambda m: edit_json(m / "vae/config.json", scaling_factor=0.5),
    "text_encoder": lambda m: edit_json(m / "text_encoder/config.json", hidden_act="gelu"),
    "tokenizer_files": lambda m: swap_words(m / "tokenizer"),
    "latent_size": lambda m: edit_json(m / "unet/config.json", sample_size=8),
    "unet_settings": lambda m: edit_json(m / "unet/config.json", attention_head_dim=4),
}


@pytest.mark.parametrize("part", CHANGES)
def test_another_teacher_of_the_same_shapes_is_refused(
    part: str, teacher: Path, tmp_path: Path
) -> None:
    digests = digests_of(teacher)
    other = Path(shutil.copytree(teacher, tmp_path / "other"))
    CHANGES[part](other)
    changed = {name for name, digest in digests_of(other).items() if digest != digests[name]}
    beside = {"unet_settings": {"unet"}, "tokenizer_files": {"tokenizer"}}  # of a run's resume
    assert changed == {part} | beside.get(part, set())
    with pytest.raises(InputError) as caught:
        hold(other, digests)
    said = f"{other} [--teacher]: is not the teacher of this run: another {part}, expected the"
    assert str(caught.value).startswith(said)
    hold(other, {name: digest for name, digest in digests.items() if name != part})  # an older run


def test_settings_of_the_clip_term_s_networks_are_held(teacher: Path) -> None:
    term = TextImage(AutoencoderTiny(), CLIP())
    before = digests_of(teacher, text_image=term)
    for part, other in (
        ("taesd_settings", replace(term, taesd=AutoencoderTiny(scaling_factor=2.0))),
        ("clip_settings", replace(term, clip=CLIP(eos_token_id=3))),
        ("clip_settings", replace(term, mean=(0.5,) * 3, std=(0.5,) * 3)),
    ):
        after = digests_of(teacher, text_image=other)
        assert {name for name in before if before[name] != after[name]} == {part}
