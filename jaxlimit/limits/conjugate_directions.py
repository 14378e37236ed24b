r"""What conjugate gradients learned on one support helps on every larger one.

Directions p_j with p_i^T H p_j = 0 for i != j stay conjugate whatever is kept. So where they are zero on the
removed weights, the best combination of them is known without a product: with p_j^T H p_j = 1,

    min over x in span(p) of (c - x)^T H (c - x) / 2     is at     x = sum_j (H p_j)^T c p_j.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxlimit.core.sharding import place, sharding_like, to_host
from jaxlimit.core.trees import PyTree
from jaxlimit.spectrum.basis import PANEL, combination, empty_panel, in_slots, overlaps, store


class Directions:
    """Conjugate directions and their products with H, each with the removals up to which it is zero on them.

    Args:
        most: how many are kept; the first ones are.

    Attributes:
        num_removed: removals of the support that is being solved on.
    """

    def __init__(self, most: int, num_removed: int = 0) -> None:
        self._most = most
        self.num_removed = num_removed
        self._removed: list[int] = []
        self._panels: list[PyTree] = []

    def __len__(self) -> int:
        return len(self._removed)

    def add(self, direction: PyTree, product: PyTree, curvature: float) -> None:
        """Keeps a direction p on the support, H p, and p^T H p > 0."""
        if len(self) < self._most:
            self._store(_scaled((direction, product), curvature**-0.5))

    def since(self, first: int) -> PyTree:
        """All pairs of p and H p but the first ones, along a leading axis of arrays of the host."""

        def rows(*panels: jax.Array) -> NDArray[Any]:
            last = first % PANEL + len(self) - first
            return np.concatenate([to_host(panel)[0] for panel in panels])[first % PANEL : last]

        return jax.tree.map(rows, *self._panels[first // PANEL :])

    def restore(self, pairs: PyTree, like: PyTree) -> None:
        """Takes pairs from `since`, of the support that is being solved on, and places them as `like`."""
        for i in range(len(jax.tree.leaves(pairs)[0])):
            pair = jax.tree.map(lambda x, i=i: x[i], pairs)
            self._store(jax.tree.map(lambda x, y: place(x[None], sharding_like(y, 1)), pair, (like, like)))

    def _store(self, pair: PyTree) -> None:
        index = len(self) % PANEL
        if index == 0:
            self._panels.append(jax.tree.map(empty_panel, pair))
        self._panels[-1] = store(self._panels[-1], pair, index)
        self._removed.append(self.num_removed)

    def without(self, vector: PyTree) -> PyTree:
        """V - sum_j (H p_j)^T v p_j over the directions that lie on the support.

        Of a removed vector c it is c - x with the best x; any other vector it makes conjugate to them all.
        """
        lie = np.array(self._removed, np.int64) >= self.num_removed
        if not lie.any():
            return vector
        slots = in_slots(self._panels)
        used = np.zeros((len(slots), 1, PANEL), np.float32)
        used.flat[: len(lie)] = lie
        return _without(slots, len(self._panels), used, vector)


@jax.jit
def _scaled(pair: tuple[PyTree, PyTree], factor: float) -> tuple[PyTree, PyTree]:
    """Both vectors times a number, with the leading axis of `jaxlimit.spectrum.basis`."""
    return jax.tree.map(lambda x: jnp.asarray(factor, x.dtype) * x[None], pair)


@jax.jit
def _without(
    slots: Sequence[tuple[PyTree, PyTree]], num_panels: int, used: jax.Array, vector: PyTree
) -> PyTree:
    vectors = jax.tree.map(lambda x: x[None], vector)
    for i, panel in enumerate(slots):
        vectors = jax.lax.cond(i < num_panels, _take_out, lambda *x: x[-1], panel, used[i], vectors)
    return jax.tree.map(lambda x: x[0], vectors)


def _take_out(panel: tuple[PyTree, PyTree], used: jax.Array, vectors: PyTree) -> PyTree:
    """V - P (a * (H P)^T v) for the directions P of one panel."""
    directions, products = panel
    shares = overlaps(products, vectors)
    shares = shares * used.astype(shares.dtype)
    return jax.tree.map(lambda v, p: v - combination(p, shares), vectors, directions)
