r"""The eigensystem of a dense symmetric matrix, with its eigenvectors only where they are asked for.

    H = Q T Q^T,   T = U diag(lambda) U^T tridiagonal,   so that V = Q U

The limits need lambda, the coordinates V^T c of a few vectors c, and the eigenvectors of eigenvalues that are
not positive. Forming all of V, and |H| from it, would take as long as the two decompositions together.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import get_lapack_funcs

from jaxlimit.core.lapack import tridiagonal_eigensystem, tridiagonal_form

# Products with the reflections that make up Q.
(_ormqr,) = get_lapack_funcs(("ormqr",), dtype=np.float64)


@dataclass(frozen=True)
class Eigensystem:
    """Eigenvalues, and products with the eigenvectors V.

    Attributes:
        eigenvalues: (D,) lambda, ascending.
        tridiagonal_vectors: (D, D) U.
        reflections: (D - 1, D - 1) and (D - 1,): Q as LAPACK keeps it; it leaves the first coordinate alone.
    """

    eigenvalues: NDArray[np.float64]
    tridiagonal_vectors: NDArray[np.float64]
    reflections: tuple[NDArray[np.float64], NDArray[np.float64]]

    def coordinates(self, vectors: NDArray[np.float64]) -> NDArray[np.float64]:
        """V^T C for the columns of C, shape (D, m). Cost: 4 D^2 operations a column."""
        return self.tridiagonal_vectors.T @ self._reflected(vectors, "T")

    def vectors(self, indices: NDArray[np.integer]) -> NDArray[np.float64]:
        """(D, m): the eigenvectors of these eigenvalues, as columns. Cost: 2 D^2 operations each."""
        return self._reflected(self.tridiagonal_vectors[:, indices], "N")

    def _reflected(self, columns: NDArray[np.float64], transposed: str) -> NDArray[np.float64]:
        """Q C, or Q^T C."""
        result = np.array(columns, order="F")
        if min(result[1:].shape) == 0:
            return result
        args = "L", transposed, *self.reflections, result[1:]
        _, work, _ = _ormqr(*args, -1)
        result[1:], _, info = _ormqr(*args, int(work[0]))
        return _checked(result, info)


def eigensystem(matrix: NDArray[np.float64]) -> Eigensystem:
    """Eigenvalues and eigenvectors of a symmetric matrix. Cost: about 3 D^3 operations, 16 D^2 bytes.

    Raises:
        ArithmeticError: LAPACK found no eigensystem.

    Examples:
        >>> found = eigensystem(np.array([[2.0, 1.0], [1.0, 2.0]]))
        >>> found.eigenvalues.round(6).tolist()
        [1.0, 3.0]
        >>> np.abs(found.coordinates(np.array([[1.0], [1.0]]))).round(6).ravel().tolist()
        [0.0, 1.414214]
    """
    reduced, diagonal, off_diagonal, scales = tridiagonal_form(matrix.T)
    values, vectors = tridiagonal_eigensystem(diagonal, off_diagonal)
    return Eigensystem(values, vectors, (np.asfortranarray(reduced[1:, : len(matrix) - 1]), scales))


def _checked(result: NDArray[np.float64], info: int) -> NDArray[np.float64]:
    if info != 0:
        raise ArithmeticError(f"LAPACK found no eigensystem (info = {info}).")
    return result
