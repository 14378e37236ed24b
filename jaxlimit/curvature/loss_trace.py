"""What the trace of a loss says about it: in which precision it computes, and whether it has a penalty.

Dependence on the weights is followed through all operations from the weights to the loss. Data or constants
of low precision do no harm there; what depends on the weights does.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, Literal

from jaxlimit.core.jaxprs import called, carried
from jaxlimit.core.trees import PyTree

# What a number depends on: marks that add up.
WEIGHTS, DATA = 1, 2
CASTS = ("convert_element_type", "jit", "pjit")


@dataclass
class LossTrace:
    """What was found on the way from the weights to the loss.

    Attributes:
        coarse: the numbers of fewer than 32 bits that stand there.
        penalty: whether a term of the weights alone is added to what depends on the data.
        epsilon: machine epsilon of the loss itself, if it is cast at the very end, which does derivatives no
            harm.
    """

    coarse: dict[str, float] = field(default_factory=dict)
    penalty: bool = False
    epsilon: float = 0.0


def trace_loss(loss_fn: Callable[[PyTree, PyTree], Any], weights: PyTree, batch: PyTree) -> LossTrace:
    """Follows the weights through a loss, as far as derivatives go."""
    closed = jax.make_jaxpr(loss_fn)(weights, batch)
    marks = [WEIGHTS] * len(jax.tree.leaves(weights)) + [DATA] * len(jax.tree.leaves(batch))
    found = LossTrace()
    _follow(closed.jaxpr, marks, found, last=True)
    return found


def _follow(jaxpr: Jaxpr, marks: list[int], found: LossTrace, last: bool = False) -> list[int]:
    """Marks of the results, given those of the arguments; `last` if the first result is the loss."""
    known = dict(zip(jaxpr.invars, marks, strict=True)) | dict.fromkeys(jaxpr.constvars, 0)

    def mark_of(atom: Any) -> int:
        return 0 if isinstance(atom, Literal) else known.get(atom, DATA)  # of what has no derivative

    cast = _last_casts(jaxpr) if last else set()
    for equation in _needed(jaxpr):
        given = [mark_of(x) for x in equation.invars]
        results = _results(equation, given, found, last=equation.outvars[0] in cast)
        for var, mark in zip(equation.outvars, results, strict=True):
            if not _is_inexact(var):
                mark &= ~WEIGHTS
            elif var in cast:
                found.epsilon = max(found.epsilon, _epsilon(var))
            elif mark & WEIGHTS and jnp.finfo(var.aval.dtype).bits < 32:
                found.coarse[str(var.aval.dtype)] = _epsilon(var)
            known[var] = mark
        _look_at(equation, given, found)
    return [mark_of(x) for x in jaxpr.outvars]


def _look_at(equation: Any, given: list[int], found: LossTrace) -> None:
    name = equation.primitive.name
    if name == "reduce_precision" and given[0] & WEIGHTS and equation.params["mantissa_bits"] < 23:
        bits = equation.params["mantissa_bits"]
        found.coarse[f"numbers of {bits} binary digits"] = 2.0**-bits
    if name in ("add", "sub", "add_any") and equation.outvars[0].aval.shape == ():
        found.penalty |= WEIGHTS in given and any(mark & DATA for mark in given)


def _results(equation: Any, given: list[int], found: LossTrace, last: bool) -> list[int]:
    together = 0
    for mark in given:
        together |= mark
    results = [0] * len(equation.outvars)
    inner = [sub for sub in called(equation, but="cond_jaxpr") if len(sub.outvars) == len(results)]
    if not inner:
        return [together] * len(results)
    for sub in inner:
        marks = given[-len(sub.invars) :] if len(sub.invars) <= len(given) else [together] * len(sub.invars)
        while True:  # until what a loop carries has the marks of its results
            new = _follow(sub, marks, found, last and equation.primitive.name in ("jit", "pjit"))
            results = [one | other for one, other in zip(results, new, strict=True)]
            places = carried(equation, sub)
            again = list(marks)
            for place, mark in zip(places, new, strict=False):
                again[place] |= mark
            if again == marks:
                break
            marks = again
    return results


def _last_casts(jaxpr: Jaxpr) -> set[Any]:
    """The loss, and what it is a mere cast of, as long as that is of low precision, too."""
    found = set(jaxpr.outvars[:1]) if not isinstance(jaxpr.outvars[0], Literal) else set()
    for equation in reversed(jaxpr.eqns):
        of_cast = equation.primitive.name == "convert_element_type" and equation.outvars[0] in found
        if of_cast and not isinstance(equation.invars[0], Literal):
            found.add(equation.invars[0])
    computed = {v for e in jaxpr.eqns if e.primitive.name in CASTS for v in e.outvars}
    return found & computed


def _needed(jaxpr: Jaxpr) -> list[Any]:
    """The operations through which derivatives go to the results, in their order."""
    needed = {x for x in jaxpr.outvars if not isinstance(x, Literal)}
    found = []
    for equation in reversed(jaxpr.eqns):
        differentiable = equation.primitive.name != "stop_gradient" and any(
            map(_is_inexact, equation.outvars)
        )
        if differentiable and needed.intersection(equation.outvars):
            needed |= {x for x in equation.invars if not isinstance(x, Literal)}
            found.append(equation)
    return found[::-1]


def _is_inexact(var: Any) -> bool:
    return jnp.issubdtype(var.aval.dtype, jnp.inexact)


def _epsilon(var: Any) -> float:
    return float(jnp.finfo(var.aval.dtype).eps)
