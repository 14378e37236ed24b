"""What a traced function says itself of where its arrays lie on a mesh."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, primitives

from jaxlimit.core.sharding import ExampleSharding, is_explicit

# Names of operations: one that says where an array should lie, and those that divide arrays themselves.
CONSTRAINT = "sharding_constraint"
DIVIDING = {"shard_map", "reshard", "mesh_cast"}


def places_itself(fn: Callable, sharding: ExampleSharding | None, *args: Any) -> bool:
    """Whether `fn` divides its arrays over devices itself, and so cannot work on one device's part of them.

    Plain constraints on where arrays lie do not count: on parts they are left out, see `unconstrained`.

    Raises:
        ValueError: it does so by shard_map, which asks for arrays that are divided already.
    """
    found = set(_primitives(jax.make_jaxpr(fn)(*args).jaxpr))
    if sharding is not None and "shard_map" in found and is_explicit(sharding.mesh):
        raise ValueError(
            "the loss calls shard_map on a mesh with explicit axes, over which the examples are divided: "
            f"make the mesh with axis_types=(jax.sharding.AxisType.Auto,) * {len(sharding.mesh.shape)}, or "
            "leave shard_map out of the loss, for every device works on its own examples already."
        )
    return not DIVIDING.isdisjoint(found)


def unconstrained(jaxpr: ClosedJaxpr) -> ClosedJaxpr:
    """The same function without `with_sharding_constraint`, which says nothing on a part of the arrays."""
    stated = CONSTRAINT in _primitives(jaxpr.jaxpr)
    return ClosedJaxpr(_without(jaxpr.jaxpr), jaxpr.consts) if stated else jaxpr


def _without(jaxpr: Jaxpr) -> Jaxpr:
    eqns = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == CONSTRAINT:
            eqns.append(eqn.replace(primitive=primitives.copy_p, params={}))
        else:
            eqns.append(eqn.replace(params=jax.tree.map(_without_in, eqn.params, is_leaf=_is_jaxpr)))
    return jaxpr.replace(eqns=eqns)


def _without_in(value: Any) -> Any:
    if isinstance(value, ClosedJaxpr):
        return unconstrained(value)
    return _without(value) if isinstance(value, Jaxpr) else value


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, (Jaxpr, ClosedJaxpr))


def _primitives(jaxpr: Jaxpr) -> Iterator[str]:
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name
        for value in jax.tree.leaves(eqn.params, is_leaf=_is_jaxpr):
            if _is_jaxpr(value):
                yield from _primitives(getattr(value, "jaxpr", value))
