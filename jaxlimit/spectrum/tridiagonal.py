"""The tridiagonal matrix that a Lanczos run leaves: all that quadrature needs of the run."""

from dataclasses import dataclass, replace
from functools import partial

import jax
import numpy as np
from numpy.typing import NDArray

from jaxlimit.core.checks import require_count


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["diagonal", "off_diagonal", "residual_norm", "rounding"],
    meta_fields=["breakdown", "reorthogonalized"],
)
@dataclass(frozen=True, eq=False)
class Tridiagonal:
    """The tridiagonal matrix T_k of one Lanczos run. Host arrays in float64.

    Attributes:
        diagonal: (k,) alpha_1 .. alpha_k.
        off_diagonal: (k - 1,) beta_1 .. beta_{k-1}, positive.
        residual_norm: beta_k, the coupling to what T_k leaves out; 0 after a breakdown.
        breakdown: whether the Krylov space was exhausted, so that T_k is exact.
        reorthogonalized: whether the whole basis was kept and every vector made orthogonal to all of it.
        rounding: relative error of a product, in units of ||T||; machine epsilon of the vectors at least.
    """

    diagonal: NDArray[np.float64]
    off_diagonal: NDArray[np.float64]
    residual_norm: float
    breakdown: bool = False
    reorthogonalized: bool = True
    rounding: float = 0.0

    @property
    def num_steps(self) -> int:
        """Order k of the matrix: the number of products spent, breakdown excepted."""
        return len(self.diagonal)

    @property
    def norm(self) -> float:
        """The largest row sum of |T_k|, beta_k included: at least the spectral norm."""
        coupled = np.append(self.off_diagonal, self.residual_norm)
        return float(np.max(np.abs(self.diagonal) + coupled + np.append(0.0, self.off_diagonal)))

    def truncate(self, num_steps: int) -> "Tridiagonal":
        """The matrix T_k of a run that had stopped earlier; itself if it was not longer.

        Raises:
            ValueError: num_steps below 1.
        """
        require_count("num_steps", num_steps)
        if num_steps >= self.num_steps:
            return self
        return replace(
            self,
            diagonal=self.diagonal[:num_steps],
            off_diagonal=self.off_diagonal[: num_steps - 1],
            residual_norm=float(self.off_diagonal[num_steps - 1]),
            breakdown=False,
        )
