"""Arguments of `pruning_limit` that cannot be meant."""

from collections.abc import Collection, Sequence

from jaxlimit.core.checks import as_real, require_count, require_positive, require_range
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
    require_positive("loss_tolerance", loss_tolerance)
    require_range("tolerance", tolerance, 0 < as_real(tolerance) < 1, "between 0 and 1")
    require_count("max_matvecs", max_matvecs, LEAST_MATVECS)
    if num_probes is not None:
        require_count("num_probes", num_probes)
        most = f"at most max_matvecs = {max_matvecs}"
        require_range("num_probes", num_probes, num_probes <= max_matvecs, most)
    if basis_bytes is not None:
        require_count("basis_bytes", basis_bytes, 0)
    require_count("host_bytes", host_bytes, 0)
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
