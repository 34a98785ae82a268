"""The rules of the whole suite: devices, JAX's strictness, shape checks, and skips in CI.

Everything here is set before the first import of jax or tiue_jax, hence the order of this file.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

os.environ.setdefault("JAX_PLATFORMS", "cpu")
_DEVICES = "--xla_force_host_platform_device_count=8"
if _DEVICES.split("=")[0] not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}".strip()
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's C++ log: errors only
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that asks a hub is a broken test
os.environ["TRANSFORMERS_OFFLINE"] = "1"
# The TPU compiler, where `make` has put it; several processes may compile at a time.
sys.path.append(str(Path(sys.prefix) / "tpu"))
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"

import flax.struct
import jax
import jaxtyping
import pytest

from tests import xla


def _unchecked(decorate: Callable[..., Any]) -> Callable[..., Any]:
    """Exempt the classes that `decorate` makes from the check of their fields' shapes.

    JAX rebuilds a `flax.struct.dataclass` through its `__init__` with whatever a tree map returned:
    ShapeDtypeStructs, shardings, None. Its annotations say what it holds at run time, no more.
    Modules and plain dataclasses stay checked.
    """

    @functools.wraps(decorate)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        made = decorate(*args, **kwargs)
        if not isinstance(made, type):  # called with options: made is the decorator
            return _unchecked(made)
        made.__no_type_check__ = True  # type: ignore[attr-defined]
        return made

    return wrapped


# Every function of the package checks the shapes in its signature while tests run.
flax.struct.dataclass = _unchecked(flax.struct.dataclass)
jaxtyping.install_import_hook("tiue_jax", "beartype.beartype")

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)
# Compiled programs are kept between runs of the suite, in a folder that git ignores.
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

_NEVER_SKIPPED = ("parity", "reference")

# Their networks run for longer than they take to compile, or are so large that XLA spends most of
# its time in ordering what it has compiled, which is more where nothing is fused.
_LARGE = ("examples/test_assets.py", "full_size/", "parity/test_pipeline.py", "reference/")

# Begun first, so that no process is left with one of them when the others are done.
_LONG = (
    "reference/test_recorded.py",
    "reference/test_replay.py",
    "training/test_hosts_runs.py",
    "training/test_sharding.py",
    "training/test_resume.py",
    "training/test_step.py",
    "notebooks/",
    "parity/test_pipeline.py",
    "training/test_tpu_compile.py",
)


def _is_in(path: Path, places: tuple[str, ...]) -> bool:
    """Return whether a file is one of these files of tests/, or in one of these folders."""
    return any(path.is_relative_to(ROOT / "tests" / place) for place in places)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files that take long first; the Makefile has xdist keep the order."""
    items.sort(key=lambda item: [not _is_in(item.path, (place,)) for place in _LONG])


@pytest.fixture(scope="module", autouse=True)
def _compiles_fast(request: pytest.FixtureRequest):
    """Everything but large networks is compiled in little time."""
    with pytest.MonkeyPatch.context() as patch:
        if not _is_in(request.path, _LARGE):
            xla.compile_fast(patch)
        yield


def in_ci() -> bool:
    """Return whether this is a CI run: `CI` is set to anything but nothing, 0 or false."""
    return os.environ.get("CI", "").lower() not in ("", "0", "false")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    """In CI a skipped parity or reference test is a failure: it would prove nothing."""
    outcome = yield
    report = outcome.get_result()
    if (
        report.skipped
        and in_ci()
        and _is_in(item.path, _NEVER_SKIPPED)
        and not hasattr(report, "wasxfail")
    ):
        report.outcome = "failed"
        report.longrepr = f"skipped in CI, where it may not be: {item.nodeid}: {report.longrepr}"


@pytest.hookimpl(hookwrapper=True)
def pytest_make_collect_report(collector: pytest.Collector):
    """The same for a whole file that is skipped while it is collected (`importorskip`)."""
    outcome = yield
    report = outcome.get_result()
    if report.skipped and in_ci() and _is_in(collector.path, _NEVER_SKIPPED):
        report.outcome = "failed"
        report.longrepr = f"skipped in CI, where it may not be: {report.longrepr}"
