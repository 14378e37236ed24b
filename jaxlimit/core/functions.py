"""Functions as pytrees: what `jaxlimit` returns as a function can be an argument of a compiled one.

Arrays that such a function carries are leaves. What else it holds is its structure, and decides whether two
of them share a compiled function.
"""

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
        ...     fn: Any
        ...     shift: Any
        ...     def __call__(self, x): return self.fn(x) + self.shift
        >>> jax.jit(lambda fn, x: fn(x))(Shifted(abs, 2.0), -3.0).item()
        5.0
    """
    names = [field.name for field in fields(cls)]

    def flatten(made: Any) -> tuple[list[tuple[Any, Any]], None]:
        values = [Static(x) if _is_leaf(x) and callable(x) else x for x in (getattr(made, n) for n in names)]
        return [(jax.tree_util.GetAttrKey(n), x) for n, x in zip(names, values, strict=True)], None

    def unflatten(_: None, values: Any) -> Any:
        return cls(*(x.value if isinstance(x, Static) else x for x in values))

    jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)
    return cls


@jax.tree_util.register_static
@dataclass(frozen=True, eq=False)
class Static:
    """What is structure of a pytree: a function, a text, a number. Numbers and texts compare by value."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Static) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self) -> tuple:
        by_value = isinstance(self.value, (bool, int, float, complex, str))
        return type(self.value), repr(self.value) if by_value else id(self.value)


def _is_leaf(x: Any) -> bool:
    return jax.tree_util.all_leaves([x])
