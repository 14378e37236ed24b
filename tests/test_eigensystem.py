"""The eigensystem of a dense matrix against NumPy's, which takes another LAPACK driver."""

import threading

import numpy as np
import pytest

from jaxlimit.core.lapack import tridiagonal_eigensystem, tridiagonal_form
from jaxlimit.limits.eigensystem import eigensystem


def full(rng, dim):
    matrix = rng.standard_normal((dim, dim))
    return matrix + matrix.T


def of_low_rank(rng, dim):
    factor = rng.standard_normal((dim, max(1, dim // 2)))
    factor[: dim // 4] = 0  # rows that vanish, as those of weights into units that are never active
    return factor @ factor.T


def diagonal(rng, dim):
    return np.diag(rng.standard_normal(dim))


def nothing(rng, dim):
    return np.zeros((dim, dim))


@pytest.mark.parametrize("dim", [1, 2, 3, 5, 120])
@pytest.mark.parametrize("make", [full, of_low_rank, diagonal, nothing])
def test_eigenvalues_vectors_and_coordinates(make, dim):
    rng = np.random.default_rng(dim)
    matrix = make(rng, dim)
    found = eigensystem(matrix)
    scale = 1e-13 * dim * max(1.0, np.abs(matrix).max())
    np.testing.assert_allclose(found.eigenvalues, np.linalg.eigvalsh(matrix), atol=scale)
    vectors = found.vectors(np.arange(dim))
    np.testing.assert_allclose(matrix @ vectors, vectors * found.eigenvalues, atol=scale)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(dim), atol=1e-13 * dim)
    columns = rng.standard_normal((dim, 3))
    np.testing.assert_allclose(found.coordinates(columns), vectors.T @ columns, atol=1e-13 * dim)
    assert found.vectors(np.array([], int)).shape == (dim, 0)


def test_other_threads_run_meanwhile():
    """The one that answers Ctrl-C, for example; SciPy's own functions would let none run."""
    matrix, beats, done = full(np.random.default_rng(0), 700), [], threading.Event()
    during = {}

    def work():
        for name, call in (
            ("form", lambda: tridiagonal_form(matrix)),
            ("eigensystem", lambda: tridiagonal_eigensystem(np.ones(700), np.ones(699))),
        ):
            before = len(beats)
            call()
            during[name] = len(beats) - before
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    while not done.wait(0.001):
        beats.append(None)
    thread.join()
    assert min(during.values()) > 3
