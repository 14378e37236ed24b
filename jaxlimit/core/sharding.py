"""Where arrays live: on one device, or divided over the devices of a `jax.sharding.Mesh`.

The caller decides by placing the data and the parameters. Data divided along their examples make every device
work on its own part of each batch, and one reduction adds the results up; vectors lie as the parameters do,
replicated or divided. With several processes (`jax.distributed`) all run the same program, and what the host
computes it computes in each.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class ExampleSharding:
    """Along which axes of a mesh the examples are divided.

    Attributes:
        mesh: of the devices.
        axes: names of its axes; the others are left to the compiler.
    """

    mesh: Mesh
    axes: tuple[str, ...]

    @property
    def num_shards(self) -> int:
        """Number of parts."""
        return int(np.prod([self.mesh.shape[axis] for axis in self.axes]))


def example_sharding(tree: Any, axis: int = 0) -> ExampleSharding | None:
    """How the examples, along `axis` of every leaf, are divided; None if they are not.

    Raises:
        ValueError: leaves that are divided in different ways.
    """
    found = {_axes(leaf, axis) for leaf in jax.tree.leaves(tree)}
    if len(found) > 1:
        raise ValueError(
            "the arrays of a batch are divided over devices in different ways: place all of them with the "
            f"same jax.sharding.NamedSharding along the examples; got {sorted(map(str, found))}."
        )
    return found.pop() if found else None


UNTRACED = "call jaxlimit outside of what jax.jit, jax.vmap and jax.grad trace."


def require_context(name: str, tree: Any) -> None:
    """Raises ValueError where arrays lie elsewhere than on the mesh that `jax.set_mesh` has set."""
    context = jax.sharding.get_abstract_mesh()
    if context.empty:
        return
    for leaf in jax.tree.leaves(tree):
        if not isinstance(leaf, jax.Array) or isinstance(leaf, Tracer) or not leaf.committed:
            continue
        sharding, wanted = _named(leaf), _axes_of(context)
        if sharding is None and len(leaf.devices()) != context.size:
            found = f"the device {next(iter(leaf.devices()))}"
        elif sharding is not None and _axes_of(sharding.mesh) != wanted:
            found = f"the mesh {_axes_of(sharding.mesh)}"
        else:
            continue
        raise ValueError(
            f"an array of {name} lies on {found}, but jax.set_mesh has set the mesh {wanted}: place it on "
            "that one with jax.device_put, or call jaxlimit outside of the block of jax.set_mesh."
        )


def _axes_of(mesh: Any) -> str:
    """Names, sizes and types of the axes of a mesh."""
    sizes = zip(mesh.shape.items(), mesh.axis_types, strict=True)
    return ", ".join(f"{name}={size} ({kind.name})" for (name, size), kind in sizes)


def num_shards(sharding: ExampleSharding | None) -> int:
    """Number of parts; 1 of what is not divided."""
    return 1 if sharding is None else sharding.num_shards


def on_parts(fn: Callable, sharding: ExampleSharding | None, divided: tuple[int | None, ...]) -> Callable:
    """`fn` of each device's part of its arguments; the results are joined along their first axes.

    Args:
        fn: function of pytrees. Derivatives that it takes stay on their device.
        sharding: of the examples; None leaves `fn` as it is.
        divided: for each argument the axis along which it is divided, or None.
    """
    if sharding is None:
        return fn
    return _shard_map(fn, sharding, divided, PartitionSpec(sharding.axes))


def sum_of_parts(fn: Callable, sharding: ExampleSharding | None, divided: tuple[int | None, ...]) -> Callable:
    """Sum over the devices of `fn` of their parts, by one reduction; arguments as for `on_parts`."""
    if sharding is None:
        return fn
    return _shard_map(
        lambda *args: jax.lax.psum(fn(*args), sharding.axes), sharding, divided, PartitionSpec()
    )


def undivided(leaf: Any) -> Any:
    """An array that is divided over devices as a copy on each of them; others as they are."""
    sharding = _named(leaf)
    if sharding is None or not any(sharding.spec):
        return leaf
    return jax.device_put(leaf, NamedSharding(sharding.mesh, PartitionSpec(*[None] * leaf.ndim)))


def is_explicit(mesh: Any) -> bool:
    """Whether where arrays lie on the mesh is part of their types."""
    return AxisType.Explicit in mesh.axis_types


def zeros(like: jax.ShapeDtypeStruct, dtype: Any = None) -> jax.Array:
    """Of the shape, and divided as the type says."""
    array = jnp.zeros(like.shape, dtype or like.dtype)
    return array if like.sharding is None else jax.sharding.reshard(array, like.sharding)


def zeros_beside(x: Any, dtype: Any = None) -> jax.Array:
    """Of the shape of an array; in programs `jnp.zeros_like` forgets where it lies, from JAX 0.11 on."""
    like = jax.typeof(x)
    return zeros(jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=explicit_sharding(like)), dtype)


def explicit_sharding(aval: Any) -> NamedSharding | None:
    """Where an array of that abstract value lies, if that is part of its type."""
    return aval.sharding if is_explicit(aval.sharding.mesh) else None


def _shard_map(
    fn: Callable, sharding: ExampleSharding, divided: tuple[int | None, ...], out_specs: PartitionSpec
) -> Callable:
    in_specs = tuple(
        PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, sharding.axes) for axis in divided
    )
    return jax.shard_map(
        fn,
        mesh=sharding.mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names={*sharding.axes},
        check_vma=False,
    )


def _axes(leaf: Any, axis: int) -> ExampleSharding | None:
    sharding = _named(leaf)
    if sharding is None or len(sharding.spec) <= axis or sharding.spec[axis] is None:
        return None
    names = sharding.spec[axis]
    names = names if isinstance(names, tuple) else (names,)
    named = ExampleSharding(sharding.mesh, names)  # pyright: ignore[reportArgumentType]
    # One part is nothing divided, unless the axis is a part of the array's type all the same.
    return named if named.num_shards > 1 or is_explicit(named.mesh) else None


def _named(leaf: Any) -> NamedSharding | None:
    sharding = getattr(leaf, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) else None


def sharding_like(leaf: Any, new_axes: int = 0, without: int = 0) -> NamedSharding | None:
    """How arrays shaped like `leaf`, with other leading axes, lie beside it.

    Args:
        leaf: an array.
        new_axes: number of leading axes that are not divided.
        without: number of leading axes of `leaf` that they take the place of.

    Returns:
        None where JAX chooses the device.
    """
    sharding = _named(leaf)
    if sharding is None:
        return None
    return NamedSharding(sharding.mesh, PartitionSpec(*[None] * new_axes, *sharding.spec[without:]))


def place(array: ArrayLike, sharding: NamedSharding | None) -> jax.Array:
    """An array of the host on its devices."""
    if sharding is None:
        return jnp.asarray(array)
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def to_host(array: Any) -> NDArray[Any]:
    """The whole array on the host of every process.

    Raises:
        ValueError: it has no numbers yet, or is a masked array of NumPy.
    """
    if isinstance(array, Tracer):
        raise ValueError(f"an array of shape {array.shape} has no numbers yet: {UNTRACED}")
    if isinstance(array, np.ma.MaskedArray):
        raise ValueError(
            f"an array of shape {array.shape} is masked, and its mask would be lost: pass filled values "
            "(numpy.ma.filled)."
        )
    if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)
