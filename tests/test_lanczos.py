"""Lanczos against what linear algebra proves of it, dense eigenvalues of NumPy, and matfree.

The matrices are known beforehand; products with them are plain matrix products. NumPy's `eigvalsh` and the
spectral measure summed over its eigenvectors know no Krylov space. matfree (another library) tridiagonalises
through Arnoldi's algorithm.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matfree import decomp

from jaxlimit.core.memory import HOST_MEMORY
from jaxlimit.spectrum import lanczos
from jaxlimit.spectrum.basis import PANEL, orthogonalize
from jaxlimit.spectrum.functions import applied
from jaxlimit.spectrum.lanczos import tridiagonalize
from jaxlimit.spectrum.tridiagonal import Tridiagonal


def symmetric(dim, seed=0, scale=1.0):
    """A dense indefinite matrix with eigenvalues of both signs over two decades."""
    rng = np.random.default_rng(seed)
    vectors = np.linalg.qr(rng.standard_normal((dim, dim)))[0]
    values = scale * 10.0 ** rng.uniform(-2, 0, dim) * rng.choice([-1, 1], dim)
    return (vectors * values) @ vectors.T


def product_with(matrix, dtype):
    device = jnp.asarray(matrix, dtype)
    return lambda v: jnp.matmul(device, v, precision="highest")


def block_product_with(matrix, dtype):
    device = jnp.asarray(matrix, dtype)
    return lambda rows: jnp.matmul(rows, device, precision="highest")


def start_vector(dim, dtype, seed=100):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(dim), dtype)


def dense(tridiagonal):
    return (
        np.diag(tridiagonal.diagonal)
        + np.diag(tridiagonal.off_diagonal, 1)
        + np.diag(tridiagonal.off_diagonal, -1)
    )


def integral(tridiagonal, f):
    values, vectors = np.linalg.eigh(dense(tridiagonal))
    return np.sum(vectors[0] ** 2 * f(values))


def true_integral(matrix, start, f):
    values, vectors = np.linalg.eigh(matrix)
    start = np.asarray(start, np.float64)
    return np.sum((vectors.T @ start) ** 2 * f(values)) / np.sum(start**2)


def bump(x):
    """Smooth, of both parities, and of the order of one on [-1, 1]."""
    return 1 / (1 + 4 * x**2) + 0.3 * x


def basis_of(state, p):
    """The Lanczos vectors of run p in columns, from all panels."""
    vectors = np.concatenate([np.asarray(panel[p], np.float64) for panel in state.basis])
    steps = state.diagonal.shape[1]
    assert not vectors[steps:].any()
    return vectors[:steps].T


# The theorems.


def test_recurrence_and_orthonormality(dtype):
    """H Q = Q T + beta q_{k+1} e_k^T, Q^T Q = I, T = Q^T H Q."""
    dim, steps, eps = 160, 75, float(np.finfo(dtype).eps)
    matrix = symmetric(dim)
    starts = jnp.stack([start_vector(dim, dtype, 1), start_vector(dim, dtype, 2)])
    state = lanczos.run(block_product_with(matrix, dtype), lanczos.init(starts), steps)
    norm = np.linalg.norm(matrix, 2)
    for p, run in enumerate(state.tridiagonals()):
        basis = basis_of(state, p)
        assert basis.shape == (dim, steps)
        following = np.asarray(state.current[p], np.float64)
        start = np.asarray(starts[p], np.float64)
        np.testing.assert_allclose(basis[:, 0], start / np.linalg.norm(start), atol=2 * eps)
        extended = np.column_stack([basis, following])
        np.testing.assert_allclose(extended.T @ extended, np.eye(steps + 1), atol=10 * eps)
        residual = matrix @ basis - basis @ dense(run)
        residual[:, -1] -= run.residual_norm * following
        assert np.max(np.abs(residual)) <= 20 * eps * norm
        assert np.max(np.abs(basis.T @ matrix @ basis - dense(run))) <= 20 * eps * norm
        assert run.residual_norm > 0.01 * norm
        assert np.all(run.off_diagonal > 0)
        assert run.num_steps == steps
        assert not run.breakdown
        assert run.reorthogonalized
        assert run.diagonal.dtype == run.off_diagonal.dtype == np.float64


@pytest.mark.parametrize("inside", [0.0, 1.0, 1e4])
def test_a_vector_mostly_within_the_basis_is_orthogonalised_again(inside, dtype):
    """One pass leaves rounding of the part that cancels, which the second removes; NumPy in float64."""
    eps = float(np.finfo(dtype).eps)
    orthonormal = np.linalg.qr(np.random.default_rng(0).standard_normal((200, 65)))[0]
    basis, new = jnp.asarray(orthonormal[:, :64].T, dtype), orthonormal[:, 64]
    vector = jnp.asarray(inside * orthonormal[:, :64].sum(axis=1) + new, dtype)
    panels = [basis[None, :32], basis[None, 32:]]
    result = np.asarray(orthogonalize(panels, len(panels), vector[None])[0], np.float64)
    overlap = np.asarray(basis, np.float64) @ result
    assert np.max(np.abs(overlap)) <= 10 * eps
    assert np.linalg.norm(result) == pytest.approx(1, abs=100 * eps * max(inside, 1))


def test_full_depth_gives_all_eigenvalues(dtype):
    matrix = symmetric(40)
    run = tridiagonalize(product_with(matrix, dtype), start_vector(40, dtype), 40)
    assert run.num_steps == 40
    eps = float(np.finfo(dtype).eps)
    np.testing.assert_allclose(np.linalg.eigvalsh(dense(run)), np.linalg.eigvalsh(matrix), atol=20 * eps)
    assert run.residual_norm <= 100 * eps  # what is left is rounding


@pytest.mark.parametrize("steps", [1, 2, 10, 25])
def test_moments_up_to_twice_the_steps(steps, x64):
    """v^T H^j v = e_1^T T^j e_1 for j < 2 k, and not for j = 2 k."""
    matrix, start = symmetric(40), start_vector(40, np.float64)
    tridiagonal = dense(tridiagonalize(product_with(matrix, np.float64), start, steps))
    unit = np.asarray(start) / np.linalg.norm(start)
    for power in range(2 * steps):
        expected = unit @ np.linalg.matrix_power(matrix, power) @ unit
        found = np.linalg.matrix_power(tridiagonal, power)[0, 0]
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-13)
    if steps <= 10:
        even = unit @ np.linalg.matrix_power(matrix, 2 * steps) @ unit
        assert np.linalg.matrix_power(tridiagonal, 2 * steps)[0, 0] < (1 - 1e-8) * even


@pytest.mark.parametrize("reorthogonalize", [True, False])
@pytest.mark.parametrize("steps", [1, 12])
@pytest.mark.parametrize("dtype", ["float64"], indirect=True)
def test_matfree_finds_the_same(steps, reorthogonalize, dtype):
    matrix, start = symmetric(40), start_vector(40, dtype)
    product = product_with(matrix, dtype)
    ours = tridiagonalize(product, start, steps, reorthogonalize=reorthogonalize)
    method = decomp.tridiag_sym(
        steps, materialize=False, reortho="full" if reorthogonalize else "none", custom_vjp=False
    )
    theirs = method(product, start)
    diagonal, off_diagonal = theirs.J_small
    atol = (1e3 if reorthogonalize else 1e5) * float(np.finfo(dtype).eps)
    np.testing.assert_allclose(ours.diagonal, diagonal, atol=atol)
    np.testing.assert_allclose(ours.off_diagonal, off_diagonal[: steps - 1], atol=atol)
    np.testing.assert_allclose(ours.residual_norm, np.linalg.norm(theirs.residual), atol=atol)


# Breakdown.


def low_rank(dim, rank, seed=0):
    rng = np.random.default_rng(seed)
    vectors = np.linalg.qr(rng.standard_normal((dim, rank)))[0]
    values = np.linspace(0.5, 2, rank) * (-1.0) ** np.arange(rank)
    return (vectors * values) @ vectors.T


# matrix, start and the number of distinct eigenvalues seen from it
EXHAUSTED = {
    "identity": (np.eye(20), np.ones(20), 1),
    "multiple of identity": (3e-6 * np.eye(20), np.arange(20.0), 1),
    "zero": (np.zeros((20, 20)), np.ones(20), 1),
    "one dimension": (np.array([[-2.5]]), np.array([7.0]), 1),
    "one dimension, zero": (np.array([[0.0]]), np.array([1.0]), 1),
    "eigenvector": (np.diag(np.arange(1.0, 21.0)), np.eye(20)[4], 1),
    "two eigenvectors": (np.diag(np.arange(1.0, 21.0)), np.eye(20)[4] - 2 * np.eye(20)[9], 2),
    "three values": (np.diag(np.repeat([-1.0, 0.5, 4.0, 4.0], 5)), np.ones(20), 3),
    "rank 1": (low_rank(20, 1), np.arange(1.0, 21.0), 2),
    "rank 4": (low_rank(20, 4), np.random.default_rng(5).standard_normal(20), 5),
    "start in the null space": (np.diag(np.repeat([0.0, 1.0], 10)), np.repeat([1.0, 0.0], 10), 1),
    "tiny": (1e-12 * np.diag(np.repeat([1.0, 2.0], 10)), np.ones(20), 2),
    "huge": (1e12 * np.diag(np.repeat([1.0, 2.0], 10)), np.ones(20), 2),
}


@pytest.mark.parametrize("reorthogonalize", [True, False])
@pytest.mark.parametrize("name", EXHAUSTED)
def test_breakdown_is_an_exact_answer(name, reorthogonalize, dtype):
    matrix, start, steps = EXHAUSTED[name]
    run = tridiagonalize(
        product_with(matrix, dtype), jnp.asarray(start, dtype), 15, reorthogonalize=reorthogonalize
    )
    assert run.num_steps == len(run.diagonal) == steps
    assert run.breakdown
    assert run.residual_norm == 0
    assert len(run.off_diagonal) == steps - 1
    assert np.all(run.off_diagonal > 0)
    scale = max(np.linalg.norm(matrix, 2), 1e-300)

    def f(x):
        return 1 / (2 + x / scale)

    expected = true_integral(matrix, start, f)
    assert integral(run, f) == pytest.approx(expected, rel=20 * float(np.finfo(dtype).eps))


def test_at_most_one_product_after_the_end(x64):
    """The host is a step ahead of the device, and no more."""
    products = []

    def matvec(v):
        products.append(v)
        return 2 * v

    assert tridiagonalize(matvec, jnp.ones(5), 10).num_steps == 1
    assert len(products) <= 2


def test_breakdown_at_the_last_step(dtype):
    run = tridiagonalize(product_with(np.diag([1.0, 3.0]), dtype), jnp.ones(2, dtype), 2)
    assert run.breakdown
    assert run.residual_norm == 0


@pytest.mark.parametrize("dtype", ["float32"], indirect=True)
def test_runs_side_by_side_are_those_alone(dtype):
    """One run ends at the first step, one at the third, and two go on; none disturbs another."""
    values = np.repeat([-1.0, 0.25, 0.5, 0.75, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 3)
    rng = np.random.default_rng(3)
    starts = [
        np.where(values == 2.0, rng.standard_normal(30), 0),
        rng.standard_normal(30),
        np.where(values < 0.6, rng.standard_normal(30), 0),
        rng.standard_normal(30),
    ]
    starts = jnp.asarray(np.stack(starts), dtype)
    product = jax.jit(lambda rows: rows * jnp.asarray(values, dtype))
    for reorthogonalize in (True, False):
        max_basis = None if reorthogonalize else 0
        together = lanczos.run(product, lanczos.init(starts), 8, max_basis).tridiagonals()
        assert [run.num_steps for run in together] == [1, 8, 3, 8]
        assert [run.breakdown for run in together] == [True, False, True, False]
        for start, run in zip(starts, together, strict=True):
            alone = tridiagonalize(product, start, 8, reorthogonalize=reorthogonalize)
            assert alone.num_steps == run.num_steps
            assert alone.breakdown == run.breakdown
            atol = 200 * float(np.finfo(dtype).eps)
            np.testing.assert_allclose(run.diagonal, alone.diagonal, atol=atol)
            np.testing.assert_allclose(run.off_diagonal, alone.off_diagonal, atol=atol)
            assert run.residual_norm == pytest.approx(alone.residual_norm, abs=atol)


@pytest.mark.parametrize("dtype", ["float32"], indirect=True)
def test_runs_that_ended_stay_ended_when_resumed(dtype):
    starts = jnp.asarray([[1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]], dtype)
    product = jax.jit(lambda rows: rows * jnp.arange(1, 7, dtype=dtype))
    state = lanczos.run(product, lanczos.init(starts), 2)
    assert state.num_steps.tolist() == [1, 2]
    state = lanczos.run(product, state, 2)
    ended, other = state.tridiagonals()
    assert (ended.num_steps, ended.breakdown, ended.diagonal.tolist()) == (1, True, [1.0])
    assert (other.num_steps, other.breakdown) == (4, False)
    state = lanczos.run(product, state, 20)
    assert [run.num_steps for run in state.tridiagonals()] == [1, 6]
    assert all(run.breakdown for run in state.tridiagonals())
    # Ended with the last step of a piece, not within it.
    state = lanczos.run(product, lanczos.run(product, lanczos.init(starts), 1), 3)
    assert [run.num_steps for run in state.tridiagonals()] == [1, 4]


# In pieces.


@pytest.mark.parametrize(
    ("pieces", "max_basis"),
    [((16, 16), None), ((32, 0), None), ((16, 16), 0), ((1, 31), 0), ((5, 11, 9, 7), 0), ((32, 16, 8), 32)],
)
def test_pieces_give_the_same_bits(pieces, max_basis, dtype):
    state, whole = in_pieces(pieces, max_basis, dtype)
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("pieces", [(1, 31), (5, 11, 9, 7)])
@pytest.mark.parametrize("dtype", ["float32"], indirect=True)
def test_odd_pieces_give_the_same_quadrature(pieces, dtype):
    """The projections sum over as many vectors as there is room for: other sizes, other roundings."""
    state, whole = in_pieces(pieces, None, dtype)
    for ours, theirs in zip(state.tridiagonals(), whole.tridiagonals(), strict=True):
        np.testing.assert_allclose(ours.diagonal[:12], theirs.diagonal[:12], atol=1e3 * np.finfo(dtype).eps)
        assert integral(ours, bump) == pytest.approx(
            integral(theirs, bump), abs=100 * float(np.finfo(dtype).eps)
        )


@pytest.mark.parametrize("first", [0, 32])
@pytest.mark.parametrize("dtype", ["float32"], indirect=True)
def test_vectors_that_were_left_out_stay_left_out(first, dtype):
    product = block_product_with(symmetric(200, seed=4), dtype)
    state = lanczos.init(start_vector(200, dtype)[None])
    state = lanczos.run(product, state, 50, first)
    more, same = (lanczos.run(product, state, 50, max_basis) for max_basis in (None, first))
    assert len(more.basis) == first // PANEL
    np.testing.assert_array_equal(more.diagonal, same.diagonal)
    assert not more.tridiagonals()[0].reorthogonalized


@pytest.mark.parametrize("dtype", ["float32"], indirect=True)
def test_a_panel_that_was_begun_is_filled(dtype):
    product = block_product_with(symmetric(200, seed=4), dtype)
    begun = lanczos.run(product, lanczos.init(start_vector(200, dtype)[None]), 48)
    state, whole = (lanczos.run(product, begun, 16, max_basis) for max_basis in (0, None))
    np.testing.assert_array_equal(basis_of(state, 0), basis_of(whole, 0))
    assert state.tridiagonals()[0].reorthogonalized
    assert not lanczos.run(product, state, 1, 0).tridiagonals()[0].reorthogonalized


def in_pieces(pieces, max_basis, dtype):
    """The states after steps in pieces, and after as many in one go."""
    product = block_product_with(symmetric(70, seed=4), dtype)
    starts = jnp.stack([start_vector(70, dtype, seed) for seed in range(3)])
    state = lanczos.init(starts)
    whole = lanczos.run(product, state, sum(pieces), max_basis)
    for piece in pieces:
        state = lanczos.run(product, state, piece, max_basis)
    return state, whole


@pytest.mark.parametrize("reorthogonalize", [True, False])
def test_truncation_is_a_shorter_run(reorthogonalize, dtype):
    product = product_with(symmetric(40), dtype)
    start = start_vector(40, dtype)
    long = tridiagonalize(product, start, 20, reorthogonalize=reorthogonalize)
    for steps in (1, 13, 20):
        short, cut = (
            tridiagonalize(product, start, steps, reorthogonalize=reorthogonalize),
            long.truncate(steps),
        )
        atol = (100 if reorthogonalize else 1e4) * float(np.finfo(dtype).eps)
        np.testing.assert_allclose(cut.diagonal, short.diagonal, atol=atol)
        np.testing.assert_allclose(cut.off_diagonal, short.off_diagonal, atol=atol)
        assert cut.residual_norm == pytest.approx(short.residual_norm, abs=atol)
        assert (cut.num_steps, cut.breakdown, cut.reorthogonalized) == (steps, False, reorthogonalize)
    assert long.truncate(20) is long
    assert long.truncate(100) is long


def test_truncation_of_an_exhausted_run():
    run = Tridiagonal(np.array([1.0, 2.0, 3.0]), np.array([0.5, 0.25]), 0.0, breakdown=True)
    assert run.truncate(3).breakdown
    shorter = run.truncate(2)
    assert (shorter.residual_norm, shorter.breakdown) == (0.25, False)
    with pytest.raises(ValueError, match="num_steps must be an integer of at least 1, got 0"):
        run.truncate(0)


# Without reorthogonalisation.


def test_without_reorthogonalisation(dtype):
    """The first steps agree; later ones do not, yet the quadrature does (Greenbaum 1989)."""
    rng = np.random.default_rng(8)
    dim, steps = 300, 120
    # Outliers, as networks have them: their Ritz values converge early and spoil the orthogonality.
    values = np.append(rng.uniform(-1, 1, dim - 3), [20.0, 50.0, 100.0])
    device = jnp.asarray(values, dtype)
    start = start_vector(dim, dtype)
    with_basis = tridiagonalize(lambda v: device * v, start, steps)
    without = tridiagonalize(lambda v: device * v, start, steps, reorthogonalize=False)
    assert not without.reorthogonalized
    eps = float(np.finfo(dtype).eps)
    np.testing.assert_allclose(without.diagonal[:6], with_basis.diagonal[:6], atol=1e5 * eps * 100)
    difference = np.max(np.abs(without.diagonal - with_basis.diagonal))
    assert difference > 0.01, "the test needs a matrix on which orthogonality is lost"

    expected = true_integral(np.diag(values), start, bump)
    assert integral(with_basis, bump) == pytest.approx(expected, abs=100 * eps + 1e-9)
    assert integral(without, bump) == pytest.approx(expected, abs=1000 * eps + 1e-9)


def test_no_basis_is_kept_without_reorthogonalisation():
    state = lanczos.init(jnp.ones((2, 5)))
    assert lanczos.run(lambda rows: rows * jnp.arange(5.0), state, 3, max_basis=0).basis == ()


@pytest.mark.parametrize(("max_basis", "panels"), [(31, 0), (32, 1), (70, 2), (96, 3), (None, 4)])
def test_a_limited_basis_keeps_its_first_vectors(max_basis, panels, dtype):
    """What it keeps stays orthogonal, and the quadrature is that of the whole basis; oracle: dense eigh."""
    rng = np.random.default_rng(8)
    values = np.append(rng.uniform(-1, 1, 297), [20.0, 50.0, 100.0])  # with outliers, as networks have them
    device, start = jnp.asarray(values, dtype), start_vector(300, dtype)
    state = lanczos.run(lambda v: device * v, lanczos.init(start[None]), 120, max_basis)
    assert len(state.basis) == panels
    (run,) = state.tridiagonals()
    assert (run.num_steps, run.reorthogonalized) == (120, max_basis is None)
    eps = float(np.finfo(dtype).eps)
    if panels:
        kept = np.concatenate([panel[0] for panel in state.basis])[:120]
        np.testing.assert_allclose(kept @ kept.T, np.eye(len(kept)), atol=30 * eps)
        np.testing.assert_allclose(kept @ state.current[0], 0, atol=30 * eps)
    expected = true_integral(np.diag(values), start, bump)
    assert integral(run, bump) == pytest.approx(expected, abs=1000 * eps + 1e-9)


@pytest.mark.parametrize("max_basis", [0, 33])
def test_vectors_in_host_memory_are_as_good_as_those_on_the_device(max_basis, dtype):
    """Oracle: the integral from dense eigh. In pieces, they give the same bits as in one go."""
    rng = np.random.default_rng(8)
    values = np.append(rng.uniform(-1, 1, 297), [20.0, 50.0, 100.0])
    device, start = jnp.asarray(values, dtype), start_vector(300, dtype)
    initial = lanczos.init(start[None])

    def product(v):
        assert v.sharding.memory_kind == start.sharding.memory_kind
        return device * v

    state = lanczos.run(product, initial, 120, max_basis, 64)
    on_host = [panel.sharding.memory_kind == HOST_MEMORY for panel in state.basis]
    assert on_host == [False] * (max_basis // PANEL) + [True, False]
    kept = np.concatenate([panel[0] for panel in state.basis])
    eps = float(np.finfo(dtype).eps)
    np.testing.assert_allclose(kept @ kept.T, np.eye(len(kept)), atol=30 * eps)
    np.testing.assert_allclose(kept @ state.current[0], 0, atol=30 * eps)

    whole = lanczos.run(product, initial, 120, max_basis, 128)
    (run,) = whole.tridiagonals()
    assert run.reorthogonalized
    assert len(whole.basis) == 4
    expected = true_integral(np.diag(values), start, bump)
    assert integral(run, bump) == pytest.approx(expected, abs=1000 * eps + 1e-9)
    pieces = initial
    for steps in (40, 24, 56):
        pieces = lanczos.run(product, pieces, steps, max_basis, 128)
    for one, other in zip(jax.tree.leaves(pieces), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(one, other)
    squared = np.asarray(applied(whole, [np.square])[0], np.float64) * np.linalg.norm(start)
    np.testing.assert_allclose(squared, values**2 * np.asarray(start), atol=1e6 * eps)


# Vectors.


@pytest.mark.parametrize("factor", [1e-6, 2.0, 1e6])
def test_the_length_of_the_start_is_irrelevant(factor, dtype):
    product, start = product_with(symmetric(40), dtype), start_vector(40, dtype)
    run, scaled = (tridiagonalize(product, x, 8) for x in (start, jnp.asarray(factor, dtype) * start))
    np.testing.assert_allclose(scaled.diagonal, run.diagonal, atol=100 * float(np.finfo(dtype).eps))
    np.testing.assert_allclose(scaled.off_diagonal, run.off_diagonal, atol=100 * float(np.finfo(dtype).eps))


@pytest.mark.parametrize("dtype", ["float32"], indirect=True)
def test_trees_of_several_leaves_are_one_vector(dtype):
    matrix = symmetric(26)
    product, start = product_with(matrix, dtype), start_vector(26, dtype)

    def split(v):
        return {"b": v[:12].reshape(3, 4), "a": (v[12:24].reshape(2, 3, 2), None, v[24:])}

    def join(tree):
        return jnp.concatenate([tree["b"].ravel(), tree["a"][0].ravel(), tree["a"][2]])

    flat = tridiagonalize(product, start, 10)
    tree = tridiagonalize(lambda v: split(product(join(v))), split(start), 10)
    np.testing.assert_allclose(tree.diagonal, flat.diagonal, atol=200 * float(np.finfo(dtype).eps))
    np.testing.assert_allclose(tree.off_diagonal, flat.off_diagonal, atol=200 * float(np.finfo(dtype).eps))


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
def test_unusable_starts_are_refused(bad):
    with pytest.raises(ValueError, match="start vectors must be finite and not zero"):
        tridiagonalize(lambda v: v, {"a": jnp.full(3, bad), "b": jnp.zeros(2)}, 3)
    with pytest.raises(ValueError, match="start vectors must be finite and not zero"):
        lanczos.init(jnp.stack([jnp.ones(3), jnp.full(3, bad)]))


@pytest.mark.parametrize("steps", [0, -1])
def test_no_steps_are_refused(steps):
    with pytest.raises(ValueError, match=f"num_matvecs must be an integer of at least 1, got {steps}"):
        tridiagonalize(lambda v: v, jnp.ones(3), steps)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("number", [1, 2, 4])
@pytest.mark.parametrize("reorthogonalize", [True, False])
def test_a_product_that_is_not_finite(bad, number, reorthogonalize):
    products = []

    def matvec(v):
        products.append(v)
        product = v * jnp.arange(1.0, 9.0)
        return product.at[2].set(bad) if len(products) == number else product

    with pytest.raises(FloatingPointError, match=f"product {number} with the matrix is not finite"):
        tridiagonalize(matvec, jnp.ones(8), 6, reorthogonalize=reorthogonalize)


def test_the_number_of_a_bad_product_counts_the_pieces_before():
    state = lanczos.run(lambda rows: rows * jnp.arange(1.0, 9.0), lanczos.init(jnp.ones((1, 8))), 3)
    with pytest.raises(FloatingPointError, match="product 4 with the matrix"):
        lanczos.run(lambda rows: rows * jnp.nan, state, 2)


def test_a_state_before_the_first_step_has_no_tridiagonal():
    assert lanczos.init(jnp.ones((2, 3))).tridiagonals() == []


def test_a_run_leaves_the_state_it_went_on_from_as_it_was():
    def product(rows):
        return rows * jnp.arange(1.0, 61.0)

    state = lanczos.run(product, lanczos.init(jnp.ones((1, 60))), 5)
    before = jax.tree.map(np.array, state)
    twice = [lanczos.run(product, state, 40) for _ in range(2)]
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), theirs)
    for ours, theirs in zip(*map(jax.tree.leaves, twice), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


@pytest.mark.parametrize("dtype", [int, bool, complex])
def test_a_start_is_of_floating_numbers(dtype):
    with pytest.raises(ValueError, match="start vectors must be floating"):
        tridiagonalize(lambda v: jnp.arange(1.0, 6.0) * v, jnp.ones(5, dtype), 5)
