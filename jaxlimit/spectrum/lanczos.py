r"""Lanczos: a symmetric matrix, seen from a start vector, as a tridiagonal matrix.

From q_1 = v / ||v||, with H q_j = beta_{j-1} q_{j-1} + alpha_j q_j + beta_j q_{j+1},

    H Q_k = Q_k T_k + beta_k q_{k+1} e_k^T,    T_k = tridiag(beta_1..beta_{k-1}; alpha_1..alpha_k),

and the eigenpairs of T_k give the k-point Gauss rule of the spectral measure of H seen from v (Golub and
Meurant 2010). Several start vectors run side by side and share each product with H.

With reorthogonalisation every new vector is made orthogonal to the whole basis by Gram-Schmidt, as matrix
products with panels of the basis (k vectors of memory for each start vector), and once more where that
cancelled much of it (Daniel, Gragg, Kaufman and Stewart 1976). Without it three vectors are kept; the
quadrature remains valid but converges later (Greenbaum 1989). Between the two, a basis of limited size keeps
its first vectors, and new ones are made orthogonal to these: they hold the outliers of the spectrum, which
are what comes back where orthogonality is lost.

When beta_k vanishes the Krylov space is exhausted and T_k is exact: the run ends there with a shorter T,
which is an answer and no error.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxlimit.core.sharding import sharding_like

PyTree = Any

# beta_k below BREAKDOWN * machine epsilon * ||T|| is rounding noise: a product with H alone is uncertain by
# a small multiple of machine epsilon * ||H||.
BREAKDOWN = 10.0
# Vectors in a panel of the basis: few enough that the last, partly filled one wastes little, and enough that
# the vector which is orthogonalised against it costs little to read and write beside it.
PANEL = 32
# A Gram-Schmidt pass that leaves less of a vector than this is repeated (Daniel et al. 1976).
CANCELLATION = 2**-0.5


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["diagonal", "off_diagonal", "residual_norm", "rounding"],
    meta_fields=["breakdown", "reorthogonalized"],
)
@dataclass(frozen=True)
class Tridiagonal:
    """The tridiagonal matrix T_k of one Lanczos run. Host arrays in float64.

    Attributes:
        diagonal: (k,) alpha_1 .. alpha_k.
        off_diagonal: (k - 1,) beta_1 .. beta_{k-1}, positive.
        residual_norm: beta_k, the coupling to what T_k leaves out; 0 after a breakdown.
        breakdown: whether the Krylov space was exhausted, so that T_k is exact.
        reorthogonalized: whether the whole basis was kept and every vector made orthogonal to all of it.
        rounding: machine epsilon of the vectors times ||T||, the scale of the errors of eigenvalues.
    """

    diagonal: NDArray[np.float64]
    off_diagonal: NDArray[np.float64]
    residual_norm: float
    breakdown: bool = False
    reorthogonalized: bool = True
    rounding: float = 0.0

    @property
    def num_steps(self) -> int:
        """Order k of the matrix: the number of products spent, breakdown excepted."""
        return len(self.diagonal)

    def truncate(self, num_steps: int) -> "Tridiagonal":
        """The matrix T_k of a run that had stopped earlier; itself if it was not longer.

        Raises:
            ValueError: num_steps below 1.
        """
        if num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {num_steps}.")
        if num_steps >= self.num_steps:
            return self
        return replace(
            self,
            diagonal=self.diagonal[:num_steps],
            off_diagonal=self.off_diagonal[: num_steps - 1],
            residual_norm=float(self.off_diagonal[num_steps - 1]),
            breakdown=False,
        )


class LanczosState(NamedTuple):
    """Where a block of P Lanczos runs stands: all that is needed to go on, or to resume to the same bits."""

    # the Krylov spaces, on the device
    basis: tuple[PyTree, ...]  # panels of the first q: leaves (P, PANEL, *shape), 0 beyond j
    previous: PyTree  # leaves (P, *shape): q_{j-1}
    current: PyTree  # leaves (P, *shape): q_j, the next vector to be multiplied; 0 where a run has ended
    norm: jax.Array  # (P,) running estimate of ||T||

    # the tridiagonal matrices so far, on the host
    diagonal: NDArray[np.float64]  # (P, j)
    off_diagonal: NDArray[np.float64]  # (P, j), the last column is the residual norm
    num_steps: NDArray[np.int64]  # (P,) steps before each run ended, or j

    def tridiagonals(self) -> list[Tridiagonal]:
        """T of each run, cut where it broke down."""
        steps_taken = self.diagonal.shape[1]
        if steps_taken == 0:
            return []
        rounding = np.asarray(self.norm, np.float64) * float(jnp.finfo(self.norm.dtype).eps)
        return [
            Tridiagonal(
                self.diagonal[p, :k],
                self.off_diagonal[p, : k - 1],
                float(self.off_diagonal[p, k - 1]),
                breakdown=bool(k < steps_taken or self.off_diagonal[p, k - 1] == 0),
                reorthogonalized=k <= PANEL * len(self.basis),
                rounding=float(rounding[p]),
            )
            for p, k in enumerate(self.num_steps)
        ]


def init(starts: PyTree) -> LanczosState:
    """State before the first step.

    Args:
        starts: P start vectors along a leading axis; they need not be normalised.

    Raises:
        ValueError: a start vector that is zero or not finite.
    """
    starts = jax.tree.map(jnp.asarray, starts)
    norms = np.asarray(_norm(starts))
    if not np.all(np.isfinite(norms)) or np.any(norms == 0):
        raise ValueError(f"start vectors must be finite and not zero, got norms {norms}.")
    current = jax.tree.map(lambda x: x / _columns(jnp.asarray(norms, x.dtype), x), starts)
    num_runs = len(norms)
    return LanczosState(
        basis=(),
        previous=jax.tree.map(jnp.zeros_like, current),
        current=current,
        norm=jnp.zeros_like(jnp.asarray(norms)),
        diagonal=np.zeros((num_runs, 0)),
        off_diagonal=np.zeros((num_runs, 0)),
        num_steps=np.zeros(num_runs, np.int64),
    )


def run(
    matmat: Callable[[PyTree], PyTree],
    state: LanczosState,
    num_matvecs: int,
    max_basis: int | None = None,
) -> LanczosState:
    """Takes up to `num_matvecs` further steps of all runs; stops early when every run has ended.

    Cost: one block product a step; with reorthogonalisation 4 j D more operations in step j for each vector,
    and memory for k + 4 vectors a run, with k rounded up to full panels.

    Args:
        matmat: product with P vectors along a leading axis.
        state: from `init`, or of an earlier call.
        num_matvecs: number of steps.
        max_basis: how many vectors a run keeps at most, in full panels; None keeps all of them, 0 none.
            A panel that the state has begun is filled; where it has left out vectors, no later one is kept.

    Raises:
        FloatingPointError: a product with the matrix is not finite.
    """
    alive = state.num_steps == state.diagonal.shape[1]
    if state.diagonal.size:
        alive &= state.off_diagonal[:, -1] > 0
    diagonal, off_diagonal = [state.diagonal], [state.off_diagonal]
    num_steps = state.num_steps.copy()
    previous, current, norm = state.previous, state.current, state.norm
    taken = state.diagonal.shape[1]
    beta = jnp.asarray(state.off_diagonal[:, -1] if taken else np.zeros(len(alive)), norm.dtype)
    basis = list(state.basis)
    kept = np.inf if max_basis is None else max_basis // PANEL * PANEL
    if taken > PANEL * len(basis):  # later ones are lost already
        kept = PANEL * len(basis)
    elif taken < PANEL * len(basis):
        kept = max(kept, PANEL * len(basis))  # the memory is there
        basis[-1] = jax.tree.map(jnp.copy, basis[-1])  # written in place below; the caller's stays as it is
    for index in range(taken, taken + num_matvecs):
        if not np.any(alive):
            break
        residual, alpha = _three_terms(previous, current, beta, matmat(current))
        if index < kept:
            if index % PANEL == 0:
                basis.append(jax.tree.map(_empty_panel, current))
            basis[-1] = _store(basis[-1], current, index % PANEL)
        residual = _orthogonalize(basis, residual)
        previous = current
        current, beta, norm = _normalize(residual, alpha, beta, norm)
        column = np.asarray(alpha, np.float64), np.asarray(beta, np.float64)
        if not np.all(np.isfinite(column)):
            raise FloatingPointError(
                f"product {index + 1} with the matrix is not finite: lower the learning rate that made these "
                "weights, or look for overflow in the loss at large inputs."
            )
        diagonal.append(column[0][:, None])
        off_diagonal.append(column[1][:, None])
        num_steps[alive] = index + 1
        alive &= column[1] > 0
    return LanczosState(
        tuple(basis),
        previous,
        current,
        norm,
        np.hstack(diagonal),
        np.hstack(off_diagonal),
        num_steps,
    )


def tridiagonalize(
    matvec: Callable[[PyTree], PyTree],
    start: PyTree,
    num_matvecs: int,
    *,
    reorthogonalize: bool = True,
) -> Tridiagonal:
    """Tridiagonal matrix of a symmetric matrix seen from one start vector.

    Cost: at most `num_matvecs` products, fewer on breakdown; memory as in `run`.

    Args:
        matvec: `matvec(v) -> H v` for pytrees shaped like `start`.
        start: start vector of any length; only its direction matters.
        num_matvecs: number of steps k, at least 1.
        reorthogonalize: keep the basis (k vectors) or work with three vectors.

    Returns:
        T_k, shorter than asked for if the Krylov space was exhausted.

    Raises:
        ValueError: num_matvecs below 1, or a start vector that is zero or not finite.
        FloatingPointError: a product is not finite.

    Examples:
        >>> T = tridiagonalize(lambda v: jnp.array([1.0, 3.0]) * v, jnp.ones(2), 5)
        >>> T.num_steps, T.diagonal.round(5).tolist(), T.off_diagonal.round(5).tolist()
        (2, [2.0, 2.0], [1.0])
    """
    if num_matvecs < 1:
        raise ValueError(f"num_matvecs must be at least 1, got {num_matvecs}.")

    def matmat(vectors: PyTree) -> PyTree:
        product = matvec(jax.tree.map(lambda x: x[0], vectors))
        return jax.tree.map(lambda x: x[None], product)

    state = init(jax.tree.map(lambda x: jnp.asarray(x)[None], start))
    return run(matmat, state, num_matvecs, None if reorthogonalize else 0).tridiagonals()[0]


@jax.jit
def _three_terms(previous, current, beta, product):
    """The residual H q_j - alpha_j q_j - beta_{j-1} q_{j-1} of all runs, and alpha_j."""
    alpha = _dot(current, product)
    residual = jax.tree.map(
        lambda hq, q, p: hq - _columns(alpha, q) * q - _columns(beta, p) * p, product, current, previous
    )
    return residual, alpha


def _orthogonalize(basis: list[PyTree], residual: PyTree) -> PyTree:
    """Gram-Schmidt of all runs against one panel of their bases after the other."""
    if not basis:
        return residual
    before = np.asarray(_norm(residual))
    for _ in range(2):  # "twice is enough" (Kahan and Parlett)
        for panel in basis:
            residual = _project_out(panel, residual)
        before, after = np.asarray(_norm(residual)), before
        if np.all(before >= CANCELLATION * after):
            break
    return residual


@jax.jit
def _project_out(panel, residual):
    """R - Q Q^T r for the vectors Q of one panel."""
    overlap = jnp.sum(jnp.stack(jax.tree.leaves(jax.tree.map(_overlap, panel, residual))), axis=0)
    return jax.tree.map(lambda r, q: r - _expand(q, overlap), residual, panel)


@jax.jit
def _normalize(residual, alpha, beta, norm):
    """q_{j+1}, beta_j and the estimate of ||T||, from the residual."""
    new_beta = _norm(residual)
    norm = jnp.maximum(norm, jnp.abs(alpha) + beta + new_beta)
    exhausted = new_beta <= BREAKDOWN * jnp.finfo(new_beta.dtype).eps * norm
    # Whole numbers: 0.0 would be a float64 constant under x64.
    new_beta = jnp.where(exhausted, 0, new_beta)
    scale = jnp.where(exhausted, 0, 1 / jnp.where(exhausted, 1, new_beta))
    return jax.tree.map(lambda r: r * _columns(scale, r), residual), new_beta, norm


def _empty_panel(vectors: jax.Array) -> jax.Array:
    shape = (vectors.shape[0], PANEL, *vectors.shape[1:])
    return jnp.zeros(shape, vectors.dtype, device=sharding_like(vectors, new_axes=2, without=1))


@partial(jax.jit, donate_argnames="panel")
def _store(panel, current, index):
    """Writes q_j into a panel, in place."""
    return jax.tree.map(lambda b, q: b.at[:, index].set(q), panel, current)


def _columns(scalars: jax.Array, like: jax.Array) -> jax.Array:
    """(P,) scalars shaped to multiply leaves of shape (P, ...)."""
    return scalars.astype(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def _dot(x: PyTree, y: PyTree) -> jax.Array:
    """(P,) inner products of P pairs of vectors."""
    products = jax.tree.map(lambda a, b: jnp.sum(a * b, axis=tuple(range(1, a.ndim))), x, y)
    return sum(jax.tree.leaves(products))  # pyright: ignore[reportReturnType]


@jax.jit
def _norm(x: PyTree) -> jax.Array:
    return jnp.sqrt(_dot(x, x))


def _overlap(basis: jax.Array, vector: jax.Array) -> jax.Array:
    """Q^T r for each run: (P, k, *shape), (P, *shape) -> (P, k)."""
    contract = jax.vmap(lambda b, v: jnp.tensordot(b, v, v.ndim, precision="highest"))
    return contract(basis, vector)


def _expand(basis: jax.Array, overlap: jax.Array) -> jax.Array:
    """Q c for each run: (P, k, *shape), (P, k) -> (P, *shape)."""
    return jax.vmap(lambda b, c: jnp.tensordot(c, b, 1, precision="highest"))(basis, overlap)
