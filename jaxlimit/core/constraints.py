"""What a traced function says itself of where its arrays lie on a mesh."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, JaxprEqn
from jax.extend.core import primitives as core_primitives

from jaxlimit.core.jaxprs import primitives, rewritten
from jaxlimit.core.sharding import ExampleSharding, is_explicit, sum_of_parts

# Names of operations: one that says where an array should lie, and those that divide arrays themselves.
CONSTRAINT = "sharding_constraint"
DIVIDING = {"shard_map", "reshard", "mesh_cast"}


def places_itself(fn: Callable, sharding: ExampleSharding | None, *args: Any) -> bool:
    """Whether `fn(*args)` divides its arrays itself, or else cannot work on a device's part of the last one.

    It may ask JAX where results should lie. Plain constraints on where arrays lie do not count, if JAX traces
    them on parts: there they are left out, see `unconstrained`.

    Raises:
        ValueError: it does so by shard_map, which asks for arrays that are divided already.
    """
    try:
        found = primitives(jax.make_jaxpr(fn)(*args).jaxpr)
    except Exception:  # of the caller's function, to be heard where that is used
        return False
    if sharding is not None and "shard_map" in found and is_explicit(sharding.mesh):
        raise ValueError(
            "the loss calls shard_map on a mesh with explicit axes, over which the examples are divided: "
            f"make the mesh with axis_types=(jax.sharding.AxisType.Auto,) * {len(sharding.mesh.shape)}, or "
            "leave shard_map out of the loss, for every device works on its own examples already."
        )
    return not DIVIDING.isdisjoint(found) or not _traces_on_parts(fn, sharding, args)


def _traces_on_parts(fn: Callable, sharding: ExampleSharding | None, args: tuple) -> bool:
    def part(*args: Any) -> jax.Array:
        jax.make_jaxpr(fn)(*args)
        return jnp.zeros(())

    divided = (*[None] * (len(args) - 1), 0)
    try:
        jax.eval_shape(sum_of_parts(part, sharding, divided), *args)
    except Exception:  # it does so for the whole arrays
        return False
    return True


def unconstrained(jaxpr: ClosedJaxpr) -> ClosedJaxpr:
    """The same function without `with_sharding_constraint`, which says nothing on a part of the arrays."""
    return rewritten(jaxpr, _copied)


def _copied(eqn: JaxprEqn) -> JaxprEqn | None:
    stated = eqn.primitive.name == CONSTRAINT
    return eqn.replace(primitive=core_primitives.copy_p, params={}) if stated else None
