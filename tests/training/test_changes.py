"""What a run that goes on may not change, and what it may."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from tests.training.tiny_run import PROMPTS, make_prompts, make_teacher
from tests.training.toy_step import assert_same, steps_of, use_devices
from tiue_jax.io.errors import InputError
from tiue_jax.pretrained.folder import load_stable_diffusion
from tiue_jax.training.checkpoint import restore_params
from tiue_jax.training.loop import train

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def refused(config: ConfigDict, workdir: Path) -> str:
    kept = steps_of(workdir)
    with pytest.raises(InputError) as caught:
        train(config, workdir)
    assert steps_of(workdir) == kept
    return str(caught.value)


def test_changed_config_is_refused_with_every_difference(config, finished: Path):
    config.train.student_lr = 2e-4
    config.lora.alpha = 3.0
    said = refused(config, finished)
    assert "lora.alpha was 2.0, is 3.0; train.student_lr was 0.0001, is 0.0002" in said


def test_changed_prompts_are_refused_and_moved_ones_are_not(config, finished: Path, tmp_path: Path):
    moved = make_prompts(tmp_path / "moved.txt")
    config.data.source = str(moved)
    train(config, finished)
    make_prompts(moved, (*PROMPTS, "a green idea"))
    assert "prompts: count was 9, is 10; prompts: sha256 was" in refused(config, finished)


def test_changed_teacher_is_refused_and_a_moved_one_is_not(config, finished: Path, tmp_path: Path):
    config.teacher = str(shutil.copytree(config.teacher, tmp_path / "moved"))
    train(config, finished)
    config.teacher = str(make_teacher(tmp_path / "another", seed=1))
    said = refused(config, finished)
    assert "teacher: unet was" in said
    assert "teacher: text_encoder was" in said
    assert "teacher: tokenizer was" not in said


@pytest.mark.parametrize("part", ["vae", "tokenizer"])
def test_a_change_of_one_part_of_the_teacher_is_refused(
    config, finished: Path, tmp_path: Path, part: str
):
    teacher = Path(shutil.copytree(config.teacher, tmp_path / "moved"))
    if part == "vae":
        shutil.copytree(make_teacher(tmp_path / "other", seed=1) / part, teacher / part,
                        dirs_exist_ok=True)  # fmt: skip
    else:  # two words that no prompt has
        vocab = json.loads((teacher / part / "vocab.json").read_text())
        first, second = sorted(vocab)[-2:]
        vocab[first], vocab[second] = vocab[second], vocab[first]
        for file in (teacher / part).glob("tokenizer.json"):
            file.unlink()
        (teacher / part / "vocab.json").write_text(json.dumps(vocab))
    config.teacher = str(teacher)
    said = refused(config, finished)
    assert f"teacher: {part} was" in said
    assert said.count(", is ") == (2 if part == "tokenizer" else 1)  # its files are held alone, too


def without_checkpoints(workdir: Path) -> Path:
    """A run that was killed before its first checkpoint, or whose checkpoints were deleted."""
    shutil.rmtree(workdir / "checkpoints")
    (workdir / "checkpoints").mkdir()
    return workdir


def test_without_a_checkpoint_a_change_is_refused_too(config, finished: Path, tmp_path: Path):
    without_checkpoints(finished)
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.name != ".holder"}
    config.train.student_lr = 2e-4
    assert "train.student_lr was 0.0001, is 0.0002" in refused(config, finished)
    config.train.student_lr = 1e-4
    config.teacher = str(make_teacher(tmp_path / "another", seed=1))
    assert "teacher: unet was" in refused(config, finished)
    for path in (finished / "run.json", finished / "student" / "training.json"):
        assert path.stat().st_mtime_ns == before[path]


def test_a_run_that_saved_nothing_may_be_begun_otherwise(config, finished: Path):
    shutil.rmtree(without_checkpoints(finished) / "student")
    config.train.student_lr = 2e-4
    train(config, finished)
    told = json.loads((finished / "student" / "training.json").read_text())
    assert told["config"]["train.student_lr"] == 2e-4


def test_without_a_checkpoint_what_is_free_may_change(config, finished: Path, done: Path):
    config.log.every = 2
    train(config, without_checkpoints(finished))
    assert steps_of(finished) == [2, 4]
    assert_same(restore_params(finished)[1], restore_params(done / "run")[1])


def test_no_iterations_of_another_teacher_are_refused(config, workdir: Path, tmp_path: Path):
    config.train.iterations = 0
    train(config, workdir)
    config.teacher = str(make_teacher(tmp_path / "another", seed=1))
    assert "teacher: unet was" in refused(config, workdir)


def test_an_export_made_otherwise_is_not_taken_for_this_run_s(config, finished: Path):
    """Of the same step, in a folder that does not say what was begun in it."""
    first = load_stable_diffusion(finished / "student", place=np.asarray).params["unet"]
    (without_checkpoints(finished) / "run.json").unlink()
    config.train.student_lr = 2e-4
    train(config, finished)
    kept = load_stable_diffusion(finished / "student_00000004", place=np.asarray)
    assert_same(kept.params["unet"], first)
    told = json.loads((finished / "student" / "training.json").read_text())
    assert told["config"]["train.student_lr"] == 2e-4


def test_a_run_file_that_cannot_be_read_is_named(config, finished: Path):
    (without_checkpoints(finished) / "run.json").write_text('{"config": {}, "teacher": 3}')
    assert "run.json [teacher]: does not describe a run" in refused(config, finished)


def test_what_only_shows_or_places_may_change(config, finished: Path, monkeypatch):
    use_devices(monkeypatch, 4)
    config.train.iterations = 6
    config.mesh.data, config.mesh.fsdp = 1, 4
    config.log.every = 4
    config.checkpoint.keep = 1
    train(config, finished)
    assert steps_of(finished) == [6]
