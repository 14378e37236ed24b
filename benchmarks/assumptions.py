r"""Which assumption of the theory fails, where a network was attained beyond the predicted limit?

    python benchmarks/assumptions.py --work DIR [--seeds 0] [--envelopes 0]

The limits of the Hessian assume that there is no gradient, no negative curvature, that the loss is quadratic,
and that the kept weights are as good as a random subspace. Here each is given up in turn, on the dense
matrices of the digits networks of believe.py (DIR is its folder):

    Hessian         |H|, as the paper takes it
    H+              negative curvature is flat
    H+, g           and the gradient counts
    Taylor          H with its signs, and the gradient: the second-order polynomial itself
    Gauss-Newton    the network is linear in its weights
    and g           its gradient counts, too
    kept weights    of Gauss-Newton: not a random subspace, but the kept weights
    envelope        no model: the real loss. For each sparsity the ridge a with
                        min_v L(v) + a |v - w_pruned|^2 / 2 = L(w) + eps   (L-BFGS)
                    and as many random directions as tr G (G + a)^{-1}, with G at the minimiser v

All but "kept weights" ask for random subspaces (`quadratic_models.directions`).
"""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import believe_cases
import common
import jax
import jax.numpy as jnp
import numpy as np
from believe_cases import Subject
from jax.flatten_util import ravel_pytree
from quadratic_models import Array, Quadratic, of_curvature
from scipy.optimize import brentq, minimize

import jaxlimit
from jaxlimit.core.trees import combine, partition

NAME = "assumptions"
COMMAND = f"python benchmarks/{NAME}.py --work DIR"
# Of the envelope: sparsities, ridges between which the right one is sought, steps of L-BFGS.
SPARSITIES, RIDGES, NUM_STEPS = (0.85, 0.9, 0.93, 0.95, 0.97), (1e-7, 10.0), 400
COLUMNS = ("Hessian", "H+", "H+, g", "Taylor", "Gauss-Newton", "and g", "kept weights", "envelope")


def curvature_at(subject: Subject, params: Any, name: str) -> jaxlimit.Curvature:
    """Of the prunable weights."""
    if name == "hessian":
        return jaxlimit.hessian(subject.loss, params, subject.batches)
    return jaxlimit.gauss_newton(subject.outputs, subject.loss_of, params, subject.batches)


def limits(subject: Subject, loss_tolerance: float) -> dict[str, float]:
    """The limits of all models."""
    hessian = of_curvature(curvature_at(subject, subject.params, "hessian"))
    newton = of_curvature(curvature_at(subject, subject.params, "gauss_newton"))
    newton = replace(newton, eigenvalues=np.maximum(newton.eigenvalues, 0))

    def still(model: Quadratic) -> Quadratic:
        return replace(model, gradient=0 * model.gradient)

    size = np.abs(hessian.eigenvalues)
    rising = np.argsort(size)
    absolute = replace(hessian, eigenvalues=size[rising], eigenvectors=hessian.eigenvectors[:, rising])
    positive = replace(hessian, eigenvalues=np.maximum(hessian.eigenvalues, 0))
    random = {
        "Hessian": still(absolute),
        "H+": still(positive),
        "H+, g": positive,
        "Taylor": hessian,
        "Gauss-Newton": still(newton),
        "and g": newton,
    }
    found = {name: model.cone(loss_tolerance) for name, model in random.items()}
    return found | {"kept weights": still(newton).readjusted(loss_tolerance)}


def envelope(subject: Subject, loss: float, loss_tolerance: float) -> dict[str, Any]:
    """How many directions the real loss needs at each sparsity, and the limit between."""
    weights, rest = partition(subject.params, subject.prunable)
    flat, unravel = ravel_pytree(weights)
    start = np.asarray(flat, np.float64)
    arrays = tuple(jnp.concatenate([batch[i] for batch in subject.batches]) for i in (0, 1))
    value_and_gradient = jax.jit(
        jax.value_and_grad(lambda v: subject.loss(combine(unravel(v), rest), arrays))
    )
    order, points = np.argsort(np.abs(start), kind="stable"), []
    for sparsity in SPARSITIES:
        pruned = start.copy()
        pruned[order[: int(sparsity * len(start))]] = 0

        def near(ridge: float, v: Array, pruned: Array = pruned) -> tuple[float, Array]:
            value, slope = value_and_gradient(jnp.asarray(v, jnp.float32))
            apart = v - pruned
            return float(value + ridge * (apart @ apart) / 2), np.asarray(slope, np.float64) + ridge * apart

        found = {"v": start}

        def excess(logarithm: float, near: Callable[..., Any] = near, found: dict[str, Any] = found) -> float:
            options: Any = {"maxiter": NUM_STEPS, "maxfun": 2 * NUM_STEPS, "maxcor": 20}
            lowest = minimize(
                partial(near, np.exp(logarithm)), found["v"], jac=True, method="L-BFGS-B", options=options
            )
            found["v"] = lowest.x
            return lowest.fun - loss - loss_tolerance

        low, high = np.log(RIDGES)
        if excess(high) <= 0:
            points.append({"sparsity": sparsity, "directions": 0.0})
            continue
        ridge = float(np.exp(brentq(excess, low, high, xtol=0.02)))  # pyright: ignore[reportArgumentType, reportCallIssue]
        params = combine(unravel(jnp.asarray(found["v"], jnp.float32)), rest)
        eigenvalues = np.linalg.eigvalsh(curvature_at(subject, params, "gauss_newton").dense())
        eigenvalues = np.maximum(eigenvalues, 0)
        needed = float(np.sum(eigenvalues / (eigenvalues + ridge)))
        points.append({"sparsity": sparsity, "directions": needed, "ridge": ridge})
    short = [point["directions"] / len(start) - (1 - point["sparsity"]) for point in points]
    limit = float(np.interp(0, short, SPARSITIES)) if short[0] < 0 < short[-1] else None
    return {"points": points, "sparsity": limit}


def table(networks: Mapping[str, Mapping[str, Any]]) -> str:
    """A row for each network, and the mean errors."""

    def cell(found: Mapping[str, Any], name: str) -> str:
        value = found["limits"].get(name)
        return "-" if value is None else f"{value:.3f}"

    shown = [x for x in COLUMNS if any(found["limits"].get(x) is not None for found in networks.values())]
    rows = [
        (name, f"{found['attained']:.3f}", *(cell(found, column) for column in shown))
        for name, found in networks.items()
    ]
    means = []
    for column in shown:
        known = [x for x in networks.values() if x["limits"].get(column) is not None]
        errors = [abs(x["limits"][column] - x["attained"]) for x in known]
        means.append(f"{np.mean(errors):.3f}" if errors else "-")
    return common.markdown(("network", "**attained**", *shown), [*rows, ("mean error", "", *means)])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="folder of believe.py")
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0, 1], choices=[0, 1], help="of the networks"
    )
    parser.add_argument(
        "--envelopes", nargs="*", type=int, default=[0], help="seeds whose envelope is computed"
    )
    options = parser.parse_args()
    measured = common.read_document("believe")["cases"]
    networks: dict[str, Any] = {}
    for name, make in believe_cases.subjects(["digits"], options.seeds, options.work).items():
        subject, seen, folder = make(), measured[name], options.work / name
        tolerance = seen["loss_tolerance"]
        found = common.step(folder / "assumptions.json", partial(limits, subject, tolerance))
        found = {key: found[key] for key in COLUMNS if key in found}
        networks[name] = {"attained": seen["measured"]["attained"], "limits": found}
        if subject.seed in options.envelopes:
            compute = partial(envelope, subject, seen["dense_loss"], tolerance)
            networks[name]["envelope"] = common.step(folder / "envelope.json", compute)
            found["envelope"] = networks[name]["envelope"]["sparsity"]
    common.write(NAME, {"command": COMMAND, "networks": networks}, table(networks))


if __name__ == "__main__":
    main()
