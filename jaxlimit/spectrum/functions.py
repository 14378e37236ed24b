r"""Functions of a matrix times the start vectors of Lanczos runs: f(H) q_1, as the Krylov space sees it.

From H Q_k = Q_k T_k + beta_k q_{k+1} e_k^T follows f(H) q_1 ~ Q_k f(T_k) e_1, exact for polynomials of
degree k - 1 (Saad 1992).
"""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh_tridiagonal

from jaxlimit.core.memory import in_device_memory
from jaxlimit.core.trees import PyTree
from jaxlimit.spectrum.basis import PANEL, combination
from jaxlimit.spectrum.lanczos import LanczosState

Function = Callable[[NDArray[np.float64]], NDArray[np.float64]]  # elementwise


def applied(state: LanczosState, functions: Sequence[Function]) -> PyTree | None:
    """f(H) v / ||v|| for each run of a state, v its start vector; None where vectors of a run were left out.

    Args:
        state: after a first step.
        functions: (P,) f for each run.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jaxlimit.spectrum import lanczos
        >>> state = lanczos.run(lambda v: v * jnp.array([1.0, 3.0]), lanczos.init(jnp.ones((1, 2))), 2)
        >>> print((applied(state, [np.square]) * 2**0.5).round(3))
        [[1. 9.]]
    """
    size = PANEL * len(state.basis)
    shares = np.zeros((len(functions), size), state.norm.dtype)
    for row, run, function in zip(shares, state.tridiagonals(), functions, strict=True):
        if run.num_steps > size:
            return None
        nodes, vectors = eigh_tridiagonal(run.diagonal, run.off_diagonal)
        row[: run.num_steps] = vectors @ (function(nodes) * vectors[0])
    parts = [
        _combined(in_device_memory(panel), shares[:, i * PANEL : (i + 1) * PANEL])
        for i, panel in enumerate(state.basis)
    ]
    return jax.tree.map(lambda *x: sum(x), *parts)


@jax.jit
def _combined(panel: PyTree, shares: jax.Array) -> PyTree:
    return jax.tree.map(lambda leaf: combination(leaf, shares), panel)
