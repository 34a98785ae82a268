"""How tests have XLA compile for a CPU: in little time, for programs that run only a few times."""

# Measured with the step of tests/training/small_step.py: level 0 halves the time to compile, and
# the other two take another 40 % off. Not for large networks: their fusions run many times slower.
FAST = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
}
# The same as XLA_FLAGS of another process.
FLAGS = " ".join(f"--{name}={str(value).lower()}" for name, value in FAST.items())
