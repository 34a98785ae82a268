"""Output is whole or not there, whatever happens while it is written."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tiue_jax.io import files
from tiue_jax.io.errors import InputError
from tiue_jax.io.files import hidden_folder, new_folder, take_number, write_atomic


def listing(folder: Path) -> list[str]:
    """Return the names below `folder`, sorted."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("data", [b"\x00\xff", b"", "text \u00e4\n"])
def test_write_atomic_writes_what_it_is_given(tmp_path: Path, data: bytes | str) -> None:
    target = tmp_path / "made" / "for" / "it.bin"
    write_atomic(target, "old")
    write_atomic(target, data)
    assert target.read_bytes() == (data.encode() if isinstance(data, str) else data)
    assert listing(tmp_path) == ["made", "made/for", "made/for/it.bin"]


def test_write_atomic_gives_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").write_text("x")
    write_atomic(tmp_path / "ours", "x")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_a_write_that_fails_keeps_the_earlier_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, error: BaseException
) -> None:
    target = tmp_path / "kept"
    write_atomic(target, "good")

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(files.os, call, fail)
    with pytest.raises(type(error)):
        write_atomic(target, "new")
    monkeypatch.undo()
    assert target.read_text() == "good"
    assert listing(tmp_path) == ["kept"]


def test_a_disk_that_fills_midway_keeps_the_earlier_file(tmp_path: Path) -> None:
    # A file size limit stops the write after 4096 bytes, as a full disk would.
    script = (
        "import resource, signal, sys\n"
        "from tiue_jax.io.files import write_atomic\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try:\n"
        "    write_atomic(sys.argv[1], b'x' * 1_000_000)\n"
        "except OSError as error:\n"
        "    sys.exit(f'failed: {error.strerror}')\n"
    )
    target = tmp_path / "kept"
    write_atomic(target, "good")
    done = subprocess.run(
        [sys.executable, "-c", script, str(target)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert (done.returncode, done.stderr) == (1, "failed: File too large\n")
    assert target.read_text() == "good"
    assert listing(tmp_path) == ["kept"]


def test_new_folder_takes_its_name_when_it_is_full(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with new_folder(target) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a.txt").write_text("a")
        assert folder.parent == target.parent
        assert not target.exists()
    assert listing(tmp_path) == ["deep", "deep/out", "deep/out/sub", "deep/out/sub/a.txt"]


def test_new_folder_accepts_an_empty_folder_and_a_link_to_one(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    with new_folder(tmp_path / "link") as folder:
        (folder / "a").write_text("a")
    assert listing(tmp_path) == ["empty", "empty/a", "link"]
    assert (tmp_path / "link").is_symlink()


def test_new_folder_refuses_a_folder_in_use_and_a_file(tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for name, what in (("used", "output folder is in use"), ("file", "is a file")):
        with pytest.raises(InputError, match=f"{name}: {what}, expected a new or empty folder"):
            with new_folder(tmp_path / name):
                pytest.fail("the block must not run")
    assert listing(tmp_path) == ["file", "used", "used/mine"]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(3)])
def test_new_folder_leaves_nothing_behind_on_failure(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), new_folder(tmp_path / "deep" / "er" / "out") as folder:
        (folder / "a").write_text("a")
        raise error
    assert listing(tmp_path) == []


def test_new_folder_gives_way_to_whoever_took_the_name_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    with pytest.raises(InputError, match="in use"), new_folder(target):
        target.mkdir()
        (target / "theirs").write_text("t")
    # The same, when the other comes between the look and the renaming.
    other = tmp_path / "other"
    with pytest.raises(InputError, match="in use"), new_folder(other):
        other.mkdir()
        (other / "theirs").write_text("t")
        monkeypatch.setattr(files, "require_free", lambda _: None)
    assert listing(tmp_path) == ["other", "other/theirs", "out", "out/theirs"]


def test_new_folder_restores_an_empty_folder_on_failure(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="no"), new_folder(tmp_path / "out"):
        raise ValueError("no")
    assert listing(tmp_path) == ["out"]


@pytest.mark.parametrize("name", ["file/x", "file/deep/x"])
def test_a_file_is_no_parent_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(InputError, match="file: is a file, expected a folder"):
        write_atomic(tmp_path / name, "x")
    with pytest.raises(InputError, match="file: is a file, expected a folder"):
        with new_folder(tmp_path / name):
            pytest.fail("the block must not run")
    assert listing(tmp_path) == ["file"]


def test_a_number_is_taken_when_the_folder_is_full(tmp_path: Path) -> None:
    """The first free one of then: two that are filled at the same time both keep what they have."""
    parent = tmp_path / "samples"
    with hidden_folder(parent) as first, hidden_folder(parent) as second:
        for folder, text in ((first, "1"), (second, "2")):
            (folder / "a").write_text(text)
        assert take_number(second) == parent / "000"
        (parent / "001").write_text("a file")
        assert take_number(first) == parent / "002"
    assert listing(tmp_path) == ["samples", "samples/000", "samples/000/a", "samples/001",
                                 "samples/002", "samples/002/a"]  # fmt: skip
    assert [(parent / n / "a").read_text() for n in ("000", "002")] == ["2", "1"]


def test_a_hidden_folder_without_a_name_leaves_nothing(tmp_path: Path) -> None:
    with hidden_folder(tmp_path / "deep" / "samples") as folder:
        (folder / "a").write_text("a")
    assert listing(tmp_path) == []
