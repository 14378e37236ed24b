"""Passes over batches that people hold in lists, streams and functions; what is no collection of batches."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from jaxlimit.core.leaves import is_array, to_arrays

PyTree = Any


def in_memory(batches: Sequence[PyTree]) -> list[PyTree]:
    """The batches of a list, with arrays as leaves.

    Raises:
        ValueError: they are one batch, as in `(inputs, labels)`.

    Examples:
        >>> in_memory((np.ones((3, 2)), np.ones(3)))
        Traceback (most recent call last):
        ...
        ValueError: batches must be a list of batches, but its items are arrays of shapes (3, 2), (3,), ...
    """
    bare = [item for item in batches if is_array(item)]
    alike = {(np.ndim(item), str(item.dtype)) for item in bare}
    shapes = [tuple(np.shape(item)) for item in bare]
    pair = len(bare) == 2 and shapes[0] != shapes[1] and shapes[0][:1] == shapes[1][:1]
    if bare and (isinstance(batches, tuple) or len(alike) > 1 or pair):
        raise ValueError(
            "batches must be a list of batches, but its items are arrays of shapes "
            f"{', '.join(map(str, shapes[:4]))}, which look like the parts of one batch: pass "
            "batched((inputs, labels), batch_size), or [(inputs, labels)]."
        )
    return [to_arrays(f"batches[{number}]", batch) for number, batch in enumerate(batches)]


def passes(batches: Any) -> Iterable[PyTree]:
    """What starts a new pass at each `iter`.

    Raises:
        ValueError: an iterator that runs out, one batch, a function with arguments, or no batches at all.
    """
    if isinstance(batches, (str, bytes, Mapping)) or is_array(batches):
        raise ValueError(
            f"batches must hold batches, but it is one {type(batches).__name__}: pass batched(arrays, "
            "batch_size), or a list of batches, [batch]."
        )
    if isinstance(batches, Iterable) and not isinstance(batches, Iterator):
        return batches
    if callable(batches) and not isinstance(batches, Iterator):
        try:
            inspect.signature(batches).bind()
        except (TypeError, ValueError) as error:
            raise ValueError(
                "batches must hold batches, or be a function without arguments that starts a pass over them; "
                f"got {getattr(batches, '__name__', type(batches).__name__)}, which takes arguments."
            ) from error
        return _Restarted(cast(Callable[[], Any], batches))
    raise ValueError(
        f"batches must be iterable more than once, got {type(batches).__name__}: pass batched(arrays, "
        "batch_size), a list of batches, an object whose __iter__ starts a new pass, or the function that "
        "makes the iterator."
    )


@dataclass(eq=False)
class _Restarted:
    """Passes that a function starts."""

    start: Callable[[], Any]
    _last: Any = field(default=None, init=False)

    def __iter__(self) -> Iterator[PyTree]:
        found = self.start()
        if not isinstance(found, Iterable):
            raise ValueError(f"the function of batches must return an iterable, got {type(found).__name__}.")
        if isinstance(found, Iterator) and found is self._last:
            raise ValueError(
                "the function of batches returned the same iterator twice, which has run out: it must start "
                "a new pass each time."
            )
        self._last = found
        return iter(found)
