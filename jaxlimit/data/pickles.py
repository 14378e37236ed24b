"""Reading pickles of numpy arrays without running anything that they ask for."""

import io
import pickle
from typing import Any

import numpy as np


def load_restricted(content: bytes) -> Any:
    """Unpickle containers, numbers, strings and numpy arrays of integers, and nothing else.

    A pickle is a program: it names functions, which `pickle.load` imports and calls. Here the only names
    that lead anywhere are those that numpy writes for an array; they lead to the functions of this module,
    and any other is refused before it is imported. Strings written by Python 2 come back as bytes.

    Args:
        content: the pickle.

    Returns:
        The object.

    Raises:
        ValueError: the pickle asks for another name (which the message gives), or is truncated or corrupt.

    Examples:
        >>> load_restricted(pickle.dumps({"labels": [3, 1]}))
        {'labels': [3, 1]}
        >>> load_restricted(pickle.dumps(print))
        Traceback (most recent call last):
        ValueError: refused: the pickle asks for builtins.print, which no array of integers needs
    """
    try:
        return _Restricted(io.BytesIO(content), encoding="bytes").load()
    except _RefusedError as error:
        raise ValueError(str(error)) from None
    # Damaged bytes are a damaged program and can fail in any way: IndexError, KeyError, MemoryError, ...
    except Exception as error:
        raise ValueError(f"truncated or corrupt pickle ({type(error).__name__}: {error})") from error


class _RefusedError(Exception):
    """The pickle asks for something that no array of integers needs."""


def _reconstruct(*_: Any) -> np.ndarray:
    """Make the empty array that the pickle's next instructions fill."""
    return np.empty(0, np.uint8)


def _from_buffer(buffer: Any, dtype: Any, shape: Any, order: str) -> np.ndarray:
    """An array of protocol 5."""
    return np.frombuffer(buffer, _integer(dtype)).reshape(shape, order="F" if order == "F" else "C")


def _scalar(dtype: Any, content: bytes) -> int:
    """A NumPy number."""
    return int(np.frombuffer(content, _integer(dtype), count=1)[0])


def _integer(dtype: Any) -> np.dtype:
    if not isinstance(dtype, np.dtype) or dtype.kind not in "iu":
        raise _RefusedError(f"refused: the pickle asks for an array of dtype {dtype!r}, not of integers")
    return np.dtype(dtype.str)  # a new one: the pickle may still change its own


def _dtype(code: str | bytes, *_: Any) -> np.dtype:
    """Make a new integer dtype; the pickle's flags, integers in old files, are constant and not passed on."""
    name = code.decode("latin1") if isinstance(code, bytes) else code
    if not isinstance(name, str) or np.dtype(name).kind not in "iu":
        raise _RefusedError(f"refused: the pickle asks for an array of dtype {name!r}, not of integers")
    return np.dtype(name, align=False, copy=True)


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """Encode as Latin-1, the only encoding that Python 3 uses to write bytes in protocols 0 to 2."""
    if encoding != "latin1":
        raise _RefusedError(f"refused: the pickle asks for the encoding {encoding!r}")
    return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    ("numpy._core.numeric", "_frombuffer"): _from_buffer,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): _dtype,
    ("_codecs", "encode"): _encode,
}


class _Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str, /) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise _RefusedError(
                f"refused: the pickle asks for {module}.{name}, which no array of integers needs"
            ) from None
