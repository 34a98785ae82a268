"""How tests have XLA compile for a CPU: in little time, for programs that run only a few times."""

from typing import Any

import pytest
from jax._src import compiler

# Measured with the step of tests/training/small_step.py: level 0 halves the time to compile, and
# the other two take another 40 % off. Not for large networks, whose fusions run many times slower:
# tests/conftest.py says which files have such.
FAST = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
}
# The same as XLA_FLAGS of another process.
FLAGS = " ".join(f"--{name}={str(value).lower()}" for name, value in FAST.items())


def compile_fast(patch: pytest.MonkeyPatch) -> None:
    """Have every program of this process compiled for the CPU by FAST."""
    make_options = compiler.get_compile_options

    def options(*args: Any, **named: Any) -> Any:
        if named["backend"].platform == "cpu":
            named["env_options_overrides"] = FAST | dict(named["env_options_overrides"] or {})
        return make_options(*args, **named)

    patch.setattr(compiler, "get_compile_options", options)
