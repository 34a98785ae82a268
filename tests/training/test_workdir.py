"""Compiled programs are kept with the run, where nothing says another place."""

from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax import monitoring
from jax.experimental.compilation_cache import compilation_cache

from tiue_jax.training.workdir import cache_programs

FOLDER = "jax_compilation_cache_dir"
SECONDS = "jax_persistent_cache_min_compile_time_secs"


@pytest.fixture
def hits() -> Iterator[list[str]]:
    """Events of the cache's use, in a process that is told nothing of a cache."""
    before = {name: jax.config.values[name] for name in (FOLDER, SECONDS)}
    events: list[str] = []

    def note(event: str, **_: object) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            events.append(event)

    jax.config.update(FOLDER, None)
    jax.config.update(SECONDS, 0.0)
    compilation_cache.reset_cache()
    monitoring.register_event_listener(note)
    try:
        yield events
    finally:
        monitoring.unregister_event_listener(note)
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def compile_anew() -> None:
    """Compile as a process that has just begun."""
    jax.clear_caches()
    jax.jit(lambda x: jnp.sin(x) @ x + 1.5)(jnp.ones((3, 3))).block_until_ready()


def test_a_run_that_goes_on_compiles_nothing(tmp_path: Path, hits: list[str]) -> None:
    compile_anew()  # before the workdir is known: JAX settles that there is no cache
    with cache_programs(tmp_path):
        compile_anew()
        assert not hits
    assert list((tmp_path / ".jax_cache").glob("*-cache"))
    compile_anew()
    assert not hits, "out of the run there is no cache"
    with cache_programs(tmp_path):
        compile_anew()
    assert hits


def test_a_cache_that_somebody_chose_stays(tmp_path: Path, hits: list[str]) -> None:
    jax.config.update(FOLDER, str(tmp_path / "chosen"))
    with cache_programs(tmp_path / "run"):
        compile_anew()
        assert jax.config.values[FOLDER] == str(tmp_path / "chosen")
    assert list((tmp_path / "chosen").glob("*-cache"))
    assert not (tmp_path / "run").exists()
