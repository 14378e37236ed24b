"""A limit as a number with an interval, and the names of the four."""

from dataclasses import dataclass, replace
from functools import partial

import jax

# From the strongest demand to the weakest.
LIMITS = ("one_shot", "width", "cone", "readjusted")


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["value", "lower", "upper", "probe_error", "spread"],
    meta_fields=[],
)
@dataclass(frozen=True)
class Estimate:
    """A limit in units of sparsity, with what is known of its error.

    Attributes:
        value: the estimate.
        lower, upper: of width and cone the certified quadrature bracket, widened by three probe errors and
            by 2/D: the step of R(s) to either side, where rules (floor or ceiling, last within or first
            beyond) differ. Of one_shot and readjusted from Lanczos, where the search ended: its points were
            judged by estimates (`loss_between`, the lower bound of `readjusted_minimum`).
        probe_error: standard error due to the finite number of probes (a bound; 0 if no probe is used).
        spread: how far it is from resolved. For width and cone see `jaxlimit.spectrum.bracket.spread`: half
            the bracket of a semidefinite matrix, which no further Lanczos step leaves; how far the value
            moved of late for an indefinite one, which bounds nothing. Where products ran out, it is the
            interval in which one_shot or readjusted was left; of a cone the larger of its last two moves is
            then added, and its bounds are moved apart by as much.
    """

    value: float
    lower: float
    upper: float
    probe_error: float = 0.0
    spread: float = 0.0

    @classmethod
    def between(
        cls, value: float, lower: float, upper: float, dim: int, probe_error: float = 0.0, spread: float = 0.0
    ) -> "Estimate":
        """From a bracket of the root, which is widened by 2/D, kept around the value and cut to [0, 1]."""
        lower, upper = min(lower, value) - 2 / dim, max(upper, value) + 2 / dim
        return cls(value, max(lower, 0.0), min(upper, 1.0), probe_error, spread)

    def widened(self, by: float) -> "Estimate":
        """The same value, less sure by so much to either side."""
        lower, upper = max(self.lower - by, 0.0), min(self.upper + by, 1.0)
        return replace(self, lower=lower, upper=upper, spread=self.spread + by)

    def __str__(self) -> str:
        return f"{self.value:.4f} [{self.lower:.4f}, {self.upper:.4f}]"
