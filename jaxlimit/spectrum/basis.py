r"""The vectors of a block of Lanczos runs: their arithmetic, and Gram-Schmidt against those that are kept.

P vectors lie along a leading axis of every leaf, one for each run. Kept vectors fill panels, leaves of shape
(P, PANEL, *shape), with zeros where no vector is yet.

With reorthogonalisation every new vector is made orthogonal to the whole basis, as matrix products with its
panels, and once more where that cancelled much of it (Daniel, Gragg, Kaufman and Stewart 1976).
"""

from collections.abc import Sequence
from functools import partial
from itertools import count

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxlimit.core.sharding import explicit_sharding, sharding_like
from jaxlimit.core.trees import PyTree

# Vectors in a panel of the basis: few enough that the last, partly filled one wastes little, and enough that
# the vector which is orthogonalised against it costs little to read and write beside it.
PANEL = 32
# A Gram-Schmidt pass that leaves less of a vector than this is repeated (Daniel et al. 1976).
CANCELLATION = 2**-0.5


def per_run(scalars: jax.Array, like: jax.Array) -> jax.Array:
    """(P,) scalars shaped to multiply leaves of shape (P, ...)."""
    return scalars.astype(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def inner_products_per_run(x: PyTree, y: PyTree) -> jax.Array:
    """(P,) inner products of P pairs of vectors."""
    products = jax.tree.map(lambda a, b: jnp.sum(a * b, axis=tuple(range(1, a.ndim))), x, y)
    return sum(jax.tree.leaves(products))  # pyright: ignore[reportReturnType]


@jax.jit
def norms(x: PyTree) -> jax.Array:
    """(P,) Euclidean norms."""
    return jnp.sqrt(inner_products_per_run(x, x))


def empty_panel(vectors: jax.Array) -> jax.Array:
    """A leaf of a panel for runs whose vectors have this leaf; it lies on the devices as they do."""
    shape = (vectors.shape[0], PANEL, *vectors.shape[1:])
    return jnp.zeros(shape, vectors.dtype, device=sharding_like(vectors, new_axes=2, without=1))


@partial(jax.jit, donate_argnames="panel")
def store(panel: PyTree, vectors: PyTree, index: int) -> PyTree:
    """Writes a vector of every run into a panel, in place."""
    return jax.tree.map(lambda b, q: b.at[:, index].set(q), panel, vectors)


def in_slots(basis: Sequence[PyTree]) -> tuple[PyTree, ...]:
    """The panels of a basis in 0, 4, 16, 64, ... slots, so that few programs serve bases of all sizes.

    Slots that are left hold the last panel again, which takes no memory.
    """
    if not basis:
        return ()
    size = next(size for size in (4**i for i in count(1)) if size >= len(basis))
    return (*basis, *[basis[-1]] * (size - len(basis)))


def orthogonalize(slots: Sequence[PyTree], num_panels: jax.Array | int, vectors: PyTree) -> PyTree:
    """Gram-Schmidt of the vectors of all runs, against one panel of their bases after the other.

    Args:
        slots: panels, the first `num_panels` of which count.
        num_panels: may be an array.
        vectors: leaves (P, *shape).
    """
    if not slots:
        return vectors

    def once_more(state: tuple) -> jax.Array:
        _, before, after, passed = state
        return (passed < 2) & jnp.any(after < CANCELLATION * before)  # "twice is enough" (Kahan and Parlett)

    def one_pass(state: tuple) -> tuple:
        vectors, _, before, passed = state
        for i, panel in enumerate(slots):
            vectors = jax.lax.cond(i < num_panels, project_out, lambda _, v: v, panel, vectors)
        return vectors, before, norms(vectors), passed + 1

    before = norms(vectors)
    return jax.lax.while_loop(once_more, one_pass, (vectors, jnp.full_like(before, jnp.inf), before, 0))[0]


def project_out(panel: PyTree, vectors: PyTree) -> PyTree:
    """R - Q Q^T r for the vectors Q of one panel."""
    shares = overlaps(panel, vectors)
    return jax.tree.map(lambda r, q: r - combination(q, shares), vectors, panel)


def overlaps(panel: PyTree, vectors: PyTree) -> jax.Array:
    """Q^T r of each run, (P, PANEL)."""
    return jnp.sum(jnp.stack(jax.tree.leaves(jax.tree.map(_overlap, panel, vectors))), axis=0)


def _overlap(basis: jax.Array, vector: jax.Array) -> jax.Array:
    """Q^T r for each run: (P, k, *shape), (P, *shape) -> (P, k)."""
    # JAX asks where the sums lie if the axes that are summed over are divided and explicit.
    sharding = explicit_sharding(jax.typeof(vector))
    here = None if sharding is None else NamedSharding(sharding.mesh, PartitionSpec())
    contract = partial(jnp.tensordot, precision="highest", out_sharding=here)
    return jax.vmap(lambda b, v: contract(b, v, v.ndim))(basis, vector)


def combination(basis: jax.Array, shares: jax.Array) -> jax.Array:
    """Q c for each run, of one leaf: (P, k, *shape), (P, k) -> (P, *shape)."""
    return jax.vmap(lambda b, c: jnp.tensordot(c, b, 1, precision="highest"))(basis, shares)
