r"""Logarithms of sums of exponentials, as in every softmax cross entropy, with derivatives in closed form.

With p = softmax(u), and l(u) = log sum_c exp(u_c),

    dl = p . du,    dp = p * (du - p . du),

so that all further derivatives need one array of the size of the logits: p. What JAX keeps of the operations
one by one is several: a vocabulary of 50,000 makes each of them large (benchmarks/language_heads.py). Whoever
wrote the loss, `log`, `sum` and `exp` are recognised in what was traced, before derivatives are taken.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Var

from jaxlimit.core.jaxprs import call_instead, called, has_plain_numbers, rewritten

# What may stand between the sum and its logarithm: it leaves positive numbers as they are.
BETWEEN = ("abs", "broadcast_in_dim", "reshape", "squeeze")


def softmax_in_closed_form(jaxpr: ClosedJaxpr) -> ClosedJaxpr:
    """The same function, whose logarithms of sums of exponentials are differentiated in closed form."""
    makers = _makers(jaxpr.jaxpr)

    def instead(eqn: JaxprEqn) -> JaxprEqn | None:
        if eqn.primitive.name != "log":
            return eqn if eqn.primitive.name.startswith("custom_") else None  # it brings its own derivative
        return _closed_form(eqn, makers)

    return rewritten(jaxpr, instead) if makers else jaxpr


def _makers(jaxpr: Jaxpr) -> dict[Any, JaxprEqn]:
    """The equations of interest by the variables that hold their results, also of what is called."""
    names = ("exp", "reduce_sum", *BETWEEN)
    found: dict[Any, JaxprEqn] = {eqn.outvars[0]: eqn for eqn in jaxpr.eqns if eqn.primitive.name in names}
    for inner in (inner for eqn in jaxpr.eqns for inner in called(eqn)):
        found |= _makers(inner)
    return found


def _closed_form(log: JaxprEqn, makers: dict[Any, JaxprEqn]) -> JaxprEqn | None:
    """A call in place of a logarithm, of what the exponential is of; None where it is of no such sum."""

    def maker(eqn: JaxprEqn | None) -> JaxprEqn | None:
        return None if eqn is None or not isinstance(eqn.invars[0], Var) else makers.get(eqn.invars[0])

    total, shape = maker(log), _aval(log.outvars[0]).shape
    while total is not None and total.primitive.name in BETWEEN:
        total = maker(total)
    power = maker(total)
    if (
        total is None
        or power is None
        or (total.primitive.name, power.primitive.name) != ("reduce_sum", "exp")
    ):
        return None
    if not has_plain_numbers(_aval(power.invars[0])) or math.prod(shape) != _aval(total.outvars[0]).size:
        return None
    axes = tuple(total.params["axes"])
    return call_instead(lambda u: log_sum_exp(u, axes).reshape(shape), log.replace(invars=power.invars))


def _aval(x: Any) -> Any:
    return x.aval


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def log_sum_exp(u: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The logarithm of the sum of exp(u) over the axes, without a shift: u should not exceed 0 by much."""
    return jnp.log(jnp.sum(jnp.exp(u), axes))


@log_sum_exp.defjvp
def _log_sum_exp_jvp(
    axes: tuple[int, ...], at: tuple[jax.Array], along: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    return log_sum_exp(*at, axes), jnp.sum(_softmax(*at, axes) * along[0], axes)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _softmax(u: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    powers = jnp.exp(u)
    return powers / jnp.sum(powers, axes, keepdims=True)


@_softmax.defjvp
def _softmax_jvp(
    axes: tuple[int, ...], at: tuple[jax.Array], along: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    p = _softmax(*at, axes)
    return p, p * (along[0] - jnp.sum(p * along[0], axes, keepdims=True))
