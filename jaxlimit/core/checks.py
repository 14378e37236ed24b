"""What is asked of arguments before work starts: a ValueError says what is allowed and what was given."""

import inspect
import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import dtypes
from jax.core import Tracer

from jaxlimit.core.sharding import UNTRACED, require_context

NOT_FINITE_CAUSES = (
    "Likely causes: NaN or infinity in the data or the parameters, or labels outside the classes, as -1 or "
    "-100 for padding: leave such examples out, or mask them in the loss and count the others with weight_fn."
)


def require_count(name: str, value: Any, least: int = 1) -> None:
    """Raises ValueError unless the value is an integer that is large enough.

    Examples:
        >>> require_count("epochs", 0)
        Traceback (most recent call last):
        ...
        ValueError: epochs must be an integer of at least 1, got 0.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}.")


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


def require_positive(name: str, value: Any) -> None:
    """Raises ValueError unless the value is a single positive finite number.

    Examples:
        >>> require_positive("loss_tolerance", "much")
        Traceback (most recent call last):
        ...
        ValueError: loss_tolerance must be a positive finite number, got much.
    """
    require_range(name, value, 0 < as_real(value) < math.inf, "a positive finite number")


def as_real(value: Any) -> float:
    """The value, where it is a single real number of any library; else NaN, which lies in no range.

    Examples:
        >>> [as_real(x) for x in (1, np.float32(0.5), jnp.ones(()), 10**400)]
        [1.0, 0.5, 1.0, inf]
        >>> [as_real(x) for x in (None, "1", True, 1j, np.ones(1))]
        [nan, nan, nan, nan, nan]
    """
    single = hasattr(value, "__float__") and np.ndim(value) == 0
    if not single or np.iscomplexobj(value) or isinstance(value, (bool, np.bool_)):
        return math.nan
    try:
        return float(value)
    except OverflowError:  # an integer
        return math.inf if value > 0 else -math.inf


def require_floating(name: str, tree: Any) -> None:
    """Raises ValueError unless all leaves of a pytree are floating-point."""
    for leaf_name, leaf in named_leaves(name, tree):
        if not hasattr(leaf, "dtype") and not isinstance(leaf, (bool, int, float, complex)):
            raise ValueError(f"{name} must be floating arrays, got a {type(leaf).__name__} in {leaf_name}.")
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise ValueError(f"{name} must be floating arrays, got {jnp.result_type(leaf)} in {leaf_name}.")


def require_finite(name: str, tree: Any) -> None:
    """Raises ValueError if a leaf of a pytree holds an infinite or NaN value."""
    named = named_leaves(name, tree)
    for (leaf_name, _), finite in zip(named, are_finite([leaf for _, leaf in named]), strict=True):
        if not finite:
            raise ValueError(f"{name} must be finite, got an infinite or NaN value in {leaf_name}.")


def are_finite(leaves: list) -> list[bool]:
    """Whether each array holds neither infinities nor NaN; they may lie on different devices.

    Examples:
        >>> are_finite([np.ones(2), jnp.array([0.0, np.nan]), 3])
        [True, False, True]
    """
    found, together = [False] * len(leaves), defaultdict(list)
    for number, x in enumerate(leaves):
        if isinstance(x, jax.Array):
            together[frozenset(x.devices())].append(number)
        else:
            found[number] = bool(np.all(np.isfinite(x)))
    for numbers in together.values():  # a program works on one set of devices
        for number, finite in zip(numbers, _are_finite([leaves[n] for n in numbers]), strict=True):
            found[number] = bool(finite)
    return found


@jax.jit
def _are_finite(arrays: list[jax.Array]) -> list[Any]:
    """In one program, for single operations compile one by one."""
    return [
        jnp.isfinite(x).all() if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.array(True) for x in arrays
    ]


def require_problem(call: str, params: Any, **functions: Any) -> None:
    """Raises ValueError unless functions of two arguments, and a tree of parameters, stand in their places.

    Args:
        call: how the function is called that asks, with its arguments in order.
        params: the parameters.
        functions: name -> function of (params, batch), or of (outputs, batch).

    Examples:
        >>> require_problem("hessian(loss_fn, params, batches)", abs, loss_fn={"w": 1.0})
        Traceback (most recent call last):
        ...
        ValueError: loss_fn must be a function, got a dict: call hessian(loss_fn, params, batches).
    """
    for name, function in functions.items():
        _require_no_module(name, function)
        if not callable(function) or isinstance(function, type):
            raise ValueError(f"{name} must be a function, got {_kind(function)}: call {call}.")
        _require_two_arguments(name, function)
    _require_no_module("params", params)
    leaves = jax.tree.leaves(params)
    if any(isinstance(leaf, Tracer) for leaf in leaves):
        raise ValueError(f"params have no numbers yet: {UNTRACED}")
    require_context("params", leaves)
    is_function = callable(params) and (not leaves or leaves[0] is params)
    if is_function or type(params).__module__.startswith("jaxlimit."):
        raise ValueError(f"params must be a pytree of arrays, got {_kind(params)}: call {call}.")


def check_scalar(loss: Any) -> None:
    """Refuses a loss that is not a scalar, with a ValueError; for use while tracing."""
    shape = () if isinstance(loss, (int, float)) else getattr(loss, "shape", type(loss).__name__)
    if shape != ():
        raise ValueError(
            f"loss_fn must return a scalar, the mean over the batch's examples; got shape {shape}. Of (loss, "
            "more) return the loss alone."
        )
    if not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
        raise ValueError(f"loss_fn must return a real floating scalar, got {jnp.result_type(loss)}.")


def require_weight_fn(weight_fn: Any) -> None:
    """Raises ValueError unless it is None or a function of a batch.

    Examples:
        >>> require_weight_fn(2.0)
        Traceback (most recent call last):
        ...
        ValueError: weight_fn must be a function of a batch, weight_fn(batch) -> scalar, got a float.
    """
    if weight_fn is not None:
        asked = "weight_fn must be a function of a batch, weight_fn(batch) -> scalar, got"
        _require_one_argument(asked, weight_fn)


def require_statistics_fn(statistics_fn: Any) -> None:
    """Raises ValueError unless it is a function of the parameters.

    Examples:
        >>> require_statistics_fn({"mean": 0.0})
        Traceback (most recent call last):
        ...
        ValueError: statistics_fn must be a function, statistics_fn(params) -> params, got a dict.
    """
    _require_one_argument(
        "statistics_fn must be a function, statistics_fn(params) -> params, got", statistics_fn
    )


def _require_one_argument(asked: str, function: Any) -> None:
    if not callable(function):
        raise ValueError(f"{asked} {_kind(function)}.")
    if signature := _unfit(function, None):
        raise ValueError(f"{asked} one with the signature {signature}.")


def _require_two_arguments(name: str, function: Callable) -> None:
    if signature := _unfit(function, None, None):
        raise ValueError(
            f"{name} is called with two arguments, parameters (or outputs) and a batch, but its signature is "
            f"{signature}: wrap it, as in lambda params, batch: {name}(params, *batch)."
        )


def _unfit(function: Callable, *args: Any) -> inspect.Signature | None:
    """The signature of a function that cannot be called with so many arguments."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of builtins there may be none
        return None
    try:
        signature.bind(*args)
    except TypeError:
        return signature
    return None


def _require_no_module(name: str, value: Any) -> None:
    """Flax has functions that part a module from its parameters."""
    for cls in type(value).__mro__ if not isinstance(value, type) else value.__mro__:
        for library, remedy in (("nnx", "from_nnx(model)"), ("linen", "from_linen(module, variables)")):
            if cls.__module__.startswith(f"flax.{library}.module"):
                raise ValueError(
                    f"{name} is a module of Flax {library.upper() if library == 'nnx' else 'Linen'}: "
                    f"`predict, params = jaxlimit.models.{remedy}` makes it a function and its parameters."
                )


def require_instance(name: str, value: Any, cls: type, maker: str) -> None:
    """Raises ValueError unless the value is of this class; `maker` says what makes one."""
    if not isinstance(value, cls):
        raise ValueError(f"{name} must be a {cls.__name__}, which {maker} makes; got {_kind(value)}.")


def require_key(name: str, key: Any) -> Any:
    """A single random key, also of the older kind, an array of uint32.

    Raises:
        ValueError: anything else: there is no default seed.

    Examples:
        >>> require_key("key", 0)
        Traceback (most recent call last):
        ...
        ValueError: key must be one random key, as jax.random.key(0) makes it, got the int 0.
    """
    dtype = getattr(key, "dtype", None)
    if isinstance(key, (jax.Array, np.ndarray)) and dtype == np.uint32 and key.ndim == 1:
        try:
            return jax.random.wrap_key_data(jnp.asarray(key))
        except TypeError:  # of another length
            pass
    if dtype is None or not jnp.issubdtype(dtype, dtypes.prng_key) or key.shape != ():
        found = _kind(key) if np.ndim(key) else f"the {type(key).__name__} {key!r:.60}"
        raise ValueError(f"{name} must be one random key, as jax.random.key(0) makes it, got {found}.")
    return key


def _kind(value: Any) -> str:
    """What a value is, in words."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if hasattr(value, "__name__"):
        return f"the function {value.__name__}"
    if isinstance(value, (np.ndarray, jax.Array)):
        return f"an array of shape {value.shape} and dtype {value.dtype}"
    article = "an" if type(value).__name__[0] in "AEIOUaeiou" else "a"
    return f"{article} {type(value).__name__}"


def named_leaves(name: str, tree: Any) -> list[tuple[str, Any]]:
    """The leaves of a pytree, and where each stands in it.

    Raises:
        ValueError: there is none.
    """
    named = [(name + jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree.leaves_with_path(tree)]
    if not named:
        raise ValueError(f"{name} must hold at least one array, got {tree}.")
    return named
