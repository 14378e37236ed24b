r"""How sparse a network may be so that its risk on new data is below a bound, with a stated confidence.

Networks of rising sparsity s_1 < s_2 < ... are tested one after the other, each with the hypothesis

    H_j: E[risk of network j on a new example] > bound

and a p-value at level 1 - confidence (`measuring.p_values`). The first that is not rejected ends the test.
All networks before it are certified, and with at least this confidence none of them wrongly, whatever their
number: a wrong certificate needs that the first true hypothesis in the order was rejected. (Fixed-sequence
testing: Angelopoulos et al., Learn then Test, arXiv 2110.01052; for pruning: arXiv 2408.04759.)
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxlimit.core.checks import as_real, require_problem, require_range
from jaxlimit.core.display import Displayed, View
from jaxlimit.core.trees import PyTree
from jaxlimit.measuring.p_values import METHODS
from jaxlimit.measuring.risks import ExampleRisks, Metric, require_no_nan

CALL = "certify(metric_fn, [(sparsity, params), ...], batches, bound=...)"


@dataclass(frozen=True, repr=False)
class Certificate(Displayed):
    """Up to which sparsity the risk on new data is certified to be below a bound. Prints as a table.

    Attributes:
        sparsity: largest certified; None if nothing is.
        risk: upper confidence bound of the risk at `sparsity`, from the same p-value, in the metric's units;
            None if nothing is certified. It holds for this network taken alone. Of a network that was found
            among several, what holds with `confidence` is `bound`.
        mean: mean risk observed at `sparsity`, or None.
        sparsities: (m,) of the networks that were tested: all that are certified, and the first that is not.
        means: (m,) their mean risks on the data.
        p_values: (m,) of the hypothesis that the risk is above the bound.
        num_examples: number of examples n.
        bound: what the risk is certified to be below, in the metric's units.
        confidence: with which probability, at least, such data certify no network wrongly.
        bounds: lowest and highest possible risk of an example.
        method: which p-value: "exact binomial", "Hoeffding-Bentkus" or "betting".
        needed_examples: about how many examples would certify the first network that is not certified, in
            four of five cases, if its risk is the one observed; None if none is left, or no number would do.
        status: how it ended, in a sentence, with what would help.
    """

    sparsity: float | None
    risk: float | None
    mean: float | None
    sparsities: tuple[float, ...]
    means: tuple[float, ...]
    p_values: tuple[float, ...]
    num_examples: int
    bound: float
    confidence: float
    bounds: tuple[float, float]
    method: str
    needed_examples: int | None
    status: str

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON values."""
        return {name: list(x) if isinstance(x, tuple) else x for name, x in asdict(self).items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Certificate":
        """The inverse of `to_json`.

        Raises:
            ValueError: the values are not those of a certificate.
        """
        names = {field.name for field in fields(cls)}
        if set(values) != names:
            odd = ", ".join(sorted(names ^ set(values)))
            raise ValueError(f"these are not the values of a Certificate: missing or unknown are {odd}.")
        found: dict[str, Any] = {n: tuple(x) if isinstance(x, list) else x for n, x in values.items()}
        return cls(**found)

    def _view(self) -> View:
        found = "nothing" if self.sparsity is None else f"sparsity {self.sparsity:.4f}"
        title = (
            f"Certified: {found}, for a risk of at most {self.bound:.4g} on new data "
            f"(confidence {self.confidence:.10g}, {self.num_examples:,} examples)"
        )
        rows = []
        for s, mean, p in zip(self.sparsities, self.means, self.p_values, strict=True):
            verdict = "certified" if self.sparsity is not None and s <= self.sparsity else "not certified"
            rows.append((f"{s:.4f}", f"{mean:.4g}", f"{p:.2g}", verdict))
        lower, upper = self.bounds
        notes = [f"{self.method} test; risks within [{lower:g}, {upper:g}]", f"status: {self.status}"]
        if self.sparsity is not None:
            notes.insert(0, f"upper bound of the risk at {self.sparsity:.4f}, taken alone: {self.risk:.4g}")
        return View(title, ("sparsity", "observed risk", "p-value", ""), rows, notes)


def certify(
    metric_fn: Metric,
    networks: Iterable[tuple[float, PyTree]],
    batches: Iterable[PyTree],
    *,
    bound: float,
    confidence: float = 0.95,
    bounds: tuple[float, float] = (0, 1),
    method: str | None = None,
) -> Certificate:
    """Largest sparsity at which the risk on new data is below `bound`, with this confidence.

    Cost: a forward pass over the data for each network up to the first that is not certified; betting takes
    about .02 ms an example and network beside, and as much again for `risk`. Networks are asked for one by
    one and share one compiled program. Memory: one network, a batch, and a number for each example.

    Args:
        metric_fn: `metric_fn(params, batch) -> (n,)`, the risk of each example, as "its class is wrong".
        networks: (sparsity, params) in rising sparsity; of an iterator none is kept.
        batches: `batched(...)`, a list of batches, or any re-iterable of batches: examples that are drawn
            independently, and have had no part in the making of these networks.
        bound: the largest risk allowed, within `bounds`.
        confidence: 1 - delta; .95 is the custom.
        bounds: lowest and highest risk of an example; what metric_fn returns lies within.
        method: "binomial", exact, for risks that can only be the two bounds; "betting" or
            "hoeffding_bentkus", for any. Default: binomial if bounds are two integers in succession and the
            dtype of the metric is bool or integer, for then there is no risk in between; else betting. The
            dtype decides and never the data, for that could make p-values wrong.

    The certificate takes on trust that the examples are independent draws from what the network will meet;
    that they have neither pruned, chosen nor trained it, nor stopped its training; and that the networks and
    their order do not depend on them. Betting goes through the examples in an order of its own, always the
    same: it is as good as random if nobody has arranged the data against it.

    Raises:
        ValueError: no networks, or not in rising sparsity; a bound or a confidence out of range; values that
            are not one for each example, not finite, outside `bounds`, or dependent on the rest of their
            batch; NaN in a network; a number of examples that changes; a method that is unknown, or does not
            fit the values.

    Examples:
        >>> from jaxlimit import batched
        >>> def wrong(threshold, x): return x < threshold
        >>> data = batched(np.arange(1000.0), batch_size=100)
        >>> certificate = certify(wrong, [(0.5, 10.0), (0.9, 30.0)], data, bound=0.03)
        >>> print(certificate)
        Certified: sparsity 0.5000, for a risk of at most 0.03 on new data (confidence 0.95, 1,000 examples)
          sparsity   observed risk     p-value
            0.5000            0.01     1.8e-05  certified
            0.9000            0.03        0.55  not certified
        upper bound of the risk at 0.5000, taken alone: 0.0169
        exact binomial test; risks within [0, 1]
        status: certified up to 0.5. The next network, at 0.9, has an observed risk of 0.03,
        which is not below the bound: no number of examples would certify such a risk.
    """
    require_problem(CALL, None, metric_fn=metric_fn)
    lower, upper = _ends(bounds)
    bound, confidence = _number("bound", bound), _number("confidence", confidence)
    require_range("bound", bound, lower < bound < upper, f"between the bounds, {lower:g} and {upper:g}")
    require_range("confidence", confidence, 0 < confidence < 1, "between 0 and 1, as .95")
    if method is not None and method not in tuple(METHODS):
        raise ValueError(f"method must be one of {', '.join(METHODS)}, or None; got {method!r}.")
    risks_of = ExampleRisks(metric_fn, batches, (lower, upper))
    unit_bound, level = (bound - lower) / (upper - lower), 1 - confidence

    rows, held, refused, tests = [], None, None, METHODS["betting"]
    for sparsity, params in _rising(networks):
        require_problem(CALL, params, metric_fn=metric_fn)
        require_no_nan(f"the network at {sparsity:g}", params)
        risks = risks_of(params)
        del params  # so that the next one takes its place
        tests = METHODS[method or _default_method(risks_of.dtype, lower, upper)]
        if tests is METHODS["binomial"]:
            _require_two_values(risks, lower, upper)
        p_value = tests.p_value(risks, unit_bound)
        rows.append((sparsity, lower + (upper - lower) * float(np.mean(risks)), p_value))
        if p_value > level:
            refused = risks
            break
        held = risks

    needed = None
    if refused is not None and np.mean(refused) < unit_bound:
        needed = tests.needed(refused, unit_bound, level)
    best = None if held is None else rows[-1 if refused is None else -2]
    sparsities, means, p_values = zip(*rows, strict=True)
    return Certificate(
        sparsity=None if best is None else best[0],
        risk=None if held is None else lower + (upper - lower) * tests.upper_bound(held, unit_bound, level),
        mean=None if best is None else best[1],
        sparsities=sparsities,
        means=means,
        p_values=p_values,
        num_examples=risks_of.num_examples,
        bound=bound,
        confidence=confidence,
        bounds=(lower, upper),
        method=tests.title,
        needed_examples=needed,
        status=_status(rows, refused is not None, bound, risks_of.num_examples, needed),
    )


def _status(
    rows: list[tuple[float, float, float]], refused: bool, bound: float, n: int, needed: int | None
) -> str:
    """How far the certificate goes, and what would take it further."""
    sparsity, mean, _ = rows[-1]
    if not refused:
        return f"every network is certified, up to {sparsity:g}: sparser ones can be tried."
    if len(rows) == 1:
        start = (
            f"nothing can be certified with {n:,} examples at this bound. The first network, at {sparsity:g},"
        )
    else:
        start = f"certified up to {rows[-2][0]:g}. The next network, at {sparsity:g},"
    start += f" has an observed risk of {mean:.4g},"
    if needed is not None:
        return f"{start} and about {_rounded(needed):,} examples would do, if that is its risk."
    if mean >= bound:
        return f"{start} which is not below the bound: no number of examples would certify such a risk."
    return f"{start} so near the bound that no practical number of examples would certify it."


def _rounded(count: int) -> int:
    """Up to two digits."""
    unit = 10 ** max(len(str(count)) - 2, 0)
    return -(-count // unit) * unit


def _default_method(dtype: Any, lower: float, upper: float) -> str:
    """By what values are possible, not by those that were seen."""
    whole = dtype == np.bool_ or np.issubdtype(dtype, np.integer)
    in_succession = lower == int(lower) and upper == lower + 1
    return "binomial" if whole and in_succession else "betting"


def _require_two_values(risks: NDArray[np.float64], lower: float, upper: float) -> None:
    between = (risks > 0) & (risks < 1)
    if between.any():
        raise ValueError(
            f"method='binomial' is for risks that are {lower:g} or {upper:g} and nothing else; "
            f"{between.sum():,} of {len(risks):,} examples have one in between. Leave method out: betting "
            "takes any risks."
        )


def _rising(networks: Any) -> Iterator[tuple[float, PyTree]]:
    """The networks, one after the other; those of a list are looked at before the first is handed out."""
    if isinstance(networks, Mapping) or not isinstance(networks, Iterable):
        raise ValueError(
            "networks must be pairs (sparsity, params) in rising sparsity, got a "
            f"{type(networks).__name__}: call {CALL}."
        )
    if isinstance(networks, (list, tuple)):
        for _ in _checked(networks):
            pass
    return _checked(networks)


def _checked(networks: Iterable[Any]) -> Iterator[tuple[float, PyTree]]:
    before = None
    for network in networks:
        if not isinstance(network, (tuple, list)) or len(network) != 2:
            raise ValueError(
                "networks must be pairs (sparsity, params), got among them "
                f"a {type(network).__name__}: call {CALL}."
            )
        sparsity = _number("a sparsity", network[0])
        require_range("a sparsity", sparsity, 0 <= as_real(sparsity) <= 1, "between 0 and 1")
        if before is not None and sparsity <= before:
            raise ValueError(
                f"networks must stand in rising sparsity, but {sparsity:g} comes after {before:g}. Sort "
                "them, each sparsity once; their order may not depend on these data."
            )
        yield sparsity, network[1]
        before = sparsity
    if before is None:
        raise ValueError("networks is empty: there is nothing to certify.")


def _ends(bounds: Any) -> tuple[float, float]:
    try:
        lower, upper = bounds
    except (TypeError, ValueError):
        raise ValueError(f"bounds must be two numbers, lowest and highest risk, got {bounds!r}.") from None
    lower, upper = _number("a bound of bounds", lower), _number("a bound of bounds", upper)
    require_range("bounds", bounds, lower < upper, "two numbers, of which the second is larger")
    return lower, upper


def _number(name: str, value: Any) -> float:
    found = as_real(value)
    if not np.isfinite(found):
        raise ValueError(f"{name} must be a finite number, got {value!r}.")
    return found
