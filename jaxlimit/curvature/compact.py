"""What a linearised batch need not keep: constants, copies of one number, one array twice.

`jax.linearize` keeps whatever the linear function reads. Some of it was only spread along an axis: the weight
of an example over all classes, zeros in place of derivatives that vanish. With a large vocabulary each takes
as much memory as the logits (benchmarks/language_heads.py), so the small original is kept, and spread again
where it is used.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, jaxpr_as_fun

from jaxlimit.core.trees import PyTree, frozen, thawed

SPREAD = "broadcast_in_dim"


class _Origin(NamedTuple):
    """What a result was spread from, and how, in order."""

    atom: Any
    spreads: tuple[JaxprEqn, ...]


@dataclass(frozen=True, eq=False)
class _Whole:
    """Makes a pytree of what was kept of its leaves."""

    structure: Any
    origins: tuple[_Origin, ...]
    places: tuple[int, ...]  # of their atoms in what is kept; -1 for a constant

    def __call__(self, kept: list[jax.Array]) -> PyTree:
        leaves = []
        for (atom, spreads), place in zip(self.origins, self.places, strict=True):
            x = jnp.asarray(atom.val, atom.aval.dtype) if place < 0 else kept[place]
            for eqn in spreads:
                x = eqn.primitive.bind(x, **eqn.params)
            leaves.append(x)
        return self.structure.unflatten(leaves)


def compacted(fn: Callable[..., PyTree]) -> Callable[..., Callable[[], PyTree]]:
    """A function like `fn` whose result, a pytree of less memory, is called to give what `fn` gives."""

    def small(*args: PyTree) -> Callable[[], PyTree]:
        args = frozen(args)  # what is no array is part of the structure
        traced, like = jax.make_jaxpr(lambda *args: fn(*thawed(args)), return_shape=True)(*args)
        jaxpr = traced.jaxpr
        origins = tuple(_origin(jaxpr, x) for x in jaxpr.outvars)
        atoms = list(dict.fromkeys(x.atom for x in origins if not isinstance(x.atom, Literal)))
        places = tuple(-1 if isinstance(x.atom, Literal) else atoms.index(x.atom) for x in origins)
        debug = jaxpr.debug_info._replace(result_paths=None)
        part = ClosedJaxpr(jaxpr.replace(outvars=atoms, debug_info=debug), traced.consts)
        kept = jaxpr_as_fun(part)(*jax.tree.leaves(args))
        return jax.tree_util.Partial(_Whole(jax.tree.structure(like), origins, places), kept)

    return small


def _origin(jaxpr: Jaxpr, x: Any) -> _Origin:
    """Of a variable or constant of a program, also through programs that it calls."""
    if isinstance(x, Literal):
        return _Origin(x, ())
    eqn = next((eqn for eqn in jaxpr.eqns if x in eqn.outvars), None)
    if eqn is not None and eqn.primitive.name == SPREAD and len(eqn.invars) == 1:
        atom, spreads = _origin(jaxpr, eqn.invars[0])
        return _Origin(atom, (*spreads, eqn))
    if eqn is not None and eqn.primitive.name == "jit":
        inner = eqn.params["jaxpr"].jaxpr
        atom, spreads = _origin(inner, inner.outvars[eqn.outvars.index(x)])
        if isinstance(atom, Literal):
            return _Origin(atom, spreads)
        if atom in inner.invars:
            outer = _origin(jaxpr, eqn.invars[inner.invars.index(atom)])
            return _Origin(outer.atom, (*outer.spreads, *spreads))
    return _Origin(x, ())
