"""Did the limits converge, and what should the reader know or do? A code for programs, and sentences."""

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxlimit.limits.dense_source import DENSE_DIM, dense_fits
from jaxlimit.limits.estimate import LIMITS, Estimate
from jaxlimit.limits.rises import EVERYTHING

# one_shot is refuted by a rise of the loss that exceeds the tolerance by half. On the network of the README,
# where one_shot is .002 of sparsity too high, it is a fifth.
MARGIN = 1.5
# Times machine epsilon and the loss: a rise that is rounding.
NOISE = 16.0
# A limit within this of 1 lets every weight go: it is printed as 1.0000.
EVERY = 5e-5
# Probe errors beyond so many tolerances are too large: probes are chosen for one, by an estimate of it.
SLACK = 1.5


class Code(enum.StrEnum):
    """How a computation of limits ended. Where several hold, the one that comes first here.

    Attributes:
        REFUTED: the loss itself, at the pruned weights, contradicts a limit.
        NOT_SEMIDEFINITE: a matrix that was declared semidefinite has a negative eigenvalue: limits of |H|.
        IMPRECISE: the bounds of a limit cross, or the rounding of the products alone makes its interval wider
            than the tolerance.
        UNDER_RESOLVED: a limit is wider than the tolerance.
        OUT_OF_PRODUCTS: a limit is missing, since no products were left for it.
        FEW_PROBES: the probe error of width or cone is larger than the tolerance, all else is resolved to it.
        CONVERGED: every limit is resolved to the tolerance.
        EXACT: every limit is exact but for rounding, from all eigenvalues.
    """

    REFUTED = "refuted"
    NOT_SEMIDEFINITE = "not_semidefinite"
    IMPRECISE = "imprecise"
    UNDER_RESOLVED = "under_resolved"
    OUT_OF_PRODUCTS = "out_of_products"
    FEW_PROBES = "few_probes"
    CONVERGED = "converged"
    EXACT = "exact"

    @property
    def converged(self) -> bool:
        """Whether every limit is known to the tolerance, and nothing speaks against it."""
        return self in (Code.CONVERGED, Code.EXACT)


def code_of(found: Mapping[str, Any]) -> Code:
    """The code in what `PruningLimit.to_json` returned.

    Files from before results had a code tell it by the first words of their sentence.

    Examples:
        >>> code_of({"code": "exact", "status": "..."}), code_of({"status": "under-resolved: bracket ..."})
        (<Code.EXACT: 'exact'>, <Code.UNDER_RESOLVED: 'under_resolved'>)
    """
    if "code" in found:
        return Code(found["code"])
    first_words = {"converged: exact": Code.EXACT, "converged": Code.CONVERGED}
    codes = (code for words, code in first_words.items() if found["status"].startswith(words))
    return next(codes, Code.UNDER_RESOLVED)


@dataclass(frozen=True)
class Findings:
    """What the code and its sentences rest on.

    Attributes:
        limits: those that were computed by name, None where they are missing. The width limit is always
            there, but from products it rests on a spectrum that was resolved only for width and cone.
        which: the limits that were wanted.
        rises: how much the loss itself rises where the limits lie, see `PruningLimit.rises`.
        loss: at the weights.
        loss_tolerance: eps.
        tolerance: accuracy that was wanted, in units of s.
        dim: D.
        exact: whether all eigenvalues are known.
        semidefinite: whether the matrix was declared so.
        negative_share: how far it was seen to reach below 0 nevertheless, in units of ||H||.
        num_matvecs, max_matvecs: products that were made, and their budget.
        num_probes: random probes that were asked for; None: as many as the tolerance needs.
        rounding: relative error of a product.
        reorthogonalized: whether Lanczos kept all of its vectors orthogonal.
    """

    limits: Mapping[str, Estimate | None]
    which: Sequence[str]
    rises: Mapping[str, float]
    loss: float
    loss_tolerance: float
    tolerance: float
    dim: int
    exact: bool
    semidefinite: bool
    negative_share: float
    num_matvecs: int
    max_matvecs: int
    num_probes: int | None
    rounding: float
    reorthogonalized: bool

    @property
    def definite(self) -> bool:
        """Whether the bounds were those of a semidefinite matrix."""
        return self.semidefinite and self.negative_share == 0

    @property
    def wanted(self) -> dict[str, Estimate]:
        """The limits that are printed."""
        found = {name: self.limits.get(name) for name in LIMITS if name in self.which}
        return {name: limit for name, limit in found.items() if limit is not None}

    @property
    def spectral(self) -> dict[str, Estimate]:
        """Width and cone, as far as they were wanted."""
        return {name: limit for name, limit in self.wanted.items() if name in ("width", "cone")}

    @property
    def spread(self) -> float:
        """The larger one of width and cone."""
        return max((limit.spread for limit in self.spectral.values()), default=0.0)

    @property
    def left(self) -> dict[str, float]:
        """How wide one_shot and readjusted were left, where that is too wide."""
        found = {name: x for name, x in self.wanted.items() if name in ("one_shot", "readjusted")}
        return {name: x.spread for name, x in found.items() if x.spread > self.tolerance}

    @property
    def rounding_error(self) -> float:
        """Half the widest interval that no product closes any more: rounding alone leaves it open.

        The limits of a dense matrix are whole numbers of weights, so the last one does not count.
        """
        if self.exact:
            steps = {name: 0.0 if name in self.spectral else 1 / self.dim for name in self.wanted}
            return max((x.half_bracket - steps[name] for name, x in self.wanted.items()), default=0.0)
        return max((x.half_bracket for x in self.spectral.values()), default=0.0)

    @property
    def probe_error(self) -> float:
        """The larger one of width and cone, where it is too large for the tolerance; else 0."""
        error = max((limit.probe_error for limit in self.spectral.values()), default=0.0)
        return error if error > SLACK * self.tolerance else 0.0

    @property
    def unsupported(self) -> bool:
        """Whether readjusted was wanted of |H| that is too large for a dense matrix."""
        return "readjusted" in self.which and not self.definite and not dense_fits(self.dim)

    @property
    def missing(self) -> list[str]:
        """What was wanted and could be had with more products."""
        names = [name for name in self.which if self.limits.get(name) is None]
        return [name for name in names if not (name == "readjusted" and self.unsupported)]


def counted(number: int, noun: str) -> str:
    """A number with its noun, in the plural where there are several."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def status_of(found: Findings) -> tuple[Code, str]:
    """The code of limits, and its sentences: the verdict, then one on each thing to know."""
    code, verdict = _verdict(found)
    return code, " ".join([verdict, *_remarks(found)])


def _verdict(found: Findings) -> tuple[Code, str]:
    if sentence := refutation(found):
        return Code.REFUTED, f"refuted by the loss: {sentence}"
    if found.negative_share:
        return Code.NOT_SEMIDEFINITE, (
            f"not semidefinite: an eigenvalue lies {found.negative_share:.2g} ||H|| below 0, so the loss is "
            "not convex in the outputs. The limits are of |H|. Use hessian, or a loss that is convex."
        )
    crossed = [name for name, limit in found.spectral.items() if limit.crossed]
    if crossed:
        return Code.IMPRECISE, (
            f"imprecise: the bounds of {' and '.join(crossed)} cross, so nothing is known of them. The "
            "products are less precise than they should be, not symmetric, or the data changed. Use float64, "
            "and batches that are the same each time."
        )
    if found.spread > found.tolerance or found.left:
        return Code.UNDER_RESOLVED, f"under-resolved: {_how_far(found)}{_limited(found)}"
    # Rounding widens a bracket that no product closes any more. Where bounds lag behind, the spread speaks.
    wide = found.rounding_error
    if (found.exact or found.definite) and wide > found.tolerance:
        return Code.IMPRECISE, (
            f"imprecise: the rounding of the products ({found.rounding:.1e} of ||H||) leaves the limits "
            f"uncertain by {wide:.4f}, more than the tolerance of {found.tolerance:g}. Use float64 "
            "(jax_enable_x64), or a larger tolerance."
        )
    if found.missing:
        return Code.OUT_OF_PRODUCTS, f"out of products: {_limited(found)}"
    if found.probe_error:
        return Code.FEW_PROBES, "too few probes: all else is resolved to the tolerance."
    if found.exact:
        return Code.EXACT, f"converged: exact, from all {found.dim:,} eigenvalues."
    if not found.spectral:
        resolved = f"{' and '.join(found.wanted)} resolved to the tolerance of {found.tolerance:g}."
        return Code.CONVERGED, f"converged: {resolved}"
    if found.definite:
        return Code.CONVERGED, (
            f"converged: bracket {max(wide, found.spread):.4f}, within the tolerance of {found.tolerance:g}."
        )
    return Code.CONVERGED, (
        f"converged: spread over step counts {found.spread:.4f}, within the tolerance of {found.tolerance:g}."
    )


def refutation(found: Findings) -> str:
    """What the loss itself says against the limits; empty if nothing.

    one_shot says of the pruned network as it is that its loss rises by eps; more than `MARGIN` times that
    refutes it. The others leave room for readjusting the weights that are kept, so a rise says nothing
    against them, unless no weight is kept.
    """
    # What two means over the same examples differ by for rounding alone.
    noise = NOISE * found.rounding * abs(found.loss)
    most, sentences = MARGIN * found.loss_tolerance + noise, []
    rise, without = found.rises.get("one_shot", 0.0), found.rises.get(EVERYTHING, 0.0)
    if not rise <= most:
        sentences.append(
            f"at one_shot it rises by {rise:.3g}, where at most {found.loss_tolerance:.3g} is predicted."
        )
    every = [name for name, x in found.wanted.items() if x.value >= 1 - EVERY]
    if every and not without <= most:
        sentences.append(
            f"{' and '.join(every)} would let every weight go, but then it rises by {without:.3g}."
        )
    if sentences:
        sentences.append(
            "So far from the weights it is not quadratic: take a smaller loss_tolerance, or train with an L1 "
            "term."
        )
    return " ".join(sentences)


def _how_far(found: Findings) -> str:
    """The spread, where it is too wide."""
    if found.spread <= found.tolerance:
        return ""
    kind = "bracket" if found.definite else "spread over step counts"
    return f"{kind} {found.spread:.4f} at a tolerance of {found.tolerance:g}, "


def _limited(found: Findings) -> str:
    """By what: products that were spent, or all that they can tell."""
    # A stage leaves some products to the next, which may find them too few.
    if found.num_matvecs >= found.max_matvecs // 2 or found.missing:
        return f"limited by max_matvecs = {found.max_matvecs:,}: raise it."
    return (
        f"limited by the rounding of the products ({found.rounding:.1e} of ||H||), not by their number: use "
        "float64 (jax_enable_x64), or a larger tolerance."
    )


def _remarks(found: Findings) -> list[str]:
    remarks = []
    if found.missing:
        remarks.append(f"Too few products were left for {', '.join(found.missing)}.")
    remarks += [f"{name} was left in an interval of {width:.4f}." for name, width in found.left.items()]
    if found.probe_error:
        more = (
            "raise max_matvecs, and more probes follow"
            if found.num_probes is None
            else f"use more than {counted(found.num_probes, 'probe')}"
        )
        remarks.append(
            f"The probe error {found.probe_error:.4f} exceeds the tolerance of {found.tolerance:g}: {more}."
        )
    if found.spectral and not found.exact and not found.definite:
        remarks.append("The proven interval of an indefinite Hessian is wider than its spread.")
    if found.unsupported:
        remarks.append(
            f"readjusted with |H| needs a dense matrix (at most {DENSE_DIM:,} weights): gauss_newton needs "
            "none."
        )
    if not found.reorthogonalized:
        remarks.append("Lanczos kept its first vectors only (basis_bytes), so it may take more products.")
    return remarks
