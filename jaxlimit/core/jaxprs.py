"""Walks through what was traced: into every program that an operation calls, and with operations replaced."""

import math
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

# What stands in place of an equation; None where it stays, but for the programs that it calls.
Rule = Callable[[JaxprEqn], JaxprEqn | None]

_PRIMITIVES: WeakKeyDictionary[Jaxpr, frozenset[str]] = WeakKeyDictionary()


def called(eqn: JaxprEqn, but: str = "") -> list[Jaxpr]:
    """The programs that an equation calls, without the parameter of a name."""
    given = [value for name, value in eqn.params.items() if name != but]
    values = [x for value in given for x in (value if isinstance(value, (tuple, list)) else (value,))]
    return [
        x.jaxpr if isinstance(x, ClosedJaxpr) else x for x in values if isinstance(x, ClosedJaxpr | Jaxpr)
    ]


def carried(eqn: JaxprEqn, body: Jaxpr) -> range:
    """Which arguments of a loop's body are its first results of the step before."""
    if eqn.primitive.name == "while":
        return range(len(body.invars) - len(eqn.outvars), len(body.invars))
    if eqn.primitive.name == "scan":  # what is stacked has one axis fewer within
        sides: list[tuple[list[Any], list[Any]]] = [(eqn.invars, body.invars), (eqn.outvars, body.outvars)]
        stacked = [sum(x.aval.ndim != y.aval.ndim for x, y in zip(*side, strict=True)) for side in sides]
        end = len(body.invars) - stacked[0]
        return range(end - len(body.outvars) + stacked[1], end)
    return range(0)


def primitives(jaxpr: Jaxpr) -> frozenset[str]:
    """Names of the operations, also of what is called; looked up once, for streams ask for every batch."""
    if jaxpr not in _PRIMITIVES:
        found = frozenset(eqn.primitive.name for eqn in jaxpr.eqns)
        inside = (primitives(inner) for eqn in jaxpr.eqns for inner in called(eqn))
        _PRIMITIVES[jaxpr] = found.union(*inside)
    return _PRIMITIVES[jaxpr]


def multiplications(function: Callable[..., Any], *args: Any) -> int:
    """Multiplications of a function in matrix products and convolutions, as it is traced; none is done.

    What a scan does counts once for each of its turns, what other loops do once. Of the branches of a
    condition the one with most multiplications counts.

    Examples:
        >>> import jax.numpy as jnp
        >>> multiplications(lambda w, x: x @ w, jnp.ones((3, 4)), jnp.ones((2, 3)))
        24
    """
    return _multiplications(jax.make_jaxpr(function)(*args).jaxpr)


def _multiplications(jaxpr: Jaxpr) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        shapes = [x.aval.shape for x in eqn.invars]  # pyright: ignore[reportAttributeAccessIssue]
        outputs = sum(math.prod(x.aval.shape) for x in eqn.outvars)  # pyright: ignore[reportAttributeAccessIssue]
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            total += outputs * math.prod(shapes[0][axis] for axis in contracted)
        elif eqn.primitive.name == "conv_general_dilated":
            channels = shapes[1][eqn.params["dimension_numbers"].rhs_spec[0]]
            total += outputs * math.prod(shapes[1]) // channels
        else:
            turns = eqn.params["length"] if eqn.primitive.name == "scan" else 1
            counts = [_multiplications(inner) for inner in called(eqn)]
            total += turns * (max(counts) if eqn.primitive.name == "cond" else sum(counts))
    return total


def rewritten(jaxpr: ClosedJaxpr, rule: Rule) -> ClosedJaxpr:
    """The program with its equations replaced, also in what is called; itself where all of them stay."""
    inner = _rewritten(jaxpr.jaxpr, rule)
    return jaxpr if inner is jaxpr.jaxpr else ClosedJaxpr(inner, jaxpr.consts)


def has_plain_numbers(aval: Any) -> bool:
    """Whether an array has real numbers, and no axis is divided over the devices of a mesh."""
    spec = getattr(getattr(aval, "sharding", None), "spec", ())
    whole = all(axis is None for axis in spec) and not getattr(aval, "vma", None)
    return jnp.issubdtype(aval.dtype, jnp.floating) and aval.size > 0 and whole


def call_instead(fn: Callable[..., jax.Array], eqn: JaxprEqn) -> JaxprEqn:
    """A call of the function in place of an equation, with its arguments."""
    avals: list[Any] = [x.aval for x in eqn.invars]
    like = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in avals]
    with jax.disable_jit(False):  # else there is no call, but the equations of the function
        (call,) = jax.make_jaxpr(jax.jit(fn))(*like).eqns
    return eqn.replace(primitive=call.primitive, params=call.params)


def _rewritten(jaxpr: Jaxpr, rule: Rule) -> Jaxpr:
    eqns = [_equation(eqn, rule) for eqn in jaxpr.eqns]
    same = all(new is old for new, old in zip(eqns, jaxpr.eqns, strict=True))
    return jaxpr if same else jaxpr.replace(eqns=eqns)


def _equation(eqn: JaxprEqn, rule: Rule) -> JaxprEqn:
    instead = rule(eqn)
    if instead is not None:
        return instead
    params = {key: _parameter(value, rule) for key, value in eqn.params.items()}
    same = all(params[key] is value for key, value in eqn.params.items())
    return eqn if same else eqn.replace(params=params)


def _parameter(value: Any, rule: Rule) -> Any:
    if isinstance(value, ClosedJaxpr):
        return rewritten(value, rule)
    if isinstance(value, Jaxpr):
        return _rewritten(value, rule)
    if isinstance(value, tuple) and any(isinstance(x, ClosedJaxpr | Jaxpr) for x in value):
        parts = tuple(_parameter(x, rule) for x in value)
        return value if all(new is old for new, old in zip(parts, value, strict=True)) else parts
    return value
