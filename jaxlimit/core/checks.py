"""What is asked of arguments before work starts: a ValueError says what is allowed and what was given."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def require_count(name: str, value: Any) -> None:
    """Raises ValueError unless the value is an integer of at least 1.

    Examples:
        >>> require_count("epochs", 0)
        Traceback (most recent call last):
        ...
        ValueError: epochs must be an integer of at least 1, got 0.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}.")


def require_range(name: str, value: Any, holds: bool, allowed: str) -> None:
    """Raises ValueError, which says what is allowed, unless `holds`.

    Examples:
        >>> require_range("l1", -1.0, False, "finite and at least 0")
        Traceback (most recent call last):
        ...
        ValueError: l1 must be finite and at least 0, got -1.0.
    """
    if not holds:
        raise ValueError(f"{name} must be {allowed}, got {value}.")


def require_floating(name: str, tree: Any) -> None:
    """Raises ValueError unless all leaves of a pytree are floating-point."""
    for leaf_name, leaf in named_leaves(name, tree):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise ValueError(f"{name} must be floating arrays, got {jnp.result_type(leaf)} in {leaf_name}.")


def require_finite(name: str, tree: Any) -> None:
    """Raises ValueError if a leaf of a pytree holds an infinite or NaN value."""
    named = named_leaves(name, tree)
    for (leaf_name, _), finite in zip(named, are_finite([leaf for _, leaf in named]), strict=True):
        if not finite:
            raise ValueError(f"{name} must be finite, got an infinite or NaN value in {leaf_name}.")


def are_finite(leaves: list) -> list[bool]:
    """Whether each array holds neither infinities nor NaN.

    Examples:
        >>> are_finite([np.ones(2), jnp.array([0.0, np.nan]), 3])
        [True, False, True]
    """
    on_device = [isinstance(x, jax.Array) for x in leaves]
    found = iter(_are_finite([x for x, there in zip(leaves, on_device, strict=True) if there]))
    return [
        bool(next(found)) if there else bool(np.all(np.isfinite(x)))
        for x, there in zip(leaves, on_device, strict=True)
    ]


@jax.jit
def _are_finite(arrays: list[jax.Array]) -> list[Any]:
    """In one program, for single operations compile one by one."""
    return [
        jnp.isfinite(x).all() if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.array(True) for x in arrays
    ]


def named_leaves(name: str, tree: Any) -> list[tuple[str, Any]]:
    """The leaves of a pytree, and where each stands in it.

    Raises:
        ValueError: there is none.
    """
    named = [(name + jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree.leaves_with_path(tree)]
    if not named:
        raise ValueError(f"{name} must hold at least one array, got {tree}.")
    return named
