"""A limit as a number with an interval, and the names of the four."""

from dataclasses import dataclass, replace
from functools import partial

import jax

# From the strongest demand to the weakest.
LIMITS = ("one_shot", "width", "cone", "readjusted")


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["value", "lower", "upper", "probe_error", "spread", "half_bracket"],
    meta_fields=[],
)
@dataclass(frozen=True, repr=False)
class Estimate:
    """A limit in units of sparsity, with what is known of its error.

    Attributes:
        value: n / D for the last n that is within the tolerance, as far as it is known; with groups the last
            sparsity that whole groups can reach.
        lower, upper: of width and cone the proven bracket, widened by three probe errors and by 2/D: the
            step of R(s) to either side, where rules (floor or ceiling, last within or first beyond) differ.
            With groups they are sparsities that whole groups can reach, and not widened by 2/D.
            Of one_shot and readjusted from Lanczos, where the search ended: its points were judged by
            estimates (`loss_between`, the lower bound of `readjusted_minimum`). 0 and 1 where the bounds
            cross: then nothing is known.
        probe_error: standard error due to the finite number of probes (a bound; 0 if no probe is used).
        spread: how far it is from resolved. For width and cone see `jaxlimit.spectrum.bracket.spread`: half
            the bracket of a semidefinite matrix, which no further Lanczos step leaves; how far the value
            moved of late for an indefinite one, which bounds nothing. Where products ran out, it is the
            interval in which one_shot or readjusted was left; of a cone the larger of its last two moves is
            then added, and its bounds are moved apart by as much.
        half_bracket: half the distance of the bounds as they were found: the rounding of products counts,
            probe errors and the 2/D do not. Negative where the bounds cross: the products are not those of
            one symmetric matrix, of the kind that was declared.
    """

    value: float
    lower: float
    upper: float
    probe_error: float = 0.0
    spread: float = 0.0
    half_bracket: float = 0.0

    @classmethod
    def between(
        cls,
        value: float,
        lower: float,
        upper: float,
        dim: int,
        *,
        probe_error: float = 0.0,
        spread: float = 0.0,
        half_bracket: float | None = None,
        group_share: float | None = None,
    ) -> "Estimate":
        """From bounds of the limit, which are moved apart by 2/D and cut to [0, 1].

        Bounds that cross by more than that are no interval: it is [0, 1] then.

        Args:
            value: of the limit.
            lower: as it was found.
            upper: as it was found.
            dim: D.
            probe_error: see above.
            spread: see above.
            half_bracket: see above; None: half the distance of the bounds.
            group_share: where groups go, the share of the largest one, by which a rounding may move a bound.
                The bounds are then not moved apart, but by a rounding.
        """
        half_bracket = (upper - lower) / 2 if half_bracket is None else half_bracket
        apart = 2 / dim if group_share is None else group_share
        if half_bracket < -1 / dim or not lower - apart <= value <= upper + apart:
            return cls(value, 0.0, 1.0, probe_error, spread, min(half_bracket, -1 / dim))
        if group_share is None:
            lower, upper = lower - apart, upper + apart
        else:
            lower, upper = min(lower, value), max(upper, value)
        return cls(value, max(lower, 0.0), min(upper, 1.0), probe_error, spread, max(half_bracket, 0.0))

    @property
    def crossed(self) -> bool:
        """Whether its bounds crossed, so that nothing is known."""
        return self.half_bracket < 0

    @property
    def interval(self) -> str:
        """Lower and upper bound as they are printed."""
        return f"[{self.lower:.4f}, {self.upper:.4f}]"

    def widened(self, by: float) -> "Estimate":
        """The same value, less sure by so much to either side."""
        lower, upper = max(self.lower - by, 0.0), min(self.upper + by, 1.0)
        half_bracket = self.half_bracket if self.crossed else self.half_bracket + by
        return replace(self, lower=lower, upper=upper, spread=self.spread + by, half_bracket=half_bracket)

    def __str__(self) -> str:
        return f"{self.value:.4f} {self.interval}"

    def __repr__(self) -> str:
        return str(self)
