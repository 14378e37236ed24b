"""Derivatives as functions of a vector, also of networks that bring a rule for reverse mode alone.

JAX refuses the forward mode of `jax.custom_vjp`, which straight-through estimators use. There reverse
mode takes its place. The second derivative is that of the gradient which the rule gives.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr

from jaxlimit.core.jaxprs import primitives
from jaxlimit.core.trees import PyTree

Linear = Callable[[PyTree], PyTree]


def derivative_of_gradient(gradient: Callable[[PyTree], PyTree], at: PyTree, traced: ClosedJaxpr) -> Linear:
    """d/dt gradient(w + t v) as a function of v; in reverse over reverse v d gradient, which is the same.

    Args:
        gradient: function of a pytree, the gradient of what was traced.
        at: w.
        traced: the function itself.

    Raises:
        ValueError: neither mode can differentiate the network twice.
    """

    def in_reverse() -> Linear:
        return jax.tree_util.Partial(_only, jax.vjp(gradient, at)[1])

    return _first_that_works([lambda: jax.linearize(gradient, at)[1], in_reverse], at, traced)


def linearized(fn: Callable[[PyTree], PyTree], at: PyTree, traced: ClosedJaxpr) -> tuple[PyTree, Linear]:
    """`jax.linearize`; where forward mode is refused, the transpose of reverse mode.

    Arguments and errors as for `derivative_of_gradient`, of `fn` itself.
    """
    outputs = None

    def forward() -> Linear:
        nonlocal outputs
        outputs, linear = jax.linearize(fn, at)
        return linear

    def in_reverse() -> Linear:
        nonlocal outputs
        outputs, pull_back = jax.vjp(fn, at)
        zeros = jax.tree.map(jnp.zeros_like, outputs)
        return jax.tree_util.Partial(_only, jax.vjp(lambda z: pull_back(z)[0], zeros)[1])

    linear = _first_that_works([forward, in_reverse], at, traced)
    return outputs, linear


def _first_that_works(modes: list[Callable[[], Linear]], like: PyTree, traced: ClosedJaxpr) -> Linear:
    """Without a rule the first; with one, JAX says only on use that none but reverse mode can do it."""
    if not any(name.startswith("custom_vjp") for name in primitives(traced.jaxpr)):
        return modes[0]()
    reason = None
    for mode in modes:
        try:
            linear = mode()
            if "custom_lin" not in primitives(jax.make_jaxpr(linear)(like).jaxpr):
                return linear
        except (TypeError, ValueError, NotImplementedError) as error:
            reason = error
    raise ValueError(
        "the network has a jax.custom_vjp whose backward pass cannot be differentiated: write it in JAX "
        "operations, or the function without a rule (x + jax.lax.stop_gradient(f(x) - x) is a "
        "straight-through estimator)."
    ) from reason


def _only(pull_back: Callable[[PyTree], tuple[PyTree]], vector: PyTree) -> PyTree:
    return pull_back(vector)[0]
