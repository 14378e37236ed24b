r"""Lanczos: a symmetric matrix, seen from a start vector, as a tridiagonal matrix.

From q_1 = v / ||v||, with H q_j = beta_{j-1} q_{j-1} + alpha_j q_j + beta_j q_{j+1},

    H Q_k = Q_k T_k + beta_k q_{k+1} e_k^T,    T_k = tridiag(beta_1..beta_{k-1}; alpha_1..alpha_k),

and the eigenpairs of T_k give the k-point Gauss rule of the spectral measure of H seen from v (Golub and
Meurant 2010). Several start vectors run side by side and share each product with H.

With reorthogonalisation (`jaxlimit.spectrum.basis`) every new vector is made orthogonal to the whole basis,
of k vectors for each start vector. Without it three vectors are kept; the quadrature remains valid but
converges later (Greenbaum 1989). Between the two, a basis of limited size keeps
its first vectors, and new ones are made orthogonal to these: they hold the outliers of the spectrum, which
are what comes back where orthogonality is lost. Or later vectors are kept in host memory
(`jaxlimit.core.memory`), and a step brings one panel of them after the other to the devices.

When beta_k vanishes the Krylov space is exhausted and T_k is exact: the run ends there with a shorter T,
which is an answer and no error.

A step is two calls of compiled programs, its product and the rest, and one that keeps its vector. The host is
a step ahead of the device: it reads a column of T while the next step is under way. So the last product of a
run that ends by itself may be one that was not needed.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxlimit.core.checks import require_count, require_floating
from jaxlimit.core.memory import in_device_memory, in_host_memory
from jaxlimit.core.programs import parts_of_one_processor
from jaxlimit.core.trees import PyTree
from jaxlimit.spectrum.basis import (
    CANCELLATION,
    PANEL,
    empty_panel,
    in_slots,
    inner_products_per_run,
    norms,
    orthogonalize,
    per_run,
    project_out,
    store,
)
from jaxlimit.spectrum.tridiagonal import Tridiagonal

# beta_k below BREAKDOWN * machine epsilon * ||T|| is rounding noise: a product with H alone is uncertain by
# a small multiple of machine epsilon * ||H||.
BREAKDOWN = 10.0


class LanczosState(NamedTuple):
    """Where a block of P Lanczos runs stands: all that is needed to go on, or to resume to the same bits."""

    # the Krylov spaces, on the device
    basis: tuple[PyTree, ...]  # panels of the first q: leaves (P, PANEL, *shape), 0 beyond j; see `run`
    previous: PyTree  # leaves (P, *shape): q_{j-1}
    current: PyTree  # leaves (P, *shape): q_j, the next vector to be multiplied; 0 where a run has ended
    norm: jax.Array  # (P,) running estimate of ||T||

    # the tridiagonal matrices so far, on the host
    diagonal: NDArray[np.float64]  # (P, j)
    off_diagonal: NDArray[np.float64]  # (P, j), the last column is the residual norm
    num_steps: NDArray[np.int64]  # (P,) steps before each run ended, or j

    def tridiagonals(self, rounding: float = 0.0) -> list[Tridiagonal]:
        """T of each run, cut where it broke down.

        Args:
            rounding: relative error of a product; machine epsilon of the vectors where that is larger.
        """
        steps_taken = self.diagonal.shape[1]
        if steps_taken == 0:
            return []
        rounding = max(rounding, float(jnp.finfo(self.norm.dtype).eps))
        return [
            Tridiagonal(
                self.diagonal[p, :k],
                self.off_diagonal[p, : k - 1],
                float(self.off_diagonal[p, k - 1]),
                breakdown=bool(k < steps_taken or self.off_diagonal[p, k - 1] == 0),
                reorthogonalized=k <= PANEL * len(self.basis),
                rounding=rounding,
            )
            for p, k in enumerate(self.num_steps)
        ]


def init(starts: PyTree) -> LanczosState:
    """State before the first step.

    Args:
        starts: P start vectors along a leading axis; they need not be normalised.

    Raises:
        ValueError: a start vector that is zero or not finite, or no vector of floating numbers.
    """
    require_floating("start vectors", starts)
    starts = jax.tree.map(jnp.asarray, starts)
    current, lengths = _normalized(starts)
    host_lengths, num_runs = np.asarray(lengths), len(lengths)
    if not np.all(np.isfinite(host_lengths)) or np.any(host_lengths == 0):
        raise ValueError(f"start vectors must be finite and not zero, got norms {host_lengths}.")
    return LanczosState(
        basis=(),
        previous=jax.tree.map(jnp.zeros_like, current),
        current=current,
        norm=jnp.zeros_like(lengths),
        diagonal=np.zeros((num_runs, 0)),
        off_diagonal=np.zeros((num_runs, 0)),
        num_steps=np.zeros(num_runs, np.int64),
    )


@jax.jit
def _normalized(starts: PyTree) -> tuple[PyTree, jax.Array]:
    """The vectors at length 1, and the lengths that they had."""
    lengths = norms(starts)
    return jax.tree.map(lambda x: x / per_run(lengths, x), starts), lengths


def run(
    matmat: Callable[[PyTree], PyTree],
    state: LanczosState,
    num_matvecs: int,
    max_basis: int | None = None,
    max_offloaded: int = 0,
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
        max_offloaded: how many vectors beyond these a run keeps in host memory, in full panels. The one that
            is being filled, and one that is looked at, lie on the devices beside the others.

    Raises:
        FloatingPointError: a product with the matrix is not finite.
    """
    taken = state.diagonal.shape[1]
    beta = state.off_diagonal[:, -1] if taken else np.zeros(len(state.num_steps))
    at = StepVectors(state.previous, state.current, jnp.asarray(beta, state.norm.dtype), state.norm)
    resident = resident_panels(max_basis, max_offloaded)
    basis, kept = _growing_basis(state, max_basis, max_offloaded)
    basis = _offloaded(basis, resident)
    columns, under_way = _Columns(state), None
    in_turn = parts_of_one_processor(jax.tree.leaves(state.current))
    for index in range(taken, taken + num_matvecs):
        if not columns.alive.any():
            break
        if index < kept:
            if index % PANEL == 0:
                basis = _offloaded([*basis, jax.tree.map(empty_panel, at.current)], resident)
            basis[-1] = store(basis[-1], at.current, index % PANEL)
        product = matmat(at.current)
        if len(basis) <= resident + 1:
            at, column = rest_of_step(in_slots(basis), len(basis), at, product)
        else:
            at, column = _rest_of_step_by_panels(basis, at, product)
        if under_way is not None:
            columns.append(under_way)
        under_way = jax.block_until_ready(column) if in_turn else column
    if under_way is not None:
        columns.append(under_way)
    return LanczosState(tuple(basis), at.previous, at.current, at.norm, *columns.matrices())


class StepVectors(NamedTuple):
    """What a step changes on the device, as in `LanczosState`; beta (P,) of the step before."""

    previous: PyTree
    current: PyTree
    beta: jax.Array
    norm: jax.Array


@jax.jit
def rest_of_step(
    slots: tuple[PyTree, ...], num_panels: int, at: StepVectors, product: PyTree
) -> tuple[StepVectors, jax.Array]:
    """All of a step behind its product, and alpha_j and beta_j (2, P)."""
    residual, alpha = three_terms(at.previous, at.current, at.beta, product)
    return _end_of_step(at, orthogonalize(slots, num_panels, residual), alpha)


def _end_of_step(at: StepVectors, residual: PyTree, alpha: jax.Array) -> tuple[StepVectors, jax.Array]:
    current, beta, norm = next_vector(residual, alpha, at.beta, at.norm)
    return StepVectors(at.current, current, beta, norm), jnp.stack([alpha, beta])


def _rest_of_step_by_panels(
    basis: list[PyTree], at: StepVectors, product: PyTree
) -> tuple[StepVectors, jax.Array]:
    """The same where panels lie in host memory: the host waits, so that one at a time is on the devices."""
    residual, alpha = jax.jit(three_terms)(at.previous, at.current, at.beta, product)
    for _ in range(2):
        before = np.asarray(norms(residual))
        for panel in basis:
            residual = jax.block_until_ready(jax.jit(project_out)(in_device_memory(panel), residual))
        if np.all(np.asarray(norms(residual)) >= CANCELLATION * before):
            break
    return jax.jit(_end_of_step)(at, residual, alpha)


class _Columns:
    """The tridiagonal matrices of a state, growing on the host; `alive` (P,) are the runs that go on."""

    def __init__(self, state: LanczosState) -> None:
        taken = state.diagonal.shape[1]
        self._diagonal, self._off_diagonal = [state.diagonal], [state.off_diagonal]
        self._taken, self._num_steps = taken, state.num_steps.copy()
        self.alive = state.num_steps == taken
        if taken:
            self.alive &= state.off_diagonal[:, -1] > 0

    def append(self, column: jax.Array) -> None:
        """alpha_j and beta_j, which are waited for; a FloatingPointError if they are not finite."""
        alpha, beta = np.asarray(column, np.float64)
        self._taken += 1
        if not (np.all(np.isfinite(alpha)) and np.all(np.isfinite(beta))):
            raise FloatingPointError(
                f"product {self._taken} with the matrix is not finite: lower the learning rate that made "
                "these weights, or look for overflow in the loss at large inputs."
            )
        self._diagonal.append(alpha[:, None])
        self._off_diagonal.append(beta[:, None])
        self._num_steps[self.alive] = self._taken
        self.alive &= beta > 0

    def matrices(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
        """The last fields of a `LanczosState`."""
        return np.hstack(self._diagonal), np.hstack(self._off_diagonal), self._num_steps


def resident_panels(max_basis: int | None, max_offloaded: int) -> float:
    """How many panels stay on the devices, beside the last one; arguments as for `run`."""
    return np.inf if max_basis is None or not max_offloaded else max_basis // PANEL


def _offloaded(basis: list[PyTree], resident: float) -> list[PyTree]:
    """The panels with those beyond `resident` in host memory, but for the last one, which is written to."""
    return [in_host_memory(x) if resident <= i < len(basis) - 1 else x for i, x in enumerate(basis)]


def _growing_basis(
    state: LanczosState, max_basis: int | None, max_offloaded: int
) -> tuple[list[PyTree], float]:
    """The panels of a state, the last of which may be written to, and the number of vectors to keep."""
    basis, taken = list(state.basis), state.diagonal.shape[1]
    kept = np.inf if max_basis is None else (max_basis // PANEL + max_offloaded // PANEL) * PANEL
    if taken > PANEL * len(basis):  # later vectors are lost already
        return basis, PANEL * len(basis)
    if taken < PANEL * len(basis):
        basis[-1] = jax.tree.map(jnp.copy, basis[-1])  # written in place; the caller's stays as it is
        kept = max(kept, PANEL * len(basis))  # the memory is there
    return basis, kept


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
        ValueError: num_matvecs below 1; a start vector that is zero, not finite, or not of floating numbers.
        FloatingPointError: a product is not finite.

    Examples:
        >>> T = tridiagonalize(lambda v: jnp.array([1.0, 3.0]) * v, jnp.ones(2), 5)
        >>> T.num_steps, T.diagonal.round(5).tolist(), T.off_diagonal.round(5).tolist()
        (2, [2.0, 2.0], [1.0])
    """
    require_count("num_matvecs", num_matvecs)

    def matmat(vectors: PyTree) -> PyTree:
        product = matvec(jax.tree.map(lambda x: x[0], vectors))
        return jax.tree.map(lambda x: x[None], product)

    state = init(jax.tree.map(lambda x: jnp.asarray(x)[None], start))
    return run(matmat, state, num_matvecs, None if reorthogonalize else 0).tridiagonals()[0]


def three_terms(
    previous: PyTree, current: PyTree, beta: jax.Array, product: PyTree
) -> tuple[PyTree, jax.Array]:
    """The residual H q_j - alpha_j q_j - beta_{j-1} q_{j-1} of all runs, and alpha_j."""
    alpha = inner_products_per_run(current, product)
    residual = jax.tree.map(
        lambda hq, q, p: hq - per_run(alpha, q) * q - per_run(beta, p) * p, product, current, previous
    )
    return residual, alpha


def next_vector(
    residual: PyTree, alpha: jax.Array, beta: jax.Array, norm: jax.Array
) -> tuple[PyTree, jax.Array, jax.Array]:
    """q_{j+1}, beta_j and the estimate of ||T||, from the residual."""
    new_beta = norms(residual)
    norm = jnp.maximum(norm, jnp.abs(alpha) + beta + new_beta)
    exhausted = new_beta <= BREAKDOWN * jnp.finfo(new_beta.dtype).eps * norm
    # Whole numbers: 0.0 would be a float64 constant under x64.
    new_beta = jnp.where(exhausted, 0, new_beta)
    scale = jnp.where(exhausted, 0, 1 / jnp.where(exhausted, 1, new_beta))
    return jax.tree.map(lambda r: r * per_run(scale, r), residual), new_beta, norm
