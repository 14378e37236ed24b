r"""Can the limit of a network be foretold before that network is trained?

    python benchmarks/foretell.py --work DIR

Two questions of reviewers, on the digits networks of predicted_vs_measured.py (64-48-24-10):

1. *From an early checkpoint*: the limits of the network after 5, 10, 25 and 50 % of its epochs, with the
   tolerance eps of the finished one, against what was measured and attained on the finished one.
2. *At another weight of the L1 term*: from the network trained with lambda, that of lambda' is foretold as
   the minimiser of

       g^T (v - w) + (v - w)^T G (v - w) / 2 + lambda' |v|_1

   over its prunable weights v, with the gradient g and the Gauss-Newton matrix G at w. That is one run and no
   training; the limits are those of v with the same g and G, at the eps of lambda'.

Beside each stands the limit of w itself, as it is. DIR is that of believe.py: its networks, and what was
attained.
"""

import argparse
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import believe_cases
import common
import jax
import numpy as np
from predicted_vs_measured import CASES, Case, Problem
from quadratic_models import Array, Quadratic, of_curvature

import jaxlimit
from jaxlimit import training
from jaxlimit.core.trees import PyTree

NAME = "foretell"
COMMAND = f"python benchmarks/{NAME}.py --work DIR"
SHARES = (0.05, 0.1, 0.25, 0.5)
PROBES = 4  # so that Lanczos is taken
STEPS, SETTLED = 2_000, 1e-5  # of the proximal gradient method; a weight's last move


def minimiser(model: Quadratic, l1: float) -> Array:
    """The v that minimises the model with an L1 term: FISTA (Beck and Teboulle 2009)."""
    step, matrix = 1 / model.eigenvalues[-1], model.matrix
    found = before = model.weights
    for number in range(1, STEPS + 1):
        ahead = found + (number - 1) / (number + 2) * (found - before)
        moved = ahead - step * (model.gradient + matrix @ (ahead - model.weights))
        before, found = found, np.sign(moved) * np.maximum(np.abs(moved) - step * l1, 0)
        if number % 100 == 0 and np.max(np.abs(found - before)) < SETTLED:
            break
    return found


def limits(model: Quadratic, weights: Array, loss_tolerance: float) -> dict[str, float]:
    """one_shot and cone of other weights, with the same matrix."""
    slope = model.gradient + model.matrix @ (weights - model.weights)
    there = replace(model, weights=weights, gradient=slope)
    still = replace(there, gradient=0 * slope)
    return {"one_shot": there.one_shot(loss_tolerance), "cone": still.cone(loss_tolerance)}


def after(case: Case, share: float) -> PyTree:
    """The parameters after a share of the epochs; the rate is that of the whole training."""
    problem, recipe = Problem(case), case.preset.recipe
    return training.train(
        problem.loss,
        problem.initial,
        problem.train,
        jax.random.fold_in(jax.random.key(case.seed), 0),
        epochs=round(share * recipe.epochs),
        batch_size=recipe.batch_size,
        learning_rate=recipe.rate(len(problem.train[1])),
        momentum=recipe.momentum,
        l1=recipe.l1,
    )


def early(case: Case, loss_tolerance: float, work: Path) -> dict[str, Any]:
    """Limits of Gauss-Newton on the way, by the share of the epochs; 1 is the finished network."""
    subject = believe_cases.trained(case, work)
    found = {}
    for share in (*SHARES, 1.0):
        params = subject.params if share == 1 else after(case, share)
        curvature = jaxlimit.gauss_newton(subject.outputs, subject.loss_of, params, subject.batches)
        limit = jaxlimit.pruning_limit(
            curvature,
            subject.key,
            loss_tolerance=loss_tolerance,
            which=("one_shot", "cone"),
            num_probes=PROBES,
        )
        loss = jaxlimit.loss_statistics(subject.loss, params, subject.batches).mean
        limits = {name: estimate.value for name, estimate in limit.estimates().items()}
        found[f"{share:g}"] = {"loss": loss, **limits, "status": limit.status}
    return found


def elsewhere(case: Case, tolerances: Mapping[float, float], work: Path) -> dict[str, Any]:
    """The limits that one network foretells of others, by their weight of the L1 term."""
    subject = believe_cases.trained(case, work)
    model = of_curvature(
        jaxlimit.gauss_newton(subject.outputs, subject.loss_of, subject.params, subject.batches)
    )
    model = replace(model, eigenvalues=np.maximum(model.eigenvalues, 0))
    return {
        f"{l1:g}": {
            "foretold": limits(model, minimiser(model, l1), loss_tolerance),
            "unmoved": limits(model, model.weights, loss_tolerance),
        }
        for l1, loss_tolerance in tolerances.items()
    }


def tables(document: Mapping[str, Any]) -> str:
    """Of checkpoints, and of other weights of the L1 term."""
    known = document["networks"]
    shares = [f"{share:g}" for share in (*SHARES, 1.0)]
    rows = [
        (
            name,
            limit,
            *(f"{found['early'][share][limit]:.3f}" for share in shares),
            f"{found['measured'][about]:.3f}",
        )
        for name, found in known.items()
        for limit, about in ABOUT.items()
    ]
    heads = ("network", "limit", *(f"{100 * float(share):g} %" for share in shares), "**measured**")
    text = common.markdown(heads, rows)
    rows = []
    for name, found in known.items():
        for l1, values in found["elsewhere"].items():
            for limit, about in ABOUT.items():
                target = next(
                    x for x in known.values() if f"{x['l1']:g}" == l1 and x["seed"] == found["seed"]
                )
                cells = (values["foretold"][limit], values["unmoved"][limit], target["measured"][about])
                rows.append((name, f"lambda = {l1}: {limit}", *(f"{value:.3f}" for value in cells)))
    heads = ("trained", "foretold for", "foretold", "its own weights", "**measured**")
    return f"{text}\n{common.markdown(heads, rows)}"


# What each limit is compared with.
ABOUT = {"one_shot": "cut", "cone": "attained"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="folder of believe.py")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], choices=[0, 1])
    options = parser.parse_args()
    measured = common.read_document("believe")["cases"]
    networks = {}
    cases = [case for case in CASES if case.preset.name == "digits" and case.seed in options.seeds]
    for case in sorted(cases, key=Case.order):
        folder, seen = options.work / case.name, measured[case.name]
        of_seed = [
            x for x in measured.values() if x["seed"] == case.seed and x["num_weights"] == seen["num_weights"]
        ]
        tolerances = {x["l1"]: x["loss_tolerance"] for x in of_seed}
        networks[case.name] = {
            "l1": seen["l1"],
            "seed": case.seed,
            "measured": seen["measured"],
            "early": common.step(
                folder / "early.json", partial(early, case, seen["loss_tolerance"], options.work)
            ),
            "elsewhere": {
                name: value
                for name, value in common.step(
                    folder / "elsewhere.json", partial(elsewhere, case, tolerances, options.work)
                ).items()
                if isinstance(value, dict)  # the file holds its seconds, too
            },
        }
    document = {"command": COMMAND, "networks": networks}
    common.write(NAME, document, tables(document))


if __name__ == "__main__":
    main()
