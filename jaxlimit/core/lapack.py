"""LAPACK routines that SciPy brings, called without Python's lock.

SciPy's own functions hold the lock as long as they compute, up to a minute for a dense matrix. Meanwhile no
other thread runs, the one that answers Ctrl-C included.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cython_lapack  # pyright: ignore[reportAttributeAccessIssue]

Array = NDArray[np.float64]

_name, _pointer = ctypes.pythonapi.PyCapsule_GetName, ctypes.pythonapi.PyCapsule_GetPointer
_name.restype, _name.argtypes = ctypes.c_char_p, [ctypes.py_object]
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


def tridiagonal_form(matrix: Array) -> tuple[Array, Array, Array, Array]:
    """Q T Q^T, T tridiagonal, of a symmetric matrix (DSYTRD). Cost: 4/3 D^3 operations.

    Args:
        matrix: (D, D) symmetric.

    Returns:
        The reflections that make up Q, as LAPACK keeps them: (D, D) in Fortran's order, below the diagonal;
        diagonal (D,) and off-diagonal (D - 1,) of T; scales of the reflections (D - 1,).

    Raises:
        ArithmeticError: LAPACK failed.

    Examples:
        >>> reflections, diagonal, off_diagonal, _ = tridiagonal_form(np.array([[2.0, 1.0], [1.0, 3.0]]))
        >>> diagonal.tolist(), off_diagonal.tolist()
        ([2.0, 3.0], [1.0])
    """
    dim = len(matrix)
    reduced = np.array(matrix, np.float64, order="F")
    diagonal, off_diagonal, scales, size = (np.zeros(n) for n in (dim, dim - 1, dim - 1, 1))
    args = "L", dim, reduced, dim, diagonal, off_diagonal, scales
    _call("dsytrd", *args, size, -1)  # asks how much work space is best
    work = np.zeros(int(size[0]))
    _call("dsytrd", *args, work, len(work))
    return reduced, diagonal, off_diagonal, scales


def tridiagonal_eigensystem(diagonal: Array, off_diagonal: Array) -> tuple[Array, Array]:
    """Eigenvalues (D,), ascending, and eigenvectors (D, D) of a symmetric tridiagonal matrix (DSTEVD).

    Raises:
        ArithmeticError: LAPACK found none.

    Examples:
        >>> values, vectors = tridiagonal_eigensystem(np.array([2.0, 2.0]), np.array([1.0]))
        >>> values.round(6).tolist(), np.abs(vectors).round(6).tolist()
        ([1.0, 3.0], [[0.707107, 0.707107], [0.707107, 0.707107]])
    """
    dim = len(diagonal)
    values, rest, vectors = diagonal.copy(), off_diagonal.copy(), np.zeros((dim, dim), order="F")
    work, integers = np.zeros(1 + 4 * dim + dim**2), np.zeros(3 + 5 * dim, np.intc)
    args = values, rest, vectors, dim, work, len(work), integers, len(integers)
    _call("dstevd", "V", dim, *args)
    return values, vectors


def _call(name: str, *args: str | int | NDArray[Any]) -> None:
    """Calls a routine, but for its last argument as LAPACK's manual lists them; arrays change in place."""
    capsule = cython_lapack.__pyx_capi__[name]
    info = ctypes.c_int(0)
    pointers = [*map(_reference, args), ctypes.byref(info)]
    routine: Callable[..., None] = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * len(pointers))(
        _pointer(capsule, _name(capsule))
    )
    routine(*pointers)
    if info.value != 0:
        raise ArithmeticError(f"LAPACK's {name} failed (info = {info.value}).")


def _reference(x: str | int | NDArray[Any]) -> Any:
    if isinstance(x, np.ndarray):
        return ctypes.c_void_p(x.ctypes.data)
    return ctypes.byref(ctypes.c_char(x.encode()) if isinstance(x, str) else ctypes.c_int(x))
