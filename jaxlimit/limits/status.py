"""Did the limits converge, and what should the reader know or do? A code for programs, and sentences."""

import enum
from collections.abc import Mapping, Sequence
from typing import Any

from jaxlimit.limits.dense_source import DENSE_DIM, dense_fits
from jaxlimit.limits.estimate import Estimate


class Code(enum.StrEnum):
    """How a computation of limits ended.

    Attributes:
        EXACT: every limit is exact, from all eigenvalues.
        CONVERGED: every limit is resolved to the tolerance.
        UNDER_RESOLVED: the products did not suffice; limits are wider than the tolerance, or missing.
    """

    EXACT = "exact"
    CONVERGED = "converged"
    UNDER_RESOLVED = "under_resolved"


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


def exact_status(dim: int) -> tuple[Code, str]:
    """Code and sentence of limits from a dense eigendecomposition."""
    return Code.EXACT, f"converged: exact, from all {dim:,} eigenvalues."


def status_of(
    limits: Mapping[str, Estimate | None],
    which: Sequence[str],
    *,
    dim: int,
    semidefinite: bool,
    tolerance: float,
    max_matvecs: int,
    reorthogonalized: bool,
) -> tuple[Code, str]:
    """The code of limits from products, and its sentences: the verdict, then one on each thing to know.

    Args:
        limits: the limits by name, None where products did not suffice. The width limit is always there, but
            rests on a spectrum that was resolved only where width or cone were wanted.
        which: the limits that were wanted.
        dim: D.
        semidefinite: whether the matrix was declared so.
        tolerance: accuracy that was wanted, in units of s.
        max_matvecs: the budget.
        reorthogonalized: whether Lanczos kept all of its vectors orthogonal.
    """
    resolved = not {"width", "cone"}.isdisjoint(which)
    spectral = [x for x in (limits["width"], limits["cone"]) if x is not None and resolved]
    spread = max((limit.spread for limit in spectral), default=0.0)
    searched = {name: limits[name] for name in ("one_shot", "readjusted")}
    left = {name: x.spread for name, x in searched.items() if x is not None and x.spread > tolerance}
    probe_error = spectral[0].probe_error if spectral else 0.0
    too_large = "readjusted" in which and not semidefinite and not dense_fits(dim)
    missing = [n for n in which if limits[n] is None and not (n == "readjusted" and too_large)]
    kind = "bracket" if semidefinite else "spread over step counts"
    code = Code.UNDER_RESOLVED if missing or left or spread > tolerance else Code.CONVERGED
    if code is Code.CONVERGED:
        sentences = [f"converged: {kind} {spread:.4f}, within the tolerance of {tolerance:g}."]
    else:
        wide = f"{kind} {spread:.4f} at a tolerance of {tolerance:g}, " if spread > tolerance else ""
        sentences = [f"under-resolved: {wide}limited by max_matvecs = {max_matvecs:,}: raise it."]
    if missing:
        sentences.append(f"Too few products were left for {', '.join(missing)}.")
    sentences += [f"{name} was left in an interval of {width:.4f}." for name, width in left.items()]
    if probe_error > 1.5 * tolerance:
        sentences.append(f"The probe error {probe_error:.4f} exceeds the tolerance: use more probes.")
    if spectral and not semidefinite:
        sentences.append("The rigorous interval of an indefinite Hessian is much wider than its spread.")
    if too_large:
        sentences.append(
            f"readjusted with |H| needs a dense matrix (at most {DENSE_DIM:,} weights): gauss_newton has an "
            "optimistic one."
        )
    if not reorthogonalized:
        sentences.append("Lanczos kept its first vectors only (basis_bytes), so it may take more products.")
    return code, " ".join(sentences)
