"""Functions as pytrees: what `jaxlimit` returns as a function can be an argument of a compiled one.

Arrays that such a function carries are leaves. What else it holds is its structure, and decides whether two
of them share a compiled function.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import jax

Class = TypeVar("Class", bound=type)


def pure_function(cls: Class) -> Class:
    """Registers a dataclass of functions and arrays as a pytree.

    A field that is callable and no pytree is structure and compares by identity; every other field is a
    pytree, whose structure compares by value.

    Examples:
        >>> @pure_function
        ... @dataclass(frozen=True, eq=False)
        ... class Shifted:
        ...     fn: Callable
        ...     shift: Any
        ...     def __call__(self, x): return self.fn(x) + self.shift
        >>> jax.jit(lambda fn, x: fn(x))(Shifted(abs, 2.0), -3.0).item()
        5.0
    """
    names = [field.name for field in fields(cls)]

    def flatten(made: Any) -> tuple[list[tuple[Any, Any]], None]:
        values = [_Opaque(x) if _is_leaf(x) and callable(x) else x for x in (getattr(made, n) for n in names)]
        return [(jax.tree_util.GetAttrKey(n), x) for n, x in zip(names, values, strict=True)], None

    def unflatten(_: None, values: Any) -> Any:
        return cls(*(x.fn if isinstance(x, _Opaque) else x for x in values))

    jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)
    return cls


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Opaque:
    """A function that is structure."""

    fn: Callable

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Opaque) and self.fn is other.fn

    def __hash__(self) -> int:
        return id(self.fn)


def _is_leaf(x: Any) -> bool:
    return jax.tree_util.all_leaves([x])
