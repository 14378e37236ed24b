"""The figure of the theory page: two weights, the ellipse of tolerable loss, and the cone that it spans.

    python benchmarks/two_weights.py

draws docs/figures/two_weights.png. tests/test_theory_example.py tests the numbers of the example.
"""

import numpy as np
from common import FIGURES

from jaxlimit.plots.style import BLUE, GREY, ORANGE, new_figure

WEIGHTS = np.array([1.0, 2.0])
HESSIAN = np.array([[2.0, 1.0], [1.0, 2.0]])
TOLERANCE = 0.8


def tangents(removed: np.ndarray) -> np.ndarray:
    """(2, 2) points at which lines through the pruned weights touch the ellipse, relative to the weights.

    They are the u on the ellipse with u^T H (u + c) = 0, so that c^T H u = -2 eps.
    """
    values, vectors = np.linalg.eigh(HESSIAN)
    root = vectors * np.sqrt(values) @ vectors.T
    seen = root @ removed  # the ellipse is a circle of radius sqrt(2 eps) in these coordinates
    cosine = -np.sqrt(2 * TOLERANCE) / np.linalg.norm(seen)
    angles = np.arctan2(seen[1], seen[0]) + np.array([1, -1]) * np.arccos(cosine)
    circle = np.sqrt(2 * TOLERANCE) * np.array([np.cos(angles), np.sin(angles)])
    return (np.linalg.inv(root) @ circle).T


def main() -> None:
    """Draws the figure."""
    figure, (axes,) = new_figure(5.2, 3.6)
    pruned, removed = np.array([0.0, 2.0]), np.array([1.0, 0.0])
    values, vectors = np.linalg.eigh(HESSIAN)
    turn = np.linspace(0, 2 * np.pi, 200)
    radii = np.sqrt(2 * TOLERANCE / values)[:, None] * np.array([np.cos(turn), np.sin(turn)])
    ellipse = WEIGHTS[:, None] + vectors @ radii
    axes.fill(*ellipse, color=BLUE, alpha=0.25, label="S: loss within the tolerance")
    rays = WEIGHTS + tangents(removed) - pruned
    ends = pruned + 8 * rays / np.linalg.norm(rays, axis=1, keepdims=True)
    axes.fill(*np.array([pruned, *ends]).T, color=ORANGE, alpha=0.15, label="C: the cone that S spans")
    axes.axvline(0, color=GREY, linestyle="--", label="what is left when the first weight is zero")
    axes.plot(*WEIGHTS, "ko")
    axes.annotate("w", tuple(WEIGHTS), (6, 4), textcoords="offset points")
    axes.plot(*pruned, "ks")
    axes.annotate("w - c", tuple(pruned), (-34, -4), textcoords="offset points")
    axes.annotate("", tuple(pruned), tuple(WEIGHTS), arrowprops={"arrowstyle": "->", "color": "black"})
    axes.plot(0, 2.5, "k^")
    axes.annotate("readjusted", (0, 2.5), (-58, 2), textcoords="offset points")
    axes.set(xlim=(-1.1, 2.6), ylim=(0.4, 3.6), xlabel="first weight", ylabel="second weight", aspect="equal")
    figure.legend(loc="outside lower center", frameon=False, fontsize=8)
    figure.savefig(FIGURES / "two_weights.png", metadata={"Software": None})


if __name__ == "__main__":
    main()
