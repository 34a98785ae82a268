"""Counting a program's arithmetic: its matrix products and convolutions, loops included.

The compiler's own count takes the body of a loop once, and sees nothing of a kernel's inside.
"""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.extend import core


def matmul_flops(jaxpr: core.Jaxpr) -> float:
    """Return 2 x the multiply-adds of all products in a traced function, over all devices.

    What a rematerialised block computes again is counted again; of a loop's body, every turn; of
    branches, the largest; of a while loop, one turn; of a kernel, what it says of itself.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        if name == "dot_general":
            total += _dot(equation)
        elif name == "conv_general_dilated":
            total += _conv(equation)
        elif name == "cond":
            total += max(matmul_flops(branch.jaxpr) for branch in parameters["branches"])
        elif name == "pallas_call":
            estimate = parameters.get("cost_estimate")
            total += estimate.flops if estimate is not None else 0.0
        else:
            turns = parameters["length"] if name == "scan" else 1
            total += turns * sum(matmul_flops(inner) for inner in _inner(parameters))
    return total


def _inner(parameters: dict[str, Any]) -> list[core.Jaxpr]:
    """Return the functions that an equation calls."""
    found = []
    for value in parameters.values():
        if isinstance(value, core.ClosedJaxpr):
            found.append(value.jaxpr)
        elif isinstance(value, core.Jaxpr):
            found.append(value)
    return found


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def _dot(equation: core.JaxprEqn) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left, out = _shape(equation.invars[0]), _shape(equation.outvars[0])
    return 2.0 * math.prod(out) * math.prod(left[i] for i in contracted)


def _conv(equation: core.JaxprEqn) -> float:
    """Zeros that a dilated input (a strided convolution's gradient) is filled with do not count."""
    spec = equation.params["dimension_numbers"]
    kernel, out = _shape(equation.invars[1]), _shape(equation.outvars[0])
    per_output = math.prod(kernel) / kernel[spec.rhs_spec[0]]
    return 2.0 * math.prod(out) * per_output / math.prod(equation.params["lhs_dilation"])


def traced_flops(function: Any, *arguments: Any) -> float:
    """Return `matmul_flops` of a function called with these arrays or shapes."""
    return matmul_flops(jax.make_jaxpr(function)(*arguments).jaxpr)
