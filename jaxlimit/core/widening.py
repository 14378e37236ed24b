"""What a function computes in few binary digits, computed in float32: rounding goes, faults of form stay.

A loss in bfloat16 that is no mean differs between two cuts of its data, and so does one that is a mean, by
rounding. In float32 only the first one does.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, jaxpr_as_fun

from jaxlimit.core.jaxprs import called, carried
from jaxlimit.core.sharding import explicit_sharding

# Operations that only call a program, which takes their place.
CALLS = {"jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint"}
CALLS |= {"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"}
# Binary digits of float32.
DIGITS = 23


def coarse_numbers(jaxpr: Jaxpr) -> set[str]:
    """Which floating-point numbers of fewer than 32 bits are computed, also in what is called."""
    found = {str(_dtype(x)) for eqn in jaxpr.eqns for x in eqn.outvars if is_coarse(_dtype(x))}
    found |= {eqn.primitive.name for eqn in jaxpr.eqns if _rounds(eqn)}
    return found.union(*(coarse_numbers(inner) for eqn in jaxpr.eqns for inner in called(eqn)))


def widened(jaxpr: ClosedJaxpr) -> ClosedJaxpr:
    """The same function of the same arguments, in float32 where it computes in fewer bits.

    Operations that read single bits, call programs of others or divide arrays over devices stay as they are.
    """
    if not coarse_numbers(jaxpr.jaxpr):
        return jaxpr
    return jax.make_jaxpr(_function(jaxpr))(*map(_like, jaxpr.in_avals))


def _values(jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], map(_wide, [*consts, *args]), strict=True))

    def value(atom: Any) -> Any:
        return _wide(atom.val) if isinstance(atom, Literal) else known[atom]

    for eqn in jaxpr.eqns:
        results = _results(jaxpr, eqn, [value(x) for x in eqn.invars])
        known.update(zip(eqn.outvars, results, strict=True))
    return [value(x) for x in jaxpr.outvars]


def _results(jaxpr: Jaxpr, eqn: JaxprEqn, args: list[Any]) -> Sequence[Any]:
    """Results of an operation of a program on wide arguments."""
    name, params, inner = eqn.primitive.name, eqn.params, called(eqn)
    if name in CALLS and len(inner) == 1:
        closed = [x for x in params.values() if isinstance(x, ClosedJaxpr)]
        return _values(inner[0], closed[0].consts if closed else (), args)
    if name in _LOOPS:
        return jax.tree.leaves(_LOOPS[name](eqn, args))
    if _rounds(eqn):
        return args
    if inner or "call" in name or name == "bitcast_convert_type":
        return _as_it_is(jaxpr, eqn, args)
    results = eqn.primitive.bind(*args, **{key: _wide_dtype(x) for key, x in params.items()})
    return results if eqn.primitive.multiple_results else [results]


def _rounds(eqn: JaxprEqn) -> bool:
    return eqn.primitive.name == "reduce_precision" and eqn.params["mantissa_bits"] < DIGITS


def _as_it_is(jaxpr: Jaxpr, eqn: JaxprEqn, args: list[Any]) -> list[Any]:
    """The operation itself, in few bits."""
    given = {
        x: _as(arg, _dtype(x)) for x, arg in zip(eqn.invars, args, strict=True) if not isinstance(x, Literal)
    }
    alone = jaxpr.replace(constvars=[], invars=list(given), outvars=eqn.outvars, eqns=[eqn])
    return list(map(_wide, jaxpr_as_fun(ClosedJaxpr(alone, []))(*given.values())))


def _function(closed: ClosedJaxpr) -> Callable[..., list[Any]]:
    return lambda *args: _values(closed.jaxpr, closed.consts, args)


def _scan(eqn: JaxprEqn, args: list[Any]) -> Any:
    body = eqn.params["jaxpr"]
    place = carried(eqn, body.jaxpr)
    consts, start, stacked = args[: place.start], args[place.start : place.stop], args[place.stop :]

    def step(carry: list[Any], x: list[Any]) -> tuple[list[Any], list[Any]]:
        found = _function(body)(*consts, *carry, *x)
        return found[: len(place)], found[len(place) :]

    return jax.lax.scan(step, start, stacked, eqn.params["length"], eqn.params["reverse"])


def _while(eqn: JaxprEqn, args: list[Any]) -> Any:
    condition, body = eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]
    start = args[len(args) - len(eqn.outvars) :]
    of_condition = args[: len(condition.in_avals) - len(start)]
    of_body = args[len(of_condition) : len(args) - len(start)]
    return jax.lax.while_loop(
        lambda carry: _function(condition)(*of_condition, *carry)[0],
        lambda carry: _function(body)(*of_body, *carry),
        start,
    )


def _cond(eqn: JaxprEqn, args: list[Any]) -> Any:
    return jax.lax.switch(args[0], list(map(_function, eqn.params["branches"])), *args[1:])


# What runs programs in steps or branches.
_LOOPS: dict[str, Callable[[JaxprEqn, list[Any]], Any]] = {"scan": _scan, "while": _while, "cond": _cond}


def is_coarse(dtype: Any) -> bool:
    """Whether these are floating-point numbers of fewer than 32 bits."""
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32


def _dtype(atom: Any) -> Any:
    """Of a variable or a literal; integers stand for what has none."""
    return getattr(atom.aval, "dtype", np.dtype(np.int32))


def _wide(x: Any) -> Any:
    return _as(x, np.float32) if is_coarse(jnp.result_type(x)) else x


def _as(x: Any, dtype: Any) -> Any:
    """A number of the host stays one, which a program may hold."""
    if jnp.result_type(x) == dtype:
        return x
    if isinstance(x, (np.ndarray, np.generic, bool, int, float)):
        return np.asarray(x, dtype)[()]
    return jax.lax.convert_element_type(x, dtype)


def _wide_dtype(value: Any) -> Any:
    return np.dtype(np.float32) if isinstance(value, np.dtype) and is_coarse(value) else value


def _like(aval: Any) -> jax.ShapeDtypeStruct:
    """An argument of such a type."""
    sharding = explicit_sharding(aval)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=aval.weak_type, sharding=sharding)
