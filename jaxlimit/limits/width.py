r"""The width limit: the paper's, delta_width(s) / D = s with the ridge 2 eps / R(s)^2.

With c = c(s) the removed vector, R its norm and x any vector on the kept weights, the four limits solve

| limit      | equation                                        | function of s          |
|------------|-------------------------------------------------|------------------------|
| one_shot   | -g^T c + c^T H c / 2 = eps, first crossing      | not monotone           |
| width      | delta(2 eps / R^2) / D = s                      | left side falls        |
| cone       | delta(a) / D = s, a c^T H (H+a)^{-1} c = 2 eps  | crosses once in practice |
| readjusted | min_x (c - x)^T H (c - x) / 2 = eps             | left side rises        |

Each has a module. The solvers take what they need as numbers and functions, so that the same code serves a
dense eigendecomposition and Lanczos.
"""

from collections.abc import Callable

from jaxlimit.geometry.dimensions import fixed_point, last_within
from jaxlimit.limits.estimate import Estimate
from jaxlimit.limits.problem import Problem, group_share
from jaxlimit.spectrum.bracket import Bracketed, EffectiveDimension, SpectralBracket, spread

Ridge = Callable[[int], float]  # n -> a
# Standard errors by which the probe error widens [lower, upper]: 99.7 % if the error were normal.
STANDARD_ERRORS = 3.0


def width_limit(bracket: SpectralBracket, problem: Problem) -> Estimate:
    """The root of delta(2 eps / R(s)^2) / D = s.

    Args:
        bracket: of the spectral measure.
        problem: order of the weights, and eps.
    """
    return dimension_root(bracket, Bracketed.known(problem.ridge), problem)[0]


def dimension_root(
    bracket: SpectralBracket, ridge: Bracketed[Ridge], problem: Problem
) -> tuple[Estimate, float]:
    """Root of delta(a(s)) / D = s, with its bracket, probe error and spread; and to less than a weight.

    Args:
        bracket: of the spectral measure.
        ridge: n -> a, the ridge after n removals.
        problem: the sparsities that can be reached.
    """
    dim, counts = problem.dim, problem.counts

    def dimension(delta: EffectiveDimension, ridge: Ridge, standard_errors: float) -> Callable[[int], float]:
        return lambda n: delta(ridge(n)) + standard_errors * bracket.probe_error(ridge(n))

    def root(delta: EffectiveDimension, ridge: Ridge, standard_errors: float = 0.0) -> float:
        return fixed_point(dimension(delta, ridge, standard_errors), dim, counts)

    def last(delta: EffectiveDimension, ridge: Ridge, standard_errors: float = 0.0) -> float:
        return problem.sparsity(last_within(dimension(delta, ridge, standard_errors), counts))

    # A limit and its bounds are numbers of weights; their errors are finer than one.
    delta = bracket.dimension
    roots, share = delta.join(root, ridge), group_share(counts)
    half_bracket = (roots.upper - roots.lower) / 2
    if share is not None and half_bracket > -1 / dim:
        # Where bounds agree on a group, it does not matter how far apart they are within it.
        ends = delta.join(last, ridge)
        half_bracket = max(ends.upper - ends.lower, 0.0) / 2
    estimate = Estimate.between(
        last(delta.value, ridge.value),
        last(delta.lower, ridge.lower, -STANDARD_ERRORS),
        last(delta.upper, ridge.upper, STANDARD_ERRORS),
        dim,
        probe_error=(root(delta.value, ridge.value, 1) - root(delta.value, ridge.value, -1)) / 2,
        spread=spread(roots),
        half_bracket=half_bracket,
        group_share=share,
    )
    return estimate, roots.value
