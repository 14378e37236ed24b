"""The width limit when Lanczos keeps only its first vectors: how many are enough?

    python benchmarks/basis.py

One probe of the Hessian of the networks of accuracy.py, the same for every size of the basis. The truth on
digits is the exact spectrum as the probe sees it, elsewhere the longest run with the whole basis.
"""

from typing import Any

import accuracy
import common
import jax
import numpy as np

from jaxlimit.core import trees
from jaxlimit.geometry import magnitude
from jaxlimit.limits.problem import Problem
from jaxlimit.limits.width import width_limit
from jaxlimit.spectrum import lanczos
from jaxlimit.spectrum.bracket import SpectralBracket, bracket_indefinite
from jaxlimit.spectrum.measure import SpectralMeasure
from jaxlimit.spectrum.probes import rademacher

NAME = "basis"
SIZES = (None, 128, 64, 32, 0)
STEPS = (64, 128, 192, 256, 320, 384, 448)
NETWORKS = (
    accuracy.Network("digits-l1-5e-4", 1_438, {}, l1=5e-4),
    accuracy.Network("fc2-mnist", 10_000, {}),
)


def widths(network: accuracy.Network, max_basis: int | None) -> dict[str, list[float]]:
    """The limit and its spread after each of STEPS."""
    curvature = network.curvature("hessian")
    order = magnitude.magnitude_order(curvature.weights)
    state = lanczos.init(rademacher(jax.random.key(0), curvature.weights, 1))
    found: dict[str, list[float]] = {"width": [], "spread": []}
    for before, steps in zip((0, *STEPS), STEPS, strict=False):
        state = lanczos.run(curvature.matmat, state, steps - before, max_basis)
        bracket = bracket_indefinite(state.tridiagonals(), order.dim)
        limit = width_limit(bracket, Problem(order, network.loss_tolerance))
        found["width"].append(limit.value)
        found["spread"].append(limit.spread)
    return found


def exact(network: accuracy.Network) -> float:
    """The limit from the dense matrix, as the same probe sees it."""
    curvature = network.curvature("hessian")
    order = magnitude.magnitude_order(curvature.weights)
    probe = rademacher(jax.random.key(0), curvature.weights, 1)
    values, vectors = np.linalg.eigh(curvature.dense())
    weights = (trees.flatten(probe) @ vectors) ** 2
    measure = SpectralMeasure(values, weights / weights.sum(), order.dim)
    return width_limit(SpectralBracket.exact(measure), Problem(order, network.loss_tolerance)).value


def rows_of(network: accuracy.Network) -> list[dict[str, Any]]:
    """A row for each size of the basis."""
    found = [{"network": network.label, "max_basis": size, **widths(network, size)} for size in SIZES]
    truth = exact(network) if network.name.startswith("digits") else found[0]["width"][-1]
    return [row | {"truth": truth} for row in found]


def markdown_table(rows: list[dict[str, Any]]) -> str:
    """Errors of the width limit."""
    body = [
        (
            row["network"],
            "all" if row["max_basis"] is None else str(row["max_basis"]),
            *(f"{width - row['truth']:+.4f}" for width in row["width"]),
        )
        for row in rows
    ]
    return common.markdown(("network", "vectors kept", *(f"{steps} steps" for steps in STEPS)), body)


def main() -> None:
    """As typed on the command line."""
    rows = [row for network in NETWORKS for row in rows_of(network)]
    document = {"command": "python benchmarks/basis.py", "steps": STEPS, "rows": rows}
    common.write(NAME, document, markdown_table(rows))


if __name__ == "__main__":
    main()
