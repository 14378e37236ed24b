"""Arguments of `pruning_limit` that cannot be meant."""

from collections.abc import Collection, Sequence

import numpy as np

from jaxlimit.core.checks import require_positive
from jaxlimit.core.memory import require_host_memory
from jaxlimit.curvature.operator import Curvature
from jaxlimit.limits.dense_source import DENSE_DIM, dense_fits
from jaxlimit.limits.estimate import LIMITS

# Fewer products leave no limit anything to say.
LEAST_MATVECS = 16


def check_arguments(
    loss_tolerance: float,
    tolerance: float,
    max_matvecs: int,
    num_probes: int | None,
    which: Sequence[str],
    basis_bytes: int | None,
    host_bytes: int = 0,
) -> None:
    """A ValueError for the first one that is out of range, naming it."""
    for name, value in (("loss_tolerance", loss_tolerance), ("tolerance", tolerance)):
        require_positive(name, value)
    memory = {"basis_bytes": basis_bytes, "host_bytes": host_bytes}
    for name, value in {"max_matvecs": max_matvecs, "num_probes": num_probes, **memory}.items():
        if value is not None and not isinstance(value, (int, np.integer)):
            raise ValueError(f"{name} must be an integer, got {value!r}.")
    if max_matvecs < LEAST_MATVECS:
        raise ValueError(f"max_matvecs must be at least {LEAST_MATVECS}, got {max_matvecs}.")
    if num_probes is not None and not 1 <= num_probes <= max_matvecs:
        raise ValueError(f"num_probes must lie between 1 and max_matvecs = {max_matvecs}, got {num_probes}.")
    for name, value in memory.items():
        if value is not None and value < 0:
            raise ValueError(f"{name} must be at least 0, got {value}.")
    if host_bytes:
        require_host_memory("host_bytes")
    listed = isinstance(which, Collection) and not isinstance(which, str)
    if not listed or not which or any(name not in LIMITS for name in which):
        raise ValueError(f"which must name limits among {', '.join(LIMITS)}, got {which!r}.")


def require_readjustable(curvature: Curvature, which: Sequence[str]) -> None:
    """A ValueError where nothing but readjusted is asked for, and cannot be had."""
    if set(which) == {"readjusted"} and not curvature.positive_semidefinite and not dense_fits(curvature.dim):
        raise ValueError(
            f"readjusted with a Hessian needs its dense matrix, and {curvature.dim:,} weights are too many "
            f"for one (at most {DENSE_DIM:,}). Take gauss_newton, whose readjusted limit is optimistic, "
            "curvature.of(...) for a part of the weights, or ask for cone."
        )
