"""What is asked of metrics: scalars by name, of the batch's examples, and numbers in the end."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxlimit.core.checks import NOT_FINITE_CAUSES
from jaxlimit.core.trees import PyTree

Metrics = Callable[[PyTree, PyTree], dict[str, jax.Array]]


def scalars(metrics_fn: Metrics) -> Metrics:
    """The same metrics as floating scalars: a bool counts as 0 or 1.

    Raises:
        ValueError: when called, of a result that is no dictionary of real scalars.

    Examples:
        >>> scalars(lambda w, x: {"all": x.all()})(None, jnp.array([True]))
        {'all': Array(1., dtype=float32)}
        >>> scalars(lambda w, x: x.mean())(None, jnp.ones(2))
        Traceback (most recent call last):
        ...
        ValueError: metrics_fn must return a dictionary of scalars by name, {"loss": value}; got a ...
    """

    def checked(params: PyTree, batch: PyTree) -> dict[str, jax.Array]:
        found: Any = metrics_fn(params, batch)
        if not isinstance(found, Mapping) or not found:
            kind = "a scalar" if getattr(found, "shape", None) == () else repr(found)[:50]
            raise ValueError(
                f'metrics_fn must return a dictionary of scalars by name, {{"loss": value}}; got {kind}.'
            )
        return {name: _scalar(name, value) for name, value in found.items()}

    return checked


def _scalar(name: str, value: jax.Array) -> jax.Array:
    shape = np.shape(value) if hasattr(value, "dtype") or np.isscalar(value) else type(value).__name__
    if shape != () or jnp.issubdtype(jnp.result_type(value), jnp.complexfloating):
        raise ValueError(
            f"the metric {name!r} must be a real scalar, the mean over the batch's examples; got "
            f"{shape if shape != () else jnp.result_type(value)}."
        )
    return jnp.asarray(value, jnp.promote_types(jnp.result_type(value), jnp.float32))


def require_numbers(metrics: Mapping[str, NDArray[np.float64]]) -> None:
    """Raises ValueError for a metric that is finite at no sparsity."""
    for name, values in metrics.items():
        if not np.any(np.isfinite(values)):
            raise ValueError(f"the metric {name!r} is finite at no sparsity. {NOT_FINITE_CAUSES}")


def require_known(metrics: Mapping[str, NDArray[np.float64]], name: str, sparsities: NDArray) -> None:
    """Raises ValueError for a metric that is not there, or not a number somewhere."""
    if name not in metrics:
        raise ValueError(f"metric must be one of {', '.join(metrics)}, got {name!r}.")
    unknown = sparsities[np.isnan(metrics[name])]
    if unknown.size:
        raise ValueError(
            f"the metric {name!r} is not a number at {unknown.size} of {len(sparsities)} sparsities, the "
            f"first {unknown[0]:.4g}: no threshold can be read off. Mend the metric, or sweep others."
        )
