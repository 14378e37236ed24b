"""From the pieces of an experiment to numbers over seeds, and to Markdown."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from jaxlimit.limits.status import Code, code_of

# The tolerance of experiments, that of `pruning_limit`.
RESOLVED = 1e-3

Results = Mapping[str, dict[str, Any]]
Piece = Mapping[str, Any]


def by_variant(results: Results, name: str = "variant") -> dict[str, list[dict[str, Any]]]:
    """The pieces of each variant, which they hold by that name; a piece for each seed.

    Examples:
        >>> by_variant({"a": {"variant": "x", "seed": 0}, "b": {"variant": "x", "seed": 1}}).keys()
        dict_keys(['x'])
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for piece in results.values():
        found.setdefault(piece[name], []).append(piece)
    return found


def mean_and_spread(values: Iterable[float]) -> tuple[float, float]:
    """Mean, and standard deviation over the seeds (0 for one).

    Examples:
        >>> mean_and_spread([1.0, 3.0])
        (2.0, 1.4142135623730951)
    """
    array = np.array(list(values), float)
    return float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else 0.0


def cell(pieces: Sequence[Piece], of: Callable[[Piece], float | None], form: str = ".3f") -> str:
    """Mean and spread as text, one value alone; a dash where a piece has none.

    Examples:
        >>> cell([{"x": 0.5}, {"x": 0.7}], lambda piece: piece["x"], ".0%")
        '60 ± 14'
        >>> cell([{"x": 0.5}], lambda piece: piece["x"])
        '0.500'
    """
    numbers = present(map(of, pieces))
    return "-" if len(numbers) < len(pieces) else as_text(numbers, form)


def as_text(numbers: Sequence[float], form: str = ".3f") -> str:
    """Mean and spread; one value alone, which has no spread."""
    shown = mean_and_spread(numbers) if len(numbers) > 1 else numbers
    return " ± ".join(format(x, form).removesuffix("%") for x in shown)


def present(values: Iterable[float | None]) -> list[float]:
    """Those that are neither None nor NaN."""
    return [value for value in values if value is not None and not np.isnan(value)]


def limit(name: str) -> Callable[[Piece], float]:
    """Picks the value of a limit out of a piece; NaN where no product was left for it.

    Examples:
        >>> limit("cone")({"limit": {"cone": {"value": 0.9}}})
        0.9
    """

    def pick(piece: Piece) -> float:
        return piece["limit"][name]["value"] if name in piece["limit"] else np.nan

    return pick


def limit_cells(pieces: Sequence[Piece], names: Iterable[str]) -> list[str]:
    """The values of these limits as texts."""
    return [cell(pieces, limit(name)) for name in names]


def threshold_cells(pieces: Sequence[Piece]) -> list[str]:
    """The measured thresholds as texts: of the loss, and of one point of accuracy less."""
    return [cell(pieces, lambda piece, name=name: piece["measured"][name]) for name in ("loss", "accuracy")]


def over_seeds(x: ArrayLike, values: ArrayLike) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(x, means, spreads) of curves, a row for each seed.

    Examples:
        >>> over_seeds([0.0], [[1.0], [3.0]])
        (array([0.]), array([2.]), array([1.41421356]))
    """
    rows = np.asarray(values, float)
    spreads = rows.std(0, ddof=1) if len(rows) > 1 else np.zeros(rows.shape[1])
    return np.asarray(x, float), rows.mean(0), spreads


def curve(
    groups: Mapping[Any, Sequence[Piece]], x: Sequence[float], of: Callable[[Piece], float | None]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(x, means, spreads), a point for each group; groups that lack the value are left out."""
    points = []
    for at, pieces in zip(x, groups.values(), strict=True):
        found = present(map(of, pieces))
        if found:
            points.append((at, *mean_and_spread(found)))
    array = np.array(points).reshape(-1, 3)
    return array[:, 0], array[:, 1], array[:, 2]


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]], texts: int = 1) -> str:
    """A Markdown table, the first columns of texts, the others of numbers."""
    lines = [heads, ["---"] * texts + ["---:"] * (len(heads) - texts), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def unresolved(results: Any) -> str:
    """How many answers in the pieces their products did not resolve, and how far; empty if none.

    Examples:
        >>> cone = {"value": 0.8, "lower": 0.7, "upper": 0.85, "spread": 0.02}
        >>> print(unresolved({"a": {"limit": {"cone": cone, "code": "under_resolved", "status": "..."}}}))
        <BLANKLINE>
        Under-resolved, or without a product left: 1 of 1. The limits there moved by up to 0.020 of late;
        their proven intervals are up to 0.150 wide.
        <BLANKLINE>
    """

    def limits(value: Any) -> Iterator[Mapping[str, Any]]:
        if isinstance(value, Mapping):
            if "status" in value:
                yield value
            for inner in value.values():
                yield from limits(inner)
        elif isinstance(value, list):
            for inner in value:
                yield from limits(inner)

    def is_left(limit: Mapping[str, Any]) -> bool:
        if code_of(limit) is Code.REFUTED:  # which is said first, however far the products went
            spreads = [x["spread"] for x in limit.values() if isinstance(x, Mapping) and "spread" in x]
            return any(spread > RESOLVED for spread in spreads)
        return code_of(limit) in (Code.UNDER_RESOLVED, Code.OUT_OF_PRODUCTS)

    found = list(limits(results))
    left = [limit for limit in found if is_left(limit)]
    if not left:
        return ""
    parts = [
        part for limit in left for part in limit.values() if isinstance(part, Mapping) and "spread" in part
    ]
    told = f"\nUnder-resolved, or without a product left: {len(left)} of {len(found)}."
    if parts:
        spread = max(part["spread"] for part in parts)
        width = max(part["upper"] - part["lower"] for part in parts)
        told += f" The limits there moved by up to {spread:.3f} of late;\ntheir"
        told += f" proven intervals are up to {width:.3f} wide."
    return f"{told}\n"


def is_less(first: float, second: float) -> bool | None:
    """Whether first < second; None where one of them is missing, NaN.

    Examples:
        >>> is_less(1.0, 2.0), is_less(1.0, float("nan"))
        (True, None)
    """
    return None if np.isnan(first) or np.isnan(second) else bool(first < second)


def tally(holds: Sequence[bool | None]) -> str:
    """How many of how many, those left out of which nothing is known.

    Examples:
        >>> tally([True, True, False]), tally([True, None])
        ('2 of 3', '1 of 1')
    """
    known = [value for value in holds if value is not None]
    return f"{sum(known)} of {len(known)}"
