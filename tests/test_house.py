"""The house rules that a program can check: pins, imports, sizes and names of files."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxtyping
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import tiue_jax
from tiue_jax.diffusion import losses

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SHIPPED = ("tiue_jax", "examples", "configs")  # what runs without the test requirements
SOURCES = sorted(
    path for top in (*SHIPPED, "tests") for path in (ROOT / top).rglob("*.py") if path.is_file()
)
MAX_LINES = 450
MAX_COMMAND_LINES = 100
FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "common", "misc"}
FORBIDDEN_IMPORTS = {"torch", "diffusers", "torchvision", "tensorflow", "tensorflow_cpu"}


def shown(path: Path) -> str:
    """Return `path` as seen from the root of the repository."""
    return path.relative_to(ROOT).as_posix()


def requirements(name: str) -> dict[str, Requirement]:
    """Return the requirements of one file by canonical name, without those it includes."""
    lines = (line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    parsed = [Requirement(line) for line in lines if line and not line.startswith("-r ")]
    return {canonicalize_name(requirement.name): requirement for requirement in parsed}


def ranges(listed: list[str]) -> dict[str, Requirement]:
    """Return the requirements of one list in pyproject.toml by canonical name."""
    return {canonicalize_name(Requirement(line).name): Requirement(line) for line in listed}


def imports(path: Path) -> set[str]:
    """Return the top-level names of all that a file imports, at any depth of its code."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
        if isinstance(node, ast.Import):
            found.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found.update(
                str(arg.value).split(".")[0] for arg in node.args if isinstance(arg, ast.Constant)
            )
    return found


@pytest.mark.parametrize(
    ("file", "extra"),
    [
        ("requirements.txt", None),
        ("requirements-dev.txt", "dev"),
        ("requirements-data.txt", "data"),
    ],
)
def test_pins_are_exact_and_within_the_ranges(file: str, extra: str | None) -> None:
    listed = PROJECT["dependencies"] if extra is None else PROJECT["optional-dependencies"][extra]
    allowed, pinned = ranges(listed), requirements(file)
    assert set(pinned) == set(allowed), "the same packages are pinned and have a range"
    for name, requirement in pinned.items():
        (pin,) = requirement.specifier
        assert pin.operator == "==" and "*" not in pin.version, requirement
        assert allowed[name].specifier.contains(pin.version), f"{requirement}: {allowed[name]}"


def test_accelerator_extras_have_the_range_of_jax() -> None:
    jax = ranges(PROJECT["dependencies"])["jax"].specifier
    for extra in ("tpu", "cuda"):
        (requirement,) = map(Requirement, PROJECT["optional-dependencies"][extra])
        assert requirement.name == "jax" and requirement.specifier == jax


def test_run_time_requirements_are_all_used_and_complete() -> None:
    """What is shipped imports exactly the pinned packages, but for those that others need."""
    used = set().union(*(imports(path) for path in SOURCES if "tests" not in path.parts))
    modules = {
        "absl-py": "absl",
        "orbax-checkpoint": "orbax",
        "pillow": "PIL",
    }
    for_others = {"importlib-resources"}
    pinned = {
        modules.get(name, name.replace("-", "_")) for name in requirements("requirements.txt")
    }
    ours = {*SHIPPED, *FORBIDDEN_IMPORTS}
    unpinned = used - pinned - ours - set(sys.stdlib_module_names)
    assert not unpinned, "imported, and not in requirements.txt"
    unused = pinned - used - {name.replace("-", "_") for name in for_others}
    assert not unused, "in requirements.txt, and not imported"


@pytest.mark.parametrize("top", SHIPPED)
def test_no_torch_and_no_tensorflow_in_what_is_shipped(top: str) -> None:
    """Not even inside of a function: `make demo` runs where neither is installed."""
    faults = {
        shown(path): sorted(imports(path) & FORBIDDEN_IMPORTS)
        for path in SOURCES
        if path.is_relative_to(ROOT / top) and imports(path) & FORBIDDEN_IMPORTS
    }
    assert not faults


def test_no_file_is_long_and_no_command_is_more_than_wiring() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in SOURCES}
    too_long = {shown(path): n for path, n in lengths.items() if n >= MAX_LINES}
    assert not too_long, f"files have under {MAX_LINES} lines"
    commands = {
        shown(path): n
        for path, n in lengths.items()
        if path.parent == ROOT / "tiue_jax" and n >= MAX_COMMAND_LINES
    }
    assert not commands, f"files directly in tiue_jax/ have under {MAX_COMMAND_LINES} lines"


def test_no_file_has_a_name_that_says_nothing() -> None:
    faults = [shown(path) for path in SOURCES if path.stem in FORBIDDEN_NAMES]
    faults += [shown(path.parent) for path in SOURCES if path.parent.name in FORBIDDEN_NAMES]
    assert not faults


def test_every_package_says_what_it_is_for() -> None:
    packages = sorted((ROOT / "tiue_jax").rglob("__init__.py"))
    assert len(packages) >= 8
    for path in packages:
        assert ast.get_docstring(ast.parse(path.read_text())), shown(path)
        assert imports(path) <= {"os"}, f"{shown(path)}: importing a package costs nothing"


def test_the_suite_checks_shapes_and_is_strict() -> None:
    """What conftest.py switches on is on: shapes in signatures, ranks, keys, eight devices."""
    square, flat = jnp.zeros((1, 2, 2, 1)), jnp.zeros((1, 4))
    with pytest.raises(jaxtyping.TypeCheckError, match="score_gradient"):
        losses.vsd_loss(square, flat)
    with pytest.raises(ValueError, match="rank_promotion"):
        square + jnp.zeros(1)
    key = jax.random.key(0)
    jax.random.normal(key)
    with pytest.raises(jax.errors.KeyReuseError):
        jax.random.normal(key)
    assert jax.device_count() == 8


def test_version_is_a_version() -> None:
    assert [part.isdigit() for part in tiue_jax.__version__.split(".")] == [True] * 3


def test_imports_go_one_way() -> None:
    command = shutil.which("lint-imports", path=str(Path(sys.executable).parent))
    assert command, "import-linter is in requirements-dev.txt"
    done = subprocess.run(
        [command, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("target", "command"),
    [
        ("demo", "-m examples.tiny_sd.demo"),
        ("test", '-m pytest  -m "not slow"'),
        ("check", "-m mypy"),
        ("slow", "-m pytest  -m slow"),
    ],
)
def test_the_documented_commands_are_make_s(target: str, command: str) -> None:
    done = subprocess.run(
        ["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert command in done.stdout


def test_ci_runs_the_tests_and_counts_skips() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111, ".ci/run is executable"
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "set -euo pipefail" in text and "export CI=1" in text
    assert text.endswith("\nexec make test\n")


def test_a_skipped_parity_test_fails_in_ci_and_only_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run a copy of the conftest over two files that skip, as a laptop and as CI."""
    (tmp_path / "tests" / "parity").mkdir(parents=True)
    for name in ("conftest.py", "xla.py"):
        shutil.copy(ROOT / "tests" / name, tmp_path / "tests" / name)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    skips = "import pytest\ndef test_one():\n    pytest.skip('no torch')\n"
    whole = "import pytest\nno = pytest.importorskip('no_such_package')\ndef test_two(): pass\n"
    (tmp_path / "tests" / "parity" / "test_one.py").write_text(skips)
    (tmp_path / "tests" / "parity" / "test_two.py").write_text(whole)
    (tmp_path / "tests" / "test_three.py").write_text(skips)

    def run() -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        return done.returncode, done.stdout.strip().splitlines()[-1]

    monkeypatch.delenv("CI", raising=False)
    code, last = run()
    assert code == 0 and last.startswith("3 skipped"), last
    monkeypatch.setenv("CI", "1")
    code, last = run()
    assert code != 0 and "1 error" in last, last
    (tmp_path / "tests" / "parity" / "test_two.py").unlink()
    code, last = run()
    assert code == 1 and last.startswith("1 failed, 1 skipped"), last
