"""A finished run of the toy step, and what a test of the loop begins with."""

import shutil
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from tests.training.tiny_run import make_config, make_prompts, make_teacher
from tests.training.toy_step import ToyStep, put_in_toy
from tiue_jax.training.loop import train


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> ToyStep:
    """Put the toy step in, without Adam's moments, on the first of the suite's devices."""
    return put_in_toy(monkeypatch)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher, prompts, and a finished run of four steps."""
    folder = tmp_path_factory.mktemp("done")
    make_teacher(folder / "teacher")
    make_prompts(folder / "prompts.txt")
    with pytest.MonkeyPatch.context() as patch:
        put_in_toy(patch)
        train(configure(folder), folder / "run")
    return folder


def configure(folder: Path) -> ConfigDict:
    config = make_config(folder / "teacher", folder / "prompts.txt")
    config.train.iterations = 4
    config.checkpoint.every = 2
    config.log.summary_every = 0
    return config


@pytest.fixture
def config(done: Path, toy: ToyStep) -> ConfigDict:
    return configure(done)


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    """Of a new run."""
    return tmp_path / "run"


@pytest.fixture
def finished(done: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(done / "run", tmp_path / "finished"))
