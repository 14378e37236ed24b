"""What the limits need to know of a curvature, from wherever it comes."""

from collections.abc import Callable
from typing import Protocol

from jaxlimit.limits.cone import Look
from jaxlimit.limits.estimate import Estimate
from jaxlimit.spectrum.bracket import SpectralBracket
from jaxlimit.spectrum.measure import SpectralMeasure


class Source(Protocol):
    """A curvature as the four limits see it: `DenseSource` from its matrix, `LanczosSource` from products."""

    @property
    def method(self) -> str:
        """By which the curvature is seen, for the reader of a result."""
        ...

    @property
    def exact(self) -> bool:
        """Whether its answers have no error but rounding."""
        ...

    @property
    def reorthogonalized(self) -> bool:
        """Whether all vectors that its answers rest on were kept orthogonal."""
        ...

    @property
    def negative_share(self) -> float:
        """How far a matrix that was declared semidefinite was seen to reach below 0, in units of ||H||.

        0 where that is but rounding, and for a matrix that may have negative eigenvalues. Else the answers
        are those of |H|.
        """
        ...

    @property
    def measure(self) -> SpectralMeasure:
        """The spectral measure, once `spectrum` was called."""
        ...

    def spectrum(self) -> SpectralBracket:
        """Bracket of the spectral measure."""
        ...

    def look(self, num_removed: int) -> Look:
        """The cone after n > 0 removals.

        Raises:
            BudgetSpent: too few products are left.
        """
        ...

    def one_shot(self) -> Estimate:
        """Last n before -g^T c + c^T H c / 2, with the signed H, exceeds eps.

        Raises:
            BudgetSpent: too few products are left.
        """
        ...

    def minimum(self) -> Callable[[int], tuple[float, float]]:
        """N -> bounds on min_x (c - x)^T |H| (c - x) / 2 over vectors x on the kept weights.

        Raises:
            BudgetSpent: by this method or the function, where too few products are left.
        """
        ...
